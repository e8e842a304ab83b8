//! What an agent asks of the system it runs in: [`Source`] for blocks of memory, [`Clock`] for time, and
//! [`System`] for the rest.
//!
//! The bare-metal guest and the process in Linux implement all three. A method is here because both need it
//! in the same place; where one of them has nothing to do there, its documentation says what for.

use crate::rng::Rng;
use crate::samples::Recorder;
use crate::stamp::{Damage, Tags};
use agent_abi::{Samples, Touch};
use shared_layout::Order;

/// The reason that there is no block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// There is none of that order.
    OutOfMemory,
    /// The host answered the install with this status word. [`Status::Ok`](guest_abi::Status::Ok) means that
    /// it said yes, but the block was evicted as before.
    InstallFailed(u64),
}

/// A list of owned blocks.
pub trait Blocks: Default {
    /// Blocks in the list.
    fn len(&self) -> u64;

    /// Bytes in all of them.
    fn bytes(&self) -> u64;

    /// Whether there is none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The index of the newest block, or of a random one.
    fn pick(&self, random: Option<&mut Rng>) -> Option<u64> {
        let last = self.len().checked_sub(1)?;
        Some(random.map_or(last, |rng| rng.below(self.len())))
    }
}

/// Memory in blocks. A list is given to the source that filled it, and to no other.
pub trait Source {
    /// Owned blocks, and what each is stamped with.
    type Blocks: Blocks;
    /// A block that is in no list and is backed by memory.
    type Block;

    /// Blocks that a list may hold if each was allocated on its own.
    const MOST_SINGLE_BLOCKS: u64;

    /// Allocates up to `count` blocks of `order`, stamps all their pages and appends them to `blocks`: how many
    /// there are, and why not all.
    fn fill(
        &mut self,
        blocks: &mut Self::Blocks,
        order: Order,
        count: u64,
        tags: &mut Tags,
    ) -> (u64, Result<(), Refusal>);

    /// Checks every stamp of block `index`, which is below [`len`](Blocks::len); the bytes checked.
    fn check(&self, blocks: &Self::Blocks, index: u64, damage: &mut Damage) -> u64;

    /// Takes block `index`, which is below [`len`](Blocks::len), out of the list; the last one takes its index.
    fn remove(&mut self, blocks: &mut Self::Blocks, index: u64) -> Self::Block;

    /// Whether a block of `order` may be taken now. For what must not count as part of the allocation, like a look at
    /// the kernel's numbers.
    ///
    /// # Errors
    /// Why not.
    fn admit(&mut self, order: Order) -> Result<(), Refusal>;

    /// Allocates one block and has it backed by memory. `alone`: nothing is asked of the host that this block does
    /// not need.
    ///
    /// # Errors
    /// Why there is none.
    fn take(&mut self, order: Order, alone: bool) -> Result<Self::Block, Refusal>;

    /// Writes to a huge frame that was just taken.
    fn touch(&self, block: &Self::Block, touch: Touch);

    /// Appends a block to a list, stamped if there is a tag to stamp it with.
    ///
    /// # Errors
    /// Why the list cannot grow; the block is free again.
    fn put(&mut self, blocks: &mut Self::Blocks, block: Self::Block, tag: Option<u64>) -> Result<(), Refusal>;

    /// Frees a block; its bytes.
    fn give(&mut self, block: Self::Block) -> u64;

    /// Returns what the source keeps at hand for its next allocation, so that others can have it.
    fn flush(&mut self);
}

/// A steady counter.
pub trait Clock: Copy {
    /// The counter now.
    fn now(self) -> u64;

    /// Counts in `millis` milliseconds, saturating; `None` if nobody knows.
    fn ticks(self, millis: u64) -> Option<u64>;

    /// Nanoseconds in `ticks`, saturating; 0 if nobody knows.
    fn nanos(self, ticks: u64) -> u64;

    /// Nanoseconds since `start`, a value of [`now`](Self::now); 0 if nobody knows.
    fn nanos_since(self, start: u64) -> u64 {
        self.nanos(self.now().saturating_sub(start))
    }

    /// Whether counts can be told as time.
    fn is_known(self) -> bool {
        self.ticks(0).is_some()
    }
}

/// The system around a source.
pub trait System: Source {
    /// Its clock.
    type Clock: Clock;

    /// The clock.
    fn clock(&self) -> Self::Clock;

    /// Huge frames that the host wants to have back. A load asks between any two of its blocks, and a system
    /// that must look after something else meanwhile does so here.
    fn wanted(&mut self) -> u64;

    /// Runs a load that takes about `most` samples, 1 to [`CAPACITY`](crate::samples::CAPACITY); memory for these is
    /// there before it starts.
    ///
    /// # Errors
    /// The reason that there is no memory for samples; the load did not run.
    fn measure(&mut self, most: usize, load: impl FnOnce(&mut Self, &mut Recorder<'_>)) -> Result<Samples, Refusal>;

    /// Gives every cache back, so that the host finds free memory to take.
    fn drain(&mut self);
}
