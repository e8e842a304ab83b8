//! Where to look for a block: near the last one, then by the hints, then everywhere.
//!
//! A [`Spot`] remembers where a CPU (or all callers without a handle together) found its last
//! blocks. When that place is used up, trees are tried in the order of the policy's ranks, and in
//! each rank frames with memory behind them before evicted ones. Only after a recount of all hints
//! from the entries, a look at every tree that they then list, reserved or not, and a last one at
//! the entries themselves is there nothing left. The search changes no owner by itself: it calls
//! the lower level, which does.

use crate::class::{CLASSES, Class, Rank};
use crate::hint::Want;
use crate::lower::Taken;
use crate::sync::Ordering;
use crate::tenant::{Tenant, tree_of};
use shared_layout::header::HUGE_PER_TREE;
use shared_layout::{HugeEntry, HugeId, Order};

/// Trees with room in used frames that a search tries in each step before it goes on: with memory
/// badly fragmented for an order, each such tree costs a look at all its rows.
const PARTIAL_TREES: u32 = 8;

/// A huge frame with no more free frames than this is emptied in one go.
pub(crate) const CROWDED_FRAMES: u16 = 64;

/// What to try, in this order: a want, and the worst rank that a tree may have for it.
const SMALL_STEPS: [(Want, Rank); 13] = [
    (Want::Crowded, Rank::Match),
    (Want::Mixed, Rank::Match),
    (Want::Sparse, Rank::Match),
    (Want::Installed, Rank::Fresh),
    (Want::Free, Rank::Fresh),
    (Want::Crowded, Rank::Demote),
    (Want::Installed, Rank::Demote),
    (Want::Free, Rank::Demote),
    (Want::Crowded, Rank::Steal),
    (Want::Mixed, Rank::Steal),
    (Want::Sparse, Rank::Steal),
    (Want::Installed, Rank::Steal),
    (Want::Free, Rank::Steal),
];
const HUGE_STEPS: [(Want, Rank); 6] = [
    (Want::Installed, Rank::Fresh),
    (Want::Free, Rank::Fresh),
    (Want::Installed, Rank::Demote),
    (Want::Free, Rank::Demote),
    (Want::Installed, Rank::Steal),
    (Want::Free, Rank::Steal),
];

/// Where the last blocks were found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spot {
    /// For each class, the huge frame that small blocks come from.
    pub(crate) small: [Option<HugeId>; CLASSES],
    /// Where to look for the next huge frame.
    pub(crate) huge: HugeId,
    /// Where to look for small blocks while there is no such huge frame.
    pub(crate) home: u32,
    /// The first tree that was full until this CPU freed a huge frame in it: its lines are near.
    pub(crate) back: Option<u32>,
    /// The tree that this CPU takes huge frames from, if it reserved one.
    pub(crate) tree: Option<u32>,
    /// A huge frame with memory behind it that was freed just now: it is warm.
    pub(crate) freed: Option<HugeId>,
    /// No free huge frame with memory behind it was found lately: evicted ones will do.
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

impl Tenant<'_> {
    /// The next huge frame in use with little room, around the tree of the last one: while a tree is
    /// crowded its huge frames are much alike, and going through them in order saves the search.
    pub(crate) fn next_crowded(&self, last: HugeId) -> Option<HugeId> {
        let first = tree_of(last) * HUGE_PER_TREE;
        let near = |e: HugeEntry| e.has_room() && e.free() <= CROWDED_FRAMES;
        let behind = last.0 + 1..first + HUGE_PER_TREE;
        [behind, first..last.0].into_iter().find_map(|range| {
            let found = self.lower.entries(range.start, range.len() as u32).position(near);
            found.map(|i| HugeId(range.start + i as u32))
        })
    }

    /// Takes a block of `order`, the spot first. With `reserve`, the trees that blocks come from are
    /// marked as this spot's own.
    pub(crate) fn take(&self, spot: &mut Spot, order: Order, class: Class, reserve: bool) -> Option<Taken> {
        let near = if order.is_huge() {
            // The spot for huge blocks follows their own class; others have to search.
            if class == Class::HUGE { self.take_near(spot, order, reserve) } else { None }
        } else {
            spot.small[usize::from(class.get())].and_then(|huge| self.lower.take(huge, order))
        };
        near.or_else(|| self.search(spot, order, class, reserve, |huge| self.lower.take(huge, order)))
    }

    /// A huge frame for order 9 in the obvious place: freed just now, or next to the last one.
    #[inline]
    pub(crate) fn take_next(&self, spot: &mut Spot) -> Option<Taken> {
        if let Some(freed) = spot.freed.take() {
            let taken = self.lower.take_huge_if(freed, |e| Want::Installed.matches(e));
            if taken.is_some() {
                return taken;
            }
        }
        let (huge, any) = (spot.huge, spot.any);
        // The first frame of a tree: is the tree one for us? That is for `take_near`.
        if huge.0.is_multiple_of(HUGE_PER_TREE) {
            return None;
        }
        spot.huge = HugeId(huge.0 + 1);
        self.lower.take_huge_if(huge, |e| any || !e.is_evicted())
    }

    /// The next huge frames behind the last one, and those of the next tree if it will do as well.
    fn take_near(&self, spot: &mut Spot, order: Order, reserve: bool) -> Option<Taken> {
        let want = if spot.any { Want::Free } else { Want::Installed };
        let step = order.huge_frames();
        let mut at = spot.huge.0.next_multiple_of(step);
        if at.is_multiple_of(HUGE_PER_TREE)
            && let Some(tree) = spot.back.take()
        {
            at = tree * HUGE_PER_TREE;
        }
        // Two trees at most: what is left of one, and the one behind it.
        for _ in 0..2 {
            if at.is_multiple_of(HUGE_PER_TREE) && !self.enter(spot, at / HUGE_PER_TREE, want, reserve) {
                break;
            }
            let end = (at / HUGE_PER_TREE + 1) * HUGE_PER_TREE;
            while at < end {
                let huge = HugeId(at);
                at += step;
                let taken = if order == Order::HUGE {
                    self.lower.take_huge_if(huge, |e| want.matches(e))
                } else {
                    self.lower.entry(huge).filter(|e| want.matches(*e)).and_then(|_| self.lower.take(huge, order))
                };
                if taken.is_some() {
                    spot.huge = HugeId(at);
                    return taken;
                }
            }
        }
        spot.huge = HugeId(at);
        None
    }

    /// Leaves the tree in hand for one that may be used for huge frames without a search, if it may:
    /// then it takes on their class.
    fn enter(&self, spot: &mut Spot, tree: u32, want: Want, reserve: bool) -> bool {
        match spot.tree.take() {
            Some(left) => self.leave(Some(left)),
            None => tree.checked_sub(1).into_iter().for_each(|left| self.recount_tree(left)),
        }
        let hint = self.trees.get(tree);
        let rank = self.policy.rank(Class::HUGE, hint.class());
        if !hint.promises(want) || hint.is_reserved() || rank > Rank::Fresh {
            return false;
        }
        let hint = hint.with_class(Class::HUGE);
        if reserve {
            spot.tree = Some(tree);
            self.trees.set(tree, hint.reserve());
        } else {
            self.trees.set(tree, hint);
        }
        true
    }

    /// The slow path: another huge frame, for `grab` to take from.
    pub(crate) fn search<T>(
        &self,
        spot: &mut Spot,
        order: Order,
        class: Class,
        reserve: bool,
        mut grab: impl FnMut(HugeId) -> Option<T>,
    ) -> Option<T> {
        let epoch = self.return_epoch.load(Ordering::Acquire);
        if reserve && epoch != spot.epoch {
            spot.epoch = epoch;
            self.recount_trees();
        }
        if let Some(found) = self.search_by_hint(spot, order, class, reserve, false, &mut grab) {
            return Some(found);
        }
        // What is left may be in trees that others reserved.
        if let Some(found) = self.search_by_hint(spot, order, class, reserve, true, &mut grab) {
            return Some(found);
        }
        // No hint helped: perhaps they are stale.
        self.recount_trees();
        if let Some(found) = self.search_by_hint(spot, order, class, reserve, true, &mut grab) {
            return Some(found);
        }
        // Others may change hints as fast as we count: only the entries can say that nothing is left.
        let fits = |e: HugeEntry| if order.is_huge() { e.is_all_free() } else { e.take_order(order).is_some() };
        let all = self.lower.entries(0, self.huge_frames()).enumerate().step_by(order.huge_frames() as usize);
        all.filter(|(_, e)| fits(*e)).find_map(|(i, _)| grab(HugeId(i as u32)))
    }

    fn recount_trees(&self) {
        for tree in 0..self.trees.len() {
            self.recount_tree(tree);
        }
    }

    fn search_by_hint<T>(
        &self,
        spot: &mut Spot,
        order: Order,
        class: Class,
        reserve: bool,
        thorough: bool,
        grab: &mut impl FnMut(HugeId) -> Option<T>,
    ) -> Option<T> {
        let steps: &[(Want, Rank)] = if order.is_huge() { &HUGE_STEPS } else { &SMALL_STEPS };
        let own = if order.is_huge() { spot.tree } else { spot.small[usize::from(class.get())].map(tree_of) };
        let home = if order.is_huge() { tree_of(spot.huge) } else { own.unwrap_or(spot.home) };
        for &(want, worst) in steps {
            let mut patience = if want.is_partial() && !thorough { PARTIAL_TREES } else { u32::MAX };
            // Our own tree need not be listed.
            let others = self.trees.listed(want, home, thorough).filter(|tree| Some(*tree) != own);
            for tree in own.into_iter().chain(others) {
                let mut hint = self.trees.get(tree);
                if !hint.promises(want) {
                    if !thorough && own != Some(tree) {
                        self.trees.unlist(want, tree);
                    }
                    continue;
                }
                if hint.is_reserved() && own != Some(tree) && !thorough {
                    continue;
                }
                if self.policy.rank(class, hint.class()) > worst {
                    continue;
                }
                if want.is_partial() || self.policy.rank(class, hint.class()) > Rank::Fresh {
                    // It may have become emptier, or its last block be gone and with it the class.
                    self.recount_tree(tree);
                    hint = self.trees.get(tree);
                    if !hint.promises(want) {
                        continue;
                    }
                }
                if let Some((huge, found)) = self.search_tree(tree, order, want, grab) {
                    let rank = self.policy.rank(class, hint.class());
                    let class_now = if matches!(rank, Rank::Fresh | Rank::Demote) { class } else { hint.class() };
                    self.settle(spot, huge, order, class, class_now, reserve, want);
                    return Some(found);
                }
                patience -= 1;
                if patience == 0 {
                    break;
                }
            }
        }
        None
    }

    /// Tries the fitting huge frames of a tree, the fullest first; recounts a tree that has none.
    fn search_tree<T>(
        &self,
        tree: u32,
        order: Order,
        want: Want,
        grab: &mut impl FnMut(HugeId) -> Option<T>,
    ) -> Option<(HugeId, T)> {
        let first = tree * HUGE_PER_TREE;
        let step = order.huge_frames() as usize;
        let need = if order.is_huge() { 0 } else { order.frames() as u16 };
        // Blocks of order 9 and 10 fit any frame that matches; of the others, try the fullest.
        let mut tried = 0u32;
        loop {
            let mut best = None;
            for (i, entry) in self.lower.entries(first, HUGE_PER_TREE).enumerate().step_by(step) {
                let free = entry.free();
                if want.matches(entry)
                    && free >= need
                    && tried & 1 << i == 0
                    && best.is_none_or(|(_, least)| free < least)
                {
                    best = Some((i, free));
                    if !want.is_partial() {
                        break;
                    }
                }
            }
            let Some((i, _)) = best else {
                self.recount_tree(tree);
                return None;
            };
            let huge = HugeId(first + i as u32);
            if let Some(found) = grab(huge) {
                return Some((huge, found));
            }
            tried |= 1 << i;
        }
    }

    /// Remembers where a search ended.
    #[expect(clippy::too_many_arguments, reason = "all of a search's outcome, for its one caller")]
    fn settle(
        &self,
        spot: &mut Spot,
        huge: HugeId,
        order: Order,
        class: Class,
        tree_class: Class,
        reserve: bool,
        want: Want,
    ) {
        let tree = tree_of(huge);
        if order.is_huge() {
            let own = reserve && class == Class::HUGE;
            let reserved = own || self.trees.get(tree).is_reserved();
            if own && spot.tree != Some(tree) {
                self.leave(spot.tree.replace(tree));
            }
            self.recount_tree_as(tree, reserved, tree_class);
            if class != Class::HUGE {
                return;
            }
            spot.huge = HugeId(huge.0 + order.huge_frames());
            spot.any = want == Want::Free;
            if !self.trees.get(tree).promises(want) {
                // That was the last one here.
                spot.huge = HugeId((tree + 1) * HUGE_PER_TREE);
            }
            return;
        }
        let old = spot.small[usize::from(class.get())].replace(huge).map(tree_of);
        if reserve && old != Some(tree) {
            self.leave(old);
        }
        let reserved = reserve || self.trees.get(tree).is_reserved();
        self.recount_tree_as(tree, reserved, tree_class);
    }

    /// Gives a tree's reservation up.
    pub(crate) fn leave(&self, tree: Option<u32>) {
        if let Some(tree) = tree {
            self.recount_tree_as(tree, false, self.trees.get(tree).class());
        }
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
