//! [`Allocation`]: what an allocation yields, a [`Block`] to use or an [`EvictedBlock`] without an address.
//!
//! Plain values, no memory touched. Only the lower level's results become blocks, so a block's
//! frames all lie in some table.

use crate::taken::Taken;
use shared_layout::{FrameId, HugeId, HugeRange, Order};

/// A block that is backed by memory and may be touched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Block {
    frame: FrameId,
    order: Order,
}

impl Block {
    /// Its first frame.
    #[must_use]
    #[inline]
    pub fn frame(&self) -> FrameId {
        self.frame
    }

    /// Its size.
    #[must_use]
    #[inline]
    pub fn order(&self) -> Order {
        self.order
    }
}

/// A block that the caller owns but must not touch: it gives no address until the host installed
/// all of its huge frames.
#[must_use = "an evicted block is owned: install and confirm it, or free it"]
#[derive(PartialEq, Eq, Debug)]
pub struct EvictedBlock {
    block: Block,
}

impl EvictedBlock {
    /// The huge frames to ask the host for: one, or two for order 10.
    #[must_use]
    #[inline]
    pub fn huge_range(&self) -> HugeRange {
        huge_range(self.block.frame, self.block.order)
    }

    /// The first huge frame to ask the host for.
    #[must_use]
    #[inline]
    pub fn first_huge(&self) -> HugeId {
        self.huge_range().first()
    }

    /// How many huge frames to ask for: 1, or 2 for order 10.
    #[must_use]
    #[inline]
    pub fn huge_frames(&self) -> u32 {
        self.huge_range().count()
    }

    /// The block, now that the host backed all of it with memory.
    #[inline]
    pub(crate) fn installed(self) -> Block {
        self.block
    }

    /// Gives up on it: what to pass to a `free`.
    #[must_use]
    #[inline]
    pub fn release(self) -> (FrameId, Order) {
        (self.block.frame, self.block.order)
    }
}

/// A block that was allocated.
#[must_use]
#[derive(PartialEq, Eq, Debug)]
pub enum Allocation {
    /// Usable at once.
    Ready(Block),
    /// The host must install it first.
    Evicted(EvictedBlock),
}

impl Allocation {
    #[inline]
    pub(crate) fn new(taken: Taken, order: Order) -> Self {
        let block = Block { frame: taken.frame, order };
        if taken.evicted { Self::Evicted(EvictedBlock { block }) } else { Self::Ready(block) }
    }

    /// The block's first frame and order, backed or not.
    #[must_use]
    #[inline]
    pub fn position(&self) -> (FrameId, Order) {
        match self {
            Self::Ready(block) | Self::Evicted(EvictedBlock { block }) => (block.frame, block.order),
        }
    }
}

/// The huge frames that a block of some table touches.
#[inline]
pub(crate) fn huge_range(frame: FrameId, order: Order) -> HugeRange {
    HugeRange::saturating(HugeId((frame.0 / Order::HUGE.frames()) as u32), order.huge_frames())
}
