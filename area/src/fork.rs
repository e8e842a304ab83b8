//! Forks: whether this process is still the one that made an area.
//!
//! A child has copies of private memory, but none of the threads, and of shared memory nothing at all (it is not
//! inherited, for two processes that allocate from one table without knowing it would write into each other's objects).
//! A handler that every `fork` runs in the child counts; who made something remembers the count. A raw `clone` runs no
//! handlers: there, a touch of shared memory is a fault, and no more.

use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

static FORKS: AtomicU32 = AtomicU32::new(0);

/// The process that something was made in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Maker(u32);

impl Maker {
    /// This process.
    pub(crate) fn new() -> Self {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            // SAFETY: the handler is a function of ours that does nothing but add to an atomic. Where there is no room
            // for it forks go unnoticed, as with a raw `clone`.
            unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        });
        Self(FORKS.load(Ordering::Relaxed))
    }

    /// Whether this process is a child of the one that made it.
    #[inline]
    pub(crate) fn is_gone(self) -> bool {
        FORKS.load(Ordering::Relaxed) != self.0
    }
}

unsafe extern "C" fn in_child() {
    // The child has this one thread.
    FORKS.fetch_add(1, Ordering::Relaxed);
}
