//! Memory new and old: single allocations in memory that nobody used, in memory of which a random half is free, and the
//! replacement of blocks one by one.
//!
//! Victims are chosen before a loop is timed and lie side by side in the workload's list: the cost of a look at a list
//! of millions of blocks is not the allocator's.

use super::round::{Round, Units};
use crate::error::BenchError;
use crate::frames::{FAILED, Frames, Handle, Visit, frames};
use crate::latency::{Latencies, Tail, between, ticks};
use crate::measured::{Measured, Timed};
use shared_layout::Order;

const TAILS: [Tail; 4] = [("alloc-p50", 0.5), ("alloc-p99", 0.99), ("alloc-p99.9", 0.999), ("alloc-max", 1.0)];
/// Blocks that are replaced between two choices of victims.
const BATCH: usize = 256;

/// Allocates half of an instance that is all free.
pub(crate) struct Fresh<'a>(pub(crate) Round<'a>);

/// Allocates in memory of which a random half is free, half of that at a time; then as many random blocks are freed.
pub(crate) struct Aged<'a>(pub(crate) Round<'a>);

/// What the same sequence of allocations took, once.
pub(crate) struct Run {
    times: Latencies,
    units: Units,
}

/// Runs of the same sequence, for what is left of the slowest allocation without the machine's interruptions.
pub(crate) const SAME_RUNS: usize = 3;

/// Frees a random block and allocates one, at a fill level: first in loops without a timer (`pair`), then timed singly.
pub(crate) struct Replace<'a> {
    pub(crate) round: Round<'a>,
    pub(crate) percent: u32,
}

/// The mean and the tails of all allocations.
fn alloc_rows(times: Latencies, units: &Units) -> Vec<Timed> {
    let mut ops = vec![times.mean("alloc", &units.watch)];
    ops.extend(times.tails(&TAILS, &units.watch));
    ops
}

/// Moves `count` random blocks to the end of the list.
fn choose(held: &mut [u64], count: usize, random: &mut fastrand::Rng) {
    let len = held.len();
    for end in (len.saturating_sub(count)..len).rev() {
        held.swap(end, random.usize(..=end));
    }
}

/// All memory in blocks of `order`, then all but `used` of them freed at random; the rest is the list.
fn scattered<H: Handle>(
    handle: &mut H,
    huge_frames: u32,
    order: Order,
    used: impl Fn(usize) -> usize,
    random: &mut fastrand::Rng,
) -> Option<Vec<u64>> {
    let blocks = (frames(huge_frames) / order.frames()) as usize;
    let mut held: Vec<u64> = (0..blocks).map(|_| handle.alloc(order)).collect();
    if held.contains(&FAILED) {
        return None;
    }
    let used = used(blocks);
    choose(&mut held, blocks - used, random);
    free_tail(handle, &mut held, used, order).then_some(held)
}

/// Frees all but the first `keep` blocks.
fn free_tail(handle: &mut impl Handle, held: &mut Vec<u64>, keep: usize, order: Order) -> bool {
    let ok = held[keep..].iter().all(|block| handle.free(*block, order));
    held.truncate(keep);
    ok
}

impl Visit for Fresh<'_> {
    type Output = Result<Measured, BenchError>;

    fn visit<F: Frames>(self, allocator: &F) -> Self::Output {
        let Self(round) = self;
        let count = (frames(round.huge_frames) / 2 / round.order.frames()).min(round.operations);
        round.alone(|| {
            let mut times = Latencies::with_room(count);
            let mut handle = allocator.handle();
            let units = Units::measure();
            let all = (0..count).all(|_| times.time(|| handle.alloc(round.order)) != FAILED);
            all.then(|| Measured { cas_ns: units.cas_ns, ops: alloc_rows(times, &units) })
        })
    }
}

/// The first run; and of several the slowest of all allocations where each has its least time of them: a program that is
/// interrupted is so at another allocation each time.
pub(crate) fn aged(runs: Vec<Run>) -> Measured {
    let worst = (runs.len() > 1).then(|| Latencies::least(runs.iter().map(|run| &run.times)));
    let Some(Run { times, units }) = runs.into_iter().next() else { return Measured::default() };
    let mut ops = alloc_rows(times, &units);
    ops.extend(worst.into_iter().flat_map(|worst| worst.tails(&[("alloc-worst", 1.0)], &units.watch)));
    Measured { cas_ns: units.cas_ns, ops }
}

impl Visit for Aged<'_> {
    type Output = Result<Run, BenchError>;

    fn visit<F: Frames>(self, allocator: &F) -> Self::Output {
        let Self(round) = self;
        let order = round.order;
        round.alone(|| {
            let mut random = fastrand::Rng::with_seed(round.seed);
            let mut handle = allocator.handle();
            let mut held = scattered(&mut handle, round.huge_frames, order, |all| all / 2, &mut random)?;
            let used = held.len();
            held.reserve(used);
            let mut times = Latencies::with_room(round.operations);
            let units = Units::measure();
            let deadline = round.deadline(&units);
            while times.count() < round.operations && (times.count() == 0 || ticks() < deadline) {
                let left = (round.operations - times.count()).min(used as u64 / 2);
                for _ in 0..left.max(1) {
                    match times.time(|| handle.alloc(order)) {
                        FAILED => return None,
                        block => held.push(block),
                    }
                }
                let allocated = held.len() - used;
                choose(&mut held, allocated, &mut random);
                if !free_tail(&mut handle, &mut held, used, order) {
                    return None;
                }
            }
            Some(Run { times, units })
        })
    }
}

impl Visit for Replace<'_> {
    type Output = Result<Measured, BenchError>;

    fn visit<F: Frames>(self, allocator: &F) -> Self::Output {
        let Self { round, percent } = self;
        let order = round.order;
        let used = |all: usize| all * percent as usize / 100;
        round.alone(|| {
            let mut random = fastrand::Rng::with_seed(round.seed);
            let mut handle = allocator.handle();
            let mut held = scattered(&mut handle, round.huge_frames, order, used, &mut random)?;
            let batch = BATCH.min(held.len());
            let batches = round.operations.div_ceil(BATCH as u64);
            let [mut frees, mut allocs] = [round.operations + BATCH as u64; 2].map(Latencies::with_room);
            let units = Units::measure();
            let mut ok = true;
            let (mut sum, mut loops) = (0, 0);
            let deadline = round.deadline(&units);
            // The first warms up.
            for pass in 0..=batches {
                choose(&mut held, batch, &mut random);
                let tail = held.len() - batch;
                let start = ticks();
                ok = ok && replace_loop(&mut handle, &mut held[tail..], order);
                let end = ticks();
                if pass > 0 {
                    (sum, loops) = (sum + between(start, end), loops + 1);
                }
                if !ok || end > deadline {
                    break;
                }
            }
            let deadline = round.deadline(&units);
            for _ in 0..batches {
                choose(&mut held, batch, &mut random);
                let tail = held.len() - batch;
                for slot in &mut held[tail..] {
                    ok = ok && frees.time(|| handle.free(*slot, order));
                    *slot = allocs.time(|| handle.alloc(order));
                    ok = ok && *slot != FAILED;
                }
                if !ok || ticks() > deadline {
                    break;
                }
            }
            let pairs = loops * batch as u64;
            let pair = Timed { op: "pair", ns: units.watch.each(sum, loops) / batch as f64, count: pairs };
            let mut ops = vec![pair, frees.mean("free", &units.watch)];
            ops.extend(alloc_rows(allocs, &units));
            ok.then_some(Measured { cas_ns: units.cas_ns, ops })
        })
    }
}

/// Frees each block and allocates another in its place; false if that failed once.
#[inline(never)]
fn replace_loop<H: Handle>(handle: &mut H, blocks: &mut [u64], order: Order) -> bool {
    let mut ok = true;
    for block in blocks {
        ok &= handle.free(*block, order);
        *block = handle.alloc(order);
        ok &= *block != FAILED;
    }
    ok
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn victims_are_different_blocks_and_no_block_is_lost() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut held: Vec<u64> = (0..1000).collect();
        let mut chosen = HashSet::new();
        for _ in 0..50 {
            choose(&mut held, 100, &mut random);
            chosen.extend(held[900..].iter().copied());
            assert_eq!(held.iter().collect::<HashSet<_>>().len(), 1000);
        }
        assert!(chosen.len() > 950, "all of them have their turn: {}", chosen.len());
        // As many as there are, and more.
        choose(&mut held, 1000, &mut random);
        choose(&mut held, 1001, &mut random);
        assert_eq!(held.into_iter().collect::<HashSet<_>>().len(), 1000);
    }

    #[test]
    fn what_is_scattered_is_what_is_in_use() {
        use crate::allocator::Allocator;
        struct Scattered;
        impl Visit for Scattered {
            type Output = ();
            fn visit<F: Frames>(self, allocator: &F) {
                let mut random = fastrand::Rng::with_seed(2);
                let mut handle = allocator.handle();
                let used = |all| all / 4;
                let held = scattered(&mut handle, 4, Order::BASE, used, &mut random).expect("all is free");
                assert_eq!(held.len() as u64, frames(4) / 4);
                let free: HashSet<u64> =
                    std::iter::repeat_with(|| handle.alloc(Order::BASE)).take_while(|frame| *frame != FAILED).collect();
                assert!(held.iter().all(|frame| !free.contains(frame)));
                assert_eq!(free.len() + held.len(), frames(4) as usize);
            }
        }
        for allocator in [Allocator::Llfree, Allocator::LlfreeShared, Allocator::Buddy] {
            allocator.with(4, Scattered);
        }
    }
}
