//! The churn: a mixed load of many small and some huge blocks, for as long as it is told.
//!
//! The load breathes: it grows or shrinks towards a size that is drawn anew whenever it is
//! reached. Blocks die at random, so that lifetimes are exponential, and each is checked before
//! it is freed. When the host states that it wants memory, the churn frees up to half of its
//! blocks, drains the vCPU's cache and stops growing until the wish is gone. All that it allocated
//! is free when it ends, and blocks of earlier commands are never touched.

use crate::agent::Tally;
use crate::blocks::{Blocks, Counters, Tags};
use crate::clock::Clock;
use crate::devices::Devices;
use crate::host::Doorbell;
use crate::memory::{Memory, Refusal};
use crate::rng::Rng;
use crate::shared::Shared;
use shared_layout::{ControlWord, HUGE_SIZE, Order};

/// Steps that stand for a millisecond when there is no clock.
const STEPS_PER_MILLI: u64 = 1000;
/// A wish of the host that stands is answered again after so many steps.
const WISH_STEPS: u64 = 4096;
/// Refused installs in a row, with nothing left to free, after which the churn ends: a host that
/// has no memory must not be asked for ever.
const PATIENCE: u32 = 64;
/// Blocks freed after an allocation that found no memory.
const OOM_FREES: u32 = 4;
/// Spins before another attempt when others, or the host, have all memory: some microseconds.
const OOM_SPINS: u32 = 1000;

/// What to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// How long.
    pub(crate) millis: u64,
    /// The most bytes to hold.
    pub(crate) bytes: u64,
    /// Seeds sizes and lifetimes.
    pub(crate) seed: u64,
}

/// What the churn works with.
pub(crate) struct Churn<'c, 'a, D> {
    pub(crate) memory: &'c mut Memory<'a, D>,
    pub(crate) counters: &'c mut Counters,
    pub(crate) shared: &'c Shared,
    pub(crate) clock: Clock,
    /// The devices, on the vCPU that runs their drivers.
    pub(crate) drives: Option<&'c Devices>,
}

/// A running churn.
struct Load {
    blocks: Blocks,
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

impl Load {
    fn new(plan: Plan, tags: Tags) -> Self {
        Self {
            blocks: Blocks::new(),
            tags,
            rng: Rng::new(plan.seed),
            tally: Tally::new(),
            target: plan.bytes,
            refusals: 0,
            starved: false,
        }
    }
}

impl<D: Doorbell> Churn<'_, '_, D> {
    /// Runs the plan to its end. The tally counts what was allocated.
    pub(crate) fn run(&mut self, plan: Plan, tags: Tags) -> Tally {
        let mut load = Load::new(plan, tags);
        let start = self.clock.now();
        let ticks = self.clock.ticks(plan.millis);
        let (mut wish, mut answered) = (0, 0);
        let mut cap = plan.bytes;
        for step in 0u64.. {
            let over = match ticks {
                Some(ticks) => self.clock.now().saturating_sub(start) >= ticks,
                None => step >= plan.millis.saturating_mul(STEPS_PER_MILLI),
            };
            if over || load.refusals >= PATIENCE {
                break;
            }
            if let Some(devices) = self.drives.filter(|devices| devices.have_work(self.shared)) {
                devices.run(self.shared, self.memory, self.clock, false);
            }
            let wanted = self.shared.control(ControlWord::Wanted);
            if wanted == 0 {
                cap = plan.bytes;
            } else if wanted != wish || step - answered >= WISH_STEPS {
                self.give_way(&mut load, wanted);
                cap = load.blocks.bytes();
                answered = step;
            }
            wish = wanted;
            self.step(&mut load, cap);
        }
        while load.blocks.len() > 0 {
            self.free_one(&mut load);
        }
        if load.starved && load.tally.is_idle() {
            load.tally.refuse(Refusal::OutOfMemory);
        }
        load.tally.settle()
    }

    /// One allocation or one free, towards the target.
    fn step(&mut self, load: &mut Load, cap: u64) {
        let held = load.blocks.bytes();
        let target = load.target.min(cap);
        let against = load.rng.below(4) == 0;
        if (held < target) != against {
            let order = draw(&mut load.rng, cap.saturating_sub(held));
            match order {
                Some(order) => self.allocate(load, order),
                None => self.free_one(load),
            }
        } else {
            self.free_one(load);
        }
        // Passed it, either way: breathe the other way.
        if (held < target) != (load.blocks.bytes() < target) || load.blocks.len() == 0 {
            load.target = load.rng.below(cap.saturating_add(1));
        }
    }

    fn allocate(&mut self, load: &mut Load, order: Order) {
        match load.blocks.add(self.memory, self.counters, order, &mut load.tags) {
            Ok(()) => {
                load.tally.add(order.bytes());
                load.refusals = 0;
            }
            // What can be freed is freed, and the churn goes on with less.
            Err(refusal) if load.blocks.len() > 0 => {
                for _ in 0..OOM_FREES {
                    self.free_one(load);
                }
                if refusal == Refusal::OutOfMemory {
                    self.memory.drain();
                }
            }
            // Others may free some before the time is over.
            Err(Refusal::OutOfMemory) => {
                load.starved = true;
                self.memory.drain();
                for _ in 0..OOM_SPINS {
                    core::hint::spin_loop();
                }
            }
            Err(Refusal::InstallFailed(status)) => {
                load.refusals += 1;
                if load.refusals == PATIENCE {
                    load.tally.refuse(Refusal::InstallFailed(status));
                }
            }
        }
    }

    /// Frees blocks for a host that wants `wanted` huge frames, at most half of what there is.
    fn give_way(&mut self, load: &mut Load, wanted: u64) {
        let held = load.blocks.bytes();
        let keep = (held / 2).max(held.saturating_sub(wanted.saturating_mul(HUGE_SIZE)));
        while load.blocks.bytes() > keep {
            self.free_one(load);
        }
        self.memory.drain();
    }

    /// Checks a random block and frees it.
    fn free_one(&mut self, load: &mut Load) {
        if let Some(index) = load.blocks.pick(Some(&mut load.rng)) {
            load.blocks.check(self.memory, index, &mut load.tally.damage);
            load.blocks.remove(self.memory, self.counters, index);
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
    use crate::fake::Table;

    #[test]
    fn giving_way_frees_what_is_wanted_but_never_more_than_half() {
        let table = Table::new(32, 1);
        let tenant = table.tenant();
        let (mut memory, mut counters) = (table.memory(&tenant, 0), Counters::default());
        let (shared, clock) = (table.shared(), Clock::new(0));
        let mut churn = Churn { memory: &mut memory, counters: &mut counters, shared: &shared, clock, drives: None };
        let mut load = Load::new(Plan { millis: 1, bytes: u64::MAX, seed: 6 }, Tags::new(6, 0, 0));
        for _ in 0..20 {
            churn.allocate(&mut load, Order::HUGE);
        }
        churn.give_way(&mut load, 3);
        assert_eq!(load.blocks.bytes(), 17 * HUGE_SIZE);
        // 31 huge frames without 17 blocks and the one with the record node: the cache is empty.
        assert_eq!(tenant.stats().free_huge, 13);
        churn.give_way(&mut load, u64::MAX);
        assert_eq!(load.blocks.bytes(), 8 * HUGE_SIZE);
        assert_eq!((load.blocks.len(), counters.allocs - counters.frees), (8, 8));
    }

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
}
