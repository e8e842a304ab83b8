//! Which tree suits a search best: a walk over the trees that are listed, as they were a moment ago.
//!
//! Few trees are looked at one by one. A handle walks through its [`Vicinity`] first, and beyond it only if nothing
//! there will do.

use crate::entries::Want;
use crate::hint::tree_of;
use crate::query::{Broken, Query};
use crate::refusal::Unsure;
use crate::spot::Spot;
use crate::steps::{
    HUGE_GOOD, HUGE_PASSES, NO_STEP, PARTIAL_PASSES, SMALL_GOOD, SMALL_PARTIAL, SMALL_PASSES, step_at, turn,
};
use crate::tenant::Tenant;
use crate::vicinity::{Look, Vicinity};

/// Trees that a search looks at one by one before it leaves out those that cannot serve it, 64 at a glance.
const LOOKS_IN_VAIN: u32 = 4;
/// What such a glance costs.
const LOOKS_PER_GLANCE: u32 = 8;
/// More trees that a search looks at when it knows a good one.
const MORE_LOOKS: u32 = 32;
/// The same when it knows one that had better serve others.
const MORE_LOOKS_FOR_BAD: u32 = 256;
/// The same while no tree had more than a little room: then one is as good as another.
const MORE_LOOKS_FOR_FEW: u32 = 2;
/// So many searches after one that looked at more believe that this is so.
const FEW_SEARCHES: u8 = 31;
/// Looks that a search may cost on average where no tree in use has what it wants: a walk that looked at more
/// is paid off by searches that take a free huge frame without one.
const LOOKS_PER_SEARCH: u32 = 8;

/// What a search knows, and the best tree so far with the step that says so.
struct Walk<'s, 't> {
    tenant: &'s Tenant<'t>,
    query: Query,
    unsure: Unsure,
    broken: &'s Broken,
    home: u32,
    /// Trees in use are looked at after the free ones.
    pays_off: bool,
    best: (u32, u8),
    /// More looks if there is a tree with little room only.
    few_looks: u32,
    /// Trees in use that were looked at.
    looked: u32,
}

impl Tenant<'_> {
    /// The tree that a search comes from: it may be reserved, and then by us.
    #[inline]
    pub(crate) fn own_tree(&self, spot: &Spot, query: Query) -> Option<u32> {
        if query.order.is_huge() { spot.tree } else { spot.small[usize::from(query.class.get())].map(tree_of) }
    }

    /// The tree that suits best, and the step that says so.
    pub(crate) fn best_tree(
        &self,
        spot: &mut Spot,
        query: Query,
        everywhere: bool,
        (unsure, broken): (Unsure, &Broken),
    ) -> Option<(u32, u8)> {
        let is_huge = query.order.is_huge();
        let own = self.own_tree(spot, query);
        let home = if is_huge { tree_of(spot.huge) } else { own.unwrap_or(spot.home) };
        // Our own tree need not be listed. Where it is not near, one that is comes first.
        let own = own.filter(|tree| !broken.has(*tree)).map(|tree| (tree, query.step_of(self, self.trees.get(tree))));
        let (near, far) = match own {
            Some((tree, _)) if !everywhere && !spot.vicinity.has(tree, self.trees.len()) => (None, own),
            _ => (own, None),
        };
        let mut best = near.unwrap_or((0, NO_STEP));
        if everywhere {
            let mut look = |tree| {
                if !unsure.has(tree) {
                    return;
                }
                let step = query.step_of(self, self.trees.get(tree));
                if step < best.1 && !broken.has(tree) {
                    best = (tree, step);
                }
            };
            if self.trees.are_few() {
                (0..self.trees.len()).for_each(look);
            } else {
                for word in (0..self.trees.len()).step_by(64) {
                    let (_, mut serving) = self.trees.glance(word, Want::Free, query.order);
                    while serving != 0 {
                        look(word + serving.trailing_zeros());
                        serving &= serving - 1;
                    }
                }
            }
            return (best.1 != NO_STEP).then_some(best);
        }
        let pays_off = !is_huge && spot.is_paying_off(query.order);
        let few_looks = if spot.few_searches > 0 { MORE_LOOKS_FOR_FEW } else { MORE_LOOKS };
        let mut walk = Walk { tenant: self, query, unsure, broken, home, pays_off, best, few_looks, looked: 0 };
        if !spot.vicinity.is_all() {
            walk.go(spot.vicinity);
        }
        if spot.vicinity.is_all() || !query.is_near_enough(walk.best.1) {
            if let Some(far) = far
                && far.1 < walk.best.1
            {
                walk.best = far;
            }
            walk.go(Vicinity::all(0));
        }
        let Walk { best, looked, .. } = walk;
        spot.few_searches = match (is_huge, best.1) {
            (false, SMALL_PARTIAL) => spot.few_searches.checked_sub(1).unwrap_or(FEW_SEARCHES),
            _ => 0,
        };
        if !is_huge && best.1 > SMALL_PARTIAL {
            spot.owe(query.order, looked / LOOKS_PER_SEARCH);
        }
        (best.1 != NO_STEP).then_some(best)
    }
}

impl Walk<'_, '_> {
    fn go(&mut self, vicinity: Vicinity) {
        if self.tenant.trees.are_few() {
            self.go_past_all(vicinity);
        } else {
            self.go_by_lists(vicinity);
        }
    }

    /// All trees, one after the other, until one is as good as can be.
    fn go_past_all(&mut self, vicinity: Vicinity) {
        // Most often nothing is known of any, and a question for each of 64 is a third of the walk.
        match self.unsure {
            Unsure::ALL => self.go_past(vicinity, |_| true),
            unsure => self.go_past(vicinity, |tree| unsure.has(tree)),
        }
    }

    /// Those trees that may have a block.
    #[inline]
    fn go_past(&mut self, vicinity: Vicinity, may_have: impl Fn(u32) -> bool) {
        let (tenant, query, broken) = (self.tenant, self.query, self.broken);
        let trees = tenant.trees;
        let is_huge = query.order.is_huge();
        let mut best = if is_huge { self.best } else { (self.best.0, turn(self.best.1)) };
        'lap: for run in vicinity.lap(self.home, trees.len()) {
            for tree in run {
                if !may_have(tree) {
                    continue;
                }
                let hint = trees.get(tree);
                let turn = query.turn_of(tenant, hint);
                if turn < best.1 && !hint.is_reserved() && !broken.has(tree) {
                    best = (tree, turn);
                    if turn == 0 {
                        break 'lap;
                    }
                }
            }
        }
        self.best = if is_huge { best } else { (best.0, step_at(best.1)) };
    }

    fn go_by_lists(&mut self, vicinity: Vicinity) {
        let (passes, good): (&[(Want, u8)], _) =
            if self.query.order.is_huge() { (&HUGE_PASSES, HUGE_GOOD) } else { (&SMALL_PASSES, SMALL_GOOD) };
        let (first, second): (&[_], &[_]) =
            if self.pays_off { (&passes[PARTIAL_PASSES..], passes) } else { (passes, &[]) };
        for &(want, enough) in first.iter().chain(second) {
            if self.best.1 <= enough || self.pays_off && self.best.1 <= good {
                break;
            }
            let mut looks = 0;
            let order = self.query.order;
            let glances = self.tenant.trees.visit(want, order, vicinity, self.home, |tree| {
                let hint = self.tenant.trees.get(tree);
                if !hint.promises(want) {
                    self.tenant.trees.unlist(tree);
                    return Look::Next;
                }
                let step = self.query.step_of(self.tenant, hint);
                if step < self.best.1 && !hint.is_reserved() && !self.broken.has(tree) {
                    self.best = (tree, step);
                    looks = 0;
                }
                looks += 1;
                self.looked += u32::from(want.is_partial());
                let most = match self.best.1 {
                    NO_STEP if looks >= LOOKS_IN_VAIN => return Look::NextThatServes,
                    NO_STEP => u32::MAX,
                    SMALL_PARTIAL if !self.query.order.is_huge() => self.few_looks,
                    step if step <= good => MORE_LOOKS,
                    _ => MORE_LOOKS_FOR_BAD,
                };
                if self.best.1 <= enough || looks >= most { Look::Enough } else { Look::Next }
            });
            if want.is_partial() {
                self.looked += LOOKS_PER_GLANCE * glances;
            }
        }
    }
}
