//! The one place atomics come from.
//!
//! The protocol files name `crate::sync` and nothing else, so that the same files run under checkers
//! that exchange them, each behind a `cfg` of its own that no ordinary build sets: `loom` explores
//! every interleaving, `shuttle` long random ones, `stepping` ends a run before each change of
//! memory. `models/` has the checks, and a package for each that builds the crate so.

#[cfg(loom)]
#[path = "../models/loom/sync.rs"]
mod atomic;
#[cfg(shuttle)]
use shuttle::sync::atomic;
#[cfg(stepping)]
#[path = "../models/crash/sync.rs"]
mod atomic;
#[cfg(not(any(loom, shuttle, stepping)))]
use core::sync::atomic;

pub(crate) use atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
#[cfg(stepping)]
pub(crate) use atomic::{fence, power_off, power_on, run_until, write_back};
