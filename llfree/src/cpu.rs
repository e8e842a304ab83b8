//! [`Cpu`]: one CPU's handle, whose reservation is its own memory.
//!
//! The fast path has no atomics. A handle takes all free frames of a row of 64 with one
//! compare-and-swap on the entry and one on the row, and serves blocks of order 0 to 5 from a
//! register; frees into that row go back the same way, and frees elsewhere gather in a second
//! register, row by row. To everybody else frames in these two rows are allocated: a handle that
//! dies with its memory leaks at most 128 frames.

use crate::class::{CLASSES, Class};
use crate::error::{AllocError, FreeError};
use crate::lower::{Taken, TakenRow, free_run, run_mask};
use crate::search::Spot;
use crate::sync::Ordering;
use crate::tenant::{Allocation, Tenant, tree_of};
use shared_layout::{FrameId, HugeId, Order};

/// Frames that a handle holds back at most: its two rows.
pub const HANDLE_FRAMES: u64 = 128;

/// No row: it lies beyond every table, so no free ever matches it.
const EMPTY_ROW: TakenRow = TakenRow { first: FrameId(!63), bits: 0, evicted: false };

/// One CPU's handle. [`drain`](Self::drain), or dropping it, gives all it holds back.
pub struct Cpu<'a> {
    tenant: Tenant<'a>,
    /// Frames to serve from.
    row: TakenRow,
    /// Frames that were freed, on their way back.
    freed: TakenRow,
    /// What `row` was taken for.
    class: Class,
    spot: Spot,
}

impl<'a> Cpu<'a> {
    pub(crate) fn new(tenant: Tenant<'a>) -> Self {
        let spot = Spot { epoch: tenant.return_epoch.load(Ordering::Acquire), ..Spot::START };
        Self { tenant, row: EMPTY_ROW, freed: EMPTY_ROW, class: Class::MOVABLE, spot }
    }

    /// Allocates a block of `order` in the [class of its order](Class::of).
    ///
    /// # Errors
    /// [`AllocError::OutOfMemory`] after a pass over all entries found none.
    #[inline]
    pub fn alloc(&mut self, order: Order) -> Result<Allocation, AllocError> {
        self.alloc_class(order, Class::of(order))
    }

    /// Allocates a block of `order` for a class of memory.
    ///
    /// # Errors
    /// As [`alloc`](Self::alloc): a class decides where to look, never whether there is memory.
    #[inline]
    pub fn alloc_class(&mut self, order: Order, class: Class) -> Result<Allocation, AllocError> {
        if order < Order::ROW
            && class == self.class
            && let Some(taken) = self.pop_row(order)
        {
            return Ok(Allocation::new(taken, order));
        }
        self.alloc_slow(order, class).map(|taken| Allocation::new(taken, order)).ok_or(AllocError::OutOfMemory(order))
    }

    /// Frees a block, whoever allocated it.
    ///
    /// # Errors
    /// What is wrong with the block; nothing changed unless [`FreeError::Corrupt`].
    #[inline]
    pub fn free(&mut self, frame: FrameId, order: Order) -> Result<(), FreeError> {
        if order >= Order::ROW {
            return self.free_large(frame, order);
        }
        if !frame.is_aligned(order) {
            return Err(FreeError::Misaligned(frame, order));
        }
        let mask = run_mask(order) << (frame.0 & 63);
        // Only frames that the lower level knows as taken, and that no row of ours has, may enter.
        if !self.tenant.lower.is_taken(frame, order) {
            return self.refuse(frame, order);
        }
        let first = frame.0 & !63;
        let row = if first == self.row.first.0 {
            &mut self.row
        } else {
            if first != self.freed.first.0 {
                self.flush_freed();
                self.freed = TakenRow { first: FrameId(first), bits: 0, evicted: true };
            }
            &mut self.freed
        };
        if row.bits & mask != 0 {
            return Err(FreeError::NotAllocated(frame, order));
        }
        row.bits |= mask;
        Ok(())
    }

    /// Gives cached frames and reservations back to the table.
    pub fn drain(&mut self) {
        self.flush_freed();
        let row = core::mem::replace(&mut self.row, EMPTY_ROW);
        self.give(row);
        for huge in core::mem::replace(&mut self.spot.small, [None; CLASSES]).into_iter().flatten() {
            self.tenant.leave(Some(tree_of(huge)));
        }
    }

    #[inline]
    fn pop_row(&mut self, order: Order) -> Option<Taken> {
        let bit = free_run(!self.row.bits, order)?;
        self.row.bits &= !(run_mask(order) << bit);
        let frame = FrameId(self.row.first.0 + u64::from(bit));
        if self.row.evicted {
            // Somebody may have had the huge frame installed since; nothing can evict it again
            // while a frame of it is ours.
            self.row.evicted = self.tenant.is_evicted(frame, Order::BASE);
        }
        Some(Taken { frame, evicted: self.row.evicted })
    }

    fn alloc_slow(&mut self, order: Order, class: Class) -> Option<Taken> {
        if order >= Order::ROW {
            let found = self.tenant.take(&mut self.spot, order, class, true);
            // What keeps a large block from being whole may be in our own hands.
            return found.or_else(|| {
                self.drain();
                self.tenant.take(&mut self.spot, order, class, true)
            });
        }
        if self.reuse_freed(order, class) {
            return self.pop_row(order);
        }
        let lower = self.tenant.lower;
        if self.row.bits != 0 && (order != Order::BASE || class != self.class) {
            // The row has no run of this order, or is for another class: leave it as it is.
            let found = self.tenant.take(&mut self.spot, order, class, true);
            return found.or_else(|| self.alloc_last(order, class));
        }
        let near = self.spot.small[usize::from(class.get())].and_then(|huge| lower.take_row(huge, order));
        let row = near.or_else(|| {
            self.tenant.search(&mut self.spot, order, class, true, |huge: HugeId| lower.take_row(huge, order))
        });
        let Some(row) = row else { return self.alloc_last(order, class) };
        self.row = row;
        self.class = class;
        if self.row.first == self.freed.first {
            // Both halves of one row: a frame must not be in two registers.
            self.row.bits |= core::mem::replace(&mut self.freed, EMPTY_ROW).bits;
        }
        self.pop_row(order)
    }

    /// Nothing is left outside: what we hold ourselves may still do.
    fn alloc_last(&mut self, order: Order, class: Class) -> Option<Taken> {
        if self.row.bits == 0 && self.freed.bits == 0 {
            return None;
        }
        self.drain();
        self.tenant.take(&mut self.spot, order, class, true)
    }

    /// Serves from what was freed lately, if the row is used up and the tree is of this class.
    fn reuse_freed(&mut self, order: Order, class: Class) -> bool {
        let fits = self.row.bits == 0 && free_run(!self.freed.bits, order).is_some();
        let of_class = || {
            let tree = self.freed.first.huge().map(tree_of);
            tree.is_some_and(|tree| self.tenant.trees.get(tree).class() == class)
        };
        if !fits || !of_class() {
            return false;
        }
        self.row = core::mem::replace(&mut self.freed, EMPTY_ROW);
        self.class = class;
        true
    }

    fn free_large(&mut self, frame: FrameId, order: Order) -> Result<(), FreeError> {
        if order < Order::HUGE && self.holds_part_of(frame, order) {
            return Err(FreeError::NotAllocated(frame, order));
        }
        let after = self.tenant.lower.give(frame, order)?;
        self.tenant.note_free(frame, after);
        if order.is_huge() && !after.is_evicted() {
            // The next huge block may as well be this one: it is warm.
            self.spot.huge = HugeId((frame.0 / Order::HUGE.frames()) as u32);
        }
        Ok(())
    }

    /// Whether one of our rows lies in a block: then the block is not the caller's to free.
    fn holds_part_of(&self, frame: FrameId, order: Order) -> bool {
        let inside = |row: &TakenRow| row.bits != 0 && row.first.0 & !(order.frames() - 1) == frame.0;
        inside(&self.row) || inside(&self.freed)
    }

    #[cold]
    fn refuse(&self, frame: FrameId, order: Order) -> Result<(), FreeError> {
        let frames = u64::from(self.tenant.huge_frames()) * Order::HUGE.frames();
        let fits = frame.0.checked_add(order.frames()).is_some_and(|end| end <= frames);
        Err(if fits { FreeError::NotAllocated(frame, order) } else { FreeError::OutOfRange(frame, order) })
    }

    fn flush_freed(&mut self) {
        let row = core::mem::replace(&mut self.freed, EMPTY_ROW);
        self.give(row);
    }

    fn give(&self, row: TakenRow) {
        if row.bits != 0
            && let Ok(after) = self.tenant.lower.give_row(row.first, row.bits)
        {
            self.tenant.note_free(row.first, after);
        }
    }
}

impl Drop for Cpu<'_> {
    fn drop(&mut self) {
        self.drain();
    }
}
