//! The guardian: a process that does nothing until the VMM is gone, and then restores a terminal
//! that was left raw. No code of a process that got SIGKILL can do that.
//!
//! It has the terminal and the reading end of a pipe, and no other descriptor. The VMM says over
//! the pipe whether the terminal is raw; the pipe's end is the VMM's end, however it came. It is
//! forked before there is guest memory, so that it keeps none of it, and after the fork it makes
//! nothing but system calls, so that it may be forked off any program.

use rustix::io::Errno;
use rustix::termios::{OptionalActions, Termios};
use std::io::{self, PipeReader, PipeWriter, Write};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

const COOKED: u8 = 0;
const RAW: u8 = 1;

/// The VMM's end of it. Dropping it ends the guardian.
pub(super) struct Guardian {
    pipe: PipeWriter,
}

impl Guardian {
    /// Starts it for this terminal, which was as in `saved` before we touched it, and is told `farewell` besides.
    pub(super) fn start(terminal: BorrowedFd<'_>, saved: &Termios, farewell: &[u8]) -> io::Result<Self> {
        let (read, write) = io::pipe()?;
        let before = block_all()?;
        // SAFETY: what the child does are system calls on its own copies and its own stack.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // In a session of its own nobody's Ctrl-C and no kill of the VMM's group reaches it: not even one that comes before it has
            // made its first step, on a machine that is busy.
            // SAFETY: as above.
            unsafe { libc::setsid() };
            // Only init has to reap a grandchild.
            // SAFETY: as above.
            if unsafe { libc::fork() } == 0 {
                watch(&read, terminal.as_raw_fd(), saved, farewell);
            }
            // SAFETY: it ends this process without running what the VMM has for its own end.
            unsafe { libc::_exit(0) }
        }
        let forked = if child < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
        // SAFETY: it is the mask that this thread had.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
        forked?;
        // SAFETY: the child is ours, and nobody wants to know how it ended.
        while unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) } < 0
            && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
        {}
        Ok(Self { pipe: write })
    }

    /// Says how the terminal is to be left from here on.
    pub(super) fn tell(&self, raw: bool) {
        if let Err(error) = (&self.pipe).write_all(&[if raw { RAW } else { COOKED }]) {
            log::debug!("the terminal is no longer guarded: {error}");
        }
    }
}

/// Blocks every signal on this thread; what it starts inherits that. Gives the mask before.
fn block_all() -> io::Result<libc::sigset_t> {
    // SAFETY: all zeroes is a set of signals.
    let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = unsafe { std::mem::zeroed() };
    // SAFETY: both are ours and live across the calls.
    let error = unsafe {
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before)
    };
    if error == 0 { Ok(before) } else { Err(io::Error::from_raw_os_error(error)) }
}

/// The guardian's life. Its signals are blocked, SIGTTOU too: it may change a terminal that is not
/// in front of it. Only system calls.
fn watch(pipe: &PipeReader, terminal: RawFd, saved: &Termios, farewell: &[u8]) -> ! {
    // SAFETY: system calls on descriptors of this process' own, and strings with an end.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"llfree-tty".as_ptr());
        libc::chdir(c"/".as_ptr());
        // The pipe is above 2: std keeps 0 to 2 open.
        libc::dup2(terminal, 0);
        libc::dup2(pipe.as_raw_fd(), 1);
        if libc::syscall(libc::SYS_close_range, 2, u32::MAX, 0) != 0 {
            for fd in 2..4096 {
                libc::close(fd);
            }
        }
    }
    // SAFETY: both are open to the end of this process.
    let (terminal, pipe) = unsafe { (BorrowedFd::borrow_raw(0), BorrowedFd::borrow_raw(1)) };
    let mut state = [COOKED];
    while let Ok(1..) | Err(Errno::INTR) = rustix::io::read(pipe, &mut state) {}
    if state[0] == RAW {
        // Nobody is left to tell if the terminal is gone too.
        let _ = rustix::io::write(terminal, farewell);
        let _ = rustix::termios::tcsetattr(terminal, OptionalActions::Now, saved);
    }
    // SAFETY: it ends this process without running what the VMM has for its own end.
    unsafe { libc::_exit(0) }
}
