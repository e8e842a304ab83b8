//! [`Spot`]: where a CPU, or all callers without a handle together, found its last blocks.
//!
//! A place to look and nothing more: any value will do. Plain values, no memory touched.

use crate::class::{CLASSES, Class};
use shared_layout::HugeId;
use shared_layout::table::HUGE_PER_TREE;

/// The place where the last blocks were found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spot {
    /// For each class, the huge frame that small blocks come from.
    pub(crate) small: [Option<HugeId>; CLASSES],
    /// The place to look for the next huge frame.
    pub(crate) huge: HugeId,
    /// The place to look for small blocks while there is no such huge frame.
    pub(crate) home: u32,
    /// The first tree that was full until this CPU freed a huge frame in it: its lines are near.
    pub(crate) back: Option<u32>,
    /// The tree that this CPU takes huge frames from, if it reserved one.
    pub(crate) tree: Option<u32>,
    /// A backed huge frame that was freed just now: it is warm.
    pub(crate) freed: Option<HugeId>,
    /// No free, backed huge frame was found lately: evicted ones will do.
    pub(crate) any: bool,
    /// `return_epoch` when the hints were last believed.
    pub(crate) epoch: u64,
}

const NONE: u32 = u32::MAX;
const ANY: u64 = 1 << 63;

impl Spot {
    pub(crate) const START: Self = Self::at(0, 0);

    /// A handle's first spot.
    pub(crate) const fn at(tree: u32, epoch: u64) -> Self {
        Self {
            small: [None; CLASSES],
            huge: HugeId(tree * HUGE_PER_TREE),
            home: tree,
            back: None,
            tree: None,
            freed: None,
            any: false,
            epoch,
        }
    }

    /// The spot of callers without a handle, in one word: they share one class of small blocks.
    pub(crate) fn pack(&self) -> u64 {
        let small = self.small[Class::MOVABLE.get() as usize].map_or(NONE, |huge| huge.0);
        u64::from(!small) | u64::from(self.huge.0 & 0x7fff_ffff) << 32 | if self.any { ANY } else { 0 }
    }

    /// Any word will do: it is only a place to look.
    pub(crate) fn unpack(word: u64) -> Self {
        let mut spot = Self::START;
        let small = !(word as u32);
        spot.small[Class::MOVABLE.get() as usize] = (small != NONE).then_some(HugeId(small));
        spot.huge = HugeId((word >> 32) as u32 & 0x7fff_ffff);
        spot.any = word & ANY != 0;
        spot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spot_survives_its_word() {
        let mut spot = Spot { huge: HugeId(77), any: true, ..Spot::START };
        for small in [None, Some(HugeId(0)), Some(HugeId(5))] {
            spot.small[1] = small;
            let again = Spot::unpack(spot.pack());
            assert_eq!((again.small, again.huge, again.any), (spot.small, spot.huge, spot.any));
        }
        assert_eq!(Spot::unpack(0).small, Spot::START.small, "zeroed memory is a spot at the start");
    }
}
