//! The file that says who owns a socket's path: locked while its VM lives, with its pid.
//!
//! A lock file has a pid from its first moment, so one without is somebody else's file; and nobody removes a
//! file that is not his, by device and inode, whatever it is called.

use rustix::fs::{AtFlags, FlockOperation};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

/// The number of times that a lock file may vanish between open and lock before we give up.
const ATTEMPTS: u32 = 100;
/// Between two of them, while somebody sweeps what a dead VM left.
const SWEEP_POLL: Duration = Duration::from_millis(1);

/// A file, whatever it is called.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    pub(super) fn of(meta: &std::fs::Metadata) -> Self {
        Self { device: meta.dev(), inode: meta.ino() }
    }

    /// Whether it is what has this name now.
    fn is_at(self, path: &Path) -> bool {
        std::fs::symlink_metadata(path).is_ok_and(|there| Self::of(&there) == self)
    }
}

/// Removes a file of ours; what somebody else put in its place stays.
pub(super) fn remove(path: &Path, ours: Identity) {
    if ours.is_at(path)
        && let Err(error) = std::fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn!("cannot remove {}: {error}", path.display());
    }
}

/// Why a lock cannot be had.
#[derive(Debug)]
pub(super) enum LockError {
    /// A process has it, by its own account.
    Held(Option<u32>),
    /// The file holds something other than a pid.
    NotALock,
    /// The kernel refused.
    Io(&'static str, io::Error),
}

/// A lock file that is locked until this is closed.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
    identity: Identity,
}

impl Lock {
    /// Opens and locks the file of that name, or makes it, with our pid in it.
    pub(super) fn take(path: &Path) -> Result<Self, LockError> {
        let failed = |step| move |source| LockError::Io(step, source);
        for _ in 0..ATTEMPTS {
            let Some(file) = open(path).map_err(failed("open the lock file"))? else {
                match create(path) {
                    Ok(file) => return Self::of(file),
                    // Somebody else was faster.
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                    Err(error) => return Err(LockError::Io("create the lock file", error)),
                }
            };
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    let pid = read_pid(&file).ok().flatten();
                    // Somebody may be about to sweep away what a dead VM left.
                    if pid.is_some_and(is_dead) {
                        std::thread::sleep(SWEEP_POLL);
                        continue;
                    }
                    return Err(LockError::Held(pid));
                }
                Err(error) => return Err(LockError::Io("lock", error.into())),
            }
            let lock = Self::of(file)?;
            // The file that we locked may have been removed by a VM that just stopped; then a newer one
            // may lie there, with another owner. Only a lock on the file that has the name counts.
            if !lock.identity.is_at(path) {
                continue;
            }
            // `--socket Cargo` must not cost anyone a Cargo.lock.
            if !matches!(read_pid(&lock.file), Ok(Some(_))) {
                return Err(LockError::NotALock);
            }
            write_pid(&lock.file).map_err(|error| LockError::Io("write", error.into()))?;
            return Ok(lock);
        }
        Err(LockError::Held(None))
    }

    fn of(file: File) -> Result<Self, LockError> {
        let meta = file.metadata().map_err(|source| LockError::Io("look at", source))?;
        Ok(Self { file, identity: Identity::of(&meta) })
    }

    /// Removes the file, if it still has this name.
    pub(super) fn remove(&self, path: &Path) {
        remove(path, self.identity);
    }
}

/// Who holds a lock file: the pid in it. `None` if nobody does. Takes nothing away from anybody.
pub(super) fn holder(path: &Path) -> Option<Option<u32>> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
        Err(rustix::io::Errno::WOULDBLOCK) => Some(read_pid(&file).ok().flatten()),
        _ => None,
    }
}

/// The file of that name; `None` if there is none.
fn open(path: &Path) -> io::Result<Option<File>> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    match OpenOptions::new().read(true).write(true).custom_flags(flags).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some),
    }
}

/// Makes a lock file that is locked and has our pid before it has its name.
fn create(path: &Path) -> io::Result<File> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    let prepare = |file: &File| {
        write_pid(file)?;
        rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive)
    };
    if let Ok(file) = options.clone().custom_flags(libc::O_TMPFILE).open(dir) {
        prepare(&file)?;
        let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
        rustix::fs::linkat(rustix::fs::CWD, unnamed, rustix::fs::CWD, path, AtFlags::SYMLINK_FOLLOW)?;
        return Ok(file);
    }
    // A file system without files that have no name.
    let mut draft = path.as_os_str().to_owned();
    draft.push(format!(".{}", std::process::id()));
    let file = options.create_new(true).open(&draft)?;
    let linked = prepare(&file).map_err(io::Error::from).and_then(|()| std::fs::hard_link(&draft, path));
    std::fs::remove_file(&draft)?;
    linked.map(|()| file)
}

/// Writes our pid over what is there, at once and in the same length whatever the number: who is killed
/// meanwhile leaves a lock file behind, and no file of another kind.
fn write_pid(file: &File) -> rustix::io::Result<()> {
    let text = format!("{:<10}\n", std::process::id());
    rustix::io::pwrite(file, text.as_bytes(), 0)?;
    rustix::fs::ftruncate(file, text.len() as u64)
}

/// Whether there is no process of that number.
fn is_dead(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    pid.is_none_or(|pid| rustix::process::test_kill_process(pid) == Err(rustix::io::Errno::SRCH))
}

/// The pid in a lock file, `None` if it is empty; an error if it holds anything else.
fn read_pid(file: &File) -> io::Result<Option<u32>> {
    let mut text = [0; 32];
    let length = rustix::io::pread(file, &mut text, 0)?;
    let text = str::from_utf8(&text[..length]).map_err(io::Error::other)?;
    if text.is_empty() {
        return Ok(None);
    }
    text.trim_end().parse().map(Some).map_err(io::Error::other)
}
