//! A bare-metal guest that allocates its RAM from the frame table it shares with its host.
//!
//! This library is all of the guest's logic. It has no entry point, makes no privileged step and
//! reaches the world in three ways only: the shared region ([`Shared`]), frames that the `llfree`
//! allocator gave it, and a [`Doorbell`]. So the same code runs in the guest, where doorbell and
//! devices are pages of MMIO, and in this crate's tests, where they are functions.
//!
//! | file | what it does |
//! |---|---|
//! | `clock`, `text` | time, and messages without an allocator |
//! | `shared` | the header page as this guest sees it, and the pages of RAM |
//! | `host` | calls to the host: mailbox, doorbell, status |
//! | `reported` | which free frames the host knows to be free |
//! | `ahead` | how many frames to have installed with one call |
//! | `memory` | frames from the allocator, installed before anybody touches them |
//! | `stamp` | what tells one use of a frame from the next |
//! | `records` | which blocks a vCPU owns, kept in frames of the same allocator |
//! | `blocks` | owned blocks: stamp, check, let go |
//! | `virtio` | a device's registers and its queues |
//! | `balloon`, `mem` | the drivers of virtio-balloon and virtio-mem |
//! | `devices` | the drivers, and when they run |
//! | `samples` | where measurements are kept |
//! | `guest` | a vCPU's memory, clock and devices, as the system that commands work with |
//! | `steady` | loads whose pace shows disturbance: STREAM's triad, fixed time quanta |
//! | `agent` | the loop of one vCPU: wait for a command, obey, report |
//!
//! Each file uses files above it only. The commands that agents in all kinds of guests know are in `llfree_agent_core`.
//!
//! A page is touched only between its block's way out of the allocator *with host memory behind
//! it* and its way back: `Memory` is the only door.
#![no_std]

#[cfg(test)]
extern crate std;

mod agent;
mod ahead;
mod balloon;
mod blocks;
mod clock;
mod devices;
mod guest;
mod host;
mod mem;
mod memory;
mod records;
mod reported;
mod samples;
mod shared;
mod stamp;
mod steady;
mod text;
mod virtio;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod fake_device;

pub use agent::Agent;
pub use devices::Devices;
pub use host::{Doorbell, Host};
pub use shared::Shared;
pub use text::Text;
