//! [`Taken`], [`TakenRow`] and [`Miss`]: what an attempt at a huge frame came to. Plain values.

use shared_layout::FrameId;

/// Frames that were just taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Taken {
    pub(crate) frame: FrameId,
    /// (One of) the huge frames is not backed.
    pub(crate) evicted: bool,
}

/// Why nothing was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Miss {
    /// Nothing fits.
    NoFit,
    /// What fits cannot be had as a whole row, for others are at work in it; a block may be.
    Busy,
    /// Others were faster: for a moment frames that are free looked taken, and whoever looked then has
    /// to be told.
    Undone,
}

/// All free frames of one row, taken at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct TakenRow {
    pub(crate) first: FrameId,
    /// A set bit is a frame that the holder may give out.
    pub(crate) bits: u64,
    pub(crate) evicted: bool,
}
