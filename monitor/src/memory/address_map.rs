//! [`AddressMap`]: where a guest sees its RAM.
//!
//! RAM is one mapping in this process; an *offset* in it is what frames, discards and residency
//! count in. A *guest-physical address* (gpa) is what the guest, its drivers and its page tables
//! use. They differ for a guest that expects a PC: a hole below 4 GiB is for devices there. Pure
//! arithmetic, total for any input. Invariant: parts lie in ascending order in both, never touch each
//! other in guest-physical space, and cover every offset of RAM exactly once.

use shared_layout::HUGE_SIZE;

/// The first address of the hole of a PC at the earliest, and so the most RAM below it.
pub const HOLE_START: u64 = 3 << 30;
/// The first address past the hole of a PC.
pub const HOLE_END: u64 = 4 << 30;

/// A stretch of RAM that is contiguous for guest and host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Where the guest sees it.
    pub gpa: u64,
    /// Where it lies in the mapping.
    pub offset: u64,
    /// Its size.
    pub bytes: u64,
}

impl Part {
    /// How far into the part `len` bytes from `start` on begin, `base` being the part's own start in
    /// the same measure; `None` if they are not all in it.
    fn position(&self, base: u64, start: u64, len: u64) -> Option<u64> {
        let position = start.checked_sub(base)?;
        (len <= self.bytes.checked_sub(position)?).then_some(position)
    }
}

/// Where a guest sees its RAM.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AddressMap {
    /// All of RAM.
    bytes: u64,
    /// The part of it below the hole.
    low: u64,
}

impl AddressMap {
    /// RAM from address 0 on in one piece.
    #[must_use]
    pub const fn flat(bytes: u64) -> Self {
        Self { bytes, low: bytes }
    }

    /// The first `low` bytes of RAM from address 0 on, the rest from 4 GiB on. RAM of at most `low`
    /// bytes has no rest, and is as [`flat`](Self::flat) has it. `low` is at most 3 GiB and a
    /// multiple of 2 MiB: it is cut to that.
    #[must_use]
    pub fn with_hole(bytes: u64, low: u64) -> Self {
        let low = low.min(HOLE_START) / HUGE_SIZE * HUGE_SIZE;
        Self { bytes, low: low.min(bytes) }
    }

    /// Bytes of RAM, without holes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where the guest sees the byte at `offset`. An offset past the end of RAM is answered as if RAM went on there.
    #[must_use]
    pub const fn gpa(&self, offset: u64) -> u64 {
        if offset < self.low || self.low == self.bytes { offset } else { HOLE_END.saturating_add(offset - self.low) }
    }

    /// Where `len` bytes from `gpa` on begin in the mapping; `None` if they are not all in one part.
    #[must_use]
    pub fn offset(&self, gpa: u64, len: u64) -> Option<u64> {
        self.parts().find_map(|part| part.position(part.gpa, gpa, len).map(|position| part.offset + position))
    }

    /// Where the guest sees `len` bytes from `offset` on; `None` if that is not in one piece.
    #[must_use]
    pub fn contiguous(&self, offset: u64, len: u64) -> Option<u64> {
        self.parts().find_map(|part| part.position(part.offset, offset, len).map(|position| part.gpa + position))
    }

    /// The parts, in ascending order; none is empty.
    pub fn parts(&self) -> impl Iterator<Item = Part> + use<> {
        let low = Part { gpa: 0, offset: 0, bytes: self.low };
        let high = Part { gpa: HOLE_END, offset: self.low, bytes: self.bytes - self.low };
        [low, high].into_iter().filter(|part| part.bytes > 0)
    }

    /// The first address above all RAM.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.gpa(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;

    #[test]
    fn small_ram_has_no_hole() {
        for bytes in [2 * MIB, 3 * GIB - 2 * MIB, 3 * GIB] {
            assert_eq!(AddressMap::with_hole(bytes, 3 * GIB), AddressMap::flat(bytes));
            assert_eq!(AddressMap::with_hole(bytes, 3 * GIB).end(), bytes);
        }
        // Flat RAM has none however large it is: that is what our own guests see.
        assert_eq!(AddressMap::flat(16 * GIB).gpa(5 * GIB), 5 * GIB);
    }

    #[test]
    fn the_rest_starts_at_four_gib() {
        let map = AddressMap::with_hole(8 * GIB, 3 * GIB);
        let parts: Vec<Part> = map.parts().collect();
        let low = Part { gpa: 0, offset: 0, bytes: 3 * GIB };
        assert_eq!(parts, [low, Part { gpa: 4 * GIB, offset: 3 * GIB, bytes: 5 * GIB }]);
        assert_eq!((map.end(), map.bytes()), (9 * GIB, 8 * GIB));
        assert_eq!((map.gpa(3 * GIB - 1), map.gpa(3 * GIB)), (3 * GIB - 1, 4 * GIB));
        assert_eq!((map.offset(3 * GIB - 1, 1), map.offset(3 * GIB, 1)), (Some(3 * GIB - 1), None));
        assert_eq!((map.offset(4 * GIB, 1), map.offset(4 * GIB - 1, 1)), (Some(3 * GIB), None));
        assert_eq!(map.offset(3 * GIB - 4096, 8192), None, "half of it is in the hole");
        assert_eq!(map.contiguous(3 * GIB, 5 * GIB), Some(4 * GIB));
        assert_eq!(map.contiguous(3 * GIB - 1, 2), None, "neighbours for the host, not for the guest");
    }

    #[test]
    fn a_hole_cannot_start_above_three_gib_or_within_a_huge_frame() {
        assert_eq!(AddressMap::with_hole(8 * GIB, u64::MAX), AddressMap::with_hole(8 * GIB, 3 * GIB));
        assert_eq!(AddressMap::with_hole(8 * GIB, GIB + 4096), AddressMap::with_hole(8 * GIB, GIB));
        let all_above = AddressMap::with_hole(GIB, 0);
        assert_eq!((all_above.gpa(0), all_above.end(), all_above.parts().count()), (4 * GIB, 5 * GIB, 1));
    }

    /// The naive model: each 2 MiB of RAM and where the guest sees it, one after the other.
    fn model(huge_frames: u64, low: u64) -> Vec<u64> {
        let mut gpa = 0;
        let mut seen = Vec::new();
        for frame in 0..huge_frames {
            if frame == low {
                gpa = HOLE_END;
            }
            seen.push(gpa);
            gpa += HUGE_SIZE;
        }
        seen
    }

    proptest! {
        #[test]
        fn the_map_is_the_model(huge_frames in 1u64..64, low in 0u64..80, gpa in any::<u64>(), len in any::<u64>()) {
            let map = AddressMap::with_hole(huge_frames * HUGE_SIZE, low * HUGE_SIZE);
            let model = model(huge_frames, low);
            for (frame, gpa) in (0..).zip(&model) {
                let offset = frame * HUGE_SIZE;
                for byte in [0, 1, 4096, HUGE_SIZE - 1] {
                    prop_assert_eq!(map.gpa(offset + byte), gpa + byte);
                    prop_assert_eq!(map.offset(gpa + byte, 1), Some(offset + byte));
                }
                prop_assert_eq!(map.offset(*gpa, HUGE_SIZE), Some(offset));
                // The next one follows for the guest, or it does not.
                let follows = model.get(frame as usize + 1) == Some(&(gpa + HUGE_SIZE));
                prop_assert_eq!(map.offset(*gpa, HUGE_SIZE + 1).is_some(), follows);
                prop_assert_eq!(map.contiguous(offset, HUGE_SIZE + 1).is_some(), follows);
            }
            let last = model.last().map_or(0, |gpa| gpa + HUGE_SIZE);
            prop_assert_eq!(map.end(), last);
            prop_assert_eq!(map.parts().map(|part| part.bytes).sum::<u64>(), map.bytes());
            // Any address, and addresses that are likely to hit something.
            for gpa in [gpa, gpa % (64 * HUGE_SIZE), HOLE_END + gpa % (64 * HUGE_SIZE)] {
                for len in [1, 1 + len % (8 * HUGE_SIZE), len] {
                    let frames = |byte: u64| model.iter().position(|start| byte.wrapping_sub(*start) < HUGE_SIZE);
                    let expected = (|| {
                        let end = gpa.checked_add(len.checked_sub(1)?)?;
                        let (first, last) = (frames(gpa)? as u64, frames(end)? as u64);
                        let offset = first * HUGE_SIZE + gpa % HUGE_SIZE;
                        // In one piece: as far apart for the host as for the guest.
                        let distance = last * HUGE_SIZE + end % HUGE_SIZE - offset;
                        (distance == len - 1).then_some(offset)
                    })();
                    if len > 0 {
                        prop_assert_eq!(map.offset(gpa, len), expected, "{:#x} {:#x} {:?}", gpa, len, map);
                    }
                }
            }
        }

        #[test]
        fn no_numbers_overflow(
            bytes in any::<u64>(), low in any::<u64>(), at in any::<u64>(), len in any::<u64>()
        ) {
            for map in [AddressMap::flat(bytes), AddressMap::with_hole(bytes, low)] {
                let _ = (map.gpa(at), map.end());
                if let Some(offset) = map.offset(at, len) {
                    prop_assert!(offset <= bytes && len <= bytes - offset);
                    prop_assert_eq!(map.contiguous(offset, len.max(1)).is_some(), len > 0 || offset < bytes);
                }
            }
        }
    }
}
