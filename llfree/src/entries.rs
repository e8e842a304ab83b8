//! [`Entries`]: what a search sees of a tree in one look, and [`Want`]: what it looks for.
//!
//! Copies, so that one pass over a cache line that others write answers every question about it.

use shared_layout::table::HUGE_PER_TREE;
use shared_layout::{HugeEntry, Order};

/// The goal of a search: room in huge frames that are in use already, from the fullest trees to
/// the emptiest (so that what is nearly empty gets a chance to become free), or free huge frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Want {
    /// In a tree that is at least 7/8 full.
    Crowded = 0,
    /// In a tree that is at least half full.
    Mixed = 1,
    /// In any tree.
    Sparse = 2,
    /// A free huge frame that is backed by memory.
    Installed = 3,
    /// Any free huge frame.
    Free = 4,
}

impl Want {
    /// All of them, from the one that is looked for first.
    pub(crate) const ALL: [Self; 5] = [Self::Crowded, Self::Mixed, Self::Sparse, Self::Installed, Self::Free];

    #[inline]
    pub(crate) fn matches(self, entry: HugeEntry) -> bool {
        match self {
            Self::Installed => entry.is_all_free() && !entry.is_evicted(),
            Self::Free => entry.is_all_free(),
            Self::Crowded | Self::Mixed | Self::Sparse => entry.has_room(),
        }
    }

    pub(crate) const fn is_partial(self) -> bool {
        (self as u8) <= Self::Sparse as u8
    }
}

/// The entries of a tree as they were a moment ago. Where the table ends, nothing is free.
pub(crate) struct Entries {
    pub(crate) entries: [HugeEntry; HUGE_PER_TREE as usize],
    /// Those that the table has.
    pub(crate) len: u16,
}

impl Entries {
    #[inline]
    pub(crate) fn whole(entries: [HugeEntry; HUGE_PER_TREE as usize]) -> Self {
        Self { entries, len: HUGE_PER_TREE as u16 }
    }

    pub(crate) fn new(found: impl Iterator<Item = HugeEntry>) -> Self {
        let (mut entries, mut len) = ([HugeEntry::HUGE_EVICTED; HUGE_PER_TREE as usize], 0);
        for (to, entry) in entries.iter_mut().zip(found) {
            *to = entry;
            len += 1;
        }
        Self { entries, len }
    }

    /// Of those huge frames in use that may have a block of `order`, and that `tried` has no bit for, the
    /// fullest.
    #[inline]
    pub(crate) fn fullest(&self, order: Order, tried: u32) -> Option<usize> {
        const NONE: i16 = i16::MAX;
        // Without a branch: the compiler compares several at once.
        let mut keys = [NONE; HUGE_PER_TREE as usize];
        for (index, (key, entry)) in keys.iter_mut().zip(&self.entries).enumerate() {
            let fits = entry.has_room() & entry.may_fit_in_part(order);
            *key = if fits { (entry.free() << 5) as i16 | index as i16 } else { NONE };
        }
        let mut rest = tried;
        while rest != 0 {
            keys[rest.trailing_zeros() as usize] = NONE;
            rest &= rest - 1;
        }
        let least = keys.into_iter().fold(NONE, i16::min);
        (least != NONE).then_some(least as usize % HUGE_PER_TREE as usize)
    }

    /// A bit for each that a caller likes.
    #[inline]
    pub(crate) fn mask(&self, likes: impl Fn(HugeEntry) -> bool) -> u32 {
        let mut liked = [0; HUGE_PER_TREE as usize];
        liked.iter_mut().zip(self.entries).for_each(|(to, entry)| *to = u8::from(likes(entry)));
        gather(&liked) as u32
    }

    /// Whether one of them may have a block of `order` below 9.
    pub(crate) fn fits(&self, order: Order) -> bool {
        self.entries.iter().any(|entry| entry.may_fit(order))
    }

    /// Whether a search for `order` that tried those in `tried` would try another one.
    pub(crate) fn has_more(&self, order: Order, tried: u32) -> bool {
        let first = |order| self.first(order, Want::Free, tried).is_some();
        if order.is_huge() { first(order) } else { first(Order::HUGE) || self.fullest(order, tried).is_some() }
    }

    /// The first huge frame for a block of order 9 or 10.
    #[inline]
    pub(crate) fn first(&self, order: Order, want: Want, tried: u32) -> Option<usize> {
        let step = order.huge_frames() as usize;
        let fits = |index: &usize| {
            let block = &self.entries[*index..*index + step];
            tried & 1 << index == 0 && want.matches(block[0]) && block.iter().all(|entry| entry.is_all_free())
        };
        (0..self.entries.len()).step_by(step).find(fits)
    }
}

/// A bit for each byte, which is 0 or 1; at most 64 of them, and a multiple of eight. Without a branch: the
/// compiler makes several bytes at once.
#[inline]
pub(crate) fn gather(liked: &[u8]) -> u64 {
    const SIZE: usize = 8;
    /// Gathers the lowest bit of each byte.
    const GATHER: u64 = 0x0102_0408_1020_4080;
    let (eights, _) = liked.as_chunks::<SIZE>();
    let bits = |eight: &[u8; SIZE]| u64::from_le_bytes(*eight).wrapping_mul(GATHER) >> 56;
    eights.iter().enumerate().fold(0, |mask, (index, eight)| mask | bits(eight) << (SIZE * index))
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared_layout::Run;

    fn used(free: u16) -> HugeEntry {
        HugeEntry::FREE_INSTALLED.take(512 - free).expect("in range")
    }

    #[test]
    fn the_fullest_that_fits_comes_first() {
        let order = |o| Order::new(o).expect("in range");
        let short = used(8).lower(Run::of(order(1))).expect("above");
        let entries = Entries::new([used(100), HugeEntry::FREE_EVICTED, used(9), short, used(0)].into_iter());
        assert_eq!(entries.fullest(order(1), 0), Some(3));
        assert_eq!(entries.fullest(order(1), 1 << 3), Some(2));
        assert_eq!(entries.fullest(order(3), 0), Some(2));
        assert_eq!(entries.fullest(order(4), 0), Some(0));
        assert_eq!(entries.fullest(order(7), 0), None);
        assert_eq!(entries.first(Order::BASE, Want::Free, 0), Some(1));
        assert_eq!(entries.first(Order::MAX, Want::Free, 0), None);
    }

    #[test]
    fn a_mask_has_a_bit_for_each_that_is_liked() {
        for liked in [0u32, 1, 0x8000_0000, 0xa5c3_1f08, u32::MAX] {
            let entry = |index| if liked >> index & 1 == 1 { used(9) } else { used(0) };
            let entries = Entries::new((0..HUGE_PER_TREE).map(entry));
            assert_eq!(entries.mask(|entry| entry.has_room()), liked);
        }
    }
}
