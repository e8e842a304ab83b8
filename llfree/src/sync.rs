//! The one place atomics come from.
//!
//! The protocol files name `crate::sync` and nothing else, so that `tests/loom.rs` can compile
//! the very same files against loom's atomics and explore every interleaving.

pub(crate) use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
