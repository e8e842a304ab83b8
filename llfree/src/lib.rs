//! LLFree: a lock-free page-frame allocator whose state host and guest share.
//!
//! The state of the allocator is 2 bytes (a [`HugeEntry`](shared_layout::HugeEntry)) and 512 bits
//! a huge frame of 2 MiB. Two parties work on it at once, each through a type of its own:
//!
//! * [`Tenant`] and its per-CPU handles [`Cpu`] allocate and free blocks of order 0 to 10. They
//!   need no lock and no help from the host, save for a frame that has nothing behind it:
//!   allocating one yields an [`EvictedBlock`], which has no address until the host installed it.
//! * [`Host`] takes free huge frames with one compare-and-swap each, returns and installs them. It
//!   believes its own table R and treats every shared word as hostile.
//!
//! | file | what it holds |
//! |---|---|
//! | `lower` | the truth: entries and bitfields, one compare-and-swap loop |
//! | `hint`, `search` | where to look: a word and five bits per tree |
//! | [`class`] | what memory is for, and which trees may serve it |
//! | [`tenant`], [`cpu`] | the guest's allocator on top of these |
//! | [`host`] | claims, reclaim, release, install |
//! | [`persist`], [`mod@recover`] | an allocator that outlives its process, and its repair after a crash |
//! | `durable` | cache-line write-back, for mappings that outlive a power failure |
//! | `sync` | the atomics, exchanged for loom's in the model checks |
//!
//! One huge frame's state, and what is kept for 32 of them:
//!
//! ```text
//! entry (16 bits)        free 0-512 | huge | evicted | held
//! bitfield (8 x 64 bits) 1 = taken; a row of 64 is what a handle takes at once
//! tree (32 entries)      one word of hints, five bits in bitmaps: where to look, never the truth
//! ```
//!
//! That is less than 33,900 bytes of metadata a GiB. The crate is `no_std`, has no features and makes no
//! system call. `examples/` has a kernel's use, two processes that share a table, and an instance
//! that survives its process.
//!
//! # Misuse
//! No call panics, and what is wrong with it is a typed error wherever the table can tell. Two bits
//! a frame would be needed to tell the rest, which harms the caller and whoever he takes frames
//! from, but never the table itself ([`Tenant::validate`] still holds):
//!
//! * freeing a block that has a new owner by now, or one that only a CPU's handle caches: to the
//!   table both are allocated. A handle sees frames that it caches itself.
//! * freeing a part of one's own block below order 9, several that lie side by side as one, or a
//!   block of order 10 as two of order 9: that works, and frees just these frames.
//! * frames of another table: numbers fit as long as they lie in this one.
//!
//! ```
//! use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU64};
//! use llfree::{Allocation, Host, Reclaim, Tenant};
//! use shared_layout::{HugeEntry, HugeId, Order};
//!
//! // Four huge frames (8 MiB), nothing behind them yet.
//! let entries = [const { AtomicU16::new(HugeEntry::FREE_EVICTED.bits()) }; 4];
//! let rows = [const { AtomicU64::new(0) }; 32];
//! let hints = [const { AtomicU16::new(0) }; Tenant::hint_len(4)];
//! let summary = [const { AtomicU64::new(0) }; Tenant::summary_len(4)];
//! let epoch = AtomicU64::new(0);
//! let residency = [const { AtomicU8::new(0) }; 4];
//! let tenant = Tenant::new(&entries, &rows, &hints, &summary, &epoch).expect("lengths fit");
//! tenant.recount();
//! let host = Host::new(&entries, &residency).expect("lengths fit");
//!
//! // The guest takes a frame; the host puts memory behind it; the guest may use it.
//! let mut cpu = tenant.cpu();
//! let Allocation::Evicted(block) = cpu.alloc(Order::BASE).expect("free") else { panic!() };
//! host.claim(block.first_huge()).expect("idle").install().expect("not held").done();
//! let block = block.confirm(&tenant).expect("installed");
//!
//! // The host cannot have that huge frame now, but any other.
//! assert!(host.claim(HugeId(0)).expect("idle").reclaim(Reclaim::Hard).is_err());
//! host.claim(HugeId(3)).expect("idle").reclaim(Reclaim::Hard).expect("free").done();
//! assert_eq!(tenant.stats().held_huge, 1);
//! cpu.free(block.frame(), block.order()).expect("ours");
//! ```
#![no_std]

#[cfg(test)]
extern crate std;

pub mod class;
pub mod cpu;
mod durable;
mod error;
mod hint;
pub mod host;
mod lower;
pub mod persist;
pub mod recover;
mod region_error;
mod row;
mod search;
mod stats;
mod sync;
pub mod tenant;
#[cfg(test)]
mod tests;
mod violation;

pub use class::{Class, Policy, Rank};
pub use cpu::{Cpu, HANDLE_FRAMES};
pub use durable::WriteBack;
pub use error::{AllocError, FreeError};
pub use host::{Census, Claim, Host, Installing, Reclaim, Reclaimed, Refused, Residency};
pub use persist::{Inspection, Persistent};
pub use recover::{Leaks, Recovery, recover};
pub use region_error::{CloseError, CreateError, OpenError};
pub use stats::{ORDERS, Stats};
pub use tenant::{Allocation, Block, EvictedBlock, Tenant};
pub use violation::{Contradiction, Violation};

/// The example of the README compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
