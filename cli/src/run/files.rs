//! Files that a launch leaves for others: the log, and the process id.

use super::events::Part;
use crate::background::replace;
use crate::file_kind::{must_be_regular, wait_from_now_on};
use crate::roles::LOG_FLAGS;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use llfree_control::watch::watch;
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
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

/// Opens what the serial line is written to. A pipe must have a reader by then: one that may never come is not waited for, but
/// the guest waits for what a reader who is there has not read yet.
pub(super) fn open_for_serial(path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    let file = match rustix::fs::open(path, flags, Mode::from(0o640)) {
        // So it is with devices that are not there and sockets, too.
        Err(Errno::NXIO) if std::fs::metadata(path)?.file_type().is_fifo() => {
            return Err(io::Error::other("nobody reads this pipe; start its reader first"));
        }
        opened => opened?,
    };
    wait_from_now_on(&file)?;
    Ok(file)
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

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{fcntl_getfl, mknodat};

    #[test]
    fn a_pipe_for_the_serial_line_needs_a_reader_and_waits_for_it_later() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pipe");
        mknodat(CWD, &path, FileType::Fifo, 0o600.into(), 0).expect("a pipe");
        let open = || open_for_serial(&path, OFlags::CREATE | OFlags::APPEND);
        let error = open().expect_err("nobody reads it").to_string();
        assert!(error.contains("nobody reads this pipe"), "{error}");
        let reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).expect("a pipe");
        let port = open().expect("somebody reads it");
        assert!(!fcntl_getfl(&port).expect("open").contains(OFlags::NONBLOCK), "no output is lost while it is full");
        rustix::io::write(&port, b"boot").expect("room");
        let mut got = [0; 8];
        assert_eq!((&reader).read(&mut got).expect("it is there"), 4);
        assert_eq!(&got[..4], b"boot");
    }
}
