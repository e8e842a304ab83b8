//! [`Cpu`]: one CPU's handle, whose reservation is its own memory.
//!
//! The fast path has no atomics. A handle takes all free frames of a row of 64 with one
//! compare-and-swap on the entry and one on the row (or all of a huge frame that has no more than
//! 64 left, or one of the last three), and serves blocks of order 0 to 5 from a register; frees into that row go back the
//! same way. A free elsewhere goes straight to the table, unless it follows another one in its row:
//! then the row gathers in a second register. A block of order 1 or more comes from where one of its order was freed
//! lately, if there is such a place; what neither that nor a register serves is searched for. To everybody else frames in
//! these rows are allocated: a handle that dies with its memory leaks at most [`HANDLE_FRAMES`], unless it has a [ledger](crate::ledger).
//!
//! Handles begin far from each other, and each comes back to the trees that it freed memory in: so
//! two CPUs at work write no cache line in common, and lose nothing to each other.

mod crowded;
mod huge;
mod places;
mod record;
mod rest;

use crate::block::{Allocation, huge_range};
use crate::class::{CLASSES, Class};
use crate::error::{AllocError, FreeError};
use crate::hint::{huge_of, tree_of};
use crate::ledger::Ledger;
use crate::listed::CROWDED_FRAMES;
use crate::lower::Lower;
use crate::query::Query;
use crate::row::{ROW_FRAMES, free_run, run_mask};
use crate::rows::{ROWS, longest_of};
use crate::spot::{Listed, Spot};
use crate::sync::Ordering;
use crate::taken::{Miss, Taken, TakenRow};
use crate::tenant::Tenant;
use crate::vicinity::Vicinity;
use crate::warm::Warm;
use core::fmt;
use core::num::NonZeroU64;
use rest::Rest;
use shared_layout::{FrameId, HugeEntry, HugeId, Order};

/// Frames that a handle holds back at most: a row to serve from or the rest of a huge frame, what
/// was freed into the row meanwhile, and a row of freed ones.
pub const HANDLE_FRAMES: u64 = 192;

/// A row with this many freed frames is served again before another is taken.
const REUSED_FRAMES: u32 = 16;

/// Frames of the first row that a handle takes: so many it may hold back that never gave out more than one.
/// Programs that are stopped at each step are too short to get to whole rows.
const FIRST_SHARE: u32 = if cfg!(stepping) { 64 } else { 4 };

/// One refusal in this many sends all back that a handle holds: others may hold what it lacks.
const KEPT_REFUSALS: u8 = 64;

/// No row: it lies beyond every table, so no free ever matches it.
const EMPTY_ROW: TakenRow = TakenRow { first: FrameId(!63), bits: 0, evicted: false };

/// One CPU's handle. [`drain`](Self::drain), or dropping it, gives all it holds back.
pub struct Cpu<'a> {
    tenant: Tenant<'a>,
    /// Frames to serve from.
    row: TakenRow,
    /// Frames that were freed, on their way back.
    freed: TakenRow,
    /// The row of the last frame that went straight back: its first frame.
    last_freed: u64,
    /// More frames of the huge frame that `row` lies in: what was left of it when it was emptied.
    rest: Rest,
    /// The class that `row` was taken for.
    class: Class,
    /// Frames that the next row may have, twice as many as the one before: a handle holds back little more than it gave
    /// out.
    share: u32,
    /// Where the last block of one, two or four rows ended: the next one is expected there.
    next_rows: FrameId,
    /// Refusals while it held something, modulo 256.
    refused: u8,
    /// Huge frames with little room that are next.
    crowded: Listed,
    /// Places of blocks that were freed lately.
    warm: Warm,
    spot: Spot,
    /// Where others find all this if our process dies.
    pub(crate) ledger: Option<Ledger<'a>>,
}

impl<'a> Tenant<'a> {
    /// A handle for one CPU. Any number may exist; each works best in one CPU's hands.
    #[must_use]
    pub fn cpu(&self) -> Cpu<'a> {
        Cpu::new(*self, self.first_vicinity())
    }
}

impl<'a> Cpu<'a> {
    pub(crate) fn new(tenant: Tenant<'a>, vicinity: Vicinity) -> Self {
        let spot = Spot::at(vicinity, Some(tenant.return_epoch.load(Ordering::Acquire)));
        Self {
            tenant,
            row: EMPTY_ROW,
            freed: EMPTY_ROW,
            last_freed: EMPTY_ROW.first.0,
            rest: Rest::NOTHING,
            class: Class::MOVABLE,
            share: FIRST_SHARE,
            next_rows: FrameId(0),
            refused: 0,
            crowded: Listed::NOTHING,
            warm: Warm::NOTHING,
            spot,
            ledger: None,
        }
    }

    /// Allocates a block of `order` in the [class of its order](Class::of).
    ///
    /// # Errors
    /// [`AllocError::OutOfMemory`] if at some moment during the call no such block was free. What handles
    /// [hold back](HANDLE_FRAMES) is not; this one gives it back first where a block may come of that alone, and now and then in
    /// any case, for others may hold the rest of a block.
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
        // A frame is what most callers ask for: as few branches as can be, all the same way.
        if order == Order::BASE && class == self.class {
            if let Some(bits) = NonZeroU64::new(self.row.bits) {
                return Ok(Allocation::new(self.pop_frame(bits), order));
            }
            if let Some(taken) = self.pop_rest() {
                return Ok(Allocation::new(taken, order));
            }
        }
        if order == Order::HUGE
            && class == Class::HUGE
            && let Some(taken) = self.tenant.take_next(&mut self.spot)
        {
            return Ok(Allocation::new(taken, order));
        }
        let taken = if order == Order::BASE { self.alloc_frame(class) } else { self.alloc_rest(order, class) };
        taken.map(|taken| Allocation::new(taken, order)).ok_or(AllocError::OutOfMemory(order))
    }

    /// Between the fast path and the slow one, so that neither has to save the other's registers.
    #[inline(never)]
    fn alloc_rest(&mut self, order: Order, class: Class) -> Option<Taken> {
        if order >= Order::ROW {
            return self.alloc_large(order, class);
        }
        if class == self.class
            // Rows last longer then, and memory that blocks come and go in stays as it is.
            && let Some(taken) = self.take_warm(order, class).or_else(|| self.pop_row(order))
        {
            return Some(taken);
        }
        self.alloc_slow(order, class)
    }

    /// Where memory is short a block that was refused is refused the next time as well, most often: then nothing is searched.
    #[inline]
    fn is_refused_again(&mut self, order: Order) -> bool {
        self.spot.was_refused(order) && self.is_refused_still(order)
    }

    #[cold]
    #[inline(never)]
    fn is_refused_still(&mut self, order: Order) -> bool {
        let is_refused = self.tenant.is_refused(order);
        self.spot.set_refused(order, is_refused);
        is_refused
    }

    /// Whole rows out of the huge frame that small blocks come from, or huge frames.
    #[inline]
    fn alloc_large(&mut self, order: Order, class: Class) -> Option<Taken> {
        if self.is_refused_again(order) {
            return self.alloc_last(order, class);
        }
        if order.is_huge() {
            return self.take_freed(order, class).or_else(|| self.alloc_slow(order, class));
        }
        let small = self.spot.small[usize::from(class.get())];
        let next = small.filter(|huge| self.next_rows.huge() == Some(*huge));
        let near = next
            .and_then(|huge| self.tenant.noted(huge, self.tenant.lower.take_rows_at(self.next_rows, order)))
            .or_else(|| self.take_warm(order, class))
            .or_else(|| small.and_then(|huge| self.tenant.grab(huge, order)));
        let taken = near.or_else(|| self.alloc_slow(order, class))?;
        self.next_rows = FrameId(taken.frame.0 + order.frames());
        Some(taken)
    }

    /// Frees a block, no matter which CPU allocated it.
    ///
    /// # Errors
    /// The error in the block; nothing changed unless [`FreeError::Corrupt`].
    #[inline]
    pub fn free(&mut self, frame: FrameId, order: Order) -> Result<(), FreeError> {
        if order == Order::HUGE {
            return self.free_huge(frame);
        }
        if self.put(frame, order) {
            return Ok(());
        }
        self.free_slow(frame, order)
    }

    /// Puts a block into a row that we hold; false, and nothing changed, if it does not belong there.
    #[inline]
    fn put(&mut self, frame: FrameId, order: Order) -> bool {
        if order >= Order::ROW {
            return false;
        }
        let first = frame.0 & !63;
        let row = if first == self.row.first.0 {
            &mut self.row
        } else if first == self.freed.first.0 && self.rest.is_empty() {
            &mut self.freed
        } else {
            return false;
        };
        enter(&self.tenant.lower, row, frame, order)
    }

    /// A block that is large, lies in another row, or is not the caller's to free.
    #[inline(never)]
    fn free_slow(&mut self, frame: FrameId, order: Order) -> Result<(), FreeError> {
        if order >= Order::ROW {
            return self.free_large(frame, order);
        }
        let first = frame.0 & !63;
        if first == self.row.first.0 || self.rest_has(frame, order) {
            return self.refuse(frame, order);
        }
        if first != self.freed.first.0 {
            if first != self.last_freed {
                // Frees that are all over the place gain nothing from a register.
                self.last_freed = first;
                let Some(after) = self.tenant.lower.give_in_row(frame, order) else {
                    return self.refuse(frame, order);
                };
                self.tenant.note_free(huge_of(frame), after, order.frames());
                self.warm.put(frame, order, after);
                return Ok(());
            }
            // Two in one row: there will be more.
            let TakenRow { first: old, bits, .. } = self.freed;
            self.freed = TakenRow { first: FrameId(first), bits: 0, evicted: true };
            self.give(old, bits);
        }
        if enter(&self.tenant.lower, &mut self.freed, frame, order) { Ok(()) } else { self.refuse(frame, order) }
    }

    /// Gives cached frames and reservations back to the table.
    pub fn drain(&mut self) {
        self.give_back();
        self.forget_places();
        self.share = FIRST_SHARE;
        self.tenant.move_out(&mut self.spot.vicinity);
    }

    fn give_back(&mut self) {
        // One after the other, each written off before others may have it.
        let freed = core::mem::replace(&mut self.freed, EMPTY_ROW);
        self.give(freed.first, freed.bits);
        while let Some((row, bits)) = self.rest.pop_row() {
            let base = self.row.first.0 & !(Order::HUGE.frames() - 1);
            self.give(FrameId(base.wrapping_add((ROW_FRAMES * row) as u64)), bits);
        }
        let row = core::mem::replace(&mut self.row, EMPTY_ROW);
        self.give(row.first, row.bits);
        self.leave_trees();
    }

    fn leave_trees(&mut self) {
        for huge in core::mem::replace(&mut self.spot.small, [None; CLASSES]).into_iter().flatten() {
            self.spot.home = tree_of(huge);
            self.tenant.leave(Some(tree_of(huge)));
        }
        self.tenant.leave(self.spot.tree.take());
        let last = self.spot.last_tree.take();
        self.tenant.leave(last.filter(|_| core::mem::take(&mut self.spot.owns_last)));
    }

    /// The next frame of a row that has one.
    #[inline]
    fn pop_frame(&mut self, bits: NonZeroU64) -> Taken {
        self.row.bits = bits.get() & (bits.get() - 1);
        self.popped(FrameId(self.row.first.0 + u64::from(bits.trailing_zeros())))
    }

    #[inline]
    fn pop_row(&mut self, order: Order) -> Option<Taken> {
        if order == Order::BASE {
            return NonZeroU64::new(self.row.bits).map(|bits| self.pop_frame(bits));
        }
        let bit = free_run(!self.row.bits, order)?;
        self.row.bits &= !(run_mask(order) << bit);
        Some(self.popped(FrameId(self.row.first.0 + u64::from(bit))))
    }

    /// A frame that was ours a moment ago, in the huge frame of `row`.
    #[inline]
    fn popped(&mut self, frame: FrameId) -> Taken {
        Taken { frame, evicted: self.row.evicted && self.still_evicted(frame) }
    }

    /// Somebody may have had the huge frame installed since; nothing can evict it again while a
    /// frame of it is ours.
    #[cold]
    #[inline(never)]
    fn still_evicted(&mut self, frame: FrameId) -> bool {
        self.row.evicted = self.tenant.is_evicted(huge_range(frame, Order::BASE));
        self.row.evicted
    }

    #[inline(never)]
    fn alloc_slow(&mut self, order: Order, class: Class) -> Option<Taken> {
        let has_row = self.row.bits != 0 || !self.rest.is_empty();
        if order < Order::ROW && !has_row && self.reuse_freed(order, class) {
            return self.pop_row(order);
        }
        // For larger ones the caller has looked.
        if order < Order::ROW && self.is_refused_again(order) {
            return self.alloc_last(order, class);
        }
        self.tenant.look_around(&mut self.spot);
        if order.is_huge() {
            // What keeps a large block from being whole may be in our own hands.
            let found = self.tenant.take(&mut self.spot, Query::reserving(order, class));
            return found.or_else(|| self.alloc_last(order, class));
        }
        if order >= Order::ROW || has_row {
            // What we hold has no run of this order, or is for another class: leave it as it is.
            if order < Order::ROW
                && let Some(taken) = self.take_warm(order, class)
            {
                return Some(taken);
            }
            let found = self.tenant.take(&mut self.spot, Query::single(order, class));
            return found.or_else(|| self.alloc_last(order, class));
        }
        self.refill(order, class).or_else(|| self.alloc_last(order, class))
    }

    /// A block out of another row, or out of the rest of another huge frame, while we hold none.
    fn refill(&mut self, order: Order, class: Class) -> Option<Taken> {
        let small = self.spot.small[usize::from(class.get())];
        if let Some(huge) = small {
            if let Some(taken) = self.take_row(huge, order, class) {
                return Some(taken);
            }
            if order == Order::BASE
                && let Some(taken) = self.take_beside(huge, class)
            {
                return Some(taken);
            }
        }
        let mut through = small.map(tree_of).filter(|tree| order == Order::BASE && self.crowded.is_through(*tree));
        if let Some(tree) = through
            && let Some(next) = self.enter_next(tree, class)
        {
            let taken = self.take_crowded(class);
            if taken.is_some() {
                return taken;
            }
            through = Some(next).filter(|tree| self.crowded.is_through(*tree));
        }
        let found = self.find(Query { through, ..Query::reserving(order, class) });
        self.crowded = Listed::NOTHING;
        if order == Order::BASE
            && found.is_some()
            && let Some(huge) = self.spot.small[usize::from(class.get())]
        {
            self.list_crowded(tree_of(huge));
        }
        found
    }

    /// A block out of a row or a rest in a tree that a search chooses.
    fn find(&mut self, query: Query) -> Option<Taken> {
        let (tenant, Query { order, class, .. }) = (self.tenant, query);
        let may_fit = |huge| tenant.entry(huge).filter(|entry| entry.may_fit(order)).map(|_| huge);
        let huge = tenant.search(&mut self.spot, query, may_fit)?;
        self.take_from(huge, order, class).or_else(|| self.find_among_others(Query { through: None, ..query }))
    }

    /// The same, taking what it finds at once: others take it as well.
    #[cold]
    #[inline(never)]
    fn find_among_others(&mut self, query: Query) -> Option<Taken> {
        let (tenant, mut spot) = (self.tenant, self.spot);
        let found = tenant.search(&mut spot, query, |huge| self.take_from(huge, query.order, query.class));
        self.spot = spot;
        found
    }

    /// A block out of a row or a rest of a huge frame.
    fn take_from(&mut self, huge: HugeId, order: Order, class: Class) -> Option<Taken> {
        let is_crowded = |entry: HugeEntry| order == Order::BASE && entry.free() <= CROWDED_FRAMES;
        if self.tenant.entry(huge).is_some_and(is_crowded) {
            self.take_some(huge, class)
        } else {
            self.take_row(huge, order, class)
        }
    }

    /// A block out of a row that we take as a whole, or past others who are at work there.
    fn take_row(&mut self, huge: HugeId, order: Order, class: Class) -> Option<Taken> {
        let row = self.tenant.lower.take_row(huge, order, self.share);
        let busy = row.is_err_and(|miss| miss != Miss::NoFit);
        match self.tenant.noted(huge, row) {
            Some(row) => {
                self.serve(row, class);
                self.pop_row(order)
            }
            None if busy => self.tenant.grab(huge, order),
            None => None,
        }
    }

    fn serve(&mut self, row: TakenRow, class: Class) {
        self.share = (2 * self.share).min(64);
        self.row = row;
        self.class = class;
        if self.row.first == self.freed.first {
            // Both halves of one row: a frame must not be in two registers.
            self.row.bits |= core::mem::replace(&mut self.freed, EMPTY_ROW).bits;
        }
        self.record();
    }

    /// Nothing is left outside: what we hold ourselves may still do. If there is too little of it, it mostly stays, for requests
    /// of large blocks in vain are no reason to look for small ones anew; only the trees are left, so that the fullest ones
    /// come next.
    fn alloc_last(&mut self, order: Order, class: Class) -> Option<Taken> {
        self.spot.set_refused(order, true);
        if self.row.bits == 0 && self.freed.bits == 0 && self.rest.is_empty() {
            return None;
        }
        self.refused = self.refused.wrapping_add(1);
        if !self.refused.is_multiple_of(KEPT_REFUSALS) && !self.may_complete(order) {
            self.leave_trees();
            return None;
        }
        self.give_back();
        self.tenant.take(&mut self.spot, Query::reserving(order, class))
    }

    /// Whether a huge frame that we hold a part of has a block of `order` together with that part.
    fn may_complete(&self, order: Order) -> bool {
        let most = self.row.bits.count_ones() + self.freed.bits.count_ones() + self.rest.len() as u32;
        [self.row.first.huge(), self.freed.first.huge()].into_iter().flatten().any(|huge| {
            // Too little of it, most often.
            let free = self.tenant.entry(huge).map_or(0, HugeEntry::free);
            if u64::from(free) + u64::from(most) < order.frames().min(Order::HUGE.frames()) {
                return false;
            }
            let held = self.held_rows(huge);
            if held == [0; ROWS] {
                return false;
            }
            let mut used = self.tenant.lower.used_rows(huge);
            used.iter_mut().zip(held).for_each(|(used, held)| *used &= !held);
            // Order 10 needs the other half, too, which may be whole already: that is for the search to see.
            if order.is_huge() { used == [0; ROWS] } else { longest_of(&used).order() >= order }
        })
    }

    /// What we hold of a huge frame.
    fn held_rows(&self, huge: HugeId) -> [u64; ROWS] {
        let mut held = if self.row.first.huge() == Some(huge) { self.rest.rows() } else { [0; ROWS] };
        for row in [&self.row, &self.freed].into_iter().filter(|row| row.first.huge() == Some(huge)) {
            held[row.first.offset_in_huge() / ROW_FRAMES] |= row.bits;
        }
        held
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

    /// Whole rows, or a pair of huge frames.
    fn free_large(&mut self, frame: FrameId, order: Order) -> Result<(), FreeError> {
        if order < Order::HUGE && self.holds_part_of(frame, order) {
            return Err(FreeError::NotAllocated(frame, order));
        }
        if order < Order::HUGE {
            // Warm, and whole.
            self.next_rows = frame;
        }
        if order == Order::ROW
            && let Some(after) = self.tenant.lower.give_in_row(frame, Order::ROW)
        {
            self.tenant.note_free(huge_of(frame), after, order.frames());
            self.warm.put(frame, order, after);
            return Ok(());
        }
        let after = self.tenant.give(frame, order)?;
        if let Some(huge) = frame.huge() {
            self.tenant.note_free(huge, after, order.frames());
            if order == Order::MAX {
                self.keep_pair(huge, after);
            } else {
                self.warm.put(frame, order, after);
            }
        }
        Ok(())
    }

    /// Whether a frame that we hold lies in a block: then the block is not the caller's to free.
    #[inline]
    fn holds_part_of(&self, frame: FrameId, order: Order) -> bool {
        let huge = |frame: FrameId| frame.0 / Order::HUGE.frames();
        [self.row.first, self.freed.first].into_iter().any(|first| huge(first) == huge(frame))
            && self.holds_row_of(frame, order)
    }

    fn holds_row_of(&self, frame: FrameId, order: Order) -> bool {
        let inside = |first: u64, bits: u64| bits != 0 && first & !(order.frames() - 1) == frame.0;
        inside(self.row.first.0, self.row.bits)
            || inside(self.freed.first.0, self.freed.bits)
            || self.rest_has(frame, order)
    }

    /// The error in a block that was not freed.
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

    /// Gives back what is in no register any more.
    #[inline]
    fn give(&self, first: FrameId, bits: u64) {
        if bits != 0 {
            self.record();
            self.tenant.give_row_back(first, bits);
        }
    }
}

/// Puts a block of less than a row into a register that has its row; false, and nothing changed, if that cannot be right.
#[inline(always)]
#[expect(clippy::inline_always, reason = "frees into a register are as short as can be")]
fn enter(lower: &Lower<'_>, row: &mut TakenRow, frame: FrameId, order: Order) -> bool {
    let mask = run_mask(order) << (frame.0 & 63);
    // Only frames that the lower level knows as taken, and that the row has not, may enter.
    if !frame.is_aligned(order) || !lower.is_taken(frame, mask) || row.bits & mask != 0 {
        return false;
    }
    // While the register was empty the host may have had the huge frame: look again.
    row.evicted |= row.bits == 0;
    row.bits |= mask;
    true
}

impl Drop for Cpu<'_> {
    fn drop(&mut self) {
        self.drain();
    }
}

impl fmt::Debug for Cpu<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rest = self.rest.len() as u32;
        f.debug_struct("Cpu")
            .field("class", &self.class)
            .field("cached_frames", &(self.row.bits.count_ones() + self.freed.bits.count_ones() + rest))
            .finish_non_exhaustive()
    }
}
