//! The one place atomics come from.
//!
//! The protocol files name `crate::sync` and nothing else, so that the same files run under checkers
//! that exchange them, each behind a `cfg` of its own that no ordinary build sets: `loom` explores
//! every interleaving, `shuttle` long random ones, `stepping` ends a run before each change of
//! memory, `lines` counts the cache lines that change hands. `models/` has the checks, and a package for each that builds the crate so.

#[cfg(loom)]
#[path = "../models/loom/sync.rs"]
mod atomic;
#[cfg(shuttle)]
use shuttle::sync::atomic;
#[cfg(stepping)]
#[path = "../models/crash/sync.rs"]
mod atomic;
#[cfg(lines)]
#[path = "../models/lines/sync.rs"]
mod atomic;
#[cfg(not(any(loom, shuttle, stepping, lines)))]
use core::sync::atomic;

pub(crate) use atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
#[cfg(stepping)]
pub(crate) use atomic::{fence, power_off, power_on, run_until, write_back};

#[cfg(lines)]
pub(crate) use atomic::{on_core, take_fetched};

use core::sync::atomic::compiler_fence;
#[cfg(not(loom))]
use core::sync::atomic::fence as any_fence;

/// Orders a read-modify-write before the loads that follow, as `fence(SeqCst)` does: of two parties
/// that each change a word and then look at the other's, one sees the other's change.
#[inline]
pub(crate) fn change_before_looks() {
    // On x86-64 such a change is a locked instruction, and that is the fence: the compiler alone is told.
    #[cfg(all(not(loom), target_arch = "x86_64", not(miri)))]
    compiler_fence(Ordering::SeqCst);
    #[cfg(all(not(loom), any(not(target_arch = "x86_64"), miri)))]
    any_fence(Ordering::SeqCst);
    #[cfg(loom)]
    loom::sync::atomic::fence(Ordering::SeqCst);
}

/// Keeps the compiler from moving memory accesses past it: a process that is killed did all that came before in its program.
#[inline]
pub(crate) fn in_program_order() {
    compiler_fence(Ordering::SeqCst);
}

/// Orders all that comes before it before all that comes after, among all who do so.
#[inline]
pub(crate) fn full_fence() {
    #[cfg(loom)]
    loom::sync::atomic::fence(Ordering::SeqCst);
    #[cfg(not(loom))]
    any_fence(Ordering::SeqCst);
}

/// Memory that two parties have one after the other. A model checker sees if they do not.
#[cfg(loom)]
pub(crate) use loom::cell::UnsafeCell;

#[cfg(not(loom))]
pub(crate) struct UnsafeCell<T>(core::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> UnsafeCell<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(core::cell::UnsafeCell::new(value))
    }

    #[inline]
    pub(crate) fn with_mut<R>(&self, work: impl FnOnce(*mut T) -> R) -> R {
        work(self.0.get())
    }
}
