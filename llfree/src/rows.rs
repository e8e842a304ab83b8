//! The rows of a huge frame together: runs of more than one row, and the longest of all.
//!
//! As `row`, it knows nothing of entries or of the right to a frame.

use crate::row::{ROW_FRAMES, free_run, joined};
use crate::sync::{AtomicU64, Ordering};
use shared_layout::{Order, Run};

/// The order of half a row.
const HALF_ROW: u8 = Order::ROW.get() - 1;
/// Rows (64 frames, one word of the bitfield) in a huge frame.
pub(crate) const ROWS: usize = 8;

/// Sets all bits of some rows; all or nothing.
#[inline]
pub(crate) fn set_rows(rows: &[AtomicU64]) -> bool {
    for (i, row) in rows.iter().enumerate() {
        if row.compare_exchange(0, u64::MAX, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            // The rows before this one are ours since a moment ago: nobody else clears them.
            rows[..i].iter().for_each(|mine| mine.store(0, Ordering::Release));
            return false;
        }
    }
    true
}

/// Whole rows that a block below order 9 covers: 1 up to order 6, then 2 and 4.
pub(crate) const fn rows_per_block(order: Order) -> usize {
    if order.get() > Order::ROW.get() { 1 << (order.get() - Order::ROW.get()) } else { 1 }
}

/// The offset of a free run for a block below order 9.
#[inline]
pub(crate) fn find_run(rows: &[AtomicU64], order: Order) -> Option<usize> {
    let used = |row: &AtomicU64| row.load(Ordering::Relaxed);
    if order < Order::ROW {
        let in_row = |(index, row)| Some(index * ROW_FRAMES + free_run(used(row), order)? as usize);
        return rows.iter().enumerate().find_map(in_row);
    }
    if order == Order::ROW {
        return rows.iter().position(|row| used(row) == 0).map(|index| index * ROW_FRAMES);
    }
    let step = rows_per_block(order);
    let free = |rows: &[AtomicU64]| rows.iter().all(|row| used(row) == 0);
    rows.chunks_exact(step).position(free).map(|index| index * step * ROW_FRAMES)
}

/// The longest free run in the rows of a huge frame.
pub(crate) fn longest(rows: &[AtomicU64]) -> Run {
    let mut used = [u64::MAX; ROWS];
    // Acquire: for the second look of a search; see the module.
    used.iter_mut().zip(rows).for_each(|(to, row)| *to = row.load(Ordering::Acquire));
    longest_of(&used)
}

/// The longest free run in such rows.
#[inline]
pub(crate) fn longest_of(used: &[u64; ROWS]) -> Run {
    let free = |rows: &[u64]| rows.iter().all(|row| *row == 0);
    if used.contains(&0) {
        return match () {
            () if used.chunks_exact(4).any(free) => Run::ANY,
            () if used.chunks_exact(2).any(free) => Run::from_bits(7),
            () => Run::of(Order::ROW),
        };
    }
    // All rows at once, and no further than there is a run in any: where memory is short that is most often not far.
    let mut starts = used.map(|used| !used);
    for order in 0..HALF_ROW {
        let longer = starts.map(|starts| joined(starts, order));
        if longer.iter().fold(0, |any, starts| any | starts) == 0 {
            return Run::from_bits(order.into());
        }
        starts = longer;
    }
    // No row is free as a whole.
    Run::from_bits(HALF_ROW.into())
}
