//! Pairs of huge frames for order 10, where trees are few.
//!
//! Where blocks of all orders come and go a pair is free for moments, and what hints say of it is behind: two of three
//! trees that promise one have none. To take a promise back and to make it again costs several times as much as a look at the
//! entries that it is about. So the trees that promise a pair are looked at in turn, and their hints stay as they are; a
//! look at all trees, or a search, takes them back where none of them has one with memory. The other pairs of the tree that
//! has some are listed for the next blocks.

use crate::class::Rank;
use crate::entries::Free;
use crate::hint::{FEW_TREES, tree_of};
use crate::query::Query;
use crate::refusal::Unsure;
use crate::spot::{Listed, Spot};
use crate::tenant::Tenant;
use shared_layout::{HugeId, Order};

/// What came of a look at the trees that promise a pair.
pub(crate) enum Pairs<T> {
    Taken(T),
    /// A search knows better: there is a tree that changes hands or its class with the block, one of others, or a pair
    /// without memory behind it.
    ForSearch,
    Nothing,
}

/// A bit for each tree has to do.
const MOST_TREES: u32 = u64::BITS;
const _: () = assert!(FEW_TREES <= MOST_TREES);

/// The trees of a part of memory that promise a pair, a bit each.
#[derive(Default)]
struct Promising {
    /// Of huge blocks.
    own: u64,
    /// Of blocks of other classes.
    strange: u64,
    /// There are better ones than strange ones, which are for a search.
    for_search: bool,
    /// Others have reserved some.
    has_others: bool,
}

impl Tenant<'_> {
    /// Looks for a pair with memory behind it: in the handle's vicinity first, and among huge blocks before it looks
    /// among small ones.
    pub(crate) fn pair_in_turn<T>(
        &self,
        spot: &mut Spot,
        query: Query,
        unsure: Unsure,
        grab: &mut impl FnMut(HugeId) -> Option<T>,
    ) -> Pairs<T> {
        let home = tree_of(spot.huge) % MOST_TREES;
        let mut is_for_search = false;
        for is_near in [true, false] {
            let mut promising = self.promising(spot, query, unsure, is_near);
            is_for_search |= promising.has_others;
            for (trees, is_own) in [(promising.own, true), (promising.strange, false)] {
                if promising.for_search && !is_own {
                    return Pairs::ForSearch;
                }
                let mut from_home = trees.rotate_right(home);
                while from_home != 0 {
                    let tree = (home + from_home.trailing_zeros()) % MOST_TREES;
                    from_home &= from_home - 1;
                    let has_evicted = match self.take_pair_of(tree, spot, is_own, grab) {
                        Ok(taken) => return Pairs::Taken(taken),
                        Err(free) => free.pairs() != 0,
                    };
                    promising.for_search |= has_evicted && is_own;
                    is_for_search |= has_evicted;
                }
            }
            if spot.vicinity.is_all() {
                break;
            }
        }
        if is_for_search { Pairs::ForSearch } else { Pairs::Nothing }
    }

    /// The trees in the vicinity, or beyond it, by their hints.
    fn promising(&self, spot: &Spot, query: Query, unsure: Unsure, is_near: bool) -> Promising {
        let (vicinity, count) = (spot.vicinity, self.trees.len());
        let mut promising = Promising::default();
        for tree in (0..count).filter(|tree| unsure.has(*tree) && vicinity.has(*tree, count) == is_near) {
            let hint = self.trees.get(tree);
            if !hint.has_pair() {
                continue;
            }
            if hint.is_reserved() && !spot.has_reserved(tree) {
                promising.has_others = true;
                continue;
            }
            match query.rank(self, hint) {
                Rank::Match => promising.own |= 1 << (tree % MOST_TREES),
                Rank::Fresh | Rank::Demote => promising.for_search = true,
                Rank::Steal => promising.strange |= 1 << (tree % MOST_TREES),
            }
        }
        promising
    }

    /// A pair of a tree that has memory behind it, and remembers where the next ones are; else what the tree has.
    fn take_pair_of<T>(
        &self,
        tree: u32,
        spot: &mut Spot,
        is_own: bool,
        grab: &mut impl FnMut(HugeId) -> Option<T>,
    ) -> Result<T, Free> {
        let free = self.entries_of(tree).free();
        let mut pairs = Listed::new(tree, (free.installed_pairs(), true));
        while let Some(first) = pairs.next() {
            let Some(taken) = grab(first) else { continue };
            spot.pairs = pairs;
            spot.spares = free.without(first).spares_pairs();
            // One pair among others' blocks is no place to stay at.
            if is_own {
                spot.huge = HugeId(first.0 + Order::MAX.huge_frames());
                spot.any = false;
                self.leave(spot.tree.take_if(|own| *own != tree));
            }
            return Ok(taken);
        }
        Err(free)
    }
}
