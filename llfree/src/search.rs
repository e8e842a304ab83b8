//! Where to look for a block: near the last one, then by the hints, then everywhere.
//!
//! A [`Spot`] remembers where a CPU found its last blocks; callers without a handle have one by the
//! place they call from. When that is used up, one walk over the trees that are listed finds the
//! best by a table of steps: a want, the rank of the tree's class in the policy. It is
//! content with a good tree after some more looks, and goes on for a better one than a bad one for
//! longer. Order 10 goes by [the entries](crate::pairs) where trees are few. Only when no hint offers
//! anything, reserved or not, is every tree counted: then what comes of it is
//! [remembered](crate::refusal). The search itself changes no owner: it calls the lower level, which does.

use crate::block::Allocation;
use crate::class::{CLASSES, Class, Rank};
use crate::entries::{Entries, Want};
use crate::error::AllocError;
use crate::hint::{TreeHint, tree_of, tree_range};
use crate::pairs::Pairs;
use crate::query::{Broken, Query};
use crate::refusal::{Unsure, held_stays};
use crate::spot::{Listed, Spot, Word};
use crate::steps::{HUGE_STEPS, NO_STEP, SMALL_PARTIAL, SMALL_STEPS};
use crate::sync::Ordering;
use crate::taken::{Miss, Taken};
use crate::tenant::Tenant;
use shared_layout::table::HUGE_PER_TREE;
use shared_layout::{HugeId, Order};

/// Trees that a search counts and passes over because others may suit better.
const PROMISES_CHECKED: u32 = 16;
/// Trees that a search looks into beside each of the table once, before it counts all of them.
const MORE_TREES: u32 = 64;
/// One in this many single blocks has its tree counted.
const SINGLES: u8 = 8;
/// Trees that a search counts anew when the host returned memory, until it is through with all.
const RECOUNTS: u32 = 16;

impl Tenant<'_> {
    /// Allocates a block of `order` without a handle, for callers that have none. Callers at different
    /// [places](Self::at_place) keep out of each other's way.
    ///
    /// # Errors
    /// [`AllocError::OutOfMemory`] if at some moment during the call no such block was free.
    #[inline]
    pub fn alloc(&self, order: Order) -> Result<Allocation, AllocError> {
        let word = self.place.word(self.trees.id());
        // The usual case: the row that the last block came from has another one.
        if order < Order::ROW
            && let Some(first) = word.row()
            && let Some(taken) = self.noted(first.huge(), self.lower.take_in_row(first, order))
        {
            return Ok(Allocation::new(taken, order));
        }
        self.alloc_far(order, word)
    }

    #[inline(never)]
    fn alloc_far(&self, order: Order, word: &Word) -> Result<Allocation, AllocError> {
        let packed = word.load();
        let mut spot = Spot::unpack(packed, self.trees.len(), &self.place);
        let taken = self.take(&mut spot, Query::at_place(order));
        let moved = spot.pack();
        if moved != packed && !word.replace(packed, moved) {
            // Others moved it meanwhile. Theirs will do as well, but then the tree that we reserved is nobody's.
            let tree = |word| Spot::small_of(word).map(tree_of);
            self.leave(tree(moved).filter(|moved| tree(packed) != Some(*moved)));
        }
        let taken = taken.ok_or(AllocError::OutOfMemory(order))?;
        if order < Order::ROW {
            word.set_row(taken.frame);
        }
        Ok(Allocation::new(taken, order))
    }

    /// Whatever was taken; a budget that went back is made known.
    #[inline]
    pub(crate) fn noted<T>(&self, huge: impl Into<Option<HugeId>>, taken: Result<T, Miss>) -> Option<T> {
        match taken {
            Ok(taken) => Some(taken),
            Err(Miss::NoFit | Miss::Busy) => None,
            Err(Miss::Undone) => {
                huge.into().inspect(|huge| self.note_undone(*huge));
                None
            }
        }
    }

    /// For an instant frames looked taken that are free: whoever looked then has to be told.
    #[cold]
    pub(crate) fn note_undone(&self, huge: HugeId) {
        for half in [huge, HugeId(huge.0 ^ 1)] {
            if let Some(entry) = self.lower.entry(half) {
                self.note_free(half, entry, 1);
            }
        }
    }

    #[inline]
    pub(crate) fn grab(&self, huge: HugeId, order: Order) -> Option<Taken> {
        let taken = self.noted(huge, self.lower.take(huge, order))?;
        if self.lower.after_take(huge, order) {
            self.note_undone(huge);
        }
        Some(taken)
    }

    /// Takes a block, the spot first.
    pub(crate) fn take(&self, spot: &mut Spot, query: Query) -> Option<Taken> {
        let Query { order, class, .. } = query;
        let near = if order.is_huge() {
            // The spot for huge blocks follows their own class; others have to search, and so have pairs that are rare.
            let is_scattered = order == Order::MAX && spot.spares && !spot.any && self.trees.are_few();
            if class == Class::HUGE && !is_scattered { self.take_near(spot, query) } else { None }
        } else {
            let last = spot.last_of(order, class);
            let last = last.filter(|huge| spot.may_stay_in(tree_of(*huge), self.trees.len()));
            let near = [spot.small[usize::from(class.get())], last];
            let fits = |huge: &HugeId| self.lower.entry(*huge).is_some_and(|entry| entry.may_fit(order));
            let near = near.into_iter().flatten().filter(fits).find_map(|huge| self.grab(huge, order));
            near.or_else(|| self.take_listed(spot, query)).or_else(|| self.take_fresh(spot, query))
        };
        near.or_else(|| self.search(spot, query, |huge| self.grab(huge, order)))
    }

    /// The free huge frame after the last one that a search opened, in the same tree: what it found
    /// nothing better for once is not asked again before the tree is through.
    #[inline]
    fn take_fresh(&self, spot: &mut Spot, query: Query) -> Option<Taken> {
        let small = &mut spot.small[usize::from(query.class.get())];
        let next = small.filter(|_| query.single && spot.is_fresh)?.0 + 1;
        let breaks_pair = || next.is_multiple_of(2) && self.is_free(HugeId(next + 1));
        let is_next = !next.is_multiple_of(HUGE_PER_TREE)
            && self.lower.entry(HugeId(next)).is_some_and(|entry| Want::Installed.matches(entry))
            && !(self.trees.get(tree_of(HugeId(next))).has_lone() && breaks_pair());
        if !is_next {
            spot.is_fresh = false;
            return None;
        }
        *small = Some(HugeId(next));
        self.grab(HugeId(next), query.order)
    }

    /// A huge frame for order 9 in the obvious place: freed just now, or next to the last one.
    #[inline]
    pub(crate) fn take_next(&self, spot: &mut Spot) -> Option<Taken> {
        if spot.spares {
            return None;
        }
        if let Some(freed) = spot.freed.pop() {
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
        if order == Order::HUGE && spot.spares {
            return None;
        }
        let step = order.huge_frames();
        let mut at = spot.huge.0.next_multiple_of(step);
        if at.is_multiple_of(HUGE_PER_TREE)
            && let Some(tree) = spot.back.take()
        {
            at = tree * HUGE_PER_TREE;
        }
        // Two trees at most: the rest of one, and the one after it.
        for _ in 0..2 {
            let tree = at / HUGE_PER_TREE;
            if at.is_multiple_of(HUGE_PER_TREE) && !self.enter(spot, tree, want, query) {
                break;
            }
            if order == Order::MAX && !self.trees.get(tree).has_pair() {
                break;
            }
            let end = (tree + 1) * HUGE_PER_TREE;
            while at < end {
                let huge = HugeId(at);
                at += step;
                let taken = if order == Order::HUGE {
                    self.lower.take_huge_if(huge, |e| want.matches(e))
                } else {
                    self.lower.entry(huge).filter(|e| want.matches(*e)).and_then(|_| self.grab(huge, order))
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
    fn enter(&self, spot: &mut Spot, tree: u32, want: Want, Query { order, reserve, .. }: Query) -> bool {
        match spot.tree.take() {
            Some(left) => self.leave_emptied(left),
            None => {
                if let Some(left) = tree.checked_sub(1) {
                    self.recount_emptied(left, |hint| hint);
                }
            }
        }
        let may = |hint: TreeHint| {
            // One where some come first is for a search.
            let is_orderly = hint.promises(want) && !(order == Order::HUGE && hint.has_lone());
            is_orderly && !hint.is_reserved() && self.policy.rank(Class::HUGE, hint.class()) <= Rank::Fresh
        };
        // Looked at once more at the change: a tree that another caller has by now keeps its class.
        let take = |hint: TreeHint| {
            if may(hint) { hint.with_class(Class::HUGE).reserved(reserve && is_worth_keeping(hint)) } else { hint }
        };
        if !spot.vicinity.has(tree, self.trees.len()) || !may(self.trees.get(tree)) {
            return false;
        }
        let hint = self.trees.change(tree, take).0;
        spot.tree = (may(hint) && reserve && is_worth_keeping(hint)).then_some(tree);
        may(hint)
    }

    /// The slow path: another huge frame, for `grab` to take from.
    #[inline(never)]
    pub(crate) fn search<T>(
        &self,
        spot: &mut Spot,
        query: Query,
        mut grab: impl FnMut(HugeId) -> Option<T>,
    ) -> Option<T> {
        if let Some(tree) = query.through {
            self.leave_emptied(tree);
            // Nobody's any more.
            (spot.home, spot.small[usize::from(query.class.get())]) = (tree, None);
        }
        let epoch = self.return_epoch.load(Ordering::Acquire);
        let unsure = self.refusal.unsure(query.order, epoch)?;
        if spot.epoch.is_some() {
            self.catch_up(spot, epoch);
        }
        if query.order == Order::MAX && query.class == Class::HUGE && self.trees.are_few() {
            // What promises say of pairs is behind.
            match self.pair_in_turn(spot, query, unsure, &mut grab) {
                Pairs::Taken(taken) => return Some(taken),
                Pairs::Nothing => return self.refuse(spot, query, &mut grab),
                Pairs::ForSearch => {}
            }
        }
        let mut broken = Broken::default();
        if query.single
            && let Some(tree) = spot.last_tree
            && spot.may_stay_in(tree, self.trees.len())
            && let Some(found) = self.search_last(spot, query, tree, &mut broken, &mut grab)
        {
            return Some(found);
        }
        // Others may free blocks and take them again as fast as we look.
        let mut tries = 0;
        // What is left at last may be in trees that others reserved.
        for everywhere in [false, true] {
            while let Some((tree, mut step)) = self.best_tree(spot, query, everywhere, (unsure, &broken)) {
                tries += 1;
                if tries > self.trees.len() + MORE_TREES {
                    break;
                }
                // Frees say little of how full a tree is: it is counted before it is chosen for that.
                let mut seen = None;
                if query.want(step).is_partial() {
                    let entries = seen.insert(self.entries_of(tree));
                    let counted = query.step_of(self, self.recount_from(tree, entries, |hint| hint));
                    if counted != step && (counted == NO_STEP || tries < PROMISES_CHECKED) {
                        continue;
                    }
                    // After so many that were not as full as they seemed, what it has will do.
                    step = counted;
                }
                let is_worth_it = !query.order.is_huge() || is_worth_keeping(self.trees.get(tree));
                let claims = !everywhere && query.stays() && is_worth_it && self.own_tree(spot, query) != Some(tree);
                if claims && self.trees.change(tree, |hint| hint.reserved(true)).0.is_reserved() {
                    // Two that look at the same moment find the same.
                    continue;
                }
                let found = self.search_tree(tree, seen, query.order, query.want(step), &mut grab);
                let stays = found.as_ref().is_some_and(|(huge, _)| self.settle(spot, query, *huge, step, claims));
                if claims && !stays {
                    self.trees.change(tree, |hint| hint.reserved(false));
                }
                if let Some((_, found)) = found {
                    return Some(found);
                }
                // It was counted: most often it promises something else by now, or nothing.
                if query.step_of(self, self.trees.get(tree)) == step && !broken.add(tree) {
                    break;
                }
            }
        }
        self.refuse(spot, query, &mut grab)
    }

    /// The tree that the last single block came from, unless all was tried there.
    #[inline]
    fn search_last<T>(
        &self,
        spot: &mut Spot,
        query: Query,
        tree: u32,
        broken: &mut Broken,
        grab: &mut impl FnMut(HugeId) -> Option<T>,
    ) -> Option<T> {
        let is_through = spot.is_through(query.order, tree);
        let hint = if is_through { self.recount_tree(tree) } else { self.trees.get(tree) };
        let step = query.step_of(self, hint);
        if step > SMALL_PARTIAL || is_through {
            return None;
        }
        let Some((huge, found)) = self.search_tree(tree, None, query.order, query.want(step), grab) else {
            broken.add(tree);
            return None;
        };
        self.remember(spot, query, huge);
        Some(found)
    }

    /// The host returned memory without a word to the hints: counts some trees, the others later.
    fn catch_up(&self, spot: &mut Spot, epoch: u64) {
        if spot.epoch.replace(epoch) != Some(epoch) {
            self.refusal.forget_before(epoch);
            spot.stale = self.trees.len();
        }
        for _ in 0..RECOUNTS.min(spot.stale) {
            spot.stale -= 1;
            self.recount_tree(spot.stale);
        }
    }

    /// Tries the fitting huge frames of a tree, the fullest first, by entries that were read just now if the caller has
    /// some; recounts a tree that has none.
    fn search_tree<T>(
        &self,
        tree: u32,
        mut seen: Option<Entries>,
        order: Order,
        want: Want,
        grab: &mut impl FnMut(HugeId) -> Option<T>,
    ) -> Option<(HugeId, T)> {
        let first = tree_range(tree).first();
        let mut tried = 0u32;
        loop {
            let entries = seen.take().unwrap_or_else(|| self.entries_of(tree));
            let best =
                if want.is_partial() { entries.fullest(order, tried) } else { entries.first(order, want, tried) };
            let Some(index) = best else {
                self.recount_from(tree, &entries, |hint| hint);
                return None;
            };
            let huge = HugeId(first.0 + index as u32);
            if let Some(found) = grab(huge) {
                return Some((huge, found));
            }
            tried |= 1 << index;
        }
    }

    #[inline]
    pub(crate) fn entries_of(&self, tree: u32) -> Entries {
        let range = tree_range(tree);
        match self.lower.entry_array(range.first()) {
            Some(entries) => Entries::whole(entries),
            // The last tree.
            None => Entries::new(self.lower.entries(range)),
        }
    }

    /// No hint offers anything: looks at all entries, once for all who ask until something is freed.
    #[cold]
    #[inline(never)]
    fn refuse<T>(&self, spot: &mut Spot, query: Query, grab: &mut impl FnMut(HugeId) -> Option<T>) -> Option<T> {
        let order = query.order;
        loop {
            let epoch = self.return_epoch.load(Ordering::Acquire);
            let looking = self.refusal.begin(order, epoch);
            let may_come_back = !held_stays(epoch);
            let to_see = if spot.sees_all() { Unsure::ALL } else { looking.unsure };
            let (mut unsure, mut came_free) = (Unsure::NONE, false);
            for tree in (0..self.trees.len()).filter(|tree| to_see.has(*tree)) {
                // Before the look: what comes free after that finds no promise either, and withdraws. What the host holds may
                // come back at any moment, without a new epoch so far: so one look tells what it holds and what may serve.
                let is_promised = !self.trees.get(tree).offer(order).is_none();
                let entries = self.entries_of(tree);
                let glance = entries.glance();
                if glance.has_held() && may_come_back {
                    unsure = unsure.with(tree);
                }
                let may_serve = match order {
                    Order::MAX => glance.has_all_free() && entries.first(order, Want::Free, 0).is_some(),
                    Order::HUGE => glance.has_all_free(),
                    _ => glance.may_fit(order) && entries.fits(order),
                };
                if !may_serve && !is_promised {
                    continue;
                }
                let wants: &[Want] = if order.is_huge() { &[Want::Free] } else { &[Want::Crowded, Want::Free] };
                let mut tried = 0u32;
                let mut grab = |huge: HugeId| {
                    tried |= 1 << (huge.0 % HUGE_PER_TREE);
                    grab(huge)
                };
                for want in wants {
                    if let Some((huge, found)) = self.search_tree(tree, None, order, *want, &mut grab) {
                        let step = if order.is_huge() { HUGE_STEPS.len() } else { SMALL_STEPS.len() } as u8 - 1;
                        self.settle(spot, query, huge, step, false);
                        return Some(found);
                    }
                }
                // Others may be at work here. And what came free since, under a promise that was there before, withdrew nothing: it may
                // be in the host's hands by now, or have been and be back again. In this order: it was there while it was promised.
                let is_promised = !self.trees.get(tree).offer(order).is_none();
                let entries = self.entries_of(tree);
                let is_back = || entries.first(order.max(Order::HUGE), Want::Free, 0).is_some();
                if is_promised || may_come_back && (entries.glance().has_held() || is_back()) {
                    unsure = unsure.with(tree);
                }
                came_free |= entries.has_more(order, tried);
            }
            if came_free {
                continue;
            }
            // If something came free meanwhile it may be behind us: once more. Somebody made progress.
            if self.refusal.conclude(looking, unsure) && self.return_epoch.load(Ordering::Acquire) == epoch {
                return None;
            }
        }
    }

    /// Remembers where a search ended: in `huge`, by this step. Returns whether the tree is our own from now on.
    fn settle(&self, spot: &mut Spot, query: Query, huge: HugeId, step: u8, is_claimed: bool) -> bool {
        let Query { order, class, reserve, .. } = query;
        let tree = tree_of(huge);
        let takes_over = |rank| matches!(rank, Rank::Fresh | Rank::Demote);
        let class_now = |hint: TreeHint| match query.rank(self, hint) {
            rank if takes_over(rank) => hint.with_class(class),
            _ => hint,
        };
        if order == Order::MAX && query.rank(self, self.trees.get(tree)) > Rank::Demote {
            // One pair among others' blocks is no place to stay at.
            spot.spares = self.recount_tree(tree).has_lone();
            return false;
        }
        if order.is_huge() {
            let is_own = spot.tree == Some(tree);
            let own = query.stays() && (is_own || is_claimed);
            if class == Class::HUGE && !is_own {
                self.leave(core::mem::replace(&mut spot.tree, own.then_some(tree)));
            }
            let entries = self.entries_of(tree);
            let hint = self.recount_from(tree, &entries, |hint| class_now(hint).reserved(own || hint.is_reserved()));
            if class != Class::HUGE {
                return false;
            }
            let want = query.want(step);
            spot.huge = HugeId(huge.0 + order.huge_frames());
            spot.any = want == Want::Free;
            spot.spares = if order == Order::MAX { hint.has_lone() } else { query.is_choosy(step) };
            if spot.spares && order == Order::HUGE {
                spot.lone = Listed::new(tree, (entries.lone(), true)).but(huge);
            }
            if !hint.promises(want) {
                // That was the last one here.
                spot.huge = HugeId((tree + 1) * HUGE_PER_TREE);
            }
            return own;
        }
        if query.single {
            self.remember(spot, query, huge);
            spot.found_in(tree, self.trees.len());
            let is_partial = query.want(step).is_partial();
            if spot.last_tree != Some(tree) || is_claimed {
                let old = spot.last_tree.replace(tree).filter(|_| spot.owns_last);
                spot.owns_last = is_claimed && is_partial;
                self.leave(old.filter(|old| *old != tree));
            }
            if is_partial {
                // What is found among others' blocks is no place to stay at.
                spot.singles = spot.singles.wrapping_add(1);
                // A tree without more of these had better not promise them; the lists are of movable ones.
                let is_through = || class != Class::MOVABLE || spot.is_through(order, tree);
                if spot.singles.is_multiple_of(SINGLES) || order > Order::ROW && is_through() {
                    self.recount_tree(tree);
                }
                return true;
            }
        }
        spot.is_fresh = query.want(step) == Want::Installed;
        let old = spot.small[usize::from(class.get())].replace(huge).map(tree_of);
        if reserve {
            self.leave(old.filter(|old| *old != tree));
        }
        if reserve {
            // It is counted when we leave it. Another caller at our place may have left it already.
            self.trees.change(tree, |hint| class_now(hint).reserved(hint.is_reserved() || old != Some(tree)));
        } else {
            self.recount_tree_as(tree, class_now);
        }
        reserve
    }

    /// Gives a tree's reservation up.
    pub(crate) fn leave(&self, tree: Option<u32>) {
        if let Some(tree) = tree {
            self.recount_tree_as(tree, |hint| hint.reserved(false));
        }
    }

    /// Gives up a tree that most often has nothing left: then no walk chooses it to find that out.
    pub(crate) fn leave_emptied(&self, tree: u32) {
        self.recount_emptied(tree, |hint| hint.reserved(false));
    }

    /// As [`recount_tree_as`](Self::recount_tree_as), of a tree that most often has nothing left: a look is all there is to do then.
    #[inline]
    fn recount_emptied(&self, tree: u32, step: impl Fn(TreeHint) -> TreeHint) {
        if self.lower.glance(tree).has_nothing() {
            self.trees.change(tree, |hint| step(hint.recounted(TreeHint::NONE)));
            if self.lower.glance(tree).has_nothing() {
                return;
            }
        }
        self.recount_tree_as(tree, step);
    }

    pub(crate) fn recount_tree(&self, tree: u32) -> TreeHint {
        self.recount_tree_as(tree, |hint| hint)
    }

    /// Counts a tree from its entries; `step` changes its owner or its purpose with it.
    pub(crate) fn recount_tree_as(&self, tree: u32, step: impl Fn(TreeHint) -> TreeHint) -> TreeHint {
        self.recount_from(tree, &self.entries_of(tree), step)
    }

    /// The same, from entries that were read just now.
    fn recount_from(&self, tree: u32, entries: &Entries, step: impl Fn(TreeHint) -> TreeHint) -> TreeHint {
        let counted = TreeHint::count(entries);
        let (old, new) = self.change_hint(tree, Order::BASE, |hint| {
            let hint = step(hint).recounted(counted.hint);
            // A tree without any block is for nobody.
            if counted.all_free && !hint.is_reserved() { hint.with_class(Class::FREE) } else { hint }
        });
        if !old.promises_more_than(new) {
            return new;
        }
        // What came free after the count, and found the promise still there, is seen now.
        let again = TreeHint::count(&self.entries_of(tree)).hint;
        if again.promises_more_than(new) {
            return self.change_hint(tree, Order::BASE, |hint| hint.with_all_of(again)).1;
        }
        new
    }

    /// Changes a hint. If it promises more than before, blocks of up to that order, and up to `least`, are no longer refused.
    /// That goes first: whoever finds the promise made has nothing to withdraw.
    pub(crate) fn change_hint(
        &self,
        tree: u32,
        least: Order,
        step: impl Fn(TreeHint) -> TreeHint,
    ) -> (TreeHint, TreeHint) {
        let (old, new) = self.trees.change(tree, |hint| {
            let new = step(hint);
            if let Some(largest) = new.largest_over(hint) {
                self.refusal.withdraw(tree, largest.max(least));
            }
            new
        });
        // A look may have begun and seen the old hint meanwhile; and frees from now on find the promise made.
        if let Some(largest) = new.largest_over(old) {
            self.refusal.withdraw(tree, largest.max(least));
        }
        (old, new)
    }
}

/// A tree is reserved for huge frames while it has no blocks: elsewhere few are free, and the next search finds another
/// tree as fast as its mark would be made and taken away.
fn is_worth_keeping(hint: TreeHint) -> bool {
    hint.class() == Class::FREE
}

const _: () = assert!(CLASSES < 8, "a class is three bits of a hint");
