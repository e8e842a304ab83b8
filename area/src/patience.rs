//! [`Deadline`]: how long a descriptor is waited for. Signals interrupt a wait, and do not begin it anew.

use rustix::event::{PollFd, Timespec, poll};
use rustix::io::Errno;
use std::io;
use std::time::{Duration, Instant};

/// A moment after which nobody waits any more.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Instant);

impl Deadline {
    /// In so long.
    #[must_use]
    pub fn within(time: Duration) -> Self {
        Self(Instant::now() + time)
    }

    /// What is left until then.
    ///
    /// # Errors
    /// [`TimedOut`](io::ErrorKind::TimedOut) when nothing is.
    pub fn left(self) -> io::Result<Duration> {
        let left = self.0.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
    }

    /// Waits until one of these is ready.
    ///
    /// # Errors
    /// [`TimedOut`](io::ErrorKind::TimedOut), or what is wrong with the descriptors.
    pub fn poll(self, fds: &mut [PollFd<'_>]) -> io::Result<()> {
        loop {
            // Once at least, so that what is ready is seen however late it is.
            let left = self.0.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            match poll(fds, Some(&left)) {
                Ok(0) => drop(self.left()?),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Tries what does not block until it does something, and waits for the descriptor in between.
    ///
    /// # Errors
    /// As [`poll`](Self::poll), or those of `attempt`.
    pub fn attempt<T>(self, fd: PollFd<'_>, mut attempt: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
        let mut fds = [fd];
        loop {
            match attempt() {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.poll(&mut fds)?,
                other => return Ok(other?),
            }
        }
    }
}
