//! The lower level: huge entries and bitfields. They alone decide who owns a frame.
//!
//! A huge frame's counter (in its [`HugeEntry`]) is a budget: a party that lowers it by n has the right
//! to set n bits. So a take lowers the counter *before* it sets bits and a give clears bits *before*
//! it raises the counter; at any instant there are at least as many clear bits as the counter says,
//! and a crash between the two steps loses frames at worst, it never gives one out twice. Blocks of
//! order 9 and 10 live in the entries alone; their bitfields stay clear.
//!
//! Everything works through `&self` on atomics, is lock-free, and knows nothing of trees or CPUs.

use crate::durable::WriteBack;
use crate::error::{AllocError, FreeError, Part, TableError, check_huge_frames, check_len};
use crate::row::{self, ROW_FRAMES, free_run, ones, run_mask};
use crate::sync::{AtomicU16, AtomicU64, Ordering};
use shared_layout::{FrameId, HugeEntry, HugeId, HugeRange, Order};

/// Rows (64 frames, one word of the bitfield) in a huge frame.
pub(crate) const ROWS: usize = 8;
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
    let mut current = word.load(Ordering::Acquire);
    for _ in 0..tries {
        let Some(next) = step(HugeEntry::from_bits(current)) else { break };
        match word.compare_exchange(current, next.bits(), Ordering::AcqRel, Ordering::Acquire) {
            Ok(old) => return Ok(HugeEntry::from_bits(old)),
            Err(seen) => current = seen,
        }
    }
    Err(HugeEntry::from_bits(current))
}

/// A guest's patience: lock-freedom says that somebody else made progress each time.
const FOREVER: u32 = u32::MAX;

/// Frames that were just taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Taken {
    pub(crate) frame: FrameId,
    /// (One of) the huge frames is not backed.
    pub(crate) evicted: bool,
}

/// All free frames of one row, taken at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct TakenRow {
    pub(crate) first: FrameId,
    /// A set bit is a frame that the holder may give out.
    pub(crate) bits: u64,
    pub(crate) evicted: bool,
}

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
    fn settle(&self, huge: HugeId) {
        if self.write_back.is_needed() {
            self.write_lines(huge);
        }
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

    /// The rows of a huge frame: set bits are taken.
    pub(crate) fn used_rows(&self, huge: HugeId) -> [u64; ROWS] {
        let mut used = [u64::MAX; ROWS];
        used.iter_mut().zip(self.rows_of(huge)).for_each(|(to, row)| *to = row.load(Ordering::Relaxed));
        used
    }

    /// Takes a huge frame that `accepts` likes.
    #[inline]
    pub(crate) fn take_huge_if(&self, huge: HugeId, accepts: impl Fn(HugeEntry) -> bool) -> Option<Taken> {
        let step = |e: HugeEntry| if accepts(e) { e.take_huge() } else { None };
        let old = transition(self.entries.get(huge.index())?, FOREVER, step).ok()?;
        self.settle(huge);
        Some(Taken { frame: huge.first_frame(), evicted: old.is_evicted() })
    }

    /// Gives a block of order 9 back; `None`, and nothing changed, if there is none.
    #[inline]
    pub(crate) fn give_one_huge(&self, huge: HugeId) -> Option<HugeEntry> {
        let old = transition(self.entries.get(huge.index())?, FOREVER, HugeEntry::give_huge).ok()?;
        self.settle(huge);
        old.give_huge()
    }

    /// Clear bits of a huge frame: what the counter should be when nobody is at work in it.
    pub(crate) fn clear_bits(&self, huge: HugeId) -> u32 {
        self.rows_of(huge).iter().map(|row| row.load(Ordering::Acquire).count_zeros()).sum()
    }

    /// Whether a huge frame's entry is valid and fits its bits, when nobody is at work in it.
    pub(crate) fn is_consistent(&self, huge: HugeId) -> bool {
        self.entry(huge).is_some_and(|entry| {
            // Bits of held frames and of huge blocks stay clear.
            let expected = if entry.is_huge() || entry.is_held() { 512 } else { u32::from(entry.free()) };
            entry.is_valid() && self.clear_bits(huge) == expected
        })
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
    pub(crate) fn take(&self, huge: HugeId, order: Order) -> Option<Taken> {
        if order.is_huge() {
            return self.take_huge(huge, order);
        }
        let word = self.entries.get(huge.index())?;
        // Order 0 always fits if the counter allows it; for others look before lowering the
        // counter, so that hopeless attempts do not make it dip for everybody else.
        if order != Order::BASE && !self.rows_of(huge).chunks(rows_per_block(order)).any(|rows| fits(rows, order)) {
            return None;
        }
        let old = transition(word, FOREVER, |e| e.take_order(order)).ok()?;
        let Some(offset) = self.set_bits(huge, order) else {
            // Others took the run that we saw. Our budget goes back; an entry that refuses it was
            // broken by somebody, and then the frames are lost rather than owned twice.
            let _ = transition(word, FOREVER, |e| e.give(order.frames() as u16));
            self.settle(huge);
            return None;
        };
        self.settle(huge);
        Some(Taken { frame: FrameId(huge.first_frame().0 + offset as u64), evicted: old.is_evicted() })
    }

    /// Takes exactly the block at `frame`.
    pub(crate) fn take_at(&self, frame: FrameId, order: Order) -> Result<Taken, AllocError> {
        let huge = self.check(frame, order).map_err(|fault| match fault {
            Fault::Range => AllocError::OutOfRange(frame, order),
            Fault::Alignment => AllocError::Misaligned(frame, order),
        })?;
        let not_free = AllocError::NotFree(frame, order);
        if order.is_huge() {
            return self.take_huge(huge, order).ok_or(not_free);
        }
        let word = &self.entries[huge.index()];
        let old = transition(word, FOREVER, |e| e.take_order(order)).map_err(|_| not_free)?;
        if self.set_block(huge, frame.offset_in_huge(), order) {
            self.settle(huge);
            return Ok(Taken { frame, evicted: old.is_evicted() });
        }
        let _ = transition(word, FOREVER, |e| e.give(order.frames() as u16));
        self.settle(huge);
        Err(not_free)
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
        let frames = self.clear_block(huge, frame.offset_in_huge(), order);
        if frames == 0 {
            return Err(not_allocated);
        }
        let old = transition(word, FOREVER, |e| e.give(frames)).map_err(|_| FreeError::Corrupt(huge))?;
        self.settle(huge);
        if u64::from(frames) < order.frames() {
            return Err(not_allocated);
        }
        old.give(frames).ok_or(FreeError::Corrupt(huge))
    }

    /// Takes all free frames of the first row that has room for a block of `order`.
    pub(crate) fn take_row(&self, huge: HugeId, order: Order) -> Option<TakenRow> {
        let word = self.entries.get(huge.index())?;
        let rows = self.rows_of(huge);
        for _ in 0..ROW_PASSES {
            HugeEntry::from_bits(word.load(Ordering::Relaxed)).take_order(order)?;
            for (index, row) in rows.iter().enumerate() {
                let used = row.load(Ordering::Relaxed);
                if free_run(used, order).is_none() {
                    continue;
                }
                let free = ones(!used) as u16;
                // Fewer in the counter than clear in the row: others are about to set bits here.
                let Ok(old) = transition(word, FOREVER, |e| e.take(free)) else { continue };
                if row.compare_exchange(used, u64::MAX, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    self.settle(huge);
                    let first = FrameId(huge.first_frame().0 + (index * ROW_FRAMES) as u64);
                    return Some(TakenRow { first, bits: !used, evicted: old.is_evicted() });
                }
                let _ = transition(word, FOREVER, |e| e.give(free));
            }
        }
        None
    }

    /// Takes all free frames of a huge frame that has at most a row's worth of them: `rows` gets
    /// the bits of each row. Returns whether there were any, and the entry's `evicted`.
    pub(crate) fn take_rest(&self, huge: HugeId, rows: &mut [u64; ROWS]) -> Option<bool> {
        let word = self.entries.get(huge.index())?;
        let all = |e: HugeEntry| if e.free() <= ROW_FRAMES as u16 { e.take(e.free()) } else { None };
        let old = transition(word, FOREVER, all).ok()?;
        let mut budget = u32::from(old.free());
        let words = self.rows_of(huge);
        let mut free = [0; ROWS];
        free.iter_mut().zip(words).for_each(|(to, row)| *to = !row.load(Ordering::Relaxed));
        if free.iter().map(|bits| bits.count_ones()).sum::<u32>() == budget {
            // Nobody else is at work here, as a rule: then all that we see is ours.
            for ((row, taken), bits) in words.iter().zip(rows.iter_mut()).zip(free).filter(|(_, bits)| *bits != 0) {
                if row.compare_exchange(!bits, u64::MAX, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    *taken = bits;
                }
            }
            budget -= rows.iter().map(|bits| bits.count_ones()).sum::<u32>();
            if budget == 0 {
                self.settle(huge);
                return Some(old.is_evicted());
            }
        }
        for _ in 0..ROW_PASSES {
            for (row, taken) in words.iter().zip(rows.iter_mut()) {
                let mut used = row.load(Ordering::Relaxed);
                while used != u64::MAX && budget > 0 {
                    // Others may be about to set bits here that are not in our budget: leave
                    // them as many as they need, which ones is all the same.
                    let mut bits = !used;
                    let mut count = ones(bits);
                    while count > budget {
                        bits &= bits - 1;
                        count -= 1;
                    }
                    match row.compare_exchange(used, used | bits, Ordering::AcqRel, Ordering::Relaxed) {
                        Ok(_) => {
                            *taken |= bits;
                            budget -= count;
                            break;
                        }
                        Err(seen) => used = seen,
                    }
                }
            }
            if budget == 0 {
                self.settle(huge);
                return Some(old.is_evicted());
            }
        }
        // Takers and givers moved free bits past us each time: the rest of the budget goes back.
        let _ = transition(word, FOREVER, |e| e.give(budget as u16));
        self.settle(huge);
        (budget < u32::from(old.free())).then_some(old.is_evicted())
    }

    /// Gives a block of less than a row back, the shortest way. `None` if it is not wholly taken, and
    /// nothing changed, or if somebody broke the entry: then it is lost rather than owned twice.
    #[inline]
    pub(crate) fn give_in_row(&self, frame: FrameId, order: Order) -> Option<(HugeId, HugeEntry)> {
        let huge = frame.huge().filter(|_| frame.is_aligned(order))?;
        let word = self.entries.get(huge.index())?;
        let row = self.rows.get((frame.0 / ROW_FRAMES as u64) as usize)?;
        let mask = run_mask(order) << (frame.0 % ROW_FRAMES as u64);
        if !row::clear(row, mask) {
            return None;
        }
        let frames = order.frames() as u16;
        let old = transition(word, FOREVER, |e| e.give(frames)).ok()?;
        self.settle(huge);
        Some((huge, old.give(frames)?))
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
        let frames = ones(row.fetch_and(!bits, Ordering::AcqRel) & bits) as u16;
        let old = transition(word, FOREVER, |e| e.give(frames)).ok()?;
        self.settle(huge);
        old.give(frames)
    }

    fn take_huge(&self, huge: HugeId, order: Order) -> Option<Taken> {
        let last = huge.0.checked_add(order.huge_frames() - 1)?;
        if !huge.first_frame().is_aligned(order) || last >= self.huge_frames() {
            return None;
        }
        // As above: a half that is taken and given back again is not there for others meanwhile.
        let words = &self.entries[huge.index()..=last as usize];
        if !words.iter().all(|word| HugeEntry::from_bits(word.load(Ordering::Relaxed)).is_all_free()) {
            return None;
        }
        let mut evicted = false;
        for index in huge.0..=last {
            match transition(&self.entries[index as usize], FOREVER, HugeEntry::take_huge) {
                Ok(old) => evicted |= old.is_evicted(),
                Err(_) => {
                    // Undo exactly the halves that this call took, and no other.
                    for taken in huge.0..index {
                        let _ = transition(&self.entries[taken as usize], FOREVER, HugeEntry::give_huge);
                        self.settle(HugeId(taken));
                    }
                    return None;
                }
            }
        }
        (huge.0..=last).for_each(|index| self.settle(HugeId(index)));
        Some(Taken { frame: huge.first_frame(), evicted })
    }

    fn give_huge(&self, huge: HugeId, order: Order) -> Option<HugeEntry> {
        if order == Order::HUGE {
            return self.give_one_huge(huge);
        }
        let words = &self.entries[huge.index()..huge.index() + order.huge_frames() as usize];
        // Look at all halves first: a wrong order must change nothing.
        if !words.iter().all(|w| HugeEntry::from_bits(w.load(Ordering::Relaxed)).give_huge().is_some()) {
            return None;
        }
        let mut after = None;
        for word in words {
            let old = transition(word, FOREVER, HugeEntry::give_huge).ok()?;
            after = after.or(old.give_huge());
        }
        (0..order.huge_frames()).for_each(|half| self.settle(HugeId(huge.0 + half)));
        after
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

    /// Finds and sets a block's bits; the offset of its first frame in the huge frame.
    fn set_bits(&self, huge: HugeId, order: Order) -> Option<usize> {
        let rows = self.rows_of(huge);
        let step = rows_per_block(order);
        for _ in 0..ROW_PASSES {
            for index in (0..ROWS).step_by(step) {
                if step > 1 {
                    if self.set_block(huge, index * ROW_FRAMES, order) {
                        return Some(index * ROW_FRAMES);
                    }
                    continue;
                }
                let row = rows.get(index)?;
                let mut used = row.load(Ordering::Relaxed);
                while let Some(bit) = free_run(used, order) {
                    let mask = run_mask(order) << bit;
                    // Acquire pairs with the giver's clearing of these bits; see `row::clear`.
                    match row.compare_exchange(used, used | mask, Ordering::AcqRel, Ordering::Relaxed) {
                        Ok(_) => return Some(index * ROW_FRAMES + bit as usize),
                        Err(seen) => used = seen,
                    }
                }
            }
        }
        None
    }

    /// Sets the bits of the block at `offset`; all or nothing.
    fn set_block(&self, huge: HugeId, offset: usize, order: Order) -> bool {
        let rows = self.block_rows(huge, offset, order);
        let mask = run_mask(order) << (offset % ROW_FRAMES);
        for (i, row) in rows.iter().enumerate() {
            if !row::set(row, mask) {
                // The rows before this one are ours since a moment ago: nobody else clears them.
                for mine in &rows[..i] {
                    mine.fetch_and(!mask, Ordering::AcqRel);
                }
                return false;
            }
        }
        true
    }

    /// Clears the bits of the block at `offset`; the number of frames cleared. None if one is clear
    /// already, fewer than the block has only if another party frees a part of it at this moment.
    fn clear_block(&self, huge: HugeId, offset: usize, order: Order) -> u16 {
        let rows = self.block_rows(huge, offset, order);
        let mask = run_mask(order) << (offset % ROW_FRAMES);
        if !rows.iter().all(|row| row.load(Ordering::Relaxed) & mask == mask) {
            return 0;
        }
        let mut cleared = 0;
        for row in rows {
            if !row::clear(row, mask) {
                return cleared;
            }
            cleared += ones(mask) as u16;
        }
        cleared
    }

    fn block_rows(&self, huge: HugeId, offset: usize, order: Order) -> &'a [AtomicU64] {
        let first = offset / ROW_FRAMES;
        self.rows_of(huge).get(first..first + rows_per_block(order)).unwrap_or(&[])
    }
}

enum Fault {
    Range,
    Alignment,
}

/// Whole rows that a block below order 9 covers: 1 up to order 6, then 2 and 4.
const fn rows_per_block(order: Order) -> usize {
    if order.get() > Order::ROW.get() { 1 << (order.get() - Order::ROW.get()) } else { 1 }
}

fn fits(rows: &[AtomicU64], order: Order) -> bool {
    rows.iter().all(|row| free_run(row.load(Ordering::Relaxed), order).is_some())
}
