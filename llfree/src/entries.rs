//! [`Entries`]: what a search sees of a tree in one look, and [`Want`]: what it looks for.
//!
//! Copies, so that one pass over a cache line that others write answers every question about it.

use crate::lanes::bits;
use shared_layout::table::HUGE_PER_TREE;
use shared_layout::{Glance, HugeEntry, HugeId, Order};

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
        bits(&self.entries, likes) as u32
    }

    /// Whether one of them may have a block of `order` below 9.
    pub(crate) fn fits(&self, order: Order) -> bool {
        self.entries.iter().any(|entry| entry.may_fit(order))
    }

    /// What is set in any of them.
    #[inline]
    pub(crate) fn glance(&self) -> Glance {
        self.entries.iter().copied().fold(Glance::default(), Glance::and)
    }

    /// Whether a search for `order` that tried those in `tried` would try another one.
    pub(crate) fn has_more(&self, order: Order, tried: u32) -> bool {
        let first = |order| self.first(order, Want::Free, tried).is_some();
        if order.is_huge() { first(order) } else { first(Order::HUGE) || self.fullest(order, tried).is_some() }
    }

    /// A huge frame for a block, all of it free: the first whose other half is not, for those that are free together
    /// serve order 10. Of a block of order 10 the first.
    #[inline]
    pub(crate) fn first(&self, order: Order, want: Want, tried: u32) -> Option<usize> {
        let free = self.free();
        let pairs = both_halves(free.all);
        let liked = if want == Want::Free { free.all } else { free.installed } & !tried;
        let found = match order {
            Order::MAX => liked & pairs & FIRST_HALVES,
            _ if liked & !pairs != 0 => liked & !pairs,
            _ => liked,
        };
        (found != 0).then(|| found.trailing_zeros() as usize)
    }

    /// The free huge frames that memory is behind and whose other halves are not free, a bit each.
    #[inline]
    pub(crate) fn lone(&self) -> u32 {
        self.free().lone()
    }

    /// The huge frames that are free as a whole.
    #[inline]
    pub(crate) fn free(&self) -> Free {
        Free { all: self.mask(HugeEntry::is_all_free), installed: self.mask(|entry| Want::Installed.matches(entry)) }
    }
}

/// The huge frames of a tree that are free as a whole, a bit each.
#[derive(Clone, Copy)]
pub(crate) struct Free {
    pub(crate) all: u32,
    /// Those with memory behind them.
    pub(crate) installed: u32,
}

/// A tree with so many free pairs of huge frames need not spare them.
pub(crate) const PLENTY: u32 = 3;

impl Free {
    /// The same without a pair, by its first half.
    pub(crate) const fn without(self, pair: HugeId) -> Self {
        let both = 3 << (pair.0 % HUGE_PER_TREE);
        Self { all: self.all & !both, installed: self.installed & !both }
    }

    /// Blocks of order 10, each by its first half.
    #[inline]
    pub(crate) const fn pairs(self) -> u32 {
        both_halves(self.all) & FIRST_HALVES
    }

    /// The same, but with memory behind both halves.
    #[inline]
    pub(crate) const fn installed_pairs(self) -> u32 {
        both_halves(self.installed) & FIRST_HALVES
    }

    /// Those with memory whose other halves are not free.
    #[inline]
    pub(crate) const fn lone(self) -> u32 {
        self.installed & !both_halves(self.all)
    }

    /// Whether order 9 had better spare the pairs: few there are, and others than their halves.
    #[inline]
    pub(crate) const fn spares_pairs(self) -> bool {
        self.lone() != 0 && self.pairs().count_ones() < PLENTY
    }
}

/// Of each block of order 10 the first half.
const FIRST_HALVES: u32 = 0x5555_5555;

/// Of some huge frames of a tree those that are there with the other half.
#[inline]
const fn both_halves(free: u32) -> u32 {
    let first = free & free >> 1 & FIRST_HALVES;
    first | first << 1
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
    fn a_block_of_order_9_breaks_a_pair_only_if_nothing_else_is_free() {
        let of = |free: &[u16]| {
            let entry = |free: &u16| match free {
                512 => HugeEntry::FREE_INSTALLED,
                513 => HugeEntry::FREE_EVICTED,
                free => used(*free),
            };
            Entries::new(free.iter().map(entry))
        };
        let first = |entries: &Entries, order, want| entries.first(order, want, 0);
        let mixed = of(&[512, 512, 0, 512, 513, 7]);
        assert_eq!(first(&mixed, Order::HUGE, Want::Installed), Some(3));
        assert_eq!(mixed.first(Order::HUGE, Want::Installed, 1 << 3), Some(0));
        assert_eq!(mixed.first(Order::HUGE, Want::Free, 1 << 3), Some(4));
        assert_eq!(first(&mixed, Order::MAX, Want::Installed), Some(0));
        assert_eq!((mixed.lone(), mixed.free().pairs()), (1 << 3, 1));
        // A half without memory is half of a pair all the same.
        let evicted = of(&[9, 9, 512, 513, 513, 512]);
        assert_eq!((evicted.lone(), evicted.free().pairs()), (0, 1 << 2 | 1 << 4));
        assert_eq!(first(&evicted, Order::HUGE, Want::Installed), Some(2));
        assert_eq!(first(&evicted, Order::MAX, Want::Installed), Some(2));
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
