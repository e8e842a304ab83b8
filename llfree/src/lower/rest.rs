//! The last frames of a huge frame, all at once.

use super::{FOREVER, Lower, ROW_PASSES, transition};
use crate::row::{ROW_FRAMES, ones};
use crate::rows::ROWS;
use crate::sync::Ordering;
use crate::taken::{Miss, Taken};
use shared_layout::{HugeEntry, HugeId};

/// So few are counted as they are taken.
const FEW_FRAMES: u32 = 2;

impl Lower<'_> {
    /// Takes the only free frame of a huge frame.
    #[inline]
    pub(crate) fn take_only(&self, huge: HugeId) -> Result<Taken, Miss> {
        let word = self.entries.get(huge.index()).ok_or(Miss::NoFit)?;
        let words = self.rows_of(huge);
        let free = self.used_rows(huge).map(|used| !used);
        // One of them has a bit: which one nobody could predict.
        let (mut bits, mut index) = (0, 0);
        for (at, row) in free.iter().enumerate() {
            bits |= row;
            index |= if *row != 0 { at } else { 0 };
        }
        let row = words.get(index).ok_or(Miss::NoFit)?;
        if bits == 0 || bits & (bits - 1) != 0 {
            return Err(Miss::NoFit);
        }
        let take = |e: HugeEntry| if e.free() == 1 { e.take(1) } else { None };
        let old = transition(word, FOREVER, take).map_err(|_| Miss::NoFit)?;
        if row.compare_exchange(!bits, u64::MAX, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            self.give_up(huge, word, 1);
            return Err(Miss::Undone);
        }
        Ok(self.taken(huge, index * ROW_FRAMES + bits.trailing_zeros() as usize, old))
    }

    /// Takes all free frames of a huge frame that has at most a row's worth of them, or no more than `most`: `rows` gets
    /// the bits of each row that has some. Returns whether there were any, and the entry's `evicted`; the entry has
    /// room afterwards if not all could be had.
    pub(crate) fn take_rest(&self, huge: HugeId, most: u32, rows: &mut [u64; ROWS]) -> Result<bool, Miss> {
        debug_assert!(rows.iter().all(|row| *row == 0), "what was taken here is counted there");
        let word = self.entries.get(huge.index()).ok_or(Miss::NoFit)?;
        let words = self.rows_of(huge);
        // The look at the rows does not wait for the change of the entry.
        let free = self.used_rows(huge).map(|used| !used);
        let mut with_free = free.iter().enumerate().fold(0u32, |rows, (i, bits)| rows | u32::from(*bits != 0) << i);
        let share = |e: HugeEntry| e.free().min(most as u16);
        let take = |e: HugeEntry| if e.free() <= ROW_FRAMES as u16 { e.take(share(e)) } else { None };
        let old = transition(word, FOREVER, take).map_err(|_| Miss::NoFit)?;
        let mut budget = u32::from(share(old));
        let count = |free: &[u64; ROWS]| free.iter().map(|bits| bits.count_ones()).sum::<u32>();
        if budget > FEW_FRAMES && count(&free) == budget {
            // As a rule nobody else is at work here, and all that we saw is ours. How many there are in which row nobody
            // could predict: so there is no branch on it.
            let mut lost = false;
            while with_free != 0 {
                let index = with_free.trailing_zeros() as usize % ROWS;
                with_free &= with_free - 1;
                let Some(row) = words.get(index) else { break };
                let taken = row.compare_exchange(!free[index], u64::MAX, Ordering::AcqRel, Ordering::Relaxed).is_ok();
                rows[index] = if taken { free[index] } else { 0 };
                lost |= !taken;
            }
            budget = if lost { budget - count(rows) } else { 0 };
        }
        while with_free != 0 && budget > 0 {
            let index = with_free.trailing_zeros() as usize % ROWS;
            with_free &= with_free - 1;
            let Some(row) = words.get(index) else { break };
            let (bits, count) = at_most(free[index], budget);
            if row.compare_exchange(!free[index], !free[index] | bits, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                rows[index] = bits;
                budget -= count;
            }
        }
        if budget == 0 {
            self.settle(huge);
            return Ok(old.is_evicted());
        }
        for _ in 0..ROW_PASSES {
            for (row, taken) in words.iter().zip(rows.iter_mut()) {
                let mut used = row.load(Ordering::Relaxed);
                while used != u64::MAX && budget > 0 {
                    let (bits, count) = at_most(!used, budget);
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
                return Ok(old.is_evicted());
            }
        }
        // Takers and givers moved free bits past us each time: the rest of the budget goes back.
        self.give_up(huge, word, budget as u16);
        // The caller looks at the entry, and tells of what has room again.
        if budget < u32::from(share(old)) { Ok(old.is_evicted()) } else { Err(Miss::Undone) }
    }
}

/// As many of these bits as a budget allows, and their number: others may be about to set bits that are not in our
/// budget. They are left as many as they need, which ones is all the same.
#[inline]
fn at_most(mut bits: u64, budget: u32) -> (u64, u32) {
    let mut count = ones(bits);
    while count > budget {
        bits &= bits - 1;
        count -= 1;
    }
    (bits, count)
}
