//! [`SocketError`]: why a control socket cannot be had or found.

use std::io;
use std::path::{Path, PathBuf};

/// The most bytes in a socket's path: `sun_path` holds 108, one of them the final NUL.
pub const MAX_SOCKET_PATH: usize = 107;
/// The most characters in a VM's name.
pub const MAX_NAME: usize = 64;

/// Why a control socket cannot be had or found.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A name that could not be a file name everywhere.
    #[error("'{0}' is not a VM name; use up to 64 letters, digits, '-', '_' and '.', and start with a letter or digit")]
    Name(String),
    /// Above [`MAX_SOCKET_PATH`].
    #[error("the socket path has {len} bytes, and the kernel takes at most {MAX_SOCKET_PATH}: {path}")]
    PathTooLong {
        /// Its length in bytes.
        len: usize,
        /// The path.
        path: PathBuf,
    },
    /// The directory belongs to someone else, or others may enter it.
    #[error("{path} must be a directory of user {uid} with mode 0700, but {found}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Our user id.
        uid: u32,
        /// The entry found there.
        found: String,
        /// Whether it is ours, and only open to others.
        is_ours: bool,
    },
    /// A VM with that name runs.
    #[error("a VM already listens on {path}{}", pid_text(*.pid))]
    InUse {
        /// Its socket.
        path: PathBuf,
        /// Its process, if it said so.
        pid: Option<u32>,
    },
    /// Something else has that path.
    #[error("{0} exists and is not a socket; choose another path")]
    NotASocket(PathBuf),
    /// The file with the lock file's name holds something other than a pid.
    #[error("{0} is needed as a lock file, but is a file of another kind; choose another path")]
    NotALock(PathBuf),
    /// Nobody listens there.
    #[error("no VM listens on {0}")]
    NoSuchVm(PathBuf),
    /// No VM at all.
    #[error("no VM is running{}", looked_text(.0))]
    NoneRunning(Vec<PathBuf>),
    /// No directory that a socket could be put in.
    #[error("there is no directory for the control socket: neither of {} can be used", joined(.0))]
    NoDirectory(Vec<PathBuf>),
    /// Which one?
    #[error("{} VMs are running", .0.len())]
    SeveralRunning(Vec<String>),
    /// A name that no running VM has.
    #[error("no VM is called '{name}'; {}{}", running_text(.running), looked_text(.looked))]
    UnknownName {
        /// The name.
        name: String,
        /// The names there are.
        running: Vec<String>,
        /// The directories that have none of that name.
        looked: Vec<PathBuf>,
    },
    /// A descriptor that was passed for it.
    #[error("the descriptor that was passed as control socket cannot be one: {0}")]
    Passed(&'static str),
    /// The kernel refused.
    #[error("cannot {action} {path}")]
    Io {
        /// The action tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

fn pid_text(pid: Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (pid {pid})"))
}

fn running_text(running: &[String]) -> String {
    if running.is_empty() { "none is running".to_owned() } else { format!("running VMs: {}", running.join(", ")) }
}

fn looked_text(places: &[PathBuf]) -> String {
    if places.is_empty() { String::new() } else { format!(" (looked in {})", joined(places)) }
}

fn joined(places: &[PathBuf]) -> String {
    places.iter().map(|place| place.display().to_string()).collect::<Vec<_>>().join(", ")
}

impl SocketError {
    /// Whether the VM may be about to come up: nobody is there yet.
    #[must_use]
    pub const fn is_absence(&self) -> bool {
        matches!(self, Self::NoneRunning(_) | Self::UnknownName { .. } | Self::NoSuchVm(_))
    }
}

pub(super) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SocketError {
    let path = path.to_owned();
    move |source| SocketError::Io { action, path, source }
}
