//! The bytes of a frame table that a tenant and its host share.
//!
//! Where each word lies, who may write it and what its bits mean, whatever the tenant is: a guest or a
//! process. The crate holds no algorithm and touches no memory; `llfree` does the work over these
//! bytes. What only a VMM and its guests need is in `guest-abi`. Everything here is `no_std` and has
//! no Cargo features, so that nothing in a workspace can pull `std` into a guest.
//!
//! | file | what it fixes |
//! |---|---|
//! | [`units`] | frame sizes, [`FrameId`], [`HugeId`], [`HugeRange`], [`Order`] |
//! | [`entry`] | [`HugeEntry`], 16 bits a huge frame, and its named transitions |
//! | [`table`] | where the parts of a table lie in a region: all that an allocator without a VMM needs |
#![no_std]

#[cfg(test)]
extern crate std;

pub mod entry;
pub mod table;
pub mod units;

pub use entry::{Glance, HugeEntry, Run};
pub use table::{HostWord, TableLayout};
pub use units::{FRAME_SIZE, FRAMES_PER_HUGE, FrameId, HUGE_SIZE, HugeId, HugeRange, Order};

// The words are shared as they are; a big-endian party would read them backwards.
const _: () = assert!(cfg!(target_endian = "little"));
const _: () = assert!(size_of::<usize>() == 8);
