//! Forks: whether this process is still the one that made an area.
//!
//! A child has copies of private memory, but none of the threads, and of shared memory nothing at all (it is not
//! inherited, for two processes that allocate from one table without knowing it would write into each other's objects).
//! A handler that every `fork` runs in the child counts; who made something remembers the count. A raw `clone` runs no
//! handlers: there, a touch of shared memory is a fault, and no more.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

static FORKS: AtomicU32 = AtomicU32::new(0);

/// The process that something was made in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Maker(u32);

impl Maker {
    /// This process.
    pub(crate) fn new() -> Self {
        static IS_REGISTERED: AtomicBool = AtomicBool::new(false);
        once_or_more(&IS_REGISTERED, || {
            // SAFETY: the handler is a function of ours that does nothing but add to an atomic. Where there is no room
            // for it forks go unnoticed, as with a raw `clone`.
            unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        });
        Self(FORKS.load(Ordering::Relaxed))
    }

    /// How many forks lie between this process and the first.
    pub(crate) fn number(self) -> u32 {
        self.0
    }

    /// Whether this process is a child of the one that made it.
    #[inline]
    pub(crate) fn is_gone(self) -> bool {
        FORKS.load(Ordering::Relaxed) != self.0
    }
}

/// Does something unless it is done. Nobody waits for a thread that does it at this moment, which may have stayed with the parent, but does
/// it as well: two handlers count a fork twice, which tells as much.
fn once_or_more(is_done: &AtomicBool, work: impl FnOnce()) {
    if !is_done.load(Ordering::Acquire) {
        work();
        is_done.store(true, Ordering::Release);
    }
}

unsafe extern "C" fn in_child() {
    // The child has this one thread.
    FORKS.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Whether `work` ends in a forked child, and comes to what is so.
    pub(crate) fn holds_in_a_child(work: impl FnOnce() -> bool) -> bool {
        // SAFETY: the child does what it is told, which takes no lock that another thread could have had, and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: ends a child that waits, by a signal.
            unsafe { libc::alarm(20) };
            let code = i32::from(!work());
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(code) };
        }
        let mut status = -1;
        // SAFETY: our child, and a place for its status.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        status == 0
    }

    #[test]
    fn a_child_that_is_forked_while_the_handler_is_registered_does_not_wait_for_that() {
        let is_done = AtomicBool::new(false);
        once_or_more(&is_done, || {
            let again = || {
                let mut done = false;
                once_or_more(&is_done, || done = true);
                done
            };
            assert!(holds_in_a_child(again));
        });
        once_or_more(&is_done, || unreachable!("it is done"));
        let ours = Maker::new();
        assert!(!ours.is_gone() && holds_in_a_child(|| ours.is_gone() && !Maker::new().is_gone()));
    }
}
