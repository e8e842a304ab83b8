//! Where to look for a block: near the last one, then by the hints, then everywhere.
//!
//! A [`Spot`] remembers where a CPU found its last blocks; callers without a handle, who come in by
//! [`Tenant::alloc`], share one. When that place is used up, trees are tried in the order of the policy's ranks, and in
//! each rank backed frames before evicted ones. Only after a recount of all hints
//! from the entries, a look at every tree that they then list, reserved or not, and a last one at
//! the entries themselves is there nothing left. The search itself changes no owner: it calls
//! the lower level, which does.

use crate::block::Allocation;
use crate::class::{Class, Rank};
use crate::error::AllocError;
use crate::hint::{Want, tree_of, tree_range};
use crate::lower::Taken;
use crate::spot::Spot;
use crate::sync::Ordering;
use crate::tenant::Tenant;
use shared_layout::table::HUGE_PER_TREE;
use shared_layout::{HugeEntry, HugeId, HugeRange, Order};

/// Trees with room in used frames that a search tries in each step before it goes on: with memory
/// badly fragmented for an order, each such tree costs a look at all its rows.
const PARTIAL_TREES: u32 = 8;

/// A huge frame with no more free frames than this is emptied in one go.
pub(crate) const CROWDED_FRAMES: u16 = 64;

/// The attempts, in this order: a want, and the worst rank that a tree may have for it.
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

/// The goal of a search.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Query {
    order: Order,
    class: Class,
    /// The trees that blocks come from are marked as the asking CPU's own.
    reserve: bool,
    /// Every tree is looked at, listed or not, reserved by others or not.
    thorough: bool,
}

impl Query {
    /// For a caller without a handle.
    pub(crate) const fn new(order: Order, class: Class) -> Self {
        Self { order, class, reserve: false, thorough: false }
    }

    /// For a CPU with a handle.
    pub(crate) const fn reserving(order: Order, class: Class) -> Self {
        Self { reserve: true, ..Self::new(order, class) }
    }

    const fn thorough(self) -> Self {
        Self { thorough: true, ..self }
    }
}

impl Tenant<'_> {
    /// Allocates a block of `order` without a handle, for callers that have none.
    ///
    /// # Errors
    /// [`AllocError::OutOfMemory`] after a pass over all entries found none.
    pub fn alloc(&self, order: Order) -> Result<Allocation, AllocError> {
        let packed = self.spot.load(Ordering::Relaxed);
        let mut spot = Spot::unpack(packed);
        let taken = self.take(&mut spot, Query::new(order, Class::of(order)));
        // Others may have moved it meanwhile; theirs or ours, it is only a place to look.
        if spot.pack() != packed {
            self.spot.store(spot.pack(), Ordering::Relaxed);
        }
        taken.map(|taken| Allocation::new(taken, order)).ok_or(AllocError::OutOfMemory(order))
    }

    /// The next huge frame in use with little room, around the tree of the last one: while a tree is
    /// crowded its huge frames are much alike, and going through them in order saves the search.
    pub(crate) fn next_crowded(&self, last: HugeId) -> Option<HugeId> {
        let tree = tree_range(tree_of(last));
        let near = |e: HugeEntry| e.has_room() && e.free() <= CROWDED_FRAMES;
        let behind = HugeRange::between(HugeId(last.0 + 1), tree.end());
        [behind, HugeRange::between(tree.first(), last)].into_iter().find_map(|range| {
            let found = self.lower.entries(range).position(near);
            found.map(|i| HugeId(range.first().0 + i as u32))
        })
    }

    /// Takes a block, the spot first.
    pub(crate) fn take(&self, spot: &mut Spot, query: Query) -> Option<Taken> {
        let Query { order, class, .. } = query;
        let near = if order.is_huge() {
            // The spot for huge blocks follows their own class; others have to search.
            if class == Class::HUGE { self.take_near(spot, query) } else { None }
        } else {
            spot.small[usize::from(class.get())].and_then(|huge| self.lower.take(huge, order))
        };
        near.or_else(|| self.search(spot, query, |huge| self.lower.take(huge, order)))
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

    /// The next huge frames after the last one, and those of the next tree if it will do as well.
    fn take_near(&self, spot: &mut Spot, query: Query) -> Option<Taken> {
        let order = query.order;
        let want = if spot.any { Want::Free } else { Want::Installed };
        let step = order.huge_frames();
        let mut at = spot.huge.0.next_multiple_of(step);
        if at.is_multiple_of(HUGE_PER_TREE)
            && let Some(tree) = spot.back.take()
        {
            at = tree * HUGE_PER_TREE;
        }
        // Two trees at most: the rest of one, and the one after it.
        for _ in 0..2 {
            if at.is_multiple_of(HUGE_PER_TREE) && !self.enter(spot, at / HUGE_PER_TREE, want, query.reserve) {
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
        query: Query,
        mut grab: impl FnMut(HugeId) -> Option<T>,
    ) -> Option<T> {
        let order = query.order;
        let epoch = self.return_epoch.load(Ordering::Acquire);
        if query.reserve && epoch != spot.epoch {
            spot.epoch = epoch;
            self.recount_trees();
        }
        if let Some(found) = self.search_by_hint(spot, query, &mut grab) {
            return Some(found);
        }
        // What is left may be in trees that others reserved.
        if let Some(found) = self.search_by_hint(spot, query.thorough(), &mut grab) {
            return Some(found);
        }
        // No hint helped: perhaps they are stale.
        self.recount_trees();
        if let Some(found) = self.search_by_hint(spot, query.thorough(), &mut grab) {
            return Some(found);
        }
        // Others may change hints as fast as we count: only the entries can say that nothing is left.
        let fits = |e: HugeEntry| if order.is_huge() { e.is_all_free() } else { e.take_order(order).is_some() };
        let all = self.lower.entries(self.lower.all()).enumerate().step_by(order.huge_frames() as usize);
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
        query: Query,
        grab: &mut impl FnMut(HugeId) -> Option<T>,
    ) -> Option<T> {
        let Query { order, class, thorough, .. } = query;
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
                    self.settle(spot, query, huge, class_now, want);
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
        let range = tree_range(tree);
        let step = order.huge_frames() as usize;
        let need = if order.is_huge() { 0 } else { order.frames() as u16 };
        // Blocks of order 9 and 10 fit any frame that matches; of the others, try the fullest.
        let mut tried = 0u32;
        loop {
            let mut best = None;
            for (i, entry) in self.lower.entries(range).enumerate().step_by(step) {
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
            let huge = HugeId(range.first().0 + i as u32);
            if let Some(found) = grab(huge) {
                return Some((huge, found));
            }
            tried |= 1 << i;
        }
    }

    /// Remembers where a search ended: in `huge`, by this `want`; its tree is one of `tree_class` now.
    fn settle(&self, spot: &mut Spot, query: Query, huge: HugeId, tree_class: Class, want: Want) {
        let Query { order, class, reserve, .. } = query;
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
