//! Why a persistent region was not formatted, opened or closed. Each error names what was found.

use crate::format::{MAGIC, REGION_ALIGN, VERSION};
use core::fmt;
use shared_layout::table::MAX_HUGE_FRAMES;

/// Why a region was not formatted; it is as it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CreateError {
    /// No memory to manage, or more than an instance may have.
    HugeFrames(u32),
    /// The region does not begin at a cache line.
    Misaligned {
        /// Its start address.
        address: usize,
    },
    /// The region has not the size for its number of huge frames.
    Length {
        /// Bytes that it has.
        bytes: usize,
        /// Bytes that it must have.
        needed: usize,
    },
    /// There is something in the region already.
    Occupied {
        /// Its first eight bytes.
        first: u64,
    },
}

impl fmt::Display for CreateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HugeFrames(n) => write!(f, "cannot manage {n} huge frames, only 1 to {MAX_HUGE_FRAMES}"),
            Self::Misaligned { address } => misaligned(f, *address),
            Self::Length { bytes, needed } => {
                write!(f, "the region has {bytes} bytes, but needs exactly {needed}: resize the file or slice the map")
            }
            Self::Occupied { first } => {
                write!(f, "the region begins with {first:#018x}: zero its first 8 bytes to format over what is there")
            }
        }
    }
}

impl core::error::Error for CreateError {}

/// Why a region was not opened; no byte of it was changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenError {
    /// Too short even for a header.
    NoHeader {
        /// Bytes of the region.
        bytes: usize,
        /// Bytes of a header.
        needed: usize,
    },
    /// The region does not begin at a cache line.
    Misaligned {
        /// Its start address.
        address: usize,
    },
    /// This is something else, or was never formatted to the end (then the magic is 0).
    Magic {
        /// The word found instead.
        found: u64,
    },
    /// A version from before this program.
    OlderVersion {
        /// Version of the region; this program's is [`VERSION`](crate::persist::VERSION).
        found: u32,
    },
    /// A version that this program does not know yet.
    NewerVersion {
        /// Version of the region; this program's is [`VERSION`](crate::persist::VERSION).
        found: u32,
    },
    /// The header claims no memory, or more than an instance may have.
    HugeFrames(u64),
    /// A word of the header does not fit the number of huge frames.
    Header {
        /// Its offset, in bytes.
        offset: usize,
        /// The value found.
        found: u64,
        /// The value expected.
        expected: u64,
    },
    /// The file was cut.
    Shorter {
        /// Bytes of the region.
        bytes: usize,
        /// Bytes that its header says.
        said: usize,
    },
    /// There is more than the header knows of.
    Longer {
        /// Bytes of the region.
        bytes: usize,
        /// Bytes that its header says.
        said: usize,
    },
    /// A word that must be zero is not.
    Reserved {
        /// Its offset, in bytes.
        offset: usize,
        /// The value found.
        found: u64,
    },
    /// Neither closed nor in use.
    State {
        /// The state in the header.
        found: u64,
    },
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoHeader { bytes, needed } => {
                write!(f, "the region has {bytes} bytes, its header alone needs {needed}: create it first")
            }
            Self::Misaligned { address } => misaligned(f, *address),
            Self::Magic { found } => {
                write!(f, "no allocator is in the region: magic {found:#018x}, expected {MAGIC:#018x}")
            }
            Self::OlderVersion { found } => {
                write!(f, "the region has the older version {found}, this program reads {VERSION}: use its own program")
            }
            Self::NewerVersion { found } => {
                write!(f, "the region has the newer version {found}, this program reads {VERSION}: update it")
            }
            Self::HugeFrames(n) => {
                write!(f, "the header claims {n} huge frames, an instance has 1 to {MAX_HUGE_FRAMES}")
            }
            Self::Header { offset, found, expected } => {
                write!(f, "the header says {found:#x} at byte {offset} where {expected:#x} fits its huge frames")
            }
            Self::Shorter { bytes, said } => {
                write!(f, "the region has {bytes} bytes, its header says {said}: it was truncated, restore the file")
            }
            Self::Longer { bytes, said } => {
                write!(f, "the region has {bytes} bytes, its header says only {said}: slice the map")
            }
            Self::Reserved { offset, found } => {
                write!(f, "the header says {found:#x} at byte {offset}, which is reserved and must be 0")
            }
            Self::State { found } => write!(f, "the region is neither in use (1) nor closed (2): its state is {found}"),
        }
    }
}

impl core::error::Error for OpenError {}

/// Why a region was not marked as closed: somebody opened it while it was open here, and both have
/// allocated from it. The table cannot be trusted; the caller must lock its file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CloseError {
    /// The generation that this instance opened.
    pub opened: u64,
    /// The generation that the region has now.
    pub found: u64,
}

impl fmt::Display for CloseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { opened, found } = self;
        write!(
            f,
            "the region was opened as generation {opened} and is now at {found}: it was opened twice, lock its file"
        )
    }
}

impl core::error::Error for CloseError {}

fn misaligned(f: &mut fmt::Formatter<'_>, address: usize) -> fmt::Result {
    write!(f, "the region begins at {address:#x}, which is not a multiple of {REGION_ALIGN}")
}
