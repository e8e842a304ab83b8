//! [`Blocks`]: a list of blocks that a vCPU owns for one purpose, and the only place where their pages are touched.
//!
//! A block enters with its record, and with its stamps if it is to be checked, or not at all.

use crate::host::Doorbell;
use crate::memory::Memory;
use crate::records::{Record, Records};
use crate::stamp::{self, Tag};
use llfree_agent_core::Refusal;
use llfree_agent_core::stamp::Damage;
use shared_layout::{FrameId, Order};

/// Owned blocks and their records.
#[derive(Debug)]
pub(crate) struct Blocks {
    records: Records,
    bytes: u64,
}

impl Default for Blocks {
    fn default() -> Self {
        Self { records: Records::new(), bytes: 0 }
    }
}

impl llfree_agent_core::Blocks for Blocks {
    fn len(&self) -> u64 {
        self.records.len()
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Blocks {
    /// Takes in a block that was just taken, and stamps each of its pages if there is a tag to do it with; the block is
    /// given back on an error.
    ///
    /// # Errors
    /// The reason that there is no frame for its record.
    pub(crate) fn put<D: Doorbell>(
        &mut self,
        memory: &mut Memory<'_, D>,
        frame: FrameId,
        order: Order,
        tag: Option<u64>,
    ) -> Result<(), Refusal> {
        let record = Record { frame, order, tag: Tag::new(tag.unwrap_or(0)) };
        // The record first: a block without one is not worth stamping.
        if let Err(refusal) = self.records.push(memory, record) {
            memory.give(frame, order);
            return Err(refusal);
        }
        if tag.is_some() {
            for frame in frames(&record) {
                // SAFETY: in the block that `Memory::take` returned.
                stamp::fill(unsafe { memory.page(frame) }.words(), frame, record.tag);
            }
        }
        self.bytes += order.bytes();
        Ok(())
    }

    /// Checks every stamp of block `index`, which must be below the list's length; the bytes checked.
    pub(crate) fn check<D: Doorbell>(&self, memory: &Memory<'_, D>, index: u64, damage: &mut Damage) -> u64 {
        let record = self.records.get(memory, index);
        for frame in frames(&record) {
            // SAFETY: in a recorded block, which was taken before `put` and not given back.
            let page = unsafe { memory.page(frame) };
            stamp::check(page.words(), memory.ram(), frame, record.tag, damage);
        }
        record.order.bytes()
    }

    /// Takes out block `index`, which must be below the list's length. The last block takes its index.
    pub(crate) fn remove<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>, index: u64) -> (FrameId, Order) {
        let Record { frame, order, .. } = self.records.swap_remove(memory, index);
        self.bytes -= order.bytes();
        (frame, order)
    }

    /// The start of block `index`, which must be below the list's length.
    pub(crate) fn frame<D: Doorbell>(&self, memory: &Memory<'_, D>, index: u64) -> FrameId {
        self.records.get(memory, index).frame
    }
}

fn frames(record: &Record) -> impl Iterator<Item = FrameId> + use<> {
    (record.frame.0..record.frame.0 + record.order.frames()).map(FrameId)
}
