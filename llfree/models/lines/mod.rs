//! The cache lines that two handles take from each other, where blocks of all orders come and go.
//!
//! A block that two processors have one after the other is dear: each of its lines travels, and so does each that one of them
//! only looked at before the other changes it. With `cfg(lines)` the crate's atomics know who has which line. Two handles take
//! turns, operation by operation, and what is counted are the lines that were fetched: the same number on every machine,
//! however fast it is and whatever else it does.
//!
//! `cargo test -p llfree-lines` runs them; with `-- --nocapture` it says whose lines they are.

#[path = "../../tests/common/memory.rs"]
mod memory;

use crate::block::Allocation;
use crate::cpu::Cpu;
use crate::error::AllocError;
use crate::sync::{on_core, take_fetched};
use crate::table::{Initial, Table};
use crate::tenant::Tenant;
use memory::Memory;
use shared_layout::{FrameId, Order, TableLayout};
use std::collections::BTreeMap;

const HUGE: u32 = 512;
const HANDLES: u32 = 2;
/// Operations of each handle before any is counted, and as many that are.
const STEPS: u64 = 100_000;

/// A handle, and the blocks that it holds.
struct Party<'a> {
    core: u32,
    cpu: Cpu<'a>,
    held: Vec<(FrameId, Order)>,
    frames: u64,
    random: fastrand::Rng,
}

impl<'a> Party<'a> {
    fn new(tenant: &Tenant<'a>, core: u32, seed: u64) -> Self {
        let random = fastrand::Rng::with_seed(seed << 8 | u64::from(core));
        Self { core, cpu: tenant.cpu(), held: Vec::new(), frames: 0, random }
    }

    /// Frees a block at random from `level` frames on, and else allocates one of a random order.
    fn step(&mut self, level: u64) {
        on_core(self.core);
        if self.frames >= level {
            let (frame, order) = self.held.swap_remove(self.random.usize(..self.held.len()));
            self.frames -= order.frames();
            self.cpu.free(frame, order).expect("ours");
            return;
        }
        let order = Order::new(self.random.u8(..=Order::MAX.get())).expect("in range");
        match self.cpu.alloc(order) {
            Ok(Allocation::Ready(block)) => {
                self.frames += order.frames();
                self.held.push((block.frame(), order));
            }
            Ok(Allocation::Evicted(_)) => panic!("all memory is there"),
            Err(AllocError::OutOfMemory(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// The part of a table that a line belongs to.
fn part(layout: &TableLayout, offset: u64) -> &'static str {
    match offset {
        offset if offset < layout.entries => "host",
        offset if offset < layout.bitfields => "entries",
        offset if offset < layout.tenant => "rows",
        offset if offset < layout.hints() => "summary",
        _ => "hints",
    }
}

/// Lines that were fetched in 100 operations with `percent` % of memory in use; prints of which part of the table.
fn fetched(percent: u64, seed: u64) -> f64 {
    let layout = TableLayout::new(HUGE).expect("in range");
    let mut memory = Memory::new(layout.total as usize);
    let region = memory.bytes(layout.total as usize);
    let base = region.as_ptr().addr();
    let table = Table::new(region, HUGE, Initial::Free).expect("it fits");
    let tenant = table.tenant();
    let level = u64::from(HUGE) * Order::HUGE.frames() * percent / 100 / u64::from(HANDLES);
    let mut parties: Vec<Party<'_>> = (0..HANDLES).map(|core| Party::new(&tenant, core, seed)).collect();
    let mut run = || (0..STEPS).for_each(|_| parties.iter_mut().for_each(|party| party.step(level)));
    run();
    take_fetched();
    run();
    let per_hundred = 100.0 / (STEPS * u64::from(HANDLES)) as f64;
    let mut parts = BTreeMap::new();
    for (address, count) in take_fetched() {
        *parts.entry(part(&layout, (address - base) as u64)).or_insert(0.0) += count as f64 * per_hundred;
    }
    let all = parts.values().sum();
    println!("{percent} % used, seed {seed}: {all:.2} lines in 100 operations, {parts:.2?}");
    all
}

/// The mean over some seeds, for most of them end with all blocks of a handle around its home, and some do not.
#[test]
fn handles_fetch_few_lines_from_each_other() {
    const SEEDS: u64 = 8;
    for (percent, most) in [(50, 0.5), (80, 1.0), (90, 24.0), (95, 37.0)] {
        let mean = (1..=SEEDS).map(|seed| fetched(percent, seed)).sum::<f64>() / SEEDS as f64;
        println!("{percent} % used: {mean:.2} lines in 100 operations");
        assert!(mean <= most, "{percent} % used: {mean} lines in 100 operations, at most {most} are wanted");
    }
}
