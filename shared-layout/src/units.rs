//! The units that cross a crate boundary: no bare integer does.
//!
//! Frames are numbered from the start of the guest's RAM. Plain values, no memory touched.

/// Bytes in a base frame (a page).
pub const FRAME_SIZE: u64 = 4096;
/// Base frames in a huge frame.
pub const FRAMES_PER_HUGE: u64 = 512;
/// Bytes in a huge frame: the unit that the host reclaims.
pub const HUGE_SIZE: u64 = FRAME_SIZE * FRAMES_PER_HUGE;

/// A 4 KiB frame, counted from the start of RAM.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FrameId(pub u64);

impl FrameId {
    /// The huge frame that this frame lies in; `None` beyond what a [`HugeId`] can number.
    #[must_use]
    pub const fn huge(self) -> Option<HugeId> {
        let huge = self.0 / FRAMES_PER_HUGE;
        if huge <= u32::MAX as u64 { Some(HugeId(huge as u32)) } else { None }
    }

    /// Position inside its huge frame, `0..512`.
    #[must_use]
    pub const fn offset_in_huge(self) -> usize {
        (self.0 % FRAMES_PER_HUGE) as usize
    }

    /// Byte offset from the start of RAM.
    #[must_use]
    pub const fn byte_offset(self) -> u64 {
        self.0 * FRAME_SIZE
    }

    /// Whether a block of `order` may start here.
    #[must_use]
    pub const fn is_aligned(self, order: Order) -> bool {
        self.0 & (order.frames() - 1) == 0
    }
}

/// A 2 MiB frame, counted from the start of RAM.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HugeId(pub u32);

impl HugeId {
    /// Its first base frame.
    #[must_use]
    pub const fn first_frame(self) -> FrameId {
        FrameId(self.0 as u64 * FRAMES_PER_HUGE)
    }

    /// Index into a per-huge-frame array.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Byte offset from the start of RAM.
    #[must_use]
    pub const fn byte_offset(self) -> u64 {
        self.0 as u64 * HUGE_SIZE
    }
}

/// The size of a block, `2^order` frames: 0 (4 KiB) to 10 (4 MiB).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Order(u8);

impl Order {
    /// One base frame.
    pub const BASE: Self = Self(0);
    /// A row of the bitfield: 64 frames.
    pub const ROW: Self = Self(6);
    /// One huge frame.
    pub const HUGE: Self = Self(9);
    /// The largest block, two huge frames.
    pub const MAX: Self = Self(10);

    /// `None` above [`Order::MAX`].
    #[must_use]
    pub const fn new(order: u8) -> Option<Self> {
        if order <= Self::MAX.0 { Some(Self(order)) } else { None }
    }

    /// The exponent, `0..=10`.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }

    /// Base frames in a block of this order.
    #[must_use]
    pub const fn frames(self) -> u64 {
        1 << self.0
    }

    /// Bytes in a block of this order.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.frames() * FRAME_SIZE
    }

    /// Huge frames that a block of this order touches: 1, or 2 for order 10.
    #[must_use]
    pub const fn huge_frames(self) -> u32 {
        if self.0 > Self::HUGE.0 { 1 << (self.0 - Self::HUGE.0) } else { 1 }
    }

    /// Whether the block is made of whole huge frames (order 9 and 10).
    #[must_use]
    pub const fn is_huge(self) -> bool {
        self.0 >= Self::HUGE.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_end_at_ten() {
        assert_eq!(Order::new(10), Some(Order::MAX));
        assert_eq!(Order::new(11), None);
        assert_eq!(Order::MAX.bytes(), 4 << 20);
        assert_eq!(Order::MAX.huge_frames(), 2);
        assert_eq!(Order::HUGE.bytes(), HUGE_SIZE);
        assert_eq!(Order::ROW.huge_frames(), 1);
    }

    #[test]
    fn a_frame_beyond_the_last_huge_frame_has_none() {
        assert_eq!(FrameId(513).huge(), Some(HugeId(1)));
        assert_eq!(FrameId(u64::MAX).huge(), None);
        assert!(FrameId(1024).is_aligned(Order::MAX));
        assert!(!FrameId(512).is_aligned(Order::MAX));
    }
}
