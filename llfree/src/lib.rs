//! LLFree: a lock-free page-frame allocator whose state host and guest share.
//!
//! The state of the allocator is 2 bytes (a [`HugeEntry`]) and 512 bits a huge frame of 2 MiB. Two
//! parties work on it at once, each through a type of its own:
//!
//! * [`Tenant`] and its per-CPU handles [`Cpu`] allocate and free blocks of order 0 to 10. They
//!   need no lock and no help from the host, except for a frame that is not backed:
//!   allocating one yields an [`EvictedBlock`], which has no address until the host installed it.
//! * [`Host`] takes free huge frames with one compare-and-swap each, returns and installs them. It
//!   believes its own table R and treats every shared word as hostile.
//!
//! A [`Table`] makes both from one region of memory. From the ground up:
//!
//! | file | what it holds |
//! |---|---|
//! | `sync` | the atomics, exchanged for those of a model checker in the models |
//! | `error`, `residency`, [`class`] | values: what went wrong, what the host knows, what memory is for |
//! | `durable` | cache-line write-back, for mappings that outlive a power failure |
//! | `row`, `rows`, `taken`, `lower` | the truth: entries and bitfields, one compare-and-swap loop |
//! | `block`, `violation` | values: what an allocation yields, what is wrong with a table |
//! | `hint`, `refusal` | where to look, and where not: a word and five bits per tree, the last "out of memory" |
//! | `spot`, `steps` | where the last blocks were, and which tree comes next |
//! | [`host`] | claims, reclaim, release, install |
//! | [`tenant`] | the guest's allocator: its words, frees, upkeep of the hints |
//! | `search` | the way to the next block |
//! | [`run`] | huge frames side by side, as many as somebody wants |
//! | [`cpu`], `stats` | one CPU's handle; what a monitor asks |
//! | [`biased`] | a handle that others drain while its CPU sleeps |
//! | [`ledger`], `recorded` | what a handle of a dead process held back |
//! | [`table`] | all of it in one region |
//! | [`mod@recover`], `format`, `region_error` | repair after a crash, and a persistent region's words |
//! | [`persist`] | an allocator that outlives its process |
//!
//! One huge frame's state, and what is kept for 32 of them:
//!
//! ```text
//! entry (16 bits)        free 0-512 | longest free run, at most | huge | evicted | held
//! bitfield (8 x 64 bits) 1 = taken; a row of 64 is what a handle takes at once
//! tree (32 entries)      one word of hints, beyond 4 GiB five bits in bitmaps: what may be free, and what surely is not
//! ```
//!
//! That is less than 33,900 bytes of metadata a GiB. The crate is `no_std`, has no features and makes no
//! system call. `examples/` has a kernel's use, two processes that share a table, and an instance
//! that survives its process; `llfree-c` is the same for programs in C.
//!
//! # Interrupts
//! A [`Cpu`] takes `&mut self`: an interrupt handler must not use the handle of the code that it
//! interrupted, but may have one of its own or call the [`Tenant`], which never waits for anybody.
//!
//! # Misuse
//! No call panics, and what is wrong with it is a typed error wherever the table can tell. Two bits
//! a frame would be needed to tell the rest, which harms the caller and those whose frames it takes
//! from, but never the table itself ([`Tenant::validate`] still holds):
//!
//! * freeing a block that has a new owner by now, or one that only a CPU's handle caches: to the
//!   table both are allocated. A handle sees frames that it caches itself.
//! * freeing a part of one's own block below order 9, several that lie side by side as one, or a
//!   block of order 10 as two of order 9: that works, and frees just these frames.
//! * frames of another table: numbers fit as long as they lie in this one.
//!
//! ```
//! use core::sync::atomic::AtomicU8;
//! use llfree::{Allocation, HugeId, Initial, Order, Reclaim, Table};
//!
//! // Four huge frames (8 MiB), not backed yet.
//! const BYTES: usize = Table::bytes_for(4).unwrap();
//! #[repr(align(64))]
//! struct Region([u8; BYTES]);
//! let mut region = Region([0; BYTES]);
//! let residency = [const { AtomicU8::new(0) }; 4];
//! let table = Table::new(&mut region.0, 4, Initial::Evicted)?;
//! let (tenant, host) = (table.tenant(), table.host(&residency)?);
//!
//! // The guest takes a frame; the host backs it with memory; the guest may use it.
//! let mut cpu = tenant.cpu();
//! let Allocation::Evicted(block) = cpu.alloc(Order::BASE)? else { panic!() };
//! host.claim(block.first_huge()).expect("idle").install().expect("not held").done();
//! let block = block.confirm(&tenant).expect("installed");
//!
//! // The host cannot have that huge frame now, but any other.
//! assert!(host.claim(HugeId(0)).expect("idle").reclaim(Reclaim::Hard).is_err());
//! host.claim(HugeId(3)).expect("idle").reclaim(Reclaim::Hard).expect("free").done();
//! assert_eq!(tenant.stats().held_huge, 1);
//! cpu.free(block.frame(), block.order())?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![cfg_attr(not(any(loom, shuttle, stepping, lines)), no_std)]
#![cfg_attr(
    any(loom, shuttle, stepping, lines),
    expect(dead_code, reason = "a model uses a part of the crate and its atomics")
)]

#[cfg(test)]
extern crate std;

pub mod biased;
mod block;
pub mod class;
pub mod cpu;
#[cfg_attr(stepping, path = "../models/crash/durable.rs")]
mod durable;
mod entries;
mod error;
#[cfg(not(any(loom, shuttle)))]
mod format;
mod hint;
mod homes;
pub mod host;
mod lanes;
pub mod ledger;
mod listed;
mod lower;
mod pairs;
#[cfg(not(any(loom, shuttle)))]
pub mod persist;
mod query;
mod recorded;
#[cfg(not(any(loom, shuttle)))]
pub mod recover;
mod refusal;
#[cfg(not(any(loom, shuttle)))]
mod region_error;
mod residency;
mod row;
mod rows;
pub mod run;
mod search;
mod spot;
mod stats;
mod steps;
mod sync;
#[cfg(not(any(loom, shuttle)))]
pub mod table;
mod taken;
pub mod tenant;
#[cfg(all(test, not(any(loom, shuttle, stepping, lines))))]
mod tests;
mod vicinity;
mod violation;
mod walk;
mod warm;

// What the exchanged atomics are for; `sync` says more.
#[cfg(all(test, stepping))]
#[path = "../models/crash/mod.rs"]
mod models;
#[cfg(all(test, loom))]
#[path = "../models/loom/mod.rs"]
mod models;
#[cfg(all(test, shuttle))]
#[path = "../models/shuttle/mod.rs"]
mod models;
#[cfg(all(test, lines))]
#[path = "../models/lines/mod.rs"]
mod models;

pub use biased::{Biased, Fence, FullFence};
pub use block::{Allocation, Block, EvictedBlock};
pub use class::{Class, Policy, Rank};
pub use cpu::{Cpu, HANDLE_FRAMES};
pub use durable::WriteBack;
pub use error::{AllocError, FreeError, Part, TableError};
pub use host::{Census, Claim, Host, Installing, Reclaim, Reclaimed, Refused};
pub use ledger::{LEDGER_WORDS, Ledger};
#[cfg(not(any(loom, shuttle)))]
pub use persist::{Inspection, Persistent};
pub use recorded::Recorded;
#[cfg(not(any(loom, shuttle)))]
pub use recover::{Leaks, Recovery, recover};
#[cfg(not(any(loom, shuttle)))]
pub use region_error::{CloseError, CreateError, OpenError};
pub use residency::Residency;
pub use stats::{ORDERS, Stats};
#[cfg(not(any(loom, shuttle)))]
pub use table::{Initial, Table};
pub use tenant::Tenant;
pub use violation::{Contradiction, Violation};

// The words of the interface, so that its users need no other crate.
pub use shared_layout::table::{HELD_STAYS, HUGE_PER_TREE, MAX_HUGE_FRAMES, next_epoch};
pub use shared_layout::{
    FRAME_SIZE, FRAMES_PER_HUGE, FrameId, HUGE_SIZE, HugeEntry, HugeId, HugeRange, Order, TableLayout,
};

/// The example of the README compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
