//! [`Exit`]: that the keeper ends, for threads that wait for descriptors and for those that cannot.

use rustix::event::{PollFd, PollFlags};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub(crate) struct Exit {
    is_said: AtomicBool,
    /// Never read, so that every thread sees it.
    event: EventFd,
}

impl Exit {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { is_said: AtomicBool::new(false), event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)? })
    }

    pub(crate) fn say(&self) {
        self.is_said.store(true, Ordering::Release);
        let _ = self.event.write(1);
    }

    pub(crate) fn is_said(&self) -> bool {
        self.is_said.load(Ordering::Acquire)
    }

    /// Readable from then on.
    pub(crate) fn poll_fd(&self) -> PollFd<'_> {
        // SAFETY: the eventfd is borrowed for as long, and open.
        let fd = unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) };
        PollFd::from_borrowed_fd(fd, PollFlags::IN)
    }

    /// The same for an event loop.
    pub(crate) fn raw(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl std::fmt::Debug for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exit").field("is_said", &self.is_said()).finish_non_exhaustive()
    }
}
