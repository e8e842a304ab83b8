//! Large blocks: whole rows of a huge frame, a huge frame, and a pair of them.

use super::{FOREVER, Lower, transition};
use crate::rows::{find_run, set_rows};
use crate::sync::{AtomicU16, Ordering};
use crate::taken::{Miss, Taken};
use shared_layout::{FrameId, HugeEntry, HugeId, Order};

impl<'a> Lower<'a> {
    /// Takes a block of one, two or four rows.
    #[inline]
    pub(super) fn take_rows(&self, huge: HugeId, order: Order) -> Result<Taken, Miss> {
        let word = self.entries.get(huge.index()).ok_or(Miss::NoFit)?;
        let all = self.rows_of(huge);
        if !HugeEntry::from_bits(word.load(Ordering::Relaxed)).may_fit(order) {
            return Err(Miss::NoFit);
        }
        let Some(offset) = find_run(all, order) else {
            return Err(self.bound(huge));
        };
        let old = transition(word, FOREVER, |e| e.take_order(order)).map_err(|_| Miss::NoFit)?;
        // One attempt: rows that were set for a moment and are free again have to be told of.
        if !set_rows(self.block_rows(huge, offset, order)) {
            self.give_up(huge, word, order.frames() as u16);
            return Err(Miss::Undone);
        }
        Ok(self.taken(huge, offset, old))
    }

    /// Takes the block of one, two or four rows that begins at a frame, if it is free.
    #[inline]
    pub(crate) fn take_rows_at(&self, frame: FrameId, order: Order) -> Result<Taken, Miss> {
        let huge = frame.huge().ok_or(Miss::NoFit)?;
        let word = self.entries.get(huge.index()).ok_or(Miss::NoFit)?;
        let rows = self.block_rows(huge, frame.offset_in_huge(), order);
        let is_free = !rows.is_empty() && rows.iter().all(|row| row.load(Ordering::Relaxed) == 0);
        if !is_free || !frame.is_aligned(order) {
            return Err(Miss::NoFit);
        }
        let old = transition(word, FOREVER, |e| e.take_order(order)).map_err(|_| Miss::NoFit)?;
        let is_set = match rows {
            [row] => row.compare_exchange(0, u64::MAX, Ordering::AcqRel, Ordering::Relaxed).is_ok(),
            rows => set_rows(rows),
        };
        if !is_set {
            self.give_up(huge, word, order.frames() as u16);
            return Err(Miss::Undone);
        }
        Ok(self.taken(huge, frame.offset_in_huge(), old))
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
        let after = self.give_unsettled(huge)?;
        self.settle(huge);
        Some(after)
    }

    /// The same; where memory is durable the caller has it [settled](Self::settle).
    #[inline]
    pub(crate) fn give_unsettled(&self, huge: HugeId) -> Option<HugeEntry> {
        transition(self.entries.get(huge.index())?, FOREVER, HugeEntry::give_huge).ok()?.give_huge()
    }

    #[inline]
    pub(super) fn take_huge(&self, huge: HugeId, order: Order) -> Result<Taken, Miss> {
        if order == Order::HUGE {
            return self.take_huge_if(huge, |_| true).ok_or(Miss::NoFit);
        }
        let [first, second] = self.pair(huge).ok_or(Miss::NoFit)?;
        // As above: a half that is taken and given back again is not there for others meanwhile.
        let is_free = |word: &AtomicU16| HugeEntry::from_bits(word.load(Ordering::Relaxed)).is_all_free();
        if !is_free(first) || !is_free(second) {
            return Err(Miss::NoFit);
        }
        let old = transition(first, FOREVER, HugeEntry::take_huge).map_err(|_| Miss::NoFit)?;
        let Ok(other) = transition(second, FOREVER, HugeEntry::take_huge) else {
            // Undo exactly the half that this call took.
            let _ = transition(first, FOREVER, HugeEntry::give_huge);
            self.settle(huge);
            return Err(Miss::Undone);
        };
        self.settle_pair(huge);
        Ok(Taken { frame: huge.first_frame(), evicted: old.is_evicted() || other.is_evicted() })
    }

    /// The entry afterwards, of the half that has memory behind it if one has.
    #[inline]
    pub(super) fn give_huge(&self, huge: HugeId, order: Order) -> Option<HugeEntry> {
        if order == Order::HUGE {
            return self.give_one_huge(huge);
        }
        let pair = self.pair(huge)?;
        // Look at both halves first: a wrong order must change nothing.
        if !pair.iter().all(|w| HugeEntry::from_bits(w.load(Ordering::Relaxed)).give_huge().is_some()) {
            return None;
        }
        let first = transition(&pair[0], FOREVER, HugeEntry::give_huge).ok()?;
        let second = transition(&pair[1], FOREVER, HugeEntry::give_huge).ok()?;
        self.settle_pair(huge);
        if first.is_evicted() { second.give_huge() } else { first.give_huge() }
    }

    /// The entries of a block of order 10.
    #[inline]
    fn pair(&self, huge: HugeId) -> Option<&'a [AtomicU16; 2]> {
        let words = self.entries.get(huge.index()..).filter(|_| huge.0.is_multiple_of(2))?;
        words.first_chunk()
    }

    #[inline]
    fn settle_pair(&self, huge: HugeId) {
        if self.write_back.is_needed() {
            [huge, HugeId(huge.0 + 1)].into_iter().for_each(|half| self.settle(half));
        }
    }
}
