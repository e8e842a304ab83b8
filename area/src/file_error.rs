//! Why an area in a file was not made, opened or closed. Values and their words.

use crate::error::AreaError;
use std::io;
use std::path::PathBuf;

/// What went wrong with the file of an area.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the area in {}", path.display())]
pub struct FileError {
    /// The file.
    pub path: PathBuf,
    /// What it was.
    #[source]
    pub fault: FileFault,
}

/// The same without the file's name.
#[derive(Debug, thiserror::Error)]
pub enum FileFault {
    /// The system said no.
    #[error("it cannot be {0}")]
    Io(&'static str, #[source] io::Error),
    /// There is something of that name already, which is left as it is.
    #[error("there is a file of that name already")]
    Exists,
    /// A directory, a pipe, a device.
    #[error("it is no regular file")]
    NotAFile,
    /// Another area of this or another process lies in it at this moment. A forked child of such a process counts, until it ends or
    /// calls `exec`.
    #[error("somebody has it open as an area")]
    InUse,
    /// This is something else, or was never finished (then it begins with zeroes).
    #[error("it begins with {found:#018x}, as no area does")]
    Magic {
        /// Its first word.
        found: u64,
    },
    /// An area of another version.
    #[error("it has version {found} of the format, and this program reads version {read}")]
    Version {
        /// Its version.
        found: u32,
        /// The one that this program reads.
        read: u32,
    },
    /// A word of the header that does not fit the others.
    #[error("its header contradicts itself: at byte {offset} there is {found:#x} where {expected:#x} belongs")]
    Header {
        /// Where.
        offset: usize,
        /// What.
        found: u64,
        /// What belongs there.
        expected: u64,
    },
    /// It was cut, or something was added.
    #[error("it has {bytes} bytes where {said} belong")]
    Length {
        /// Its size.
        bytes: u64,
        /// The size that its header calls for, or that of a header.
        said: u64,
    },
    /// Its table is not what it was.
    #[error("its table cannot be used")]
    Table(#[from] llfree::OpenError),
    /// What reached the disk before the machine went down may be of different moments.
    #[error("the machine went down while it was open, or before it was on the disk; nothing in it can be relied on")]
    Torn,
    /// Memory could never go back.
    #[error("its file system cannot make holes in a file, so that no memory could go back")]
    CannotPunch(#[source] io::Error),
    /// Clones or handles of it are left.
    #[error("this process still uses it")]
    StillUsed,
    /// No area could be had, whatever lies in the file.
    #[error(transparent)]
    Area(#[from] AreaError),
}
