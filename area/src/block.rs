//! [`Block`]: memory of an area that somebody owns. Plain values.

use shared_layout::{FrameId, HugeRange, Order};
use std::ptr::NonNull;

/// The frames that a block is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Extent {
    /// One block of the table.
    Order(FrameId, Order),
    /// Huge frames side by side.
    Run(HugeRange),
}

/// Memory of an area, for its owner alone. [`Handle::free`](crate::Handle::free) or [`Area::free`](crate::Area::free)
/// gives it back, from any thread; dropped, it stays allocated until the area ends.
#[must_use = "a block that is dropped stays allocated"]
#[derive(PartialEq, Eq, Debug)]
pub struct Block {
    pub(crate) area: u32,
    pub(crate) extent: Extent,
    pub(crate) start: NonNull<u8>,
    pub(crate) is_zeroed: bool,
}

// SAFETY: a block is the right to memory that no thread is tied to; its bytes are reached by raw pointers only.
unsafe impl Send for Block {}
// SAFETY: a shared block gives out a number and an address, nothing else.
unsafe impl Sync for Block {}

impl Block {
    /// Its first byte, at a multiple of its size for orders, of 2 MiB for runs. Valid until the block is freed or the
    /// area is dropped.
    #[must_use]
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.start
    }

    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self.extent {
            Extent::Order(_, order) => order.bytes() as usize,
            Extent::Run(range) => range.bytes() as usize,
        }
    }

    /// Whether all of it is known to be zero: it came from the kernel just now.
    #[must_use]
    pub fn is_zeroed(&self) -> bool {
        self.is_zeroed
    }
}

/// The largest aligned blocks of a stretch of pages, from its start, none of them a huge frame.
pub(crate) fn pieces(start: u64, end: u64) -> impl Iterator<Item = (FrameId, Order)> {
    let mut at = start;
    std::iter::from_fn(move || {
        let largest = (end - at).checked_ilog2()?.min(at.trailing_zeros()).min(8);
        let piece = (FrameId(at), Order::new(largest as u8)?);
        at += piece.1.frames();
        Some(piece)
    })
}
