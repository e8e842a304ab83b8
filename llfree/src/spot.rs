//! [`Spot`]: where a CPU, or the callers without a handle at one [`Place`], found their last blocks.
//!
//! A place to look and nothing more: any value will do. The spots of callers without a handle are
//! words of the program, not of a table: in a table they would be as many for 1 GiB as for 1 TiB, and
//! only those who work in this program come back to them. Which word is whose is left to a hash of
//! table and place. Two tables that meet in one word disturb each other: a tree that one of them reserved may stay
//! reserved until memory is short, as one does that a program leaves behind in a table which others use.

use crate::class::{CLASSES, Class};
use crate::vicinity::Vicinity;
use shared_layout::table::HUGE_PER_TREE;
use shared_layout::{HugeId, Order};

/// The place where the last blocks were found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spot {
    /// For each class, the huge frame that small blocks come from.
    pub(crate) small: [Option<HugeId>; CLASSES],
    /// The place to look for the next huge frame.
    pub(crate) huge: HugeId,
    /// The place to look for small blocks while there is no such huge frame.
    pub(crate) home: u32,
    /// The trees to look at first.
    pub(crate) vicinity: Vicinity,
    /// The first tree that was full until this CPU freed a huge frame in it: its lines are near.
    pub(crate) back: Option<u32>,
    /// The tree that this CPU takes huge frames from, if it reserved one.
    pub(crate) tree: Option<u32>,
    /// Backed huge frames that were freed lately: they are warm.
    pub(crate) freed: Freed,
    /// The last huge block was found in a tree where order 9 spares the pairs: others are searched for before one is broken.
    pub(crate) spares: bool,
    /// More huge frames of that tree that are no half of a pair.
    pub(crate) lone: Listed,
    /// More pairs of the tree that the last scattered one came from, by their first halves.
    pub(crate) pairs: Listed,
    /// No free, backed huge frame was found lately: evicted ones will do.
    pub(crate) any: bool,
    /// `return_epoch` when a handle last believed the hints.
    pub(crate) epoch: Option<u64>,
    /// For each order below 9, the huge frame that the last single block of it came from; movable ones.
    last: [HugeId; SMALL_ORDERS],
    /// For each of these orders, huge frames that may have more of them.
    listed: [Listed; SMALL_ORDERS],
    /// A pair of huge frames that was freed just now.
    pub(crate) freed_pair: Option<HugeId>,
    /// The huge frame that small blocks come from was free as a whole when a search found it.
    pub(crate) is_fresh: bool,
    /// The tree that single blocks come from.
    pub(crate) last_tree: Option<u32>,
    /// It was reserved for them.
    pub(crate) owns_last: bool,
    /// Searches that take the first tree with little room, because an earlier one found no better.
    pub(crate) few_searches: u8,
    /// Single blocks that were searched for, modulo 256.
    pub(crate) singles: u8,
    /// Looks for a block that no hint offers, modulo 256.
    looks: u8,
    /// Blocks that may come from beyond the vicinity before it is looked through again.
    abroad: u8,
    /// The orders that may be refused still, a bit each: the last search found none.
    refused: u16,
    /// Searches for blocks of this order and larger ones that go without a walk over trees in use.
    owed: u32,
    owed_order: Order,
    /// Trees, from the first, that have to be counted before they are believed again.
    pub(crate) stale: u32,
}

/// The last huge frames that were freed. Without a branch to remember one: what is freed is freed in a few nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Freed {
    /// A ring; [`NONE`] where there is nothing.
    frames: [u32; FREED],
    next: u32,
}

/// Huge frames that are remembered: two of three that a handle frees among blocks of all orders it meets again.
const FREED: usize = 8;

impl Freed {
    pub(crate) const NOTHING: Self = Self { frames: [NONE; FREED], next: 0 };

    #[inline]
    pub(crate) const fn put(&mut self, huge: HugeId) {
        self.frames[self.next as usize % FREED] = huge.0;
        self.next = self.next.wrapping_add(1);
    }

    /// The last one that was not asked for since.
    #[inline]
    pub(crate) const fn pop(&mut self) -> Option<HugeId> {
        let last = self.next.wrapping_sub(1);
        let frame = &mut self.frames[last as usize % FREED];
        if *frame == NONE {
            return None;
        }
        self.next = last;
        Some(HugeId(core::mem::replace(frame, NONE)))
    }
}

/// Some huge frames of one tree, as they were when it was looked at: going through them saves searches.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Listed {
    tree: u32,
    rest: u32,
    /// No others of the tree would have done.
    is_all: bool,
}

impl Listed {
    pub(crate) const NOTHING: Self = Self { tree: u32::MAX, rest: 0, is_all: false };

    /// Those of a tree, a bit each; and whether these are all that would do.
    pub(crate) const fn new(tree: u32, (listed, is_all): (u32, bool)) -> Self {
        Self { tree, rest: listed, is_all }
    }

    /// The same without one of them.
    pub(crate) const fn but(self, huge: HugeId) -> Self {
        Self { rest: self.rest & !(1 << (huge.0 % HUGE_PER_TREE)), ..self }
    }

    /// The last one comes once more, if it has more.
    #[inline]
    pub(crate) const fn again(&mut self, last: HugeId, has_more: bool) {
        self.rest |= (has_more as u32) << (last.0 % HUGE_PER_TREE);
    }

    /// Whether a tree was gone through.
    pub(crate) const fn is_through(&self, tree: u32) -> bool {
        self.is_all && self.rest == 0 && self.tree == tree
    }

    #[inline]
    pub(crate) const fn is_empty(&self) -> bool {
        self.rest == 0
    }

    #[inline]
    pub(crate) const fn is_of(&self, tree: u32) -> bool {
        self.tree == tree
    }

    /// The tree, once all of them were tried.
    pub(crate) const fn through(&self) -> Option<u32> {
        if self.rest == 0 && self.tree != u32::MAX { Some(self.tree) } else { None }
    }

    #[inline]
    pub(crate) const fn next(&mut self) -> Option<HugeId> {
        if self.rest == 0 {
            return None;
        }
        let huge = HugeId(self.tree * HUGE_PER_TREE + self.rest.trailing_zeros());
        self.rest &= self.rest - 1;
        Some(huge)
    }
}

/// A look in this many sees every tree, whatever is known of it.
const LOOKS_AT_ALL: u8 = 16;
/// Blocks that a handle takes beyond its vicinity for one search: that costs each of them little, and there may be some at home
/// again.
const STAY_ABROAD: u8 = 32;

const SMALL_ORDERS: usize = Order::HUGE.get() as usize;

/// See [`Spot::reserved_trees`].
pub(crate) const TREE_COUNT: usize = CLASSES + 3;

const NONE: u32 = u32::MAX;
const ANY: u64 = 1 << 63;

impl Spot {
    /// A first spot.
    pub(crate) const fn at(vicinity: Vicinity, epoch: Option<u64>) -> Self {
        let tree = vicinity.first();
        Self {
            small: [None; CLASSES],
            huge: HugeId(tree * HUGE_PER_TREE),
            home: tree,
            vicinity,
            back: None,
            tree: None,
            freed: Freed::NOTHING,
            spares: false,
            lone: Listed::NOTHING,
            pairs: Listed::NOTHING,
            any: false,
            epoch,
            last: [HugeId(NONE); SMALL_ORDERS],
            listed: [Listed::NOTHING; SMALL_ORDERS],
            freed_pair: None,
            is_fresh: false,
            last_tree: None,
            owns_last: false,
            few_searches: 0,
            singles: 0,
            looks: 0,
            abroad: 0,
            refused: 0,
            owed: 0,
            owed_order: Order::BASE,
            stale: 0,
        }
    }

    /// Whether the next look for a block that no hint offers sees every tree: one in some does, and that of a caller without a
    /// handle.
    pub(crate) fn sees_all(&mut self) -> bool {
        self.looks = self.looks.wrapping_add(1);
        self.looks % LOOKS_AT_ALL == 1
    }

    /// A search found a block in this tree: where that is beyond the vicinity some more may come from there.
    pub(crate) fn found_in(&mut self, tree: u32, trees: u32) {
        self.abroad = if self.vicinity.has(tree, trees) { 0 } else { STAY_ABROAD };
    }

    /// Whether the next block may come from a tree without a search: if it is near or it has not been long since one.
    #[inline]
    pub(crate) fn may_stay_in(&mut self, tree: u32, trees: u32) -> bool {
        self.vicinity.has(tree, trees) || self.may_stay_abroad()
    }

    #[cold]
    fn may_stay_abroad(&mut self) -> bool {
        let may = self.abroad > 0;
        self.abroad -= u8::from(may);
        may
    }

    /// Whether the last search for a block of this order found none; others may have freed some since.
    #[inline]
    pub(crate) const fn was_refused(&self, order: Order) -> bool {
        self.refused >> order.get() & 1 != 0
    }

    pub(crate) const fn set_refused(&mut self, order: Order, is_refused: bool) {
        let bit = 1 << order.get();
        self.refused = if is_refused { self.refused | bit } else { self.refused & !bit };
    }

    /// A walk over the trees in use found nothing for `order`, at the cost of so many searches.
    pub(crate) fn owe(&mut self, order: Order, searches: u32) {
        if searches > 0 {
            self.owed = searches;
            self.owed_order = order;
        }
    }

    /// Whether a search for `order` pays off an earlier walk by doing without one.
    pub(crate) fn is_paying_off(&mut self, order: Order) -> bool {
        let pays = self.owed > 0 && order >= self.owed_order;
        self.owed -= u32::from(pays);
        pays
    }

    /// The huge frame that the last single block of an order came from.
    #[inline]
    pub(crate) fn last_of(&self, order: Order, class: Class) -> Option<HugeId> {
        let huge = *self.last.get(usize::from(order.get()))?;
        (class == Class::MOVABLE && huge.0 != NONE).then_some(huge)
    }

    /// The trees that a handle may have reserved, and at last its home.
    pub(crate) fn reserved_trees(&self) -> [Option<u32>; TREE_COUNT] {
        let mut trees = [None; TREE_COUNT];
        trees.iter_mut().zip(self.small).for_each(|(to, huge)| *to = huge.map(|huge| huge.0 / HUGE_PER_TREE));
        trees[CLASSES] = self.tree;
        trees[CLASSES + 1] = self.last_tree.filter(|_| self.owns_last);
        trees[CLASSES + 2] = self.vicinity.is_home.then_some(self.vicinity.first);
        trees
    }

    /// Whether a tree is marked as this caller's own.
    pub(crate) fn has_reserved(&self, tree: u32) -> bool {
        self.reserved_trees()[..CLASSES + 2].contains(&Some(tree))
    }

    /// Forgets the huge frames of some trees that the next blocks would come from.
    pub(crate) fn forget_listed(&mut self, is_abroad: impl Fn(u32) -> bool) {
        for huge in &mut self.last {
            if is_abroad(huge.0 / HUGE_PER_TREE) {
                *huge = HugeId(NONE);
            }
        }
        for listed in self.listed.iter_mut().chain([&mut self.lone, &mut self.pairs]) {
            if is_abroad(listed.tree) {
                *listed = Listed::NOTHING;
            }
        }
    }

    /// The next listed huge frame.
    #[inline]
    pub(crate) fn next_listed(&mut self, order: Order) -> Option<HugeId> {
        self.listed.get_mut(usize::from(order.get()))?.next()
    }

    /// Whether all huge frames of a tree that had blocks of this order were gone through.
    pub(crate) fn is_through(&self, order: Order, tree: u32) -> bool {
        self.listed.get(usize::from(order.get())).is_some_and(|listed| listed.is_through(tree))
    }

    /// Remembers huge frames of a tree, a bit each, all but the last one; and whether no others would do.
    pub(crate) fn list(&mut self, order: Order, tree: u32, listed: (u32, bool), last: HugeId) {
        if let Some(to) = self.listed.get_mut(usize::from(order.get())) {
            *to = Listed::new(tree, listed).but(last);
        }
    }

    /// Remembers it.
    pub(crate) fn remember(&mut self, order: Order, class: Class, huge: HugeId) {
        if let Some(last) = self.last.get_mut(usize::from(order.get()))
            && class == Class::MOVABLE
        {
            *last = huge;
        }
    }

    /// The spot of callers without a handle, in one word: they share one class of small blocks.
    pub(crate) fn pack(&self) -> u64 {
        let small = self.small[Class::MOVABLE.get() as usize].map_or(NONE, |huge| huge.0);
        u64::from(!small) | u64::from(self.huge.0 & 0x7fff_ffff) << 32 | if self.any { ANY } else { 0 }
    }

    /// The huge frame that small blocks come from, in such a word.
    #[inline]
    pub(crate) fn small_of(word: u64) -> Option<HugeId> {
        let small = !(word as u32);
        (word != 0 && small != NONE).then_some(HugeId(small))
    }

    /// Any word will do: it is only a place to look. Zero is that of callers who come for the first time.
    pub(crate) fn unpack(word: u64, trees: u32, place: &Place) -> Self {
        if word == 0 {
            return Self::at(Vicinity::all(place.first_tree(trees)), None);
        }
        let huge = (word >> 32) as u32 & 0x7fff_ffff;
        let mut spot = Self::at(Vicinity::all(huge / HUGE_PER_TREE), None);
        spot.small[Class::MOVABLE.get() as usize] = Self::small_of(word);
        spot.huge = HugeId(huge);
        spot.any = word & ANY != 0;
        spot
    }
}

/// Where a call without a handle comes from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place(Option<usize>);

/// The words of all places.
const WORDS: usize = 64;
/// A kernel's stack is 16 KiB or more: two threads are further apart, one mostly is not.
const STACK_SHIFT: u32 = 14;

impl Place {
    pub(crate) const BY_STACK: Self = Self(None);

    pub(crate) const fn numbered(number: usize) -> Self {
        Self(Some(number))
    }

    /// Its number, spread over all bits.
    #[inline]
    fn hash(self) -> u64 {
        /// The golden ratio as a fraction of 2^64: its multiples never crowd.
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let on_stack = 0u8;
        let number = self.0.unwrap_or_else(|| core::ptr::from_ref(&on_stack).addr() >> STACK_SHIFT);
        (number as u64).wrapping_add(1).wrapping_mul(STEP)
    }

    /// The tree where callers at this place begin.
    fn first_tree(self, trees: u32) -> u32 {
        (((self.hash() >> 32) * u64::from(trees)) >> 32) as u32
    }

    /// The word of this place for a table.
    #[inline]
    pub(crate) fn word(self, table: usize) -> &'static Word {
        let hash = self.hash() ^ (table as u64 >> 6).wrapping_mul(0xd6e8_feb8_6659_fd93);
        &words::ALL[(hash >> 58) as usize % WORDS]
    }
}

pub(crate) use words::Word;

/// One place a cache line. In a program of checkers, which run it many times over, nothing is remembered.
#[cfg(not(any(loom, shuttle, stepping)))]
mod words {
    use super::WORDS;
    use core::sync::atomic::{AtomicU64, Ordering};
    use shared_layout::FrameId;

    #[repr(align(64))]
    pub(crate) struct Word {
        spot: AtomicU64,
        /// A frame of the row that the last small block came from.
        row: AtomicU64,
    }

    pub(super) static ALL: [Word; WORDS] = [const { Word { spot: AtomicU64::new(0), row: AtomicU64::new(0) } }; WORDS];

    impl Word {
        #[inline]
        pub(crate) fn load(&self) -> u64 {
            self.spot.load(Ordering::Relaxed)
        }

        /// False, and nothing changed, if others did.
        pub(crate) fn replace(&self, old: u64, new: u64) -> bool {
            self.spot.compare_exchange(old, new, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        }

        #[inline]
        pub(crate) fn row(&self) -> Option<FrameId> {
            let frame = self.row.load(Ordering::Relaxed);
            // From its start on: what was there is no place that a block was freed at.
            (frame != 0).then_some(FrameId(frame & !63))
        }

        pub(crate) fn set_row(&self, frame: FrameId) {
            // Zero is nowhere, and the row has more than one frame.
            self.row.store(frame.0 | 1, Ordering::Relaxed);
        }
    }
}

#[cfg(any(loom, shuttle, stepping))]
mod words {
    use super::WORDS;
    use shared_layout::FrameId;

    pub(crate) struct Word;

    pub(super) static ALL: [Word; WORDS] = [const { Word }; WORDS];

    impl Word {
        pub(crate) fn load(&self) -> u64 {
            0
        }

        pub(crate) fn replace(&self, _old: u64, _new: u64) -> bool {
            false
        }

        pub(crate) fn row(&self) -> Option<FrameId> {
            None
        }

        pub(crate) fn set_row(&self, _frame: FrameId) {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spot_survives_its_word() {
        let place = Place::numbered(3);
        let mut spot = Spot { huge: HugeId(77), any: true, ..Spot::at(Vicinity::all(0), None) };
        for small in [None, Some(HugeId(0)), Some(HugeId(5))] {
            spot.small[1] = small;
            let again = Spot::unpack(spot.pack(), 128, &place);
            assert_eq!((again.small, again.huge, again.any), (spot.small, spot.huge, spot.any));
        }
    }

    #[test]
    fn the_huge_frame_that_was_freed_last_comes_first() {
        let mut freed = Freed::NOTHING;
        assert_eq!(freed.pop(), None);
        (0..FREED as u32 + 3).for_each(|huge| freed.put(HugeId(huge)));
        for huge in (3..FREED as u32 + 3).rev() {
            assert_eq!(freed.pop(), Some(HugeId(huge)));
        }
        assert_eq!(freed.pop(), None);
        freed.put(HugeId(5));
        assert_eq!((freed.pop(), freed.pop()), (Some(HugeId(5)), None));
    }

    #[test]
    fn places_begin_far_from_each_other() {
        let firsts: std::collections::BTreeSet<_> = (0..8).map(|place| Place::numbered(place).first_tree(64)).collect();
        assert!(firsts.len() == 8 && firsts.iter().all(|tree| *tree < 64), "{firsts:?}");
        let spots = (0..4).map(|place| Spot::unpack(0, 64, &Place::numbered(place)).home);
        assert!(spots.eq((0..4).map(|place| Place::numbered(place).first_tree(64))));
    }
}
