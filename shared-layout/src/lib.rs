//! The ABI between a host and a guest that share a page-frame allocator's state.
//!
//! This crate is bytes only: where each word lies, who may write it and what its bits mean.
//! It holds no algorithm and touches no memory; `llfree` does the work over these bytes, the
//! VMM and the guest merely agree through them. Everything here is `no_std` and has no Cargo
//! features, so that nothing in a workspace can pull `std` into a guest.
//!
//! | file | what it fixes |
//! |---|---|
//! | [`units`] | frame sizes, [`FrameId`], [`HugeId`], [`HugeRange`], [`Order`] |
//! | [`entry`] | [`HugeEntry`], 16 bits a huge frame, and its named transitions |
//! | [`table`] | where the parts of a table lie in a region: all that an allocator without a VMM needs |
//! | [`header`] | magic, version, geometry, and the words that the host updates |
//! | [`mailbox`] | one request half and one reply half a vCPU |
//! | [`call`] | what a guest asks of its host, one enum, and the doorbell that rings it |
//! | [`devices`] | the window of virtio-mmio pages, and what we add to the virtio standard |
//! | [`agent`] | what a host asks of the test guest, carried by [`Call::Wait`] |
//! | [`channel`] | the same as frames on a byte stream, for agents that are programs in a guest |
//!
//! The shared region, from low to high addresses, each part page aligned:
//!
//! ```text
//! +--------+-----------+--------------+--------------------+-------------+
//! | header | mailboxes | huge entries | bitfields          | tenant area |
//! | 4 KiB  | 512 B/vCPU| 2 B/2 MiB    | 64 B/2 MiB         | 42 B/GiB    |
//! +--------+-----------+--------------+--------------------+-------------+
//! ```
#![no_std]

#[cfg(test)]
extern crate std;

pub mod agent;
pub mod call;
pub mod channel;
pub mod devices;
pub mod entry;
pub mod header;
pub mod mailbox;
pub mod table;
pub mod units;

pub use call::{Call, Request, Status};
pub use entry::HugeEntry;
pub use header::{ControlWord, Header, Layout};
pub use table::TableLayout;
pub use units::{FRAME_SIZE, FRAMES_PER_HUGE, FrameId, HUGE_SIZE, HugeId, HugeRange, Order};

// The words are shared as they are; a big-endian party would read them backwards.
const _: () = assert!(cfg!(target_endian = "little"));
const _: () = assert!(size_of::<usize>() == 8);
