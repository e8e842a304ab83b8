//! The allocator's metadata in the caches, and out of them.
//!
//! Half of the blocks are free, by chance. A loop frees blocks at random places, another allocates as many, each timed
//! as a whole: `cold` after a sweep over more memory than the last cache holds, `hot` the same with the blocks just
//! allocated, in random order. A sweep leaves nothing of the allocator in the caches, and that is the point: a guest's
//! own work does the same between two bursts of allocations.

use super::blocks::{by_chance, carve};
use super::round::{Round, Units};
use crate::error::BenchError;
use crate::frames::{FAILED, Frames, Visit, frames};
use crate::latency::{between, ticks};
use crate::measured::{Measured, Timed};
use crate::passes::{alloc_loop, free_loop};
use std::collections::HashSet;
use std::hint::black_box;

/// Blocks of a loop; fewer, if all loops together would free more than a quarter of those in use.
const BLOCKS: u64 = 1024;
/// Loops of each kind in a round.
const LOOPS: u64 = 4;
/// The last cache, if the kernel does not say.
const LAST_CACHE: usize = 32 << 20;

/// One round.
pub(crate) struct Cache<'a> {
    pub(crate) round: Round<'a>,
    /// What a sweep writes: twice the last cache.
    pub(crate) sweep: usize,
}

/// Twice the largest cache of the first core, in bytes.
pub(crate) fn sweep_bytes() -> usize {
    let size = |index: u32| {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
        let text = std::fs::read_to_string(path).ok()?;
        text.trim().strip_suffix('K')?.parse::<usize>().ok().map(|kib| kib << 10)
    };
    2 * (0..8).filter_map(size).max().unwrap_or(LAST_CACHE)
}

/// Writes to every line.
fn sweep(lines: &mut [u64]) {
    lines.iter_mut().step_by(8).for_each(|word| *word = word.wrapping_add(1));
    black_box(lines);
}

/// Blocks in use at the start, chosen at random, none of them twice.
struct Victims<'a> {
    blocks: u64,
    seed: u64,
    taken: HashSet<u64>,
    random: &'a mut fastrand::Rng,
}

impl Victims<'_> {
    fn choose(&mut self, count: u64) -> Vec<u64> {
        let mut chosen = Vec::with_capacity(count as usize);
        while (chosen.len() as u64) < count {
            let block = self.random.u64(..self.blocks);
            if by_chance(block, self.seed) && self.taken.insert(block) {
                chosen.push(block);
            }
        }
        chosen
    }
}

impl Visit for Cache<'_> {
    type Output = Result<Measured, BenchError>;

    fn visit<F: Frames>(self, allocator: &F) -> Self::Output {
        let Self { round, sweep: bytes } = self;
        let Round { huge_frames, order, seed, .. } = round;
        let blocks = frames(huge_frames) / order.frames();
        // All loops together take a quarter of those in use: there is always one to choose.
        let count = BLOCKS.min(blocks / 2 / 4 / (LOOPS + 1));
        round.alone(|| {
            carve(allocator, huge_frames, order, |block| by_chance(block, seed))?;
            let mut random = fastrand::Rng::with_seed(seed);
            let mut choice = fastrand::Rng::with_seed(!seed);
            let mut victims = Victims { blocks, seed, taken: HashSet::new(), random: &mut choice };
            let mut lines = vec![0; bytes / 8];
            let mut handle = allocator.handle();
            let units = Units::measure();
            let mut sums = [0; 4];
            // The first loop warms up.
            for pass in 0..=LOOPS {
                let mut list: Vec<u64> = victims.choose(count).iter().map(|block| block * order.frames()).collect();
                for (kind, sums) in sums.chunks_exact_mut(2).enumerate() {
                    let cold = kind == 0;
                    if cold {
                        sweep(&mut lines);
                    } else {
                        random.shuffle(&mut list);
                    }
                    // What the loop itself reads is not what is out of the caches.
                    black_box(list.iter().sum::<u64>());
                    let start = ticks();
                    let freed = free_loop(&mut handle, &list, order);
                    let free = between(start, ticks());
                    if cold {
                        sweep(&mut lines);
                        list.fill(FAILED);
                    }
                    let start = ticks();
                    alloc_loop(&mut handle, &mut list, order);
                    let alloc = between(start, ticks());
                    if !freed || list.contains(&FAILED) {
                        return None;
                    }
                    if pass > 0 {
                        (sums[0], sums[1]) = (sums[0] + free, sums[1] + alloc);
                    }
                }
            }
            let names = ["free-cold", "alloc-cold", "free-hot", "alloc-hot"].into_iter();
            let timed = |(op, sum)| Timed { op, ns: units.watch.each(sum, LOOPS) / count as f64, count: LOOPS * count };
            Some(Measured { cas_ns: units.cas_ns, ops: names.zip(sums).map(timed).collect() })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn victims_are_in_use_and_chosen_once() {
        let mut random = fastrand::Rng::with_seed(5);
        let mut victims = Victims { blocks: 4096, seed: 9, taken: HashSet::new(), random: &mut random };
        let all: Vec<u64> = (0..5).flat_map(|_| victims.choose(100)).collect();
        assert!(all.iter().all(|block| *block < 4096 && by_chance(*block, 9)));
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), 500);
    }

    #[test]
    fn a_sweep_is_larger_than_a_cache() {
        assert!(sweep_bytes() >= 64 << 10);
    }
}
