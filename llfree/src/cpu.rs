//! [`Cpu`]: one CPU's handle, whose reservation is its own memory.
//!
//! The fast path has no atomics. A handle takes all free frames of a row of 64 with one
//! compare-and-swap on the entry and one on the row (or all of a huge frame that has no more than
//! 64 left), and serves blocks of order 0 to 5 from a register; frees into that row go back the
//! same way, and frees elsewhere gather in a second register, row by row. To everybody else frames
//! in these rows are allocated: a handle that dies with its memory leaks at most
//! [`HANDLE_FRAMES`].

use crate::class::{CLASSES, Class};
use crate::error::{AllocError, FreeError};
use crate::lower::{ROWS, Taken, TakenRow, free_run, run_mask};
use crate::search::{CROWDED_FRAMES, Spot};
use crate::sync::Ordering;
use crate::tenant::{Allocation, Tenant, tree_of};
use shared_layout::{FrameId, HugeId, Order};

/// Frames that a handle holds back at most: a row to serve from or the rest of a huge frame, what
/// was freed into the row meanwhile, and a row of freed ones.
pub const HANDLE_FRAMES: u64 = 192;

/// A row with so many freed frames is served again before another is taken.
const REUSED_FRAMES: u32 = 16;

/// No row: it lies beyond every table, so no free ever matches it.
const EMPTY_ROW: TakenRow = TakenRow { first: FrameId(!63), bits: 0, evicted: false };

/// One CPU's handle. [`drain`](Self::drain), or dropping it, gives all it holds back.
pub struct Cpu<'a> {
    tenant: Tenant<'a>,
    /// Frames to serve from.
    row: TakenRow,
    /// Frames that were freed, on their way back.
    freed: TakenRow,
    /// More rows of the huge frame that `row` lies in: what was left of it when it was emptied.
    rest: [u64; ROWS],
    /// Which of these have bits.
    rest_rows: u8,
    /// What `row` was taken for.
    class: Class,
    spot: Spot,
}

impl<'a> Cpu<'a> {
    pub(crate) fn new(tenant: Tenant<'a>) -> Self {
        let spot = Spot { epoch: tenant.return_epoch.load(Ordering::Acquire), ..Spot::START };
        Self { tenant, row: EMPTY_ROW, freed: EMPTY_ROW, rest: [0; ROWS], rest_rows: 0, class: Class::MOVABLE, spot }
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
        if order == Order::HUGE
            && class == Class::HUGE
            && let Some(taken) = self.tenant.take_next(&mut self.spot)
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
            return if order == Order::HUGE { self.free_huge(frame) } else { self.free_large(frame, order) };
        }
        let mask = run_mask(order) << (frame.0 & 63);
        // Only frames that the lower level knows as taken, and that no row of ours has, may enter.
        if !frame.is_aligned(order) || !self.tenant.lower.is_taken(frame, mask) {
            return self.refuse(frame, order);
        }
        let first = frame.0 & !63;
        let row = if first == self.row.first.0 {
            &mut self.row
        } else {
            if first != self.freed.first.0 {
                self.flush_freed(first);
            }
            if self.rest_rows != 0 && self.rest_has(frame, mask) {
                return self.refuse(frame, order);
            }
            &mut self.freed
        };
        if row.bits & mask != 0 {
            return self.refuse(frame, order);
        }
        // While the register was empty the host may have had the huge frame: look again.
        row.evicted |= row.bits == 0;
        row.bits |= mask;
        Ok(())
    }

    /// Gives cached frames and reservations back to the table.
    pub fn drain(&mut self) {
        self.flush_freed(EMPTY_ROW.first.0);
        let base = self.row.first.0 & !(Order::HUGE.frames() - 1);
        let row = core::mem::replace(&mut self.row, EMPTY_ROW);
        self.give(row);
        self.rest_rows = 0;
        for (i, bits) in core::mem::take(&mut self.rest).into_iter().enumerate() {
            self.give(TakenRow { first: FrameId(base + 64 * i as u64), bits, evicted: true });
        }
        for huge in core::mem::replace(&mut self.spot.small, [None; CLASSES]).into_iter().flatten() {
            self.tenant.leave(Some(tree_of(huge)));
        }
        self.tenant.leave(self.spot.tree.take());
    }

    #[inline]
    fn pop_row(&mut self, order: Order) -> Option<Taken> {
        let bit = if order == Order::BASE {
            if self.row.bits == 0 {
                return None;
            }
            self.row.bits.trailing_zeros()
        } else {
            free_run(!self.row.bits, order)?
        };
        self.row.bits &= !(run_mask(order) << bit);
        let frame = FrameId(self.row.first.0 + u64::from(bit));
        if self.row.evicted {
            // Somebody may have had the huge frame installed since; nothing can evict it again
            // while a frame of it is ours.
            self.row.evicted = self.tenant.is_evicted(frame, Order::BASE);
        }
        Some(Taken { frame, evicted: self.row.evicted })
    }

    #[inline(never)]
    fn alloc_slow(&mut self, order: Order, class: Class) -> Option<Taken> {
        if order >= Order::ROW {
            let found = self.tenant.take(&mut self.spot, order, class, true);
            // What keeps a large block from being whole may be in our own hands.
            return found.or_else(|| self.alloc_last(order, class));
        }
        if self.row.bits == 0 && self.rest_rows != 0 && class == self.class {
            self.next_rest();
            if let Some(taken) = self.pop_row(order) {
                return Some(taken);
            }
        }
        if self.row.bits != 0 || self.rest_rows != 0 {
            // What we hold has no run of this order, or is for another class: leave it as it is.
            let found = self.tenant.take(&mut self.spot, order, class, true);
            return found.or_else(|| self.alloc_last(order, class));
        }
        if self.reuse_freed(order, class) || self.refill(order, class) {
            return self.pop_row(order);
        }
        self.alloc_last(order, class)
    }

    /// Another row, or the rest of another huge frame, while we hold none.
    fn refill(&mut self, order: Order, class: Class) -> bool {
        let lower = self.tenant.lower;
        let small = self.spot.small[usize::from(class.get())];
        if let Some(huge) = small {
            if let Some(row) = lower.take_row(huge, order) {
                self.serve(row, class);
                return true;
            }
            if order == Order::BASE
                && let Some(next) = self.tenant.next_crowded(huge)
                && self.take_rest(next, class)
            {
                self.spot.small[usize::from(class.get())] = Some(next);
                return true;
            }
        }
        let tenant = self.tenant;
        let mut spot = self.spot;
        let found = tenant.search(&mut spot, order, class, true, |huge| {
            let crowded = order == Order::BASE && lower.entry(huge).is_some_and(|e| e.free() <= CROWDED_FRAMES);
            if crowded {
                return self.take_rest(huge, class).then_some(());
            }
            lower.take_row(huge, order).map(|row| self.serve(row, class))
        });
        self.spot = spot;
        found.is_some()
    }

    fn take_rest(&mut self, huge: HugeId, class: Class) -> bool {
        let mut rest = [0; ROWS];
        let Some(evicted) = self.tenant.lower.take_rest(huge, &mut rest) else { return false };
        self.rest = rest;
        self.rest_rows = rest.iter().enumerate().fold(0, |rows, (i, bits)| rows | u8::from(*bits != 0) << i);
        // An empty row in the right place, so that `next_rest` knows the huge frame.
        self.row = TakenRow { first: huge.first_frame(), bits: 0, evicted };
        self.class = class;
        self.next_rest();
        true
    }

    /// Serves from the next row of the rest.
    fn next_rest(&mut self) {
        let index = self.rest_rows.trailing_zeros() as usize;
        let Some(bits) = self.rest.get_mut(index).map(core::mem::take) else { return };
        self.rest_rows &= self.rest_rows - 1;
        let base = self.row.first.0 & !(Order::HUGE.frames() - 1);
        let row = TakenRow { first: FrameId(base + 64 * index as u64), bits, evicted: self.row.evicted };
        self.serve(row, self.class);
    }

    fn serve(&mut self, row: TakenRow, class: Class) {
        self.row = row;
        self.class = class;
        if self.row.first == self.freed.first {
            // Both halves of one row: a frame must not be in two registers.
            self.row.bits |= core::mem::replace(&mut self.freed, EMPTY_ROW).bits;
        }
    }

    fn rest_has(&self, frame: FrameId, mask: u64) -> bool {
        let huge = |frame: u64| frame / Order::HUGE.frames();
        huge(frame.0) == huge(self.row.first.0) && self.rest[frame.offset_in_huge() / 64] & mask != 0
    }

    /// Nothing is left outside: what we hold ourselves may still do.
    fn alloc_last(&mut self, order: Order, class: Class) -> Option<Taken> {
        if self.row.bits == 0 && self.freed.bits == 0 && self.rest_rows == 0 {
            return None;
        }
        self.drain();
        self.tenant.take(&mut self.spot, order, class, true)
    }

    /// Serves from what was freed lately, if that is worth a row and the tree is of this class. A few
    /// frames are not: a caller that frees and allocates one by one would find everything back where
    /// it was, and memory would never get tidier.
    fn reuse_freed(&mut self, order: Order, class: Class) -> bool {
        let fits = self.freed.bits.count_ones() >= REUSED_FRAMES && free_run(!self.freed.bits, order).is_some();
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

    #[inline(never)]
    fn free_large(&mut self, frame: FrameId, order: Order) -> Result<(), FreeError> {
        if order < Order::HUGE && self.holds_part_of(frame, order) {
            return Err(FreeError::NotAllocated(frame, order));
        }
        let after = self.tenant.lower.give(frame, order)?;
        self.tenant.note_free(frame, after);
        Ok(())
    }

    #[inline]
    fn free_huge(&mut self, frame: FrameId) -> Result<(), FreeError> {
        let huge = frame.huge().filter(|_| frame.is_aligned(Order::HUGE));
        let Some((huge, after)) = huge.and_then(|huge| Some((huge, self.tenant.lower.give_one_huge(huge)?))) else {
            return self.refuse(frame, Order::HUGE);
        };
        self.tenant.note_free(frame, after);
        if !after.is_evicted() {
            self.spot.freed = Some(huge);
            // There is memory again that costs no install: look for that first.
            self.spot.any = false;
        }
        Ok(())
    }

    /// Whether a frame that we hold lies in a block: then the block is not the caller's to free.
    fn holds_part_of(&self, frame: FrameId, order: Order) -> bool {
        let inside = |first: u64, bits: u64| bits != 0 && first & !(order.frames() - 1) == frame.0;
        let base = self.row.first.0 & !(Order::HUGE.frames() - 1);
        let mut rest = self.rest.iter().enumerate();
        inside(self.row.first.0, self.row.bits)
            || inside(self.freed.first.0, self.freed.bits)
            || rest.any(|(i, bits)| inside(base + 64 * i as u64, *bits))
    }

    /// What is wrong with a block that was not freed.
    #[cold]
    #[inline(never)]
    fn refuse(&self, frame: FrameId, order: Order) -> Result<(), FreeError> {
        let frames = u64::from(self.tenant.huge_frames()) * Order::HUGE.frames();
        if frame.0.checked_add(order.frames()).is_none_or(|end| end > frames) {
            return Err(FreeError::OutOfRange(frame, order));
        }
        if !frame.is_aligned(order) {
            return Err(FreeError::Misaligned(frame, order));
        }
        Err(FreeError::NotAllocated(frame, order))
    }

    /// Gives the freed row back and begins another.
    #[inline(never)]
    fn flush_freed(&mut self, first: u64) {
        let next = TakenRow { first: FrameId(first), bits: 0, evicted: true };
        let row = core::mem::replace(&mut self.freed, next);
        self.give(row);
    }

    #[inline]
    fn give(&self, row: TakenRow) {
        if row.bits != 0
            && let Some(after) = self.tenant.lower.give_row(row.first, row.bits)
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
