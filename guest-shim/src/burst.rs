//! The burst: huge frames allocated one after another, as fast as they come, each of them timed.
//!
//! A sample is what one allocation took as the vCPU sees it, from the call to the block that may be
//! touched: the host's part, if there was one, is in it. Touching is timed apart. Blocks are named
//! by a record list of their own, so what earlier commands allocated is never touched.

use crate::agent::Tally;
use crate::blocks::{Blocks, Counters, Tags};
use crate::clock::Clock;
use crate::host::Doorbell;
use crate::memory::Memory;
use crate::records::{Record, Records};
use crate::samples::Recorder;
use crate::stamp::Tag;
use shared_layout::agent::Touch;
use shared_layout::{FrameId, Order};

/// What to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// At least so many bytes.
    pub(crate) bytes: u64,
    /// What of them is touched.
    pub(crate) touch: Touch,
    /// Whether they are owned and stamped afterwards, instead of free.
    pub(crate) keep: bool,
}

/// What a burst works with.
pub(crate) struct Burst<'b, 'a, D> {
    pub(crate) memory: &'b mut Memory<'a, D>,
    pub(crate) counters: &'b mut Counters,
    pub(crate) blocks: &'b mut Blocks,
    pub(crate) clock: Clock,
}

impl<D: Doorbell> Burst<'_, '_, D> {
    /// Runs the plan. The tally counts what was allocated.
    pub(crate) fn run(&mut self, plan: Plan, mut samples: Recorder<'_>, mut tags: Tags) -> Tally {
        let mut tally = Tally::new();
        let mut taken = Records::new();
        let mut touching = 0;
        while tally.bytes() < plan.bytes {
            let start = self.clock.now();
            let block = match self.memory.take(Order::HUGE) {
                Ok(block) => block,
                Err(refusal) => {
                    tally.refuse(refusal);
                    break;
                }
            };
            let got = self.clock.now();
            touch(self.memory, block.frame(), plan.touch);
            let touched = self.clock.now();
            if self.clock.is_known() {
                samples.push(self.clock.nanos(got.saturating_sub(start)));
                touching += touched.saturating_sub(got);
            }
            let record = Record { frame: block.frame(), order: Order::HUGE, tag: Tag::new(0) };
            if let Err(refusal) = taken.push(self.memory, record) {
                self.memory.give(block.frame(), Order::HUGE);
                tally.refuse(refusal);
                break;
            }
            tally.add(Order::HUGE.bytes());
        }
        tally.measured(samples);
        tally.add_beside(self.clock.nanos(touching));
        self.settle(plan.keep, &mut taken, &mut tags, &mut tally);
        tally
    }

    /// Hands the blocks over to those that the vCPU owns, or frees them.
    fn settle(&mut self, keep: bool, taken: &mut Records, tags: &mut Tags, tally: &mut Tally) {
        while let Some(last) = taken.len().checked_sub(1) {
            let Record { frame, order, .. } = taken.swap_remove(self.memory, last);
            if keep {
                if let Err(refusal) = self.blocks.adopt(self.memory, self.counters, frame, order, tags) {
                    tally.refuse(refusal);
                }
            } else {
                self.memory.give(frame, order);
                self.counters.allocs += 1;
                self.counters.frees += 1;
            }
        }
    }
}

/// Writes to a huge frame that was just taken.
pub(crate) fn touch<D: Doorbell>(memory: &Memory<'_, D>, first: FrameId, touch: Touch) {
    let frames = match touch {
        Touch::Nothing => 0,
        Touch::Frames => 1,
        Touch::Pages => Order::HUGE.frames(),
    };
    for frame in (first.0..first.0 + frames).map(FrameId) {
        // SAFETY: in the block that the caller took.
        unsafe { memory.page(frame) }.store(0, frame.0);
    }
}
