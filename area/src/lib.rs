//! Memory of a process whose free part goes back to the system without anybody asking for it.
//!
//! An [`Area`] is address space with an `llfree` table beside it. Threads allocate and free through [`Handle`]s, with
//! atomics and without a system call; the area's monitor sees in the same table what is free, takes what stays so, and
//! leaves a mark; the next allocation prefers frames without the mark. [`Objects`](objects::Objects) puts size classes
//! and thread caches on top, for buffers from 64 KiB to all of the area.
//!
//! ```
//! use llfree_area::{Area, Order};
//!
//! let area = Area::builder().size(64 << 20).build()?;
//! let mut handle = area.handle();
//! let block = handle.alloc(Order::HUGE)?;
//! // SAFETY: the block is ours, and as large as this.
//! unsafe { block.as_ptr().write_bytes(7, block.bytes()) };
//! handle.free(block)?;
//! area.reclaim(u64::MAX)?;
//! assert_eq!(area.status()?.resident_bytes, 0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | [`area`] | the area, its builder, handles of threads |
//! | [`block`], [`error`] | what an allocation yields, and why it may not |
//! | [`objects`] | large objects: classes, caches, typed regions |
//! | `raw` | frames by address and layout, for allocators of others |
//! | `hand` | one thread's access to the table |
//! | `membarrier` | a fence that costs one side nothing: how what sleeping threads keep is drained |
//! | `space` | memory and table, mapped; kinds of memory |
//! | [`reclaimer`] | the monitor, and its thread |
//! | [`tier`], `collections` | on top: a global allocator, and the `Allocator` trait of allocator-api2 |
//! | [`once`] | a value that nobody waits for, as allocators need it |
//! | [`link`], [`wire`] | an area registered with a process that takes memory back; the words for that |
//! | [`patience`] | how long a descriptor is waited for |
//! | [`foreign`] | the area of another process, for who takes memory from it |
//! | [`mod@file`], [`file_error`] | table and memory in a file that outlives its process |
//! | `fork` | whether this is still the process that made the area |

pub mod area;
pub mod block;
#[cfg(feature = "allocator-api2")]
mod collections;
pub mod error;
pub mod file;
pub mod file_error;
pub mod foreign;
mod fork;
mod hand;
pub mod link;
mod membarrier;
pub mod objects;
pub mod once;
pub mod patience;
mod raw;
pub mod reclaimer;
mod roles;
mod space;
pub mod tier;
pub mod wire;

pub use area::{Area, Builder, Handle, Opened};
pub use block::Block;
pub use error::{AllocError, AreaError, FreeError};
pub use file::NamedFile;
pub use file_error::{FileError, FileFault};
pub use foreign::{AdoptError, ForeignArea};
pub use link::{RegisterError, Registered};
pub use llfree_base::choices::{Settings, Switch};
pub use reclaimer::Status;
pub use shared_layout::Order;
pub use space::{MemoryKind, Shared};
pub use tier::Tier;
