//! Huge frames of a tree that one look found, for the next blocks of the same kind ([`Listed`](crate::spot::Listed)).
//!
//! A search pays for a look at 32 entries and finds one huge frame; the others that would have done are served
//! without a search. Where none is left the tree is not looked at again for that order.

use crate::class::Class;
use crate::hint::tree_of;
use crate::query::Query;
use crate::spot::Spot;
use crate::taken::Taken;
use crate::tenant::Tenant;
use shared_layout::{HugeEntry, HugeId, Order};

/// A huge frame with no more free frames than this is emptied in one go.
pub(crate) const CROWDED_FRAMES: u16 = 64;
/// One with no more than this many is served before emptier ones.
const FULL_FRAMES: u16 = 256;
/// Listed huge frames that are tried before a search.
const LISTED_TRIES: u32 = 4;

impl Tenant<'_> {
    /// The huge frames of a tree that are in use and have little room, a bit each; and whether no others have a free frame.
    pub(crate) fn crowded(&self, tree: u32) -> (u32, bool) {
        let entries = self.entries_of(tree);
        let crowded = entries.mask(|entry| entry.has_room() & (entry.free() <= CROWDED_FRAMES));
        // With more free frames than that an entry has room, or is free as a whole, unless the host holds it.
        let most = entries.entries.iter().fold(0, |most, entry| entry.free().max(most));
        (crowded, most <= CROWDED_FRAMES || crowded == entries.mask(|entry| entry.has_room() | entry.is_all_free()))
    }

    /// A block out of a huge frame that had one when the tree of the last one was looked at.
    #[inline]
    pub(crate) fn take_listed(&self, spot: &mut Spot, query: Query) -> Option<Taken> {
        let Query { order, class, single, .. } = query;
        if !single || class != Class::MOVABLE {
            return None;
        }
        for _ in 0..LISTED_TRIES {
            let huge = spot.next_listed(order)?;
            if !spot.may_stay_in(tree_of(huge), self.trees.len()) {
                return None;
            }
            if self.lower.entry(huge).is_some_and(|entry| entry.may_fit_in_part(order) && entry.has_room())
                && let Some(taken) = self.grab(huge, order)
            {
                spot.remember(order, class, huge);
                return Some(taken);
            }
        }
        None
    }

    /// The huge frames of a tree that are in use and may have a block of `order`, a bit each: the fuller ones if
    /// there are some; and whether these are all.
    fn fitting(&self, tree: u32, order: Order) -> (u32, bool) {
        let entries = self.entries_of(tree);
        let fits = |entry: HugeEntry| entry.has_room() & entry.may_fit_in_part(order);
        let full = entries.mask(|entry| fits(entry) & (entry.free() <= FULL_FRAMES));
        let all = entries.mask(fits);
        if full != 0 { (full, full == all) } else { (all, true) }
    }

    /// Remembers where a single block came from, and where more of its kind may be.
    pub(crate) fn remember(&self, spot: &mut Spot, query: Query, huge: HugeId) {
        let Query { order, class, .. } = query;
        spot.remember(order, class, huge);
        if class == Class::MOVABLE {
            let tree = tree_of(huge);
            spot.list(order, tree, self.fitting(tree, order), huge);
        }
    }
}
