//! [`Membarrier`]: the fence by which a thread has all others of its process fence, while theirs cost nothing.
//!
//! `membarrier(2)`, private and expedited: an interrupt of each processor that runs this process at the moment. Where the system
//! has or permits none nobody but its owner drains a handle.

use crate::fork::Maker;
use llfree::Fence;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence, fence};

/// Any is as good as another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Membarrier;

#[cfg(test)]
thread_local! {
    /// How often this thread had others fence.
    pub(crate) static HEAVY: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
}

/// Registers this process, unless it is: beside other threads that takes some ten milliseconds. Nobody waits for a thread that does so
/// at this moment, which may have stayed with the parent.
pub(crate) fn prepare() {
    /// One more than the forks between the first process and the one that is registered.
    static REGISTERED: AtomicU64 = AtomicU64::new(0);
    let this = u64::from(Maker::new().number()) + 1;
    if REGISTERED.load(Ordering::Relaxed) != this && call(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED) {
        REGISTERED.store(this, Ordering::Relaxed);
    }
}

// SAFETY: a private expedited membarrier returns when every other thread of the process passed a full fence since its call; where a
// thread ran before and after, its program's order is what the compiler's fence keeps.
unsafe impl Fence for Membarrier {
    #[inline]
    fn light(&self) {
        compiler_fence(Ordering::SeqCst);
    }

    fn heavy(&self) -> bool {
        #[cfg(test)]
        HEAVY.set(HEAVY.get() + 1);
        // Also where the call fails. It does in a process that is not registered.
        fence(Ordering::SeqCst);
        call(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED)
    }
}

fn call(command: libc::c_int) -> bool {
    // SAFETY: neither command touches memory.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
}
