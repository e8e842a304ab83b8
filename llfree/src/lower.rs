//! The lower level: huge entries and bitfields. They alone decide who owns a frame.
//!
//! A huge frame's counter (in its [`HugeEntry`]) is a budget: a party that lowers it by n has the right
//! to set n bits. So a take lowers the counter *before* it sets bits and a give clears bits *before*
//! it raises the counter; at any instant there are at least as many clear bits as the counter says,
//! and a crash between the two steps loses frames at worst, it never gives one out twice. Blocks of
//! order 9 and 10 live in the entries alone; their bitfields stay clear.
//!
//! [`large`] has the blocks of whole rows and more. Everything works through `&self` on atomics, is lock-free, and knows nothing of trees or CPUs.

mod large;
mod rest;

use crate::durable::WriteBack;
use crate::error::{AllocError, FreeError, Part, TableError, check_huge_frames, check_len};
use crate::hint::tree_range;
use crate::lanes::look;
use crate::row::{self, ROW_FRAMES, free_run, longest_run, ones, run_around, run_mask};
use crate::rows::{ROWS, find_run, longest, rows_per_block, set_rows};
use crate::sync::{AtomicU16, AtomicU64, Ordering, change_before_looks};
use crate::taken::{Miss, Taken, TakenRow};
use crate::violation::Violation;
use shared_layout::table::HUGE_PER_TREE;
use shared_layout::{FrameId, Glance, HugeEntry, HugeId, HugeRange, Order, Run};

/// A search that lost this many races in one huge frame looks elsewhere.
const ROW_PASSES: usize = 4;

/// Applies a transition to a shared word: the only compare-and-swap loop on huge entries.
///
/// Returns the entry before the transition, or the entry that allows none (or that kept changing
/// for `tries` attempts: the host bounds its patience, a guest passes `u32::MAX`).
///
/// Acquire: a taker sees what the giver of the frames wrote before. Release: the next taker sees
/// our bits cleared and our last writes to the frames.
#[inline]
pub(crate) fn transition(
    word: &AtomicU16,
    tries: u32,
    step: impl Fn(HugeEntry) -> Option<HugeEntry>,
) -> Result<HugeEntry, HugeEntry> {
    transition_to(word, tries, step).map(|(old, _)| old)
}

/// The same, and the entry after the transition as well.
#[inline]
fn transition_to(
    word: &AtomicU16,
    tries: u32,
    step: impl Fn(HugeEntry) -> Option<HugeEntry>,
) -> Result<(HugeEntry, HugeEntry), HugeEntry> {
    let mut current = word.load(Ordering::Acquire);
    for _ in 0..tries {
        let Some(next) = step(HugeEntry::from_bits(current)) else { break };
        match word.compare_exchange(current, next.bits(), Ordering::AcqRel, Ordering::Acquire) {
            Ok(old) => return Ok((HugeEntry::from_bits(old), next)),
            Err(seen) => current = seen,
        }
    }
    Err(HugeEntry::from_bits(current))
}

/// A guest's patience: lock-freedom says that somebody else made progress each time.
const FOREVER: u32 = u32::MAX;

/// Entries and bitfields of one table, as slices of shared memory.
#[derive(Clone, Copy)]
pub(crate) struct Lower<'a> {
    entries: &'a [AtomicU16],
    rows: &'a [AtomicU64],
    write_back: WriteBack,
}

impl<'a> Lower<'a> {
    /// Fails unless there are exactly eight rows an entry, and no more entries than a table may have.
    pub(crate) fn new(entries: &'a [AtomicU16], rows: &'a [AtomicU64]) -> Result<Self, TableError> {
        check_huge_frames(entries.len())?;
        check_len(Part::Rows, rows.len(), entries.len() * ROWS)?;
        Ok(Self { entries, rows, write_back: WriteBack::NONE })
    }

    /// The same table in memory that needs changes written back to keep them.
    pub(crate) fn with_write_back(self, write_back: WriteBack) -> Self {
        Self { write_back, ..self }
    }

    /// Makes a huge frame's entry and bits durable, before a block in it changes hands.
    ///
    /// This is all that a power failure asks for. A block that was handed out had its bits (or
    /// its `huge`) written back by then, and everything that its huge frame was before; so
    /// whichever later state of the two lines survives, in whatever mixture, it says that the
    /// block is taken.
    #[inline]
    pub(crate) fn settle(&self, huge: HugeId) {
        if self.is_durable() {
            self.write_lines(huge);
        }
    }

    /// Whether memory outlives its system: then a change is over when it is [settled](Self::settle).
    #[inline]
    pub(crate) fn is_durable(&self) -> bool {
        self.write_back.is_needed()
    }

    // By value: the address of the caller's own table stays its own, and the table in registers.
    #[cold]
    #[inline(never)]
    fn write_lines(self, huge: HugeId) {
        if let Some(word) = self.entries.get(huge.index()) {
            self.write_back.lines(core::slice::from_ref(word));
            self.write_back.lines(self.rows_of(huge));
            self.write_back.fence();
        }
    }

    pub(crate) fn huge_frames(&self) -> u32 {
        self.entries.len() as u32
    }

    /// All huge frames of the table.
    pub(crate) fn all(&self) -> HugeRange {
        HugeRange::up_to(self.huge_frames())
    }

    pub(crate) fn entry(&self, huge: HugeId) -> Option<HugeEntry> {
        // Relaxed: a look only guides; every change goes through `transition`.
        self.entries.get(huge.index()).map(|word| HugeEntry::from_bits(word.load(Ordering::Relaxed)))
    }

    /// Whether a huge frame of which the caller owns a part is not backed; true beyond
    /// the table. Nothing sets the bit meanwhile.
    #[inline]
    pub(crate) fn is_evicted(&self, huge: HugeId) -> bool {
        // Acquire pairs with the end of an install, also one that another CPU asked for: memory
        // was put there before the bit went.
        let word = self.entries.get(huge.index());
        word.is_none_or(|word| HugeEntry::from_bits(word.load(Ordering::Acquire)).is_evicted())
    }

    /// The entries of those huge frames of a range that the table has.
    #[inline]
    pub(crate) fn entries(&self, range: HugeRange) -> impl Iterator<Item = HugeEntry> + use<'a> {
        let first = range.first().index().min(self.entries.len());
        let end = range.end().index().min(self.entries.len());
        self.entries[first..end].iter().map(|word| HugeEntry::from_bits(word.load(Ordering::Relaxed)))
    }

    /// The entries of `N` huge frames from `first` on; `None` unless the table has all of them.
    #[inline]
    pub(crate) fn entry_array<const N: usize>(&self, first: HugeId) -> Option<[HugeEntry; N]> {
        let words: &[AtomicU16; N] = self.entries.get(first.index()..)?.first_chunk()?;
        let mut entries = [HugeEntry::HUGE_EVICTED; N];
        entries.iter_mut().zip(look(words)).for_each(|(entry, bits)| *entry = HugeEntry::from_bits(bits));
        Some(entries)
    }

    /// What is set in any entry of a tree.
    #[inline]
    pub(crate) fn glance(&self, tree: u32) -> Glance {
        let tree = tree_range(tree);
        match self.entry_array::<{ HUGE_PER_TREE as usize }>(tree.first()) {
            Some(entries) => entries.into_iter().fold(Glance::default(), Glance::and),
            None => self.entries(tree).fold(Glance::default(), Glance::and),
        }
    }

    /// The rows of a huge frame: set bits are taken.
    #[inline]
    pub(crate) fn used_rows(&self, huge: HugeId) -> [u64; ROWS] {
        let mut used = [u64::MAX; ROWS];
        used.iter_mut().zip(self.rows_of(huge)).for_each(|(to, row)| *to = row.load(Ordering::Relaxed));
        used
    }

    /// Clears `evicted` in a huge frame of which the caller, a process, owns a part: its touch is the install.
    #[cold]
    pub(crate) fn self_install(&self, huge: HugeId) {
        if let Some(word) = self.entries.get(huge.index()) {
            let _ = transition(word, FOREVER, HugeEntry::self_install);
            self.settle(huge);
        }
    }

    /// Clear bits of a huge frame: what the counter should be when nobody is at work in it.
    pub(crate) fn clear_bits(&self, huge: HugeId) -> u32 {
        self.rows_of(huge).iter().map(|row| row.load(Ordering::Acquire).count_zeros()).sum()
    }

    /// What is wrong with a huge frame's entry or its bits, when nobody is at work in it.
    pub(crate) fn violation(&self, huge: HugeId) -> Option<Violation> {
        Violation::of_bits(huge, self.entry(huge)?, self.clear_bits(huge), longest(self.rows_of(huge)))
    }

    /// Whether a huge frame's entry is valid and fits its bits, when nobody is at work in it.
    pub(crate) fn is_consistent(&self, huge: HugeId) -> bool {
        self.entry(huge).is_some() && self.violation(huge).is_none()
    }

    /// Whether all bits of a block of at most a row are set: taken as a small block, not as part
    /// of a huge one. False beyond the table.
    #[inline]
    pub(crate) fn is_taken(&self, frame: FrameId, mask: u64) -> bool {
        // Relaxed: the caller frees a block it owns, so the bits were set before, by itself or by
        // the party that handed the block over.
        self.rows
            .get((frame.0 / ROW_FRAMES as u64) as usize)
            .is_some_and(|row| row.load(Ordering::Relaxed) & mask == mask)
    }

    pub(crate) fn rows_of(&self, huge: HugeId) -> &'a [AtomicU64] {
        let start = huge.index() * ROWS;
        self.rows.get(start..start + ROWS).unwrap_or(&[])
    }

    /// Takes a block of `order` in `huge` (and its successor for order 10).
    #[inline]
    pub(crate) fn take(&self, huge: HugeId, order: Order) -> Result<Taken, Miss> {
        if order.is_huge() {
            return self.take_huge(huge, order);
        }
        if order >= Order::ROW {
            return self.take_rows(huge, order);
        }
        let word = self.entries.get(huge.index()).ok_or(Miss::NoFit)?;
        HugeEntry::from_bits(word.load(Ordering::Relaxed)).take_order(order).ok_or(Miss::NoFit)?;
        let rows = self.rows_of(huge);
        // Order 0 fits if the counter allows it. For others look before lowering the counter, so that
        // hopeless attempts do not make it dip for everybody else.
        let seen = find_run(rows, order);
        if seen.is_none() && order != Order::BASE {
            return Err(self.bound(huge));
        }
        let old = transition(word, FOREVER, |e| e.take_order(order)).map_err(|_| Miss::NoFit)?;
        self.set_some(huge, word, order, old, seen)
    }

    /// Sets the bits of a block, which the counter of the entry was lowered for, at the place where free frames were
    /// seen or elsewhere.
    #[inline]
    fn set_some(
        &self,
        huge: HugeId,
        word: &AtomicU16,
        order: Order,
        old: HugeEntry,
        mut seen: Option<usize>,
    ) -> Result<Taken, Miss> {
        let rows = self.rows_of(huge);
        let mut fruitless = 0;
        while fruitless < ROW_PASSES {
            let Some(offset) = seen.take().or_else(|| find_run(rows, order)) else {
                fruitless += 1;
                continue;
            };
            // Another one is faster than us only where it makes progress itself.
            if self.set_block(huge, offset, order) {
                return Ok(self.taken(huge, offset, old));
            }
        }
        self.give_up(huge, word, order.frames() as u16);
        Err(Miss::Undone)
    }

    /// Takes a block of less than a row where a frame lies, or elsewhere in its row, if there is one.
    #[inline]
    pub(crate) fn take_in_row(&self, frame: FrameId, order: Order) -> Result<Taken, Miss> {
        let huge = frame.huge().ok_or(Miss::NoFit)?;
        let word = self.entries.get(huge.index()).ok_or(Miss::NoFit)?;
        let row = self.rows.get((frame.0 / ROW_FRAMES as u64) as usize).ok_or(Miss::NoFit)?;
        let (used, at) = (row.load(Ordering::Relaxed), (frame.0 % ROW_FRAMES as u64) as u32);
        // Where one of this order was freed it fits, most often: no search whose length nobody could predict.
        let fits = used & run_mask(order) << at == 0 && frame.is_aligned(order);
        let bit = if fits { at } else { free_run(used, order).ok_or(Miss::NoFit)? };
        let old = transition(word, FOREVER, |e| e.take_order(order)).map_err(|_| Miss::NoFit)?;
        let offset = (frame.offset_in_huge() & !(ROW_FRAMES - 1)) + bit as usize;
        self.set_some(huge, word, order, old, Some(offset))
    }

    /// A block whose bits were set, out of an entry that was `old` before.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "an addition and a test, at the end of each take")]
    fn taken(&self, huge: HugeId, offset: usize, old: HugeEntry) -> Taken {
        self.settle(huge);
        Taken { frame: FrameId(huge.first_frame().0 + offset as u64), evicted: old.is_evicted() }
    }

    /// After a take that looked through the huge frame: lowers the bound on the runs if this was the last of the longest.
    /// A take at a place that the caller knew does without: most often that is one where a block of this size was freed
    /// lately and comes free again, and a bound that is too high costs a search no more than this look. Whether it had to
    /// be raised again: for a moment it denied a run that came free meanwhile, and a party that looked then has to be told.
    #[inline]
    pub(crate) fn after_take(&self, huge: HugeId, order: Order) -> bool {
        let is_longest = |entry: HugeEntry| entry.has_room() && entry.run() == Run::of(order);
        (Order::BASE < order && order < Order::HUGE)
            && self.entry(huge).is_some_and(is_longest)
            && self.after_longest(huge, order)
    }

    /// Raises the counter by frames whose bits were cleared before, in runs of at most `run`; the entry
    /// afterwards. `None` if it was broken by somebody: then the frames are lost rather than owned twice.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "frees spend a tenth of their time on the call")]
    fn count_free(&self, huge: HugeId, word: &AtomicU16, frames: u16, run: Run) -> Option<HugeEntry> {
        let (old, after) = transition_to(word, FOREVER, |e| e.give(frames, run)).ok()?;
        self.settle(huge);
        // No run is longer than any.
        let looks = old.free() == 0 && run != Run::ANY;
        Some(if looks { self.after_nothing(huge, word, after, frames) } else { after })
    }

    /// The entry after a give to a huge frame of which nothing was free. Budgets are all alike: a taker of the
    /// last frames may have set the bits that a giver cleared and left others, so the giver looks at all.
    #[cold]
    fn after_nothing(&self, huge: HugeId, word: &AtomicU16, after: HugeEntry, frames: u16) -> HugeEntry {
        let rows = self.rows_of(huge);
        if usize::from(frames) >= ROW_FRAMES {
            let with_free = rows.iter().fold(0, |n, row| n + u16::from(row.load(Ordering::Acquire) != u64::MAX));
            if with_free <= frames / ROW_FRAMES as u16 {
                // Whatever rows they are by now, so few have no longer run than as many that were given.
                return after;
            }
        }
        let run = longest(rows);
        match transition(word, FOREVER, |e| e.raise(run)) {
            Ok(old) => old.raise(run).unwrap_or(after),
            // High enough, or taken again.
            Err(_) => after.raise(run).unwrap_or(after),
        }
    }

    /// Gives back a budget whose frames others took. An entry that refuses it was broken by somebody,
    /// and then the frames are lost rather than owned twice.
    #[cold]
    fn give_up(&self, huge: HugeId, word: &AtomicU16, frames: u16) {
        let _ = transition(word, FOREVER, |e| e.give(frames, Run::ANY));
        self.settle(huge);
    }

    /// The longest run that a row lies in after some of its bits were cleared.
    #[inline]
    fn run_after(&self, frame: FrameId, used: u64) -> Run {
        if used == 0 { self.run_of_rows((frame.0 / ROW_FRAMES as u64) as usize) } else { longest_run(used) }
    }

    /// The longest run that a row lies in which was cleared as a whole.
    #[inline]
    fn run_of_rows(&self, row: usize) -> Run {
        const HALF: usize = ROWS / 2;
        // Of two parties that each clear a row, one sees both.
        change_before_looks();
        let first = row & !(HALF - 1);
        let Some(rows) = self.rows.get(first..).and_then(|rows| rows.first_chunk::<HALF>()) else { return Run::ANY };
        let used = |row: usize| rows[row % HALF].load(Ordering::Relaxed);
        if used(row ^ 1) != 0 {
            return Run::of(Order::ROW);
        }
        Run::from_bits(7 + u16::from(used(row ^ 2) | used(row ^ 3) == 0))
    }

    /// Lowers the bound on the runs of a huge frame to what its bits say. What a search that found no run in it makes of
    /// that: a bound that fell and rose again may have misled somebody.
    #[cold]
    #[inline(never)]
    pub(crate) fn bound(&self, huge: HugeId) -> Miss {
        let Some(before) = self.entry_before_a_look(huge) else { return Miss::NoFit };
        let has_risen = self.lower_bound(huge, before, longest(self.rows_of(huge)));
        if has_risen { Miss::Undone } else { Miss::NoFit }
    }

    /// An entry, before the rows are looked at.
    #[inline]
    fn entry_before_a_look(&self, huge: HugeId) -> Option<HugeEntry> {
        self.entries.get(huge.index()).map(|word| HugeEntry::from_bits(word.load(Ordering::Acquire)))
    }

    /// A block of the longest runs was taken: if it was the last, that saves others the look. Whether the bound had to be raised again.
    #[inline(never)]
    fn after_longest(&self, huge: HugeId, order: Order) -> bool {
        let Some(before) = self.entry_before_a_look(huge) else { return false };
        find_run(self.rows_of(huge), order).is_none()
            && self.lower_bound(huge, before, Run::from_bits(u16::from(order.get()) - 1))
    }

    /// Lowers the bound of an entry that is as it was before the look that found runs up to `seen`: one that was given
    /// a longer run meanwhile keeps its bound, for others may go by it. Whether the bound had to be raised again, for a
    /// run above `seen` that came since the look is seen now.
    #[inline]
    fn lower_bound(&self, huge: HugeId, before: HugeEntry, seen: Run) -> bool {
        let Some(word) = self.entries.get(huge.index()) else { return false };
        let lower = |e: HugeEntry| if e == before { e.lower(seen) } else { None };
        if transition(word, FOREVER, lower).is_err() {
            return false;
        }
        let rows = self.rows_of(huge);
        let is_there = Order::new(seen.order().get() + 1).is_some_and(|above| find_run(rows, above).is_some());
        if seen != Run::ANY && is_there {
            let now = longest(rows);
            return transition(word, FOREVER, |e| e.raise(now)).is_ok();
        }
        false
    }

    /// Takes exactly the block at `frame`; whether frames looked taken for a moment comes with an error.
    pub(crate) fn take_at(&self, frame: FrameId, order: Order) -> Result<Taken, (AllocError, Miss)> {
        let huge = self.check(frame, order).map_err(|fault| match fault {
            Fault::Range => (AllocError::OutOfRange(frame, order), Miss::NoFit),
            Fault::Alignment => (AllocError::Misaligned(frame, order), Miss::NoFit),
        })?;
        let not_free = AllocError::NotFree(frame, order);
        if order.is_huge() {
            return self.take_huge(huge, order).map_err(|miss| (not_free, miss));
        }
        let word = &self.entries[huge.index()];
        let old = transition(word, FOREVER, |e| e.take_order(order)).map_err(|_| (not_free, Miss::NoFit))?;
        if self.set_block(huge, frame.offset_in_huge(), order) {
            self.settle(huge);
            return Ok(Taken { frame, evicted: old.is_evicted() });
        }
        self.give_up(huge, word, order.frames() as u16);
        Err((not_free, Miss::Undone))
    }

    /// Gives a block back; returns the first huge entry as it is afterwards.
    pub(crate) fn give(&self, frame: FrameId, order: Order) -> Result<HugeEntry, FreeError> {
        let huge = self.check(frame, order).map_err(|fault| match fault {
            Fault::Range => FreeError::OutOfRange(frame, order),
            Fault::Alignment => FreeError::Misaligned(frame, order),
        })?;
        let not_allocated = FreeError::NotAllocated(frame, order);
        if order.is_huge() {
            return self.give_huge(huge, order).ok_or(not_allocated);
        }
        let word = &self.entries[huge.index()];
        let entry = HugeEntry::from_bits(word.load(Ordering::Relaxed));
        if entry.is_huge() || entry.is_held() {
            return Err(not_allocated);
        }
        // What was cleared is given back even if it is not all of the block, so that the counter
        // fits the bits whatever callers do.
        let (frames, left) = self.clear_block(huge, frame.offset_in_huge(), order);
        if frames == 0 {
            return Err(not_allocated);
        }
        // Of several rows all were free together for a moment, and a part of them may be still when the
        // first is not: a look from there does not say.
        let run = self.run_after(frame, left).max(Run::of(order));
        let after = self.count_free(huge, word, frames, run).ok_or(FreeError::Corrupt(huge))?;
        if u64::from(frames) < order.frames() { Err(not_allocated) } else { Ok(after) }
    }

    /// Takes all free frames of the first row that has room for a block of `order`, or no more than `most` from that
    /// block on. That no row can be had so does not say that no block can: others may be at work in it.
    pub(crate) fn take_row(&self, huge: HugeId, order: Order, most: u32) -> Result<TakenRow, Miss> {
        let word = self.entries.get(huge.index()).ok_or(Miss::NoFit)?;
        let rows = self.rows_of(huge);
        for _ in 0..ROW_PASSES {
            let mut fits = false;
            HugeEntry::from_bits(word.load(Ordering::Relaxed)).take_order(order).ok_or(Miss::NoFit)?;
            for (index, row) in rows.iter().enumerate() {
                let used = row.load(Ordering::Relaxed);
                let Some(run) = free_run(used, order) else { continue };
                fits = true;
                let most = most.max(2 * order.frames() as u32);
                let bits = if most < ROW_FRAMES as u32 { lowest(!used & u64::MAX << run, most) } else { !used };
                let free = ones(bits) as u16;
                // Fewer in the counter than clear in the row: others are about to set bits here.
                let Ok(old) = transition(word, FOREVER, |e| e.take(free)) else { continue };
                if row.compare_exchange(used, used | bits, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    self.settle(huge);
                    let first = FrameId(huge.first_frame().0 + (index * ROW_FRAMES) as u64);
                    return Ok(TakenRow { first, bits, evicted: old.is_evicted() });
                }
                self.give_up(huge, word, free);
                return Err(Miss::Undone);
            }
            if !fits {
                return Err(self.bound(huge));
            }
        }
        Err(Miss::Busy)
    }

    /// Gives a block of a row or less back, the shortest way. `None` if it is not wholly taken, and
    /// nothing changed, or if somebody broke the entry: then it is lost rather than owned twice.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "frees spend a tenth of their time on the call")]
    pub(crate) fn give_in_row(&self, frame: FrameId, order: Order) -> Option<HugeEntry> {
        let huge = frame.huge().filter(|_| frame.is_aligned(order))?;
        let word = self.entries.get(huge.index())?;
        let row = (frame.0 / ROW_FRAMES as u64) as usize;
        let mask = run_mask(order) << (frame.0 % ROW_FRAMES as u64);
        let used = row::clear(self.rows.get(row)?, mask)?;
        let run = if used == 0 { self.run_of_rows(row) } else { run_around(used, frame.0 as u32 % 64) };
        self.count_free(huge, word, order.frames() as u16, run)
    }

    /// Gives `bits` of a row back that [`Lower::take_row`] took; returns the entry afterwards. `None`
    /// if somebody broke the entry: then the frames are lost rather than owned twice.
    #[inline]
    pub(crate) fn give_row(&self, first: FrameId, bits: u64) -> Option<HugeEntry> {
        let huge = first.huge()?;
        let word = self.entries.get(huge.index())?;
        let row = self.rows.get((first.0 / ROW_FRAMES as u64) as usize)?;
        // Only what was still set: frames that somebody freed out of our register (a double free)
        // must not raise the counter twice, or it would call a huge frame free that is not.
        let used = row.fetch_and(!bits, Ordering::AcqRel);
        let (frames, run) = (ones(used & bits) as u16, self.run_after(first, used & !bits));
        self.count_free(huge, word, frames, run)
    }

    fn check(&self, frame: FrameId, order: Order) -> Result<HugeId, Fault> {
        let end = frame.0.checked_add(order.frames()).ok_or(Fault::Range)?;
        if end > u64::from(self.huge_frames()) * Order::HUGE.frames() {
            return Err(Fault::Range);
        }
        if !frame.is_aligned(order) {
            return Err(Fault::Alignment);
        }
        frame.huge().ok_or(Fault::Range)
    }

    /// Sets the bits of the block at `offset`; all or nothing.
    #[inline]
    fn set_block(&self, huge: HugeId, offset: usize, order: Order) -> bool {
        match self.block_rows(huge, offset, order) {
            [row] => row::set(row, run_mask(order) << (offset % ROW_FRAMES)),
            rows => set_rows(rows),
        }
    }

    /// Clears the bits of the block at `offset`; the number of frames cleared, and what is left in the
    /// row. None if one is clear already, fewer than the block has only if
    /// another party frees a part of it at this moment.
    #[inline]
    fn clear_block(&self, huge: HugeId, offset: usize, order: Order) -> (u16, u64) {
        let rows = self.block_rows(huge, offset, order);
        let mask = run_mask(order) << (offset % ROW_FRAMES);
        let (mut cleared, mut left) = (0, u64::MAX);
        if rows.len() > 1 && !rows.iter().all(|row| row.load(Ordering::Relaxed) & mask == mask) {
            return (cleared, left);
        }
        for row in rows {
            let Some(after) = row::clear(row, mask) else { break };
            cleared += order.frames().min(ROW_FRAMES as u64) as u16;
            left = after;
        }
        (cleared, left)
    }

    #[inline]
    fn block_rows(&self, huge: HugeId, offset: usize, order: Order) -> &'a [AtomicU64] {
        let first = offset / ROW_FRAMES;
        self.rows_of(huge).get(first..first + rows_per_block(order)).unwrap_or(&[])
    }
}

/// The lowest set bits, no more than `most`.
fn lowest(bits: u64, most: u32) -> u64 {
    let mut rest = bits;
    (0..most).for_each(|_| rest &= rest.wrapping_sub(1));
    bits & !rest
}

enum Fault {
    Range,
    Alignment,
}
