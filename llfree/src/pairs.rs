//! Pairs of huge frames for order 10, where trees are few.
//!
//! Where blocks of all orders come and go a pair is free for moments, and what hints say of it is behind: two of three
//! trees that promise one have none. To take a promise back and to make it again costs several times as much as a look at the
//! entries that it is about. So the trees that promise a pair are looked at in turn, and their hints stay as they are until
//! none of them has one. The other pairs of the tree that has some are listed for the next blocks.

use crate::class::Rank;
use crate::entries::Free;
use crate::hint::{FEW_TREES, tree_of};
use crate::query::Query;
use crate::spot::{Listed, Spot};
use crate::tenant::Tenant;
use shared_layout::{HugeId, Order};

/// What came of a look at the trees that promise a pair.
pub(crate) enum Pairs<T> {
    Taken(T),
    /// A search knows better: there is a tree without blocks, which it makes the handle's own, or pairs without memory
    /// behind them.
    ForSearch,
    Nothing,
}

impl Tenant<'_> {
    /// Looks for a pair with memory behind it: in the handle's vicinity first, and among huge blocks before it looks
    /// among small ones.
    pub(crate) fn pair_in_turn<T>(
        &self,
        spot: &mut Spot,
        query: Query,
        grab: &mut impl FnMut(HugeId) -> Option<T>,
    ) -> Pairs<T> {
        let (vicinity, count) = (spot.vicinity, self.trees.len());
        let home = tree_of(spot.huge) % MOST_TREES;
        let mut nothing = Pairs::Nothing;
        for is_near in [true, false] {
            let (mut good, mut others, mut has_unused) = (0u64, 0u64, false);
            for tree in (0..count).filter(|tree| vicinity.has(*tree, count) == is_near) {
                let hint = self.trees.get(tree);
                // Others' trees are for the last look at all of them.
                if !hint.has_pair() || hint.is_reserved() && spot.tree != Some(tree) {
                    continue;
                }
                match query.rank(self, hint) {
                    Rank::Fresh => has_unused = true,
                    Rank::Match | Rank::Demote => good |= 1 << (tree % MOST_TREES),
                    _ => others |= 1 << (tree % MOST_TREES),
                }
            }
            for (trees, is_good) in [(good, true), (others, false)] {
                if has_unused && !is_good {
                    return Pairs::ForSearch;
                }
                let mut from_home = trees.rotate_right(home);
                while from_home != 0 {
                    let tree = (home + from_home.trailing_zeros()) % MOST_TREES;
                    from_home &= from_home - 1;
                    let free = self.entries_of(tree).free();
                    let mut pairs = Listed::new(tree, (free.installed_pairs(), true));
                    while let Some(first) = pairs.next() {
                        if let Some(taken) = grab(first) {
                            self.stay_among_pairs(spot, first, pairs, free, is_good);
                            return Pairs::Taken(taken);
                        }
                    }
                    if free.pairs() != 0 {
                        nothing = Pairs::ForSearch;
                    }
                }
            }
            if vicinity.is_all() {
                break;
            }
        }
        nothing
    }

    /// Remembers where a pair was found, the first of some in a tree.
    fn stay_among_pairs(&self, spot: &mut Spot, first: HugeId, rest: Listed, free: Free, is_good: bool) {
        spot.pairs = rest;
        spot.spares = free.without(first).spares_pairs();
        // One pair among others' blocks is no place to stay at.
        if is_good {
            spot.huge = HugeId(first.0 + Order::MAX.huge_frames());
            spot.any = false;
            self.leave(spot.tree.take());
        }
    }
}

/// A bit for each tree has to do.
const MOST_TREES: u32 = u64::BITS;
const _: () = assert!(FEW_TREES <= MOST_TREES);
