//! [`Guest`]: what one vCPU works with, as the system of an [`llfree_agent_core::Agent`].
//!
//! Blocks come from the vCPU's [`Memory`], so that what is touched is backed by memory. The vCPU that runs the
//! drivers runs them between any two blocks, as an interrupt would make it.

use crate::blocks::Blocks;
use crate::clock::Clock;
use crate::devices::Devices;
use crate::host::Doorbell;
use crate::memory::Memory;
use crate::samples::Store;
use crate::shared::Shared;
use agent_abi::{Samples, Touch};
use guest_abi::ControlWord;
use llfree_agent_core::samples::Recorder;
use llfree_agent_core::stamp::{Damage, Tags};
use llfree_agent_core::{Refusal, Source, System};
use shared_layout::{FrameId, Order};

/// The vCPU that runs the drivers.
const DRIVER_VCPU: u32 = 0;

/// One vCPU's memory, clock and devices.
pub(crate) struct Guest<'a, D> {
    pub(crate) memory: Memory<'a, D>,
    shared: Shared,
    clock: Clock,
    samples: Store,
    /// The devices, on the vCPU that runs their drivers.
    drives: Option<&'a Devices>,
}

impl<'a, D: Doorbell> Guest<'a, D> {
    /// A vCPU without devices. `memory` is of the region `shared`.
    pub(crate) fn new(shared: &Shared, memory: Memory<'a, D>) -> Self {
        let clock = Clock::new(shared.header().tsc_khz);
        Self { memory, shared: shared.clone(), clock, samples: Store::default(), drives: None }
    }

    /// Connects vCPU `vcpu` to the guest's devices; one of the vCPUs brings them up, and runs their drivers from
    /// now on.
    pub(crate) fn attach(&mut self, devices: &'a Devices, vcpu: u32) {
        if !Devices::exist(&self.shared) {
            return;
        }
        devices.connect(&mut self.memory);
        if vcpu == DRIVER_VCPU {
            devices.probe(&self.shared, &mut self.memory);
            self.drives = Some(devices);
        }
    }

    /// Lets the drivers work if they have something to do.
    pub(crate) fn heed_devices(&mut self) {
        if self.drives.is_some_and(|devices| devices.have_work(&self.shared)) {
            self.run_drivers(false);
        }
    }

    /// A turn of the drivers, if this vCPU runs them; true if there is more to do.
    pub(crate) fn run_drivers(&mut self, tick: bool) -> bool {
        let Some(devices) = self.drives else { return false };
        devices.run(&self.shared, &mut self.memory, self.clock, tick)
    }
}

impl<D: Doorbell> Source for Guest<'_, D> {
    type Blocks = Blocks;
    type Block = (FrameId, Order);

    const MOST_SINGLE_BLOCKS: u64 = u64::MAX;

    fn fill(&mut self, blocks: &mut Blocks, order: Order, count: u64, tags: &mut Tags) -> (u64, Result<(), Refusal>) {
        for done in 0..count {
            self.heed_devices();
            let block = self.take(order, false).and_then(|block| self.put(blocks, block, Some(tags.draw())));
            if let Err(refusal) = block {
                return (done, Err(refusal));
            }
        }
        (count, Ok(()))
    }

    fn check(&self, blocks: &Blocks, index: u64, damage: &mut Damage) -> u64 {
        blocks.check(&self.memory, index, damage)
    }

    fn remove(&mut self, blocks: &mut Blocks, index: u64) -> (FrameId, Order) {
        blocks.remove(&mut self.memory, index)
    }

    fn admit(&mut self, _order: Order) -> Result<(), Refusal> {
        Ok(())
    }

    fn take(&mut self, order: Order, alone: bool) -> Result<(FrameId, Order), Refusal> {
        self.memory.single = alone;
        let block = self.memory.take(order);
        self.memory.single = false;
        block.map(|block| (block.frame(), order))
    }

    fn touch(&self, &(first, _): &(FrameId, Order), touch: Touch) {
        let frames = match touch {
            Touch::Nothing => 0,
            Touch::Frames => 1,
            Touch::Pages => Order::HUGE.frames(),
        };
        for frame in (first.0..first.0 + frames).map(FrameId) {
            // SAFETY: in a huge frame that was just taken.
            unsafe { self.memory.page(frame) }.store(0, frame.0);
        }
    }

    fn put(&mut self, blocks: &mut Blocks, block: (FrameId, Order), tag: Option<u64>) -> Result<(), Refusal> {
        blocks.put(&mut self.memory, block.0, block.1, tag)
    }

    fn give(&mut self, (frame, order): (FrameId, Order)) -> u64 {
        self.memory.give(frame, order);
        order.bytes()
    }

    fn flush(&mut self) {
        self.memory.drain();
    }
}

impl<D: Doorbell> System for Guest<'_, D> {
    type Clock = Clock;

    fn clock(&self) -> Clock {
        self.clock
    }

    fn wanted(&mut self) -> u64 {
        self.heed_devices();
        self.shared.control(ControlWord::Wanted)
    }

    fn measure(&mut self, _most: usize, load: impl FnOnce(&mut Self, &mut Recorder<'_>)) -> Result<Samples, Refusal> {
        // Out of `self` for as long as the load has that.
        let mut store = core::mem::take(&mut self.samples);
        let samples = store.record(&mut self.memory).map(|mut recorder| {
            load(self, &mut recorder);
            recorder.finish()
        });
        self.samples = store;
        samples
    }

    fn drain(&mut self) {
        self.samples.release(&mut self.memory);
        self.memory.drain();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Table;
    use llfree_agent_core::churn::{Churn, Plan};
    use llfree_agent_core::{Blocks as _, Counters};
    use shared_layout::HUGE_SIZE;

    #[test]
    fn giving_way_frees_what_is_wanted_but_never_more_than_half() {
        let table = Table::new(32, 1);
        let tenant = table.tenant();
        let mut guest = Guest::new(&table.shared(), table.memory(&tenant, 0));
        let mut counters = Counters::default();
        let plan = Plan { millis: 1, bytes: u64::MAX, seed: 6 };
        let mut churn = Churn::new(&mut guest, &mut counters, plan, Tags::new(6, 0, 0));
        for _ in 0..20 {
            churn.allocate(Order::HUGE);
        }
        churn.give_way(3);
        assert_eq!(churn.blocks().bytes(), 17 * HUGE_SIZE);
        // 31 huge frames without 17 blocks and the one with the record node: the cache is empty.
        assert_eq!(tenant.stats().free_huge, 13);
        churn.give_way(u64::MAX);
        assert_eq!(churn.blocks().bytes(), 8 * HUGE_SIZE);
        let held = churn.blocks().len();
        assert_eq!((held, counters.allocs - counters.frees), (8, 8));
    }
}
