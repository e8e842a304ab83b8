//! The last frames of a huge frame, all at once or, of few, one by one.

use super::{FOREVER, Lower, ROW_PASSES, transition};
use crate::row::ROW_FRAMES;
use crate::rows::ROWS;
use crate::sync::Ordering;
use crate::taken::{Miss, Taken};
use shared_layout::{HugeEntry, HugeId};

impl Lower<'_> {
    /// Takes a frame of a huge frame that has few; whether it has others. Where somebody else is at work nothing is taken.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "a result in memory costs as much as the look")]
    pub(crate) fn take_one(&self, huge: HugeId) -> Result<(Taken, bool), Miss> {
        let word = self.entries.get(huge.index()).ok_or(Miss::NoFit)?;
        let rows = self.rows_of(huge).first_chunk::<ROWS>().ok_or(Miss::NoFit)?;
        // Which rows have one nobody could predict: so there is no branch on it.
        let (mut used, mut index) = (u64::MAX, 0);
        for (at, row) in rows.iter().enumerate() {
            let row = row.load(Ordering::Relaxed);
            let has_one = row != u64::MAX;
            used = if has_one { row } else { used };
            index = if has_one { at } else { index };
        }
        if used == u64::MAX {
            return Err(Miss::NoFit);
        }
        let old = transition(word, 1, |e| e.take(1)).map_err(|_| Miss::NoFit)?;
        if rows[index].compare_exchange(used, used | (used + 1), Ordering::AcqRel, Ordering::Relaxed).is_err() {
            self.give_up(huge, word, 1);
            return Err(Miss::Undone);
        }
        let bit = used.trailing_ones() as usize;
        Ok((self.taken(huge, index * ROW_FRAMES + bit, old), old.free() > 1))
    }

    /// Takes all free frames of a huge frame that has at most a row's worth of them, or no more than `most`: `took` is told
    /// the row and the bits of some. Returns the entry's `evicted`; the entry has room afterwards if not all could be had.
    pub(crate) fn take_rest(&self, huge: HugeId, most: u32, mut took: impl FnMut(usize, u64)) -> Result<bool, Miss> {
        let word = self.entries.get(huge.index()).ok_or(Miss::NoFit)?;
        let rows = self.rows_of(huge).first_chunk::<ROWS>().ok_or(Miss::NoFit)?;
        // The look at the rows does not wait for the change of the entry.
        let free = self.used_rows(huge).map(|used| !used);
        let mut with_free = free.iter().enumerate().fold(0u32, |rows, (i, bits)| rows | u32::from(*bits != 0) << i);
        let share = |e: HugeEntry| e.free().min(most as u16);
        let take = |e: HugeEntry| if e.free() <= ROW_FRAMES as u16 { e.take(share(e)) } else { None };
        let old = transition(word, FOREVER, take).map_err(|_| Miss::NoFit)?;
        let mut budget = u32::from(share(old));
        // As a rule nobody else is at work here, and all that we saw is ours.
        while with_free != 0 && budget > 0 {
            let index = with_free.trailing_zeros() as usize % ROWS;
            with_free &= with_free - 1;
            let (bits, count) = at_most(free[index], budget);
            if rows[index]
                .compare_exchange(!free[index], !free[index] | bits, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
            {
                took(index, bits);
                budget -= count;
            }
        }
        for _ in 0..ROW_PASSES {
            if budget == 0 {
                self.settle(huge);
                return Ok(old.is_evicted());
            }
            for (index, row) in rows.iter().enumerate() {
                let mut used = row.load(Ordering::Relaxed);
                while used != u64::MAX && budget > 0 {
                    let (bits, count) = at_most(!used, budget);
                    match row.compare_exchange(used, used | bits, Ordering::AcqRel, Ordering::Relaxed) {
                        Ok(_) => {
                            took(index, bits);
                            budget -= count;
                            break;
                        }
                        Err(seen) => used = seen,
                    }
                }
            }
        }
        if budget > 0 {
            // Takers and givers moved free bits past us each time: the rest of the budget goes back.
            self.give_up(huge, word, budget as u16);
        } else {
            self.settle(huge);
        }
        // The caller looks at the entry, and tells of what has room again.
        if budget < u32::from(share(old)) { Ok(old.is_evicted()) } else { Err(Miss::Undone) }
    }
}

/// As many of these bits as a budget allows, and their number: others may be about to set bits that are not in our
/// budget. They are left as many as they need, which ones is all the same.
#[inline]
fn at_most(mut bits: u64, budget: u32) -> (u64, u32) {
    // Three or more are rare, and one or two, which nobody could predict, are counted without a branch.
    let more = bits & bits.wrapping_sub(1);
    let few = u32::from(bits != 0) + u32::from(more != 0);
    let mut count = if more & more.wrapping_sub(1) == 0 { few } else { bits.count_ones() };
    while count > budget {
        bits &= bits - 1;
        count -= 1;
    }
    (bits, count)
}
