//! Blocks of a handle where one of their order was freed lately.
//!
//! Nothing is searched then, as a rule no larger run is cut up, and the lines are near ([`Warm`]). A place that is
//! among the blocks of others comes after one at home.

use super::Cpu;
use crate::class::Class;
use crate::hint::{huge_of, tree_of};
use crate::spot::{Freed, Listed};
use crate::taken::Taken;
use crate::warm::Warm;
use shared_layout::{FrameId, HugeEntry, Order};

impl Cpu<'_> {
    /// A block where one of its order was freed lately, if it is free still and nobody else's tree.
    #[inline]
    pub(super) fn take_warm(&mut self, order: Order, class: Class) -> Option<Taken> {
        if self.warm.has(order) { self.take_warmest(order, class) } else { None }
    }

    #[inline(never)]
    fn take_warmest(&mut self, order: Order, class: Class) -> Option<Taken> {
        let frame = self.pop_place(order)?;
        let huge = frame.huge()?;
        let tree = tree_of(huge);
        let hint = self.tenant.trees.get(tree);
        let is_ours = || {
            let small = self.spot.small[usize::from(class.get())].map(tree_of);
            [small, self.spot.last_tree].contains(&Some(tree))
        };
        // What came free as a whole meanwhile is not cut up again.
        let is_in_use = self.tenant.entry(huge).is_some_and(HugeEntry::has_room);
        if hint.class() != class || hint.is_reserved() && !is_ours() || !is_in_use {
            return None;
        }
        let lower = &self.tenant.lower;
        let taken = if order < Order::ROW { lower.take_in_row(frame, order) } else { lower.take_rows_at(frame, order) };
        self.tenant.noted(huge, taken)
    }

    /// The place of a block of this order that was freed lately: at home, if there are two, so that blocks which others live
    /// around become fewer.
    #[inline]
    pub(super) fn pop_place(&mut self, order: Order) -> Option<FrameId> {
        let last = self.warm.pop(order)?;
        let is_home = self.spot.vicinity.has(tree_of(huge_of(last)), self.tenant.trees.len());
        if is_home { Some(last) } else { self.pop_before(order, last) }
    }

    #[cold]
    #[inline(never)]
    fn pop_before(&mut self, order: Order, abroad: FrameId) -> Option<FrameId> {
        self.warm.pop(order).or(Some(abroad))
    }

    /// Forgets the places: others may use them for what they like while this handle sleeps.
    pub(super) fn forget_places(&mut self) {
        self.warm = Warm::NOTHING;
        self.spot.freed = Freed::NOTHING;
        self.spot.lone = Listed::NOTHING;
        self.spot.freed_pair = None;
        self.spot.pairs = Listed::NOTHING;
    }
}
