//! [`Membarrier`]: the fence by which a thread has all others of its process fence, while theirs cost nothing.
//!
//! `membarrier(2)`, private and expedited: an interrupt of each processor that runs this process at the moment. Where the system
//! has or permits none nobody but its owner drains a handle.

use llfree::Fence;
use std::sync::OnceLock;
use std::sync::atomic::{Ordering, compiler_fence};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Membarrier;

// SAFETY: a private expedited membarrier returns when every other thread of the process passed a full fence since its call; where a
// thread ran before and after, its program's order is what the compiler's fence keeps.
unsafe impl Fence for Membarrier {
    #[inline]
    fn light(&self) {
        compiler_fence(Ordering::SeqCst);
    }

    fn heavy(&self) -> bool {
        static IS_REGISTERED: OnceLock<bool> = OnceLock::new();
        // Also where it fails.
        std::sync::atomic::fence(Ordering::SeqCst);
        *IS_REGISTERED.get_or_init(|| call(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED))
            && call(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED)
    }
}

fn call(command: libc::c_int) -> bool {
    // SAFETY: neither command touches memory.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
}
