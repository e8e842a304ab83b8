//! The churn: a mixed load of many small and some huge blocks, for as long as it is told.
//!
//! The load breathes: it grows or shrinks towards a size that is drawn anew whenever it is
//! reached. Blocks die at random, so that lifetimes are exponential, and each is checked before
//! it is freed. When the host states that it wants memory, the churn frees up to half of its
//! blocks, flushes what the source keeps and stops growing until the wish is gone. All that it allocated
//! is free when it ends, and blocks of earlier commands are never touched.

use crate::rng::Rng;
use crate::source::{Blocks, Clock, Refusal, System};
use crate::stamp::Tags;
use crate::tally::{Counters, Tally};
use shared_layout::{HUGE_SIZE, Order};

/// Steps that stand for a millisecond when there is no clock.
const STEPS_PER_MILLI: u64 = 1000;
/// A standing request of the host is answered again after this many steps.
const WISH_STEPS: u64 = 4096;
/// Refused installs in a row, with nothing left to free, after which the churn ends: a host that
/// has no memory must not be asked forever.
const PATIENCE: u32 = 64;
/// Blocks freed after an allocation that found no memory.
const OOM_FREES: u32 = 4;
/// Spins before another attempt when others, or the host, have all memory: some microseconds.
const OOM_SPINS: u32 = 1000;

/// The command.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The duration.
    pub millis: u64,
    /// The most bytes to hold.
    pub bytes: u64,
    /// Seeds sizes and lifetimes.
    pub seed: u64,
}

/// A churn, and what it works with.
#[derive(Debug)]
pub struct Churn<'c, S: System> {
    system: &'c mut S,
    counters: &'c mut Counters,
    plan: Plan,
    blocks: S::Blocks,
    tags: Tags,
    rng: Rng,
    tally: Tally,
    /// Bytes the load moves towards.
    target: u64,
    /// Refused installs since the last block.
    refusals: u32,
    /// There was a time without a block to hold or to get.
    starved: bool,
}

impl<'c, S: System> Churn<'c, S> {
    /// A churn without a block yet.
    pub fn new(system: &'c mut S, counters: &'c mut Counters, plan: Plan, tags: Tags) -> Self {
        let (blocks, rng, tally) = (S::Blocks::default(), Rng::new(plan.seed), Tally::new());
        Self { system, counters, plan, blocks, tags, rng, tally, target: plan.bytes, refusals: 0, starved: false }
    }

    /// The blocks that it holds.
    pub fn blocks(&self) -> &S::Blocks {
        &self.blocks
    }

    /// Runs the plan to its end. The tally counts what was allocated.
    #[must_use]
    pub fn run(mut self) -> Tally {
        let clock = self.system.clock();
        let start = clock.now();
        let ticks = clock.ticks(self.plan.millis);
        let (mut wish, mut answered) = (0, 0);
        let mut cap = self.plan.bytes;
        for step in 0u64.. {
            let over = match ticks {
                Some(ticks) => clock.now().saturating_sub(start) >= ticks,
                None => step >= self.plan.millis.saturating_mul(STEPS_PER_MILLI),
            };
            if over || self.refusals >= PATIENCE {
                break;
            }
            let wanted = self.system.wanted();
            if wanted == 0 {
                cap = self.plan.bytes;
            } else if wanted != wish || step - answered >= WISH_STEPS {
                self.give_way(wanted);
                cap = self.blocks.bytes();
                answered = step;
            }
            wish = wanted;
            self.step(cap);
        }
        while !self.blocks.is_empty() {
            self.free_one();
        }
        if self.starved && self.tally.is_idle() {
            self.tally.refuse(Refusal::OutOfMemory);
        }
        self.tally.settle()
    }

    /// One allocation or one free, towards the target.
    fn step(&mut self, cap: u64) {
        let held = self.blocks.bytes();
        let target = self.target.min(cap);
        let against = self.rng.below(4) == 0;
        let full = self.blocks.len() >= S::MOST_SINGLE_BLOCKS;
        let grow = (held < target) != against && !full;
        match grow.then(|| draw(&mut self.rng, cap.saturating_sub(held))).flatten() {
            Some(order) => self.allocate(order),
            None => self.free_one(),
        }
        // Passed it, either way, or cannot get there: breathe the other way.
        if (held < target) != (self.blocks.bytes() < target) || self.blocks.is_empty() || full {
            self.target = self.rng.below(cap.saturating_add(1));
        }
    }

    /// Allocates a block of `order`, or makes room if there is none.
    pub fn allocate(&mut self, order: Order) {
        match self.system.fill(&mut self.blocks, order, 1, &mut self.tags).1 {
            Ok(()) => {
                self.tally.add(order.bytes());
                self.counters.allocs += 1;
                self.refusals = 0;
            }
            // What can be freed is freed, and the churn goes on with less.
            Err(refusal) if !self.blocks.is_empty() => {
                for _ in 0..OOM_FREES {
                    self.free_one();
                }
                if refusal == Refusal::OutOfMemory {
                    self.system.flush();
                }
            }
            // Others may free some before the time is over.
            Err(Refusal::OutOfMemory) => {
                self.starved = true;
                self.system.flush();
                for _ in 0..OOM_SPINS {
                    core::hint::spin_loop();
                }
            }
            Err(Refusal::InstallFailed(status)) => {
                self.refusals += 1;
                if self.refusals == PATIENCE {
                    self.tally.refuse(Refusal::InstallFailed(status));
                }
            }
        }
    }

    /// Frees blocks for a host that wants `wanted` huge frames, at most half of what there is.
    pub fn give_way(&mut self, wanted: u64) {
        let held = self.blocks.bytes();
        let keep = (held / 2).max(held.saturating_sub(wanted.saturating_mul(HUGE_SIZE)));
        while self.blocks.bytes() > keep {
            self.free_one();
        }
        self.system.flush();
    }

    /// Checks a random block and frees it.
    fn free_one(&mut self) {
        if let Some(index) = self.blocks.pick(Some(&mut self.rng)) {
            self.system.check(&self.blocks, index, &mut self.tally.damage);
            let block = self.system.remove(&mut self.blocks, index);
            self.system.give(block);
            self.counters.frees += 1;
        }
    }
}

/// The order of the next block, small and huge ones most often; `None` if not even a page fits.
fn draw(rng: &mut Rng, room: u64) -> Option<Order> {
    let order = match rng.below(100) {
        0..50 => 0,
        50..75 => 1 + rng.below(3),
        75..85 => 4 + rng.below(5),
        85..97 => 9,
        _ => 10,
    };
    // Among those that fit, one of the same kind would be as good: simply the largest.
    (0..=order as u8).rev().filter_map(Order::new).find(|order| order.bytes() <= room)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Model;

    #[test]
    fn every_order_is_drawn_and_none_that_does_not_fit() {
        let mut rng = Rng::new(5);
        let mut seen = [0; 11];
        for _ in 0..10_000 {
            seen[usize::from(draw(&mut rng, u64::MAX).expect("room").get())] += 1;
            assert!(draw(&mut rng, 64 << 10).is_some_and(|order| order.bytes() <= 64 << 10));
        }
        assert!(seen.iter().all(|count| *count > 100), "{seen:?}");
        assert!(seen[0] > 4000 && seen[9] > 1000, "{seen:?}");
        assert_eq!(draw(&mut rng, 4095), None);
    }

    #[test]
    fn a_list_of_single_blocks_never_grows_past_what_the_source_allows() {
        let mut model = Model::new(u64::MAX);
        let mut counters = Counters::default();
        let plan = Plan { millis: 40, bytes: u64::MAX, seed: 4 };
        let tally = Churn::new(&mut model, &mut counters, plan, Tags::new(4, 0, 0)).run();
        assert_eq!(model.most, Model::MOST);
        assert_eq!((counters.allocs, model.used), (counters.frees, 0));
        assert!(!tally.is_idle());
    }
}
