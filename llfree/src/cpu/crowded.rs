//! Frames of a handle out of memory that is nearly full: huge frames with a row's worth of free ones at most.
//!
//! One look at a tree finds all of them, and the search that chose the tree is paid for once. A huge frame is emptied in one
//! go: its last frames are the handle's, as a list ([`Rest`](super::rest::Rest)). From one that has only a few each block takes one:
//! for as many as that, whatever tells them apart costs more than to come again.

use super::{Cpu, REUSED_FRAMES};
use crate::class::Class;
use crate::hint::{TreeHint, tree_of, tree_range};
use crate::query::Query;
use crate::row::ROW_FRAMES;
use crate::rows::ROWS;
use crate::spot::Listed;
use crate::steps::{SMALL_FULL, SMALL_PARTIAL};
use crate::taken::{Taken, TakenRow};
use shared_layout::{FrameId, HugeEntry, HugeId, Order};

/// Free frames that a huge frame is not emptied of in one go.
const FEW_FRAMES: u16 = 3;

impl Cpu<'_> {
    /// A frame of the rest.
    #[inline]
    pub(super) fn pop_rest(&mut self) -> Option<Taken> {
        let place = self.rest.pop()?;
        let base = self.row.first.0 & !(Order::HUGE.frames() - 1);
        Some(self.popped(FrameId(base + u64::from(place))))
    }

    /// A frame, when those that we have are used up or for another class.
    #[inline(never)]
    pub(super) fn alloc_frame(&mut self, class: Class) -> Option<Taken> {
        if class == self.class
            && let Some(taken) = self.take_crowded(class)
        {
            return Some(taken);
        }
        self.alloc_slow(Order::BASE, class)
    }

    /// A frame out of the next huge frame that the look at its tree found, while nothing that was freed comes first.
    #[inline]
    pub(super) fn take_crowded(&mut self, class: Class) -> Option<Taken> {
        let tree = tree_of(self.spot.small[usize::from(class.get())]?);
        if !self.crowded.is_of(tree) || self.freed.bits.count_ones() >= REUSED_FRAMES {
            return None;
        }
        self.take_next_crowded(class)
    }

    /// A frame out of the next huge frame of that list.
    #[inline]
    fn take_next_crowded(&mut self, class: Class) -> Option<Taken> {
        let huge = self.crowded.next()?;
        let taken = self.take_some(huge, class)?;
        self.spot.small[usize::from(class.get())] = Some(huge);
        Some(taken)
    }

    /// A frame out of a huge frame with little room.
    #[inline]
    pub(super) fn take_some(&mut self, huge: HugeId, class: Class) -> Option<Taken> {
        if self.tenant.entry(huge)?.free() > FEW_FRAMES {
            return self.take_rest(huge, class);
        }
        let Some((taken, has_more)) = self.tenant.noted(huge, self.tenant.lower.take_one(huge)) else {
            // Others are at work here, and what they leave alone is free all the time.
            return self.tenant.grab(huge, Order::BASE);
        };
        if self.crowded.is_of(tree_of(huge)) {
            self.crowded.again(huge, has_more);
        }
        Some(taken)
    }

    /// A frame out of the rest of a huge frame, all of which is ours then.
    #[inline(never)]
    fn take_rest(&mut self, huge: HugeId, class: Class) -> Option<Taken> {
        let Self { tenant, rest, .. } = self;
        let mut rows = 0u8;
        let taken = tenant.lower.take_rest(huge, self.share, |row, bits| {
            rows |= 1 << (row % ROWS);
            rest.push(row, bits);
        });
        let evicted = self.tenant.noted(huge, taken)?;
        if self.tenant.entry(huge).is_some_and(HugeEntry::has_room) {
            // Some of it could not be had, and looked taken meanwhile.
            self.tenant.note_undone(huge);
        }
        // Frees go into a row that the rest has nothing of.
        let without = rows.trailing_ones() as usize;
        let (row, bits) = if without < ROWS { (without, 0) } else { self.rest.pop_row().unwrap_or_default() };
        let first = FrameId(huge.first_frame().0 + (ROW_FRAMES * row) as u64);
        self.serve(TakenRow { first, bits, evicted }, class);
        self.pop_rest()
    }

    /// Leaves a tree that has nothing left for the next one, if the last searches found no better than trees like that.
    pub(super) fn enter_next(&mut self, tree: u32, class: Class) -> Option<u32> {
        let (tenant, query, next) = (self.tenant, Query::reserving(Order::BASE, class), tree + 1);
        // Not one that has more room: such trees are to come free.
        let is_full = |hint| [SMALL_FULL, SMALL_PARTIAL].contains(&query.step_of(&tenant, hint));
        let may = |hint: TreeHint| !hint.is_reserved() && is_full(hint);
        let is_near = next < tenant.trees.len() && self.spot.vicinity.has(next, tenant.trees.len());
        if self.spot.few_searches == 0 || !is_near || !may(tenant.trees.get(next)) {
            return None;
        }
        // What was freed here meanwhile is as good, and near.
        if !tenant.lower.glance(tree).has_nothing() {
            return None;
        }
        if !may(tenant.trees.change(next, |hint| if may(hint) { hint.reserved(true) } else { hint }).0) {
            return None;
        }
        self.spot.few_searches -= 1;
        tenant.leave_emptied(tree);
        self.spot.small[usize::from(class.get())] = Some(tree_range(next).first());
        self.list_crowded(next);
        Some(next)
    }

    /// Looks which huge frames of a tree are in use and have little room.
    pub(super) fn list_crowded(&mut self, tree: u32) {
        self.crowded = Listed::new(tree, self.tenant.crowded(tree));
    }

    /// A frame out of another huge frame with little room in the tree of the last one, which has nothing left.
    pub(super) fn take_beside(&mut self, last: HugeId, class: Class) -> Option<Taken> {
        let tree = tree_of(last);
        if !self.crowded.is_of(tree) {
            self.list_crowded(tree);
            self.crowded = self.crowded.but(last);
        }
        self.take_next_crowded(class)
    }

    /// Whether the rest has a part of a block.
    pub(super) fn rest_has(&self, frame: FrameId, order: Order) -> bool {
        let huge = |frame: u64| frame / Order::HUGE.frames();
        let start = frame.offset_in_huge();
        huge(frame.0) == huge(self.row.first.0) && self.rest.has_any(&(start..start + order.frames() as usize))
    }
}
