//! Files that a launch leaves for others: the log, and the process id.

use super::events::Part;
use crate::background::replace;
use crate::file_kind::{must_be_regular, wait_from_now_on};
use crate::roles::LOG_FLAGS;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use llfree_control::watch::watch;
use rustix::fs::{CWD, FileType, Mode};
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// The log's file in the place of stderr, and what stderr was before.
pub(super) struct LogFile {
    path: PathBuf,
    file: OwnedFd,
    /// `None` if that is not to be kept open: somebody may wait for its end.
    before: Option<OwnedFd>,
}

impl LogFile {
    /// Opens it. Stderr stays what it is until [`enter`](Self::enter), and may be given back at the end.
    pub(super) fn open(path: &Path, gives_back: bool) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        // Asked before opening, for the name of what it is.
        if let Ok(there) = std::fs::metadata(&path)
            && !there.file_type().is_char_device()
        {
            must_be_regular(there.file_type())?;
        }
        let file = open(&path)?;
        // A slow device is waited for: what was logged so far is written at once, and must not be lost.
        wait_from_now_on(&file)?;
        let before = gives_back.then(|| io::stderr().as_fd().try_clone_to_owned()).transpose()?;
        Ok(Self { path, file, before })
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes what was logged so far, and what comes.
    pub(super) fn enter(&self, so_far: &[u8]) -> io::Result<()> {
        let mut file = std::fs::File::from(self.file.try_clone()?);
        file.write_all(so_far)?;
        replace(self.file.as_fd(), libc::STDERR_FILENO)
    }

    /// Gives stderr back, for the last words of a launch that has a terminal.
    pub(super) fn give_back(&self) {
        let Some(before) = &self.before else { return };
        if let Err(error) = replace(before.as_fd(), libc::STDERR_FILENO) {
            log::debug!("stderr stays the log: {error}");
        }
    }
}

/// A file, or a device without an end such as /dev/null: a pipe could block the thread that logs. One is not waited for here, where
/// the event loop would be. A device stays non-blocking when this is opened anew, for which the log's writer waits by itself.
fn open(path: &Path) -> io::Result<OwnedFd> {
    let file = rustix::fs::openat(CWD, path, LOG_FLAGS, Mode::from(0o640))?;
    match FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) {
        FileType::RegularFile | FileType::CharacterDevice => Ok(file),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file")),
    }
}

/// Opens the log anew at each SIGHUP, on the event loop.
pub(super) struct Reopen {
    signal: UnixStream,
    path: PathBuf,
    deaf: Option<io::Error>,
}

impl Reopen {
    pub(super) fn new(signal: UnixStream, path: &Path) -> io::Result<Self> {
        signal.set_nonblocking(true)?;
        Ok(Self { signal, path: path.to_owned(), deaf: None })
    }
}

impl Part for Reopen {
    fn take_failure(&mut self) -> Option<io::Error> {
        self.deaf.take()
    }
}

impl MutEventSubscriber for Reopen {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        let mut bytes = [0; 64];
        while matches!((&self.signal).read(&mut bytes), Ok(1..)) {}
        match open(&self.path).and_then(|file| replace(file.as_fd(), libc::STDERR_FILENO)) {
            Ok(()) => log::info!("the log goes on here"),
            Err(error) => log::warn!("the log stays where it is: cannot open {} anew: {error}", self.path.display()),
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        self.deaf = watch(ops, Events::new(&self.signal, EventSet::IN)).err();
    }
}

/// The file with this process' id, as long as it lives.
pub(super) struct PidFile(PathBuf);

impl PidFile {
    /// Writes it.
    pub(super) fn write(path: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        // Asked before opening, for the name of what it is; the file goes with the VM, as no device should.
        if let Ok(there) = std::fs::metadata(&path) {
            must_be_regular(there.file_type())?;
        }
        let mut options = OpenOptions::new();
        // And not to wait for the other end of a pipe that takes its place just then.
        options.write(true).create(true).truncate(true).mode(0o644).custom_flags(libc::O_NONBLOCK);
        let mut file = options.open(&path)?;
        must_be_regular(file.metadata()?.file_type())?;
        let written = Self(path);
        writeln!(file, "{}", std::process::id())?;
        Ok(written)
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            log::warn!("cannot remove {}: {error}", self.0.display());
        }
    }
}
