//! A launch in the background: `--detach` forks, and the caller ends when the VM answers.
//!
//! The fork is the first act of the process, before there is a second thread. Until the VM is up, the launch
//! has the caller's terminal: warnings and errors go where those of any command go, and Ctrl-C ends both. Then
//! it leaves: a session of its own, nothing open that is the caller's. A pipe tells the caller, which
//! prints that the VM is up; a launch that ends without that word has said why itself, and its exit code is
//! the caller's.

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

/// First byte of what the launch says: it has left the terminal, so an end from here on is silent.
const LEFT: u8 = b'l';
/// The second: the VM is up, and the rest is for the caller to print.
const UP: u8 = b'u';

/// Which process this is after the fork.
pub enum Side {
    /// The one that was called: it ends with this exit code, after it has printed what `Caller` has to say.
    Caller(CallerEnd),
    /// The one that launches the VM.
    Launch(Background),
}

/// What the caller is to print, and how to exit.
pub struct CallerEnd {
    /// For stdout.
    pub words: Vec<u8>,
    /// The launch ended after it had left the terminal, and could not say why.
    pub is_silent: bool,
    /// The exit code.
    pub code: u8,
}

/// The way from the launch to its caller.
pub struct Background {
    pipe: PipeWriter,
}

/// Forks. The caller's side returns when the VM is up, or the launch has ended.
///
/// # Errors
/// The host has no process or no descriptor to give.
pub fn fork() -> io::Result<Side> {
    let (read, write) = io::pipe()?;
    // SAFETY: there is one thread, so the child is a whole copy of the process.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(read);
            Ok(Side::Launch(Background { pipe: write }))
        }
        child => {
            drop(write);
            Ok(Side::Caller(wait_for(read, child)))
        }
    }
}

fn wait_for(mut launch: PipeReader, child: libc::pid_t) -> CallerEnd {
    let mut said = Vec::new();
    // What cannot be read was not said.
    let _ = launch.read_to_end(&mut said);
    match said.split_first_chunk() {
        Some(([LEFT, UP], words)) => CallerEnd { words: words.to_vec(), is_silent: false, code: 0 },
        _ => CallerEnd { words: Vec::new(), is_silent: !said.is_empty(), code: exit_code(child) },
    }
}

/// The exit code of a child that ends now, as a shell would say it.
fn exit_code(child: libc::pid_t) -> u8 {
    let mut status = 0;
    // SAFETY: the child is ours, and `status` has room for the answer.
    while unsafe { libc::waitpid(child, &raw mut status, 0) } < 0 {
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return 1;
        }
    }
    let code = if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 128 + libc::WTERMSIG(status) };
    u8::try_from(code).unwrap_or(1)
}

impl Background {
    /// Leaves the caller's session and its descriptors; `log` takes the place of stderr.
    ///
    /// # Errors
    /// The host refuses a step, or the caller is gone: then nobody wants the VM.
    pub fn leave(&self, log: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let nowhere = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        // It fails for the leader of a process group, which a child that was just forked is not.
        rustix::process::setsid()?;
        replace(nowhere.as_fd(), libc::STDIN_FILENO)?;
        replace(nowhere.as_fd(), libc::STDOUT_FILENO)?;
        replace(log.unwrap_or(nowhere.as_fd()), libc::STDERR_FILENO)?;
        (&self.pipe).write_all(&[LEFT])
    }

    /// The VM is up: has the caller print these words and end.
    ///
    /// # Errors
    /// The caller is gone: then nobody wants the VM.
    pub fn is_up(self, words: &str) -> io::Result<()> {
        // Less than a pipe holds: it does not block.
        (&self.pipe).write_all(&[&[UP], words.as_bytes()].concat())
    }
}

/// Puts a descriptor in the place of one of the first three.
pub(crate) fn replace(by: BorrowedFd<'_>, place: libc::c_int) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    loop {
        // SAFETY: the first three descriptors are nobody's in particular: who writes there writes to whatever
        // they are.
        if unsafe { libc::dup3(by.as_raw_fd(), place, 0) } >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(Errno::INTR.raw_os_error()) {
            return Err(error);
        }
    }
}
