//! [`Process`]: the agent's own process as the system of an [`llfree_agent_core::Agent`].
//!
//! Linux allocates when memory is touched, so a block is taken when the first word of its mapping is written: the
//! page fault, with whatever the host has to do for it, is part of the allocation. The kernel looks after devices and
//! gives way on its own to a host that wants memory, and what is freed is the kernel's at once.

use crate::heap::{Block, Heap};
use crate::room::Room;
use crate::system;
use agent_abi::{Samples, Touch};
use llfree_agent_core::samples::Recorder;
use llfree_agent_core::stamp::{Damage, Tags};
use llfree_agent_core::{Clock, Refusal, Source, System};
use shared_layout::Order;
use std::time::Instant;

/// Nanoseconds since the agent started.
#[derive(Clone, Copy, Debug)]
pub struct Monotonic(Instant);

impl Clock for Monotonic {
    fn now(self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn ticks(self, millis: u64) -> Option<u64> {
        Some(millis.saturating_mul(1_000_000))
    }

    fn nanos(self, ticks: u64) -> u64 {
        ticks
    }
}

/// The process: how much it may allocate, and its clock.
#[derive(Debug)]
pub struct Process {
    room: Room,
    clock: Monotonic,
}

impl Process {
    /// A process that allocates within `room`.
    #[must_use]
    pub fn new(room: Room) -> Self {
        Self { room, clock: Monotonic(Instant::now()) }
    }
}

impl Source for Process {
    type Blocks = Heap;
    type Block = Block;

    /// Each may be a mapping of its own, of which Linux allows 65530.
    const MOST_SINGLE_BLOCKS: u64 = 16_384;

    fn fill(&mut self, blocks: &mut Heap, order: Order, count: u64, tags: &mut Tags) -> (u64, Result<(), Refusal>) {
        let added = blocks.fill(count, order, tags, &mut self.room);
        (added, if added < count { Err(Refusal::OutOfMemory) } else { Ok(()) })
    }

    fn check(&self, blocks: &Heap, index: u64, damage: &mut Damage) -> u64 {
        let block = blocks.block(index);
        block.check(damage);
        block.bytes()
    }

    fn remove(&mut self, blocks: &mut Heap, index: u64) -> Block {
        blocks.remove(index)
    }

    fn admit(&mut self, order: Order) -> Result<(), Refusal> {
        if self.room.take(order.bytes()) { Ok(()) } else { Err(Refusal::OutOfMemory) }
    }

    fn take(&mut self, order: Order, _alone: bool) -> Result<Block, Refusal> {
        let block = Block::single(order).map_err(|_| Refusal::OutOfMemory)?;
        block.touch(false);
        Ok(block)
    }

    fn touch(&self, block: &Block, touch: Touch) {
        if touch == Touch::Pages {
            block.touch(true);
        }
    }

    fn put(&mut self, blocks: &mut Heap, block: Block, tag: Option<u64>) -> Result<(), Refusal> {
        match tag {
            Some(tag) => blocks.keep(block, tag),
            None => blocks.push(block),
        }
        Ok(())
    }

    fn give(&mut self, block: Block) -> u64 {
        block.bytes()
    }

    fn flush(&mut self) {}
}

impl System for Process {
    type Clock = Monotonic;

    fn clock(&self) -> Monotonic {
        self.clock
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

    fn drain(&mut self) {
        // Refused where the agent is not root; the report's numbers show it.
        let _ = system::drain();
    }
}
