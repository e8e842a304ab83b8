//! A system that is a number: a count of the bytes that may be used, and one page stands for all of a block.

use crate::samples::Recorder;
use crate::source::{Blocks, Clock, Refusal, Source, System};
use crate::stamp::{self, Damage, Page, Tags};
use agent_abi::{Samples, Touch};
use core::sync::atomic::{AtomicU64, Ordering};
use shared_layout::Order;
use std::boxed::Box;
use std::vec;
use std::vec::Vec;

/// Memory by the byte, and what was done with it.
#[derive(Debug)]
pub(crate) struct Model {
    limit: u64,
    /// Bytes in blocks.
    pub(crate) used: u64,
    /// The longest that a list was.
    pub(crate) most: u64,
    /// The reason that there are no more.
    pub(crate) refusal: Refusal,
    clock: &'static AtomicU64,
}

#[derive(Debug)]
pub(crate) struct Block {
    order: Order,
    tag: u64,
    page: Box<Page>,
}

#[derive(Debug, Default)]
pub(crate) struct List(Vec<Block>);

impl List {
    pub(crate) fn spoil(&self, index: usize) {
        self.0[index].page[0].fetch_xor(1, Ordering::Relaxed);
    }
}

impl Blocks for List {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn bytes(&self) -> u64 {
        self.0.iter().map(|block| block.order.bytes()).sum()
    }
}

impl Model {
    pub(crate) const MOST: u64 = 50;

    pub(crate) fn new(limit: u64) -> Self {
        // Leaked: a clock is copied freely.
        let clock = Box::leak(Box::new(AtomicU64::new(0)));
        Self { limit, used: 0, most: 0, refusal: Refusal::OutOfMemory, clock }
    }
}

impl Source for Model {
    type Blocks = List;
    type Block = Block;

    const MOST_SINGLE_BLOCKS: u64 = Self::MOST;

    fn fill(&mut self, blocks: &mut List, order: Order, count: u64, tags: &mut Tags) -> (u64, Result<(), Refusal>) {
        for done in 0..count {
            match self.take(order, false) {
                Ok(block) => self.put(blocks, block, Some(tags.draw())).expect("a list of this model always grows"),
                Err(refusal) => return (done, Err(refusal)),
            }
        }
        (count, Ok(()))
    }

    fn check(&self, blocks: &List, index: u64, damage: &mut Damage) -> u64 {
        let block = &blocks.0[index as usize];
        if let Some(wrong) = stamp::check(&block.page, block.tag) {
            damage.note(wrong, |offset| offset);
        }
        block.order.bytes()
    }

    fn remove(&mut self, blocks: &mut List, index: u64) -> Block {
        blocks.0.swap_remove(index as usize)
    }

    fn admit(&mut self, order: Order) -> Result<(), Refusal> {
        if self.limit - self.used < order.bytes() { Err(self.refusal) } else { Ok(()) }
    }

    fn take(&mut self, order: Order, _alone: bool) -> Result<Block, Refusal> {
        self.admit(order)?;
        self.used += order.bytes();
        Ok(Block { order, tag: 0, page: Box::new(core::array::from_fn(|_| AtomicU64::new(0))) })
    }

    fn touch(&self, block: &Block, touch: Touch) {
        if touch != Touch::Nothing {
            block.page[0].store(1, Ordering::Relaxed);
        }
    }

    fn put(&mut self, blocks: &mut List, mut block: Block, tag: Option<u64>) -> Result<(), Refusal> {
        if let Some(tag) = tag {
            block.tag = tag;
            stamp::fill(&block.page, tag);
        }
        blocks.0.push(block);
        self.most = self.most.max(blocks.len());
        Ok(())
    }

    fn give(&mut self, block: Block) -> u64 {
        self.used -= block.order.bytes();
        block.order.bytes()
    }

    fn flush(&mut self) {}
}

/// Goes on by a microsecond whenever somebody looks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticking(&'static AtomicU64);

impl Clock for Ticking {
    fn now(self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }

    fn ticks(self, millis: u64) -> Option<u64> {
        Some(millis.saturating_mul(1000))
    }

    fn nanos(self, ticks: u64) -> u64 {
        ticks.saturating_mul(1000)
    }
}

impl System for Model {
    type Clock = Ticking;

    fn clock(&self) -> Ticking {
        Ticking(self.clock)
    }

    fn wanted(&mut self) -> u64 {
        0
    }

    fn measure(&mut self, most: usize, load: impl FnOnce(&mut Self, &mut Recorder<'_>)) -> Result<Samples, Refusal> {
        let mut words = vec![0; most];
        let mut recorder = Recorder::new(&mut words);
        load(self, &mut recorder);
        Ok(recorder.finish())
    }

    fn drain(&mut self) {}
}
