//! One row: 64 frames of a huge frame as the bits of a word, set where taken.
//!
//! Arithmetic on such words, and the two steps that change some bits of a shared one all at once or
//! not at all. Knows nothing of entries or of the right to a frame.

use crate::sync::{AtomicU64, Ordering};
use shared_layout::{Order, Run};

/// Frames in a row.
pub(crate) const ROW_FRAMES: usize = 64;

/// Sets `mask` in a row; false, and nothing changed, if one of its bits is set already.
#[inline]
pub(crate) fn set(row: &AtomicU64, mask: u64) -> bool {
    change(row, |used| (used & mask == 0).then_some(used | mask)).is_some()
}

/// Clears `mask` in a row and returns the row afterwards; `None`, and nothing changed, if one of its
/// bits is clear already.
#[inline]
pub(crate) fn clear(row: &AtomicU64, mask: u64) -> Option<u64> {
    change(row, |used| (used & mask == mask).then_some(used & !mask))
}

#[inline]
fn change(row: &AtomicU64, step: impl Fn(u64) -> Option<u64>) -> Option<u64> {
    let mut used = row.load(Ordering::Relaxed);
    while let Some(next) = step(used) {
        // Release: the next owner sees our last writes to the frames that we give. Acquire pairs
        // with it where we take.
        match row.compare_exchange(used, next, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => return Some(next),
            Err(seen) => used = seen,
        }
    }
    None
}

/// Set bits, quickly for none, few or all: x86-64 has no instruction for it that can be relied on.
#[inline]
pub(crate) fn ones(bits: u64) -> u32 {
    let mut rest = bits;
    for count in 0..4 {
        if rest == 0 {
            return count;
        }
        rest &= rest - 1;
    }
    if bits == u64::MAX { 64 } else { bits.count_ones() }
}

/// The bits of a block in each of its rows, at position 0.
pub(crate) const fn run_mask(order: Order) -> u64 {
    if order.get() >= Order::ROW.get() { u64::MAX } else { (1u64 << order.frames()) - 1 }
}

// Bit i survives round k if the 2^(k+1) bits from i on are clear.
const ALIGNED: [u64; 7] = [
    u64::MAX,
    0x5555_5555_5555_5555,
    0x1111_1111_1111_1111,
    0x0101_0101_0101_0101,
    0x0001_0001_0001_0001,
    0x0000_0001_0000_0001,
    1,
];

/// Position of the lowest aligned run of clear bits for a block of `order`, up to a whole row.
#[inline]
pub(crate) fn free_run(used: u64, order: Order) -> Option<u32> {
    let order = usize::from(order.get().min(Order::ROW.get()));
    let mut free = !used;
    for round in 0..order {
        free &= free >> (1 << round);
    }
    free &= ALIGNED[order];
    (free != 0).then(|| free.trailing_zeros())
}

/// The starts of runs twice as long, of the starts of those of `order`, which is below a row's.
#[inline]
pub(crate) const fn joined(starts: u64, order: u8) -> u64 {
    starts & starts >> (1 << order) & ALIGNED[order as usize + 1]
}

/// The longest run in a row. Without a branch: which one it is nobody could predict.
#[inline]
pub(crate) fn longest_run(used: u64) -> Run {
    let mut free = !used;
    let mut order = 0;
    for round in 0..Order::ROW.get() {
        free = joined(free, round);
        order += u16::from(free != 0);
    }
    Run::from_bits(order)
}

/// The longest run in each pattern of eight frames.
static RUNS_OF_EIGHT: [u8; 256] = {
    let mut runs = [0; 256];
    let mut used = 0;
    while used < 256 {
        let pairs = !used & !used >> 1 & 0x55;
        let quads = pairs & pairs >> 2 & 0x11;
        runs[used] = (pairs != 0) as u8 + (quads != 0) as u8 + (used == 0) as u8;
        used += 1;
    }
    runs
};

/// The longest run around a frame that came free in a row; others elsewhere are not seen.
#[inline]
pub(crate) fn run_around(used: u64, bit: u32) -> Run {
    let eight = RUNS_OF_EIGHT[usize::from((used >> (bit & 56)) as u8)];
    let (sixteen, half) = ((used >> (bit & 48)) as u16, (used >> (bit & 32)) as u32);
    // Without a branch, as above: what is free as a whole has free halves.
    Run::from_bits(u16::from(eight) + u16::from(sixteen == 0) + u16::from(half == 0) + u16::from(used == 0))
}

/// Adds a row's free blocks, each frame in the largest that it lies in.
pub(crate) fn free_blocks_in_row(used: u64, blocks: &mut [u64]) {
    let (mut free, mut smaller) = (!used, None);
    for (order, aligned) in ALIGNED.into_iter().enumerate() {
        if order > 0 {
            free &= free >> (1 << (order - 1));
        }
        let count = u64::from((free & aligned).count_ones());
        if let Some(below) = smaller {
            // Two of each smaller block make one of these.
            blocks[order - 1] += below - 2 * count;
        }
        smaller = Some(count);
        free &= aligned;
    }
    blocks[ALIGNED.len() - 1] += smaller.unwrap_or(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_run_is_the_highest_order_that_is_found() {
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..10_000 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let used = random & random.rotate_left(random as u32 % 64) & random.rotate_left(7);
            let found = (0..=6).filter_map(Order::new).filter(|order| free_run(used, *order).is_some()).max();
            let run = found.map_or(Run::SINGLE, Run::of);
            assert_eq!(longest_run(used), run, "{used:#x}");
        }
        assert_eq!(longest_run(0), Run::of(Order::ROW));
        assert_eq!(longest_run(u64::MAX), Run::SINGLE);
    }

    #[test]
    fn the_run_around_a_frame_has_it_in_it() {
        let order = |o| Order::new(o).expect("in range");
        for o in 0..=6 {
            for first in (0..64).step_by(1 << o) {
                let used = !(run_mask(order(o)) << first);
                assert_eq!(run_around(used, first), Run::of(order(o)));
                assert_eq!(run_around(used, first + (1 << o) - 1), Run::of(order(o)));
            }
        }
        assert_eq!(run_around(!0xf01, 0), Run::SINGLE, "the four are elsewhere");
        assert_eq!(run_around(!0xffff_ff00, 9), Run::of(order(3)), "the sixteen are elsewhere");
    }

    #[test]
    fn free_run_finds_the_lowest_aligned_run() {
        let order = |o| Order::new(o).expect("in range");
        assert_eq!(free_run(0, order(6)), Some(0));
        assert_eq!(free_run(1, order(6)), None);
        assert_eq!(free_run(1, order(5)), Some(32));
        assert_eq!(free_run(0b0110, order(1)), Some(4));
        assert_eq!(free_run(u64::MAX, order(0)), None);
        assert_eq!(free_run(!(1 << 63), order(0)), Some(63));
        for o in 0..=6 {
            for bit in (0..64).step_by(1 << o) {
                let used = !(run_mask(order(o)) << bit);
                assert_eq!(free_run(used, order(o)), Some(bit), "order {o}");
            }
        }
    }
}
