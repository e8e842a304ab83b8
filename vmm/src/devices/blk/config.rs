//! [`DiskConfig`]: what `--disk` says, and every reason to refuse it.
//!
//! Nothing here changes a file. What two disks of one VM must not share is found by
//! [`check_disks`]; what two processes must not share, by the locks of [`super::file`].

use llfree_base::units::shorten;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::str::FromStr;
use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

/// The most disks of one VM.
pub const MOST_DISKS: usize = 8;
/// Bytes of a serial number, by the standard.
pub const SERIAL_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// A disk, as `--disk PATH[,ro][,serial=TEXT]` describes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskConfig {
    /// A raw image, or a block device.
    pub path: PathBuf,
    /// The guest must not write.
    pub read_only: bool,
    /// The name that the guest sees, e.g. in `/dev/disk/by-id`; at most [`SERIAL_BYTES`].
    pub serial: Option<String>,
}

/// Why a text is not a [`DiskConfig`].
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DiskConfigError {
    /// Nothing before the first comma.
    #[error("a disk needs the path of a raw image or of a block device: PATH[,ro][,serial=TEXT]")]
    NoPath,
    /// No such option.
    #[error("'{0}' is not an option of a disk; the options are ro and serial=TEXT, and a path cannot contain a comma")]
    Option(String),
    /// An option that was set before.
    #[error("'{0}' is set twice")]
    Twice(&'static str),
    /// Not fit for a guest's device names.
    #[error(
        "'{0}' is not a serial number; one has 1 to {SERIAL_BYTES} letters or digits of ASCII, or any of '-', '_' and \
         '.'"
    )]
    Serial(String),
}

impl FromStr for DiskConfig {
    type Err = DiskConfigError;

    fn from_str(text: &str) -> Result<Self, DiskConfigError> {
        let mut parts = text.split(',');
        let path = parts.next().filter(|path| !path.is_empty()).ok_or(DiskConfigError::NoPath)?;
        let mut disk = Self { path: PathBuf::from(OsStr::new(path)), read_only: false, serial: None };
        for option in parts {
            match option.split_once('=') {
                None if option == "ro" => {
                    if disk.read_only {
                        return Err(DiskConfigError::Twice("ro"));
                    }
                    disk.read_only = true;
                }
                Some(("serial", serial)) => {
                    if disk.serial.is_some() {
                        return Err(DiskConfigError::Twice("serial"));
                    }
                    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
                    if serial.is_empty() || serial.len() > SERIAL_BYTES || !serial.chars().all(plain) {
                        return Err(DiskConfigError::Serial(shorten(serial)));
                    }
                    disk.serial = Some(serial.to_owned());
                }
                _ => return Err(DiskConfigError::Option(shorten(option))),
            }
        }
        Ok(disk)
    }
}

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// No such file.
    #[error("the disk {path} does not exist; an empty one comes from 'truncate -s 4G FILE'", path = path.display())]
    Missing {
        /// As given.
        path: PathBuf,
    },
    /// A directory, a pipe and so on.
    #[error("the disk {path} is {what}; it must be a raw image or a block device", path = path.display())]
    Kind {
        /// As given.
        path: PathBuf,
        /// The kind of file found.
        what: &'static str,
    },
    /// Nothing in it.
    #[error("the disk {path} has a size of zero; 'truncate -s 4G FILE' gives it one", path = path.display())]
    Empty {
        /// As given.
        path: PathBuf,
    },
    /// Not whole sectors.
    #[error(
        "the disk {path} has {bytes} bytes, which is not a multiple of 512; only raw images are disks \
         ('qemu-img convert -O raw' makes one)",
        path = path.display()
    )]
    Size {
        /// As given.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// It cannot be written, though perhaps read.
    #[error(
        "the disk {path} cannot be opened for writing; add ,ro if the guest need only read it, or change its \
         permissions",
        path = path.display()
    )]
    NotWritable {
        /// As given.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Anything else.
    #[error("the disk {path} cannot be opened", path = path.display())]
    Open {
        /// As given.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Another process has it locked.
    #[error(
        "the disk {path} is in use by another process; end that, or, if neither need write, give it to both with ,ro",
        path = path.display()
    )]
    Locked {
        /// As given.
        path: PathBuf,
    },
    /// Two disks of one VM.
    #[error(
        "the disks {first} and {second} are the same file, and the guest could write to it; leave one out, \
         or add ,ro to both",
        first = first.display(),
        second = second.display()
    )]
    Twice {
        /// As given.
        first: PathBuf,
        /// As given.
        second: PathBuf,
    },
    /// More than a VM can have.
    #[error("{0} disks are too many; a VM has at most {MOST_DISKS}")]
    TooMany(usize),
}

/// Checks what the disks of one VM must not have in common. [`super::Blk::open`] checks each for itself.
///
/// # Errors
/// Too many, the same file twice if one of the two may write, or a file that is not there.
pub fn check_disks(disks: &[DiskConfig]) -> Result<(), DiskError> {
    if disks.len() > MOST_DISKS {
        return Err(DiskError::TooMany(disks.len()));
    }
    let mut seen: Vec<(&DiskConfig, (u64, u64))> = Vec::new();
    for disk in disks {
        let metadata = fs::metadata(&disk.path).map_err(|error| disk.cannot_open(error))?;
        let file = (metadata.dev(), metadata.ino());
        let same = seen.iter().find(|(other, id)| *id == file && !(disk.read_only && other.read_only));
        if let Some((other, _)) = same {
            return Err(DiskError::Twice { first: other.path.clone(), second: disk.path.clone() });
        }
        seen.push((disk, file));
    }
    Ok(())
}

impl DiskConfig {
    /// The error for a refusal of the kernel to open it.
    pub(super) fn cannot_open(&self, source: io::Error) -> DiskError {
        let path = self.path.clone();
        match source.kind() {
            io::ErrorKind::NotFound => DiskError::Missing { path },
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::ExecutableFileBusy
                if !self.read_only =>
            {
                DiskError::NotWritable { path, source }
            }
            _ => DiskError::Open { path, source },
        }
    }
}
