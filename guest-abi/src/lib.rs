//! The contract between a guest and its VMM besides the frame table.
//!
//! Bytes only, as in [`shared_layout`], which a tenant without a VMM links alone: where each word lies,
//! who may write it and what its bits mean. `no_std`, and without Cargo features, so that nothing in a
//! workspace can pull `std` into a guest.
//!
//! | file | what it fixes |
//! |---|---|
//! | [`header`] | magic, version, geometry, and the words that the host updates |
//! | [`mailbox`] | one request half and one reply half a vCPU |
//! | [`call`] | what a guest asks of its host, one enum, and the doorbell that rings it |
//! | [`devices`] | the window of virtio-mmio pages, and what we add to the virtio standard |
//!
//! The shared region, from low to high addresses, each part page aligned:
//!
//! ```text
//! +--------+-----------+--------------+--------------------+-------------+
//! | header | mailboxes | huge entries | bitfields          | tenant area |
//! | 4 KiB  | 512 B/vCPU| 2 B/2 MiB    | 64 B/2 MiB         | 42 B/GiB *  |
//! +--------+-----------+--------------+--------------------+-------------+
//! ```
//! \* and up to 256 bytes more for each of the first 4 GiB
#![no_std]

#[cfg(test)]
extern crate std;

pub mod call;
pub mod devices;
pub mod header;
pub mod mailbox;

pub use call::{Call, Request, Status};
pub use header::{ControlWord, GuestWord, Header, Layout};
