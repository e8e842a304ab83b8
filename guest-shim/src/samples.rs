//! [`Store`]: where a measuring command keeps what it measures.
//!
//! Samples lie in a block of the guest's own memory, which is allocated and touched before the
//! measurement, so that recording one costs a store and never an install. The store stays with its
//! vCPU from one command to the next, like a cache, until it is told to give caches up.

use crate::host::Doorbell;
use crate::memory::Memory;
use llfree::Block;
use llfree_agent_core::Refusal;
use llfree_agent_core::samples::{CAPACITY, Recorder};
use shared_layout::Order;

const _: () = assert!(CAPACITY as u64 * 8 == Order::MAX.bytes());

/// Memory for samples.
#[derive(Default, Debug)]
pub(crate) struct Store(Option<Block>);

impl Store {
    /// A recorder without samples; all of its memory was touched.
    ///
    /// # Errors
    /// The reason that there is no memory.
    pub(crate) fn record<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>) -> Result<Recorder<'_>, Refusal> {
        let block = match self.0 {
            Some(block) => block,
            None => *self.0.insert(memory.take(Order::MAX)?),
        };
        // SAFETY: taken above, and given back only by `release`, which needs the recorder's borrow
        // of `self` to be over.
        let words = unsafe { memory.ram().block(block.frame(), block.order()) }.cast::<u64>();
        // SAFETY: the block is this store's alone and of this many words; an honest host writes to
        // no frame that the guest was given. Zeroes first, so all of it is initialized.
        let words = unsafe {
            words.write_bytes(0, CAPACITY);
            core::slice::from_raw_parts_mut(words, CAPACITY)
        };
        Ok(Recorder::new(words))
    }

    /// Gives the memory back.
    pub(crate) fn release<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>) {
        if let Some(block) = self.0.take() {
            memory.give(block.frame(), block.order());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Table;
    use agent_abi::Samples;

    #[test]
    fn the_store_keeps_its_block_until_it_is_released() {
        let table = Table::new(8, 1);
        let tenant = table.tenant();
        let mut memory = table.memory(&tenant, 0);
        let mut store = Store::default();
        let mut recorder = store.record(&mut memory).expect("room");
        recorder.push(9);
        assert_eq!(recorder.finish().p50, 9);
        let installs = memory.installs;
        assert_eq!(store.record(&mut memory).expect("room").finish(), Samples::default(), "old samples are gone");
        assert_eq!(memory.installs, installs);
        assert_eq!(tenant.stats().free_huge, 5);
        store.release(&mut memory);
        store.release(&mut memory);
        memory.drain();
        assert_eq!(tenant.stats().free_huge, 7);
    }
}
