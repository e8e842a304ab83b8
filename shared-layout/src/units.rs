//! The units that cross a crate boundary: no bare integer does.
//!
//! Frames are numbered from the start of the guest's RAM. Plain values, no memory touched.

use core::ops::Range;

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
    #[inline]
    pub const fn huge(self) -> Option<HugeId> {
        let huge = self.0 / FRAMES_PER_HUGE;
        if huge <= u32::MAX as u64 { Some(HugeId(huge as u32)) } else { None }
    }

    /// Position inside its huge frame, `0..512`.
    #[must_use]
    #[inline]
    pub const fn offset_in_huge(self) -> usize {
        (self.0 % FRAMES_PER_HUGE) as usize
    }

    /// Byte offset from the start of RAM.
    #[must_use]
    #[inline]
    pub const fn byte_offset(self) -> u64 {
        self.0 * FRAME_SIZE
    }

    /// Whether a block of `order` may start here.
    #[must_use]
    #[inline]
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
    #[inline]
    pub const fn first_frame(self) -> FrameId {
        FrameId(self.0 as u64 * FRAMES_PER_HUGE)
    }

    /// Index into a per-huge-frame array.
    #[must_use]
    #[inline]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Byte offset from the start of RAM.
    #[must_use]
    #[inline]
    pub const fn byte_offset(self) -> u64 {
        self.0 as u64 * HUGE_SIZE
    }
}

/// Huge frames that lie side by side, none to all. Its end fits a `u32` too, so no sum of its parts
/// overflows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct HugeRange {
    first: HugeId,
    count: u32,
}

impl HugeRange {
    /// No huge frame.
    pub const EMPTY: Self = Self::up_to(0);

    /// `count` huge frames from `first` on; `None` if they do not end at or below `u32::MAX`.
    #[must_use]
    #[inline]
    pub const fn new(first: HugeId, count: u32) -> Option<Self> {
        if count <= u32::MAX - first.0 { Some(Self { first, count }) } else { None }
    }

    /// The same, but shorter if it would end above `u32::MAX`, where no table reaches.
    #[must_use]
    #[inline]
    pub const fn saturating(first: HugeId, count: u32) -> Self {
        let most = u32::MAX - first.0;
        Self { first, count: if count < most { count } else { most } }
    }

    /// The first `count` huge frames of RAM.
    #[must_use]
    #[inline]
    pub const fn up_to(count: u32) -> Self {
        Self { first: HugeId(0), count }
    }

    /// From `first` up to and without `end`; empty if that lies before.
    #[must_use]
    #[inline]
    pub const fn between(first: HugeId, end: HugeId) -> Self {
        Self { first, count: end.0.saturating_sub(first.0) }
    }

    /// Those that some of these bytes of RAM lie in.
    #[must_use]
    #[inline]
    pub fn around(bytes: Range<u64>) -> Self {
        if bytes.is_empty() {
            return Self::EMPTY;
        }
        let end = bytes.end.div_ceil(HUGE_SIZE).min(u32::MAX.into());
        let first = (bytes.start / HUGE_SIZE).min(end);
        // Both are at most u32::MAX.
        Self::between(HugeId(first as u32), HugeId(end as u32))
    }

    /// Its first huge frame, if there is any.
    #[must_use]
    #[inline]
    pub const fn first(self) -> HugeId {
        self.first
    }

    /// How many.
    #[must_use]
    #[inline]
    pub const fn count(self) -> u32 {
        self.count
    }

    /// The huge frame past the end of the range.
    #[must_use]
    #[inline]
    pub const fn end(self) -> HugeId {
        HugeId(self.first.0 + self.count)
    }

    /// Whether there is none.
    #[must_use]
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.count == 0
    }

    /// Whether `huge` is one of them.
    #[must_use]
    #[inline]
    pub const fn contains(self, huge: HugeId) -> bool {
        self.first.0 <= huge.0 && huge.0 - self.first.0 < self.count
    }

    /// Bytes of memory.
    #[must_use]
    #[inline]
    pub const fn bytes(self) -> u64 {
        self.count as u64 * HUGE_SIZE
    }

    /// Byte offset of its start from the start of RAM.
    #[must_use]
    #[inline]
    pub const fn byte_offset(self) -> u64 {
        self.first.byte_offset()
    }

    /// Takes `huge` in if it is the frame past the end; whether it did.
    #[must_use]
    #[inline]
    pub const fn append(&mut self, huge: HugeId) -> bool {
        let is_next = huge.0 == self.first.0 + self.count && huge.0 < u32::MAX;
        self.count += is_next as u32;
        is_next
    }

    /// The first `count` of them, or all if there are no more, and the rest.
    #[must_use]
    #[inline]
    pub const fn split(self, count: u32) -> (Self, Self) {
        let head = if count < self.count { count } else { self.count };
        let rest = Self { first: HugeId(self.first.0 + head), count: self.count - head };
        (Self { first: self.first, count: head }, rest)
    }

    /// Them, one by one.
    #[inline]
    pub fn iter(self) -> impl DoubleEndedIterator<Item = HugeId> + ExactSizeIterator + Clone {
        self.into_iter()
    }
}

/// One huge frame. `u32::MAX`, which is no frame of any table, gives an empty range.
impl From<HugeId> for HugeRange {
    #[inline]
    fn from(huge: HugeId) -> Self {
        Self::saturating(huge, 1)
    }
}

impl IntoIterator for HugeRange {
    type Item = HugeId;
    type IntoIter = core::iter::Map<Range<u32>, fn(u32) -> HugeId>;

    #[inline]
    fn into_iter(self) -> Self::IntoIter {
        (self.first.0..self.first.0 + self.count).map(HugeId)
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
    #[inline]
    pub const fn new(order: u8) -> Option<Self> {
        if order <= Self::MAX.0 { Some(Self(order)) } else { None }
    }

    /// The exponent, `0..=10`.
    #[must_use]
    #[inline]
    pub const fn get(self) -> u8 {
        self.0
    }

    /// Base frames in a block of this order.
    #[must_use]
    #[inline]
    pub const fn frames(self) -> u64 {
        1 << self.0
    }

    /// Bytes in a block of this order.
    #[must_use]
    #[inline]
    pub const fn bytes(self) -> u64 {
        self.frames() * FRAME_SIZE
    }

    /// Huge frames that a block of this order touches: 1, or 2 for order 10.
    #[must_use]
    #[inline]
    pub const fn huge_frames(self) -> u32 {
        if self.0 > Self::HUGE.0 { 1 << (self.0 - Self::HUGE.0) } else { 1 }
    }

    /// Whether the block is made of whole huge frames (order 9 and 10).
    #[must_use]
    #[inline]
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
    fn no_range_ends_past_the_last_number() {
        let last = HugeId(u32::MAX);
        assert_eq!(HugeRange::new(last, 1), None);
        assert_eq!(HugeRange::new(last, 0).map(HugeRange::end), Some(last));
        assert_eq!(HugeRange::new(HugeId(1), u32::MAX - 1).map(HugeRange::end), Some(last));
        assert_eq!(HugeRange::saturating(HugeId(7), u32::MAX).end(), last);
        assert_eq!(HugeRange::up_to(u32::MAX).bytes(), u64::from(u32::MAX) << 21);
        assert!(HugeRange::between(last, HugeId(3)).is_empty());
        let around = HugeRange::around;
        assert_eq!(around((2 << 21) - 1..(2 << 21) + 1), HugeRange::between(HugeId(1), HugeId(3)));
        assert_eq!(around(2 << 21..3 << 21), HugeRange::from(HugeId(2)));
        assert!(around(5..5).is_empty());
        assert!(around(u64::MAX - 1..u64::MAX).is_empty());
    }

    #[test]
    fn a_split_range_has_the_same_huge_frames() {
        let range = HugeRange::new(HugeId(3), 5).expect("in range");
        assert!(range.contains(HugeId(3)) && range.contains(HugeId(7)));
        assert!(!range.contains(HugeId(2)) && !range.contains(HugeId(8)));
        assert_eq!((range.byte_offset(), range.bytes()), (3 << 21, 5 << 21));
        for at in 0..7 {
            let (head, rest) = range.split(at);
            assert_eq!(head.count(), at.min(5));
            assert!(head.into_iter().chain(rest).eq(range.iter()), "split at {at}");
        }
        assert_eq!(HugeRange::EMPTY.iter().next(), None);
    }

    #[test]
    fn a_frame_beyond_the_last_huge_frame_has_none() {
        assert_eq!(FrameId(513).huge(), Some(HugeId(1)));
        assert_eq!(FrameId(u64::MAX).huge(), None);
        assert!(FrameId(1024).is_aligned(Order::MAX));
        assert!(!FrameId(512).is_aligned(Order::MAX));
    }

    #[test]
    fn a_range_grows_by_the_frame_past_its_end_only() {
        let mut range = HugeRange::from(HugeId(7));
        assert!(range.append(HugeId(8)) && !range.append(HugeId(8)) && !range.append(HugeId(6)));
        assert_eq!((range.first(), range.count()), (HugeId(7), 2));
        let mut last = HugeRange::from(HugeId(u32::MAX - 1));
        assert!(!last.append(HugeId(u32::MAX)));
        assert!(HugeRange::from(HugeId(u32::MAX)).is_empty());
    }
}
