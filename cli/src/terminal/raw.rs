//! [`Terminal`]: raw mode on a terminal, and back.
//!
//! Keys reach the guest as they are typed, Ctrl-C too. What the modes were at first comes back by
//! [`Terminal::restore`], by its drop, and after any other end of the process (a panic, a forbidden
//! system call, SIGKILL) by the guardian. A terminal whose foreground is another
//! job is never touched: then its shell has set it to its own liking.

use super::guardian::Guardian;
use llfree_base::lock;
use rustix::io::Errno;
use rustix::termios::{OptionalActions, SpecialCodeIndex, Termios};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

/// A terminal that this process reads from.
pub struct Terminal {
    fd: OwnedFd,
    saved: Termios,
    guardian: Guardian,
    /// What the terminal is told when it is restored.
    farewell: Vec<u8>,
    raw: Mutex<bool>,
}

impl Terminal {
    /// Takes care of this terminal; `None` if it is none. Nothing changes before
    /// [`raw`](Self::raw). Starts the guardian: call it before there is guest memory.
    ///
    /// # Errors
    /// If the host has no descriptor or no process to give.
    pub fn open(fd: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        Self::open_screen(fd, "")
    }

    /// The same for a program that draws: besides the modes, these sequences are written to the terminal when it is
    /// restored, whoever does it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_screen(fd: BorrowedFd<'_>, farewell: &str) -> io::Result<Option<Self>> {
        // A terminal that hung up is none either.
        let Ok(saved) = rustix::termios::tcgetattr(fd) else { return Ok(None) };
        let fd = fd.try_clone_to_owned()?;
        let guardian = Guardian::start(fd.as_fd(), &saved, farewell.as_bytes())?;
        let farewell = farewell.as_bytes().to_vec();
        Ok(Some(Self { fd, saved, guardian, farewell, raw: Mutex::new(false) }))
    }

    /// Whether this process belongs to the job that the terminal is for now. Without job control
    /// it always does.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        match rustix::termios::tcgetpgrp(&self.fd) {
            Ok(foreground) => foreground == rustix::process::getpgrp(),
            Err(_) => true,
        }
    }

    /// Raw mode; nothing if the terminal is another job's. Lines that we and others print still
    /// look right, since output is processed as before.
    pub fn raw(&self) {
        let mut raw = lock(&self.raw);
        if !self.is_ours() {
            return;
        }
        let mut modes = self.saved.clone();
        modes.make_raw();
        modes.output_modes = self.saved.output_modes;
        // A read never waits, should somebody else take what was there.
        modes.special_codes[SpecialCodeIndex::VMIN] = 0;
        modes.special_codes[SpecialCodeIndex::VTIME] = 0;
        // First: a VMM killed between the two leaves the terminal as it was.
        self.guardian.tell(true);
        self.set(&modes);
        *raw = true;
    }

    /// Back to the original modes. May be called repeatedly.
    pub fn restore(&self) {
        let mut raw = lock(&self.raw);
        if !std::mem::take(&mut *raw) {
            return;
        }
        if self.is_ours() {
            // It fails where the terminal is gone.
            let _ = rustix::io::write(&self.fd, &self.farewell);
            self.set(&self.saved);
        }
        self.guardian.tell(false);
    }

    fn set(&self, modes: &Termios) {
        loop {
            match rustix::termios::tcsetattr(&self.fd, OptionalActions::Now, modes) {
                Ok(()) => return,
                Err(Errno::INTR) => {}
                Err(error) => return log::debug!("cannot change the modes of the terminal: {error}"),
            }
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.restore();
    }
}
