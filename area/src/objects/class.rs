//! [`Class`]: the sizes of objects, four steps a doubling from 64 KiB up. Arithmetic only.
//!
//! Above 2 MiB all of them are whole huge frames, for only these go back to the system; between 1 and 2 MiB there are none,
//! for a huge frame with an object in it costs all of its memory anyway.

use crate::block::pieces;
use crate::error::AllocError;
use shared_layout::{FRAME_SIZE, FRAMES_PER_HUGE, FrameId, HUGE_SIZE, Order};

/// Base frames of the smallest class: 64 KiB.
const LEAST: u64 = 16;
/// The most bytes that are ever asked for: as much as any table has.
const MOST: u64 = 64 << 40;

/// A size of objects.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Class(u8);

impl Class {
    /// The smallest that has so many bytes at such an alignment.
    #[inline]
    pub(crate) fn of(bytes: usize, align: usize) -> Result<Self, AllocError> {
        if align as u64 > HUGE_SIZE {
            return Err(AllocError::Alignment(align));
        }
        // Objects begin at a multiple of 64 KiB, or of the power of two at or below their size.
        let bytes = if align as u64 > LEAST * FRAME_SIZE { bytes.max(align) } else { bytes } as u64;
        if bytes > MOST {
            return Err(AllocError::OutOfMemory { bytes });
        }
        let frames = bytes.div_ceil(FRAME_SIZE).max(LEAST);
        let class = Self::at_least(frames);
        // 1.25 to 1.75 MiB, and between the first few huge frames.
        let whole = frames.next_multiple_of(FRAMES_PER_HUGE);
        let is_odd = frames > FRAMES_PER_HUGE / 2 && !class.frames().is_multiple_of(FRAMES_PER_HUGE);
        Ok(if is_odd { Self::at_least(whole) } else { class })
    }

    /// The first step at or above a number of frames.
    #[inline]
    fn at_least(frames: u64) -> Self {
        let octave = frames.ilog2();
        // Quarters of the power of two below, four of which are that itself; by shifts, for a division takes as long as all
        // the rest of an allocation.
        let shift = octave - 2;
        let quarters = (frames + (1 << shift) - 1) >> shift;
        Self((shift * 4 + quarters as u32 - 12) as u8)
    }

    /// Its number, counted from the smallest.
    #[inline]
    pub(crate) fn index(self) -> usize {
        usize::from(self.0)
    }

    /// The class of a number.
    pub(crate) fn numbered(index: usize) -> Self {
        Self(index as u8)
    }

    /// Whether objects of it exist.
    pub(crate) fn is_in_use(self) -> bool {
        Self::of(self.bytes(), 1) == Ok(self)
    }

    /// Its size in base frames.
    #[inline]
    pub(crate) const fn frames(self) -> u64 {
        let octave = self.0 as u32 / 4 + 4;
        (4 + self.0 as u64 % 4) << (octave - 2)
    }

    /// Its size.
    #[inline]
    pub(crate) const fn bytes(self) -> usize {
        (self.frames() * FRAME_SIZE) as usize
    }

    /// Whole huge frames that an object of it has, if it has such.
    #[inline]
    pub(crate) const fn huge_frames(self) -> Option<u32> {
        let frames = self.frames();
        // At most as many as a table has.
        if frames < FRAMES_PER_HUGE { None } else { Some((frames / FRAMES_PER_HUGE) as u32) }
    }

    /// Below a huge frame: the block of the table that an object of it is cut from.
    pub(crate) fn order(self) -> Order {
        let frames = self.frames().next_power_of_two();
        Order::new(frames.trailing_zeros() as u8).unwrap_or(Order::HUGE)
    }

    /// Below a huge frame: the blocks that an object at `first` consists of.
    pub(crate) fn pieces(self, first: FrameId) -> impl Iterator<Item = (FrameId, Order)> {
        pieces(first.0, first.0 + self.frames())
    }

    /// Below a huge frame: the blocks behind such an object, up to the end of what it was cut from.
    pub(crate) fn offcuts(self, first: FrameId) -> impl Iterator<Item = (FrameId, Order)> {
        pieces(first.0 + self.frames(), first.0 + self.order().frames())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: usize = 1 << 10;
    const MIB: usize = 1 << 20;

    #[test]
    fn sizes_are_rounded_up_to_four_steps_a_doubling() {
        let of = |bytes| Class::of(bytes, 8).expect("in range").bytes();
        for (bytes, size) in [
            (0, 64 * KIB),
            (1, 64 * KIB),
            (64 * KIB, 64 * KIB),
            (64 * KIB + 1, 80 * KIB),
            (100 * KIB, 112 * KIB),
            (MIB, MIB),
            (MIB + 1, 2 * MIB),
            (2 * MIB, 2 * MIB),
            (2 * MIB + 1, 4 * MIB),
            (5 * MIB, 6 * MIB),
            (6 * MIB + 1, 8 * MIB),
            (9 * MIB, 10 * MIB),
            (33 * MIB, 40 * MIB),
            (1 << 30, 1 << 30),
            (MOST as usize, MOST as usize),
        ] {
            assert_eq!(of(bytes), size, "{bytes}");
        }
        assert_eq!(Class::of(MOST as usize + 1, 1), Err(AllocError::OutOfMemory { bytes: MOST + 1 }));
        assert_eq!(Class::of(usize::MAX, 1), Err(AllocError::OutOfMemory { bytes: u64::MAX }));
        assert_eq!(Class::of(1, 4 * MIB), Err(AllocError::Alignment(4 * MIB)));
    }

    #[test]
    fn every_size_fits_its_class_and_wastes_no_more_than_a_quarter_or_a_huge_frame() {
        let mut last = 0;
        for frames in 1..40_000u64 {
            let bytes = (frames * FRAME_SIZE) as usize;
            let class = Class::of(bytes, 1).expect("in range");
            assert!(class.bytes() >= bytes && class.bytes() >= last && class.is_in_use());
            last = class.bytes();
            let most = if frames > 256 { bytes + bytes / 4 + 2 * MIB } else { (bytes + bytes / 4).max(64 * KIB) };
            assert!(class.bytes() <= most, "{bytes} has {}", class.bytes());
            assert_eq!(Class::numbered(class.index()), class);
            assert!(class.huge_frames().is_none_or(|n| u64::from(n) * HUGE_SIZE == class.bytes() as u64));
            assert!(class.huge_frames().is_some() || class.frames() <= 256);
        }
    }

    #[test]
    fn an_object_and_its_offcuts_are_the_block_it_was_cut_from() {
        for index in 0..=16 {
            let class = Class::numbered(index);
            let first = FrameId(class.order().frames() * 3);
            let all: Vec<_> = class.pieces(first).chain(class.offcuts(first)).collect();
            let mut at = first.0;
            for (frame, order) in all {
                assert!(frame.0 == at && frame.is_aligned(order));
                at += order.frames();
            }
            assert_eq!(at, first.0 + class.order().frames());
        }
    }

    #[test]
    fn an_alignment_is_met_by_the_size() {
        for shift in 0..=21 {
            let class = Class::of(1, 1 << shift).expect("in range");
            let start = if class.huge_frames().is_some() { HUGE_SIZE } else { class.order().bytes() };
            assert!(start.is_multiple_of(1 << shift), "2^{shift} in {class:?}");
        }
    }
}
