//! [`Blocks`]: the blocks that a vCPU owns for one purpose, all stamped.
//!
//! A block enters with its record and its stamps or not at all; its pages are touched only here.

use crate::host::Doorbell;
use crate::memory::{Memory, Refusal};
use crate::records::{Record, Records};
use crate::rng::{Rng, mix};
use crate::stamp::{self, Damage, Tag};
use shared_layout::{FrameId, Order};

/// What a vCPU did since boot, in blocks that it was told to allocate; record nodes do not count.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Counters {
    pub(crate) allocs: u64,
    pub(crate) frees: u64,
}

/// Tags for one command's blocks: the same frame hardly ever gets the same tag twice.
#[derive(Debug)]
pub(crate) struct Tags {
    seed: u64,
    serial: u64,
}

impl Tags {
    /// Tags of vCPU `vcpu`'s command number `command`.
    pub(crate) const fn new(seed: u64, vcpu: u32, command: u64) -> Self {
        Self { seed: mix(mix(seed ^ vcpu as u64) ^ command), serial: 0 }
    }

    fn next(&mut self) -> Tag {
        self.serial += 1;
        Tag::new(mix(self.seed.wrapping_add(self.serial)))
    }
}

/// Stamped blocks and their records.
#[derive(Debug)]
pub(crate) struct Blocks {
    records: Records,
    bytes: u64,
}

impl Blocks {
    /// None.
    pub(crate) const fn new() -> Self {
        Self { records: Records::new(), bytes: 0 }
    }

    /// How many.
    pub(crate) const fn len(&self) -> u64 {
        self.records.len()
    }

    /// Bytes in all of them.
    pub(crate) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Allocates a block and stamps each of its pages.
    ///
    /// # Errors
    /// Why there is no block, or no frame for its record; nothing is kept.
    pub(crate) fn add<D: Doorbell>(
        &mut self,
        memory: &mut Memory<'_, D>,
        counters: &mut Counters,
        order: Order,
        tags: &mut Tags,
    ) -> Result<(), Refusal> {
        let block = memory.take(order)?;
        self.adopt(memory, counters, block.frame(), order, tags)
    }

    /// Stamps each page of a block that was taken already; it is given back on an error.
    ///
    /// # Errors
    /// Why there is no frame for its record.
    pub(crate) fn adopt<D: Doorbell>(
        &mut self,
        memory: &mut Memory<'_, D>,
        counters: &mut Counters,
        frame: FrameId,
        order: Order,
        tags: &mut Tags,
    ) -> Result<(), Refusal> {
        let record = Record { frame, order, tag: tags.next() };
        // The record first: a block without one is not worth stamping.
        if let Err(refusal) = self.records.push(memory, record) {
            memory.give(record.frame, record.order);
            return Err(refusal);
        }
        for frame in frames(&record) {
            // SAFETY: in the block that `take` returned.
            stamp::fill(&unsafe { memory.page(frame) }, frame, record.tag);
        }
        counters.allocs += 1;
        self.bytes += record.order.bytes();
        Ok(())
    }

    /// Checks every stamp of block `index`, which must be below [`len`](Self::len); the bytes
    /// checked.
    pub(crate) fn check<D: Doorbell>(&self, memory: &Memory<'_, D>, index: u64, damage: &mut Damage) -> u64 {
        let record = self.records.get(memory, index);
        for frame in frames(&record) {
            // SAFETY: in a recorded block, which was taken by `add` and not given back.
            let page = unsafe { memory.page(frame) };
            damage.add(stamp::check(&page, memory.ram(), frame, record.tag));
        }
        record.order.bytes()
    }

    /// Frees block `index`, which must be below [`len`](Self::len); the bytes freed. The last
    /// block takes its index.
    pub(crate) fn remove<D: Doorbell>(
        &mut self,
        memory: &mut Memory<'_, D>,
        counters: &mut Counters,
        index: u64,
    ) -> u64 {
        let record = self.records.swap_remove(memory, index);
        memory.give(record.frame, record.order);
        counters.frees += 1;
        self.bytes -= record.order.bytes();
        record.order.bytes()
    }

    /// The index of the newest block, or of a random one.
    pub(crate) fn pick(&self, random: Option<&mut Rng>) -> Option<u64> {
        let last = self.len().checked_sub(1)?;
        Some(random.map_or(last, |rng| rng.below(self.len())))
    }
}

fn frames(record: &Record) -> impl Iterator<Item = FrameId> + use<> {
    (record.frame.0..record.frame.0 + record.order.frames()).map(FrameId)
}
