//! [`Hand`]: what one thread needs to take from an area's table and to give back to it.
//!
//! A handle of the table and a place to look for runs. It keeps the table mapped, but not the area alive.

use crate::error::{AllocError, FreeError};
use crate::space::Space;
use llfree::run::{Behind, TakenRun};
use llfree::{Allocation, Cpu};
use shared_layout::{FrameId, HUGE_SIZE, HugeEntry, HugeId, HugeRange, Order};
use std::sync::Arc;

#[derive(Debug)]
pub(crate) struct Hand {
    /// Borrows from the space's table, so it goes first: in `drop`.
    cpu: Option<Cpu<'static>>,
    /// Where the last run ended, or was freed.
    near: HugeId,
    pub(crate) space: Arc<Space>,
}

/// A block that was taken; it is installed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taken {
    pub(crate) frame: FrameId,
    pub(crate) is_zeroed: bool,
}

impl Hand {
    pub(crate) fn new(space: Arc<Space>) -> Self {
        let cpu = (!space.is_missing()).then(|| space.tenant().cpu());
        Self { cpu, near: HugeId(0), space }
    }

    /// Takes a block of an order.
    #[inline]
    pub(crate) fn take(&mut self, order: Order) -> Result<Taken, AllocError> {
        let cpu = match &mut self.cpu {
            Some(cpu) if !self.space.is_missing() => cpu,
            _ => return Err(AllocError::Forked),
        };
        let taken = cpu.alloc(order).map_err(|_| AllocError::OutOfMemory { bytes: order.bytes() })?;
        Ok(install(&self.space, taken))
    }

    /// Takes a run; the marks of evicted frames are as they were.
    pub(crate) fn take_run(&mut self, huge_frames: u32, behind: Behind) -> Result<TakenRun, AllocError> {
        if self.space.is_missing() {
            return Err(AllocError::Forked);
        }
        let out = AllocError::OutOfMemory { bytes: u64::from(huge_frames) * HUGE_SIZE };
        self.space.tenant().alloc_run(huge_frames, behind, &mut self.near).map_err(|_| out)
    }

    #[inline]
    pub(crate) fn give(&mut self, frame: FrameId, order: Order) -> Result<(), FreeError> {
        self.space.mark_freed(Space::huge_range(frame, order.frames()));
        let Some(cpu) = &mut self.cpu else { return Err(FreeError::Forked) };
        Ok(cpu.free(frame, order)?)
    }

    pub(crate) fn give_run(&mut self, range: HugeRange) -> Result<(), FreeError> {
        self.space.mark_freed(range);
        // Warm: the next one begins here.
        self.near = range.first();
        Ok(self.space.tenant().free_run(range)?)
    }

    /// Gives back what it keeps to be fast.
    pub(crate) fn drain(&mut self) {
        if let Some(cpu) = &mut self.cpu
            && !self.space.is_missing()
        {
            cpu.drain();
        }
    }
}

/// Makes what was taken ready to be touched.
#[inline]
pub(crate) fn install(space: &Space, taken: Allocation) -> Taken {
    let (frame, _) = taken.position();
    match taken {
        Allocation::Ready(_) => Taken { frame, is_zeroed: false },
        Allocation::Evicted(block) => {
            let tenant = space.tenant();
            // Nobody has touched what is evicted, and of two huge frames one may not be. We look now that the block is
            // ours: when it was counted for us an owner before us may still have had it.
            let is_evicted = |huge| tenant.entry(huge).is_some_and(HugeEntry::is_evicted);
            let is_zeroed = block.huge_range().iter().all(is_evicted);
            let _ = block.self_install(&tenant);
            Taken { frame, is_zeroed }
        }
    }
}

impl Drop for Hand {
    fn drop(&mut self) {
        let cpu = self.cpu.take();
        if self.space.is_missing() {
            // Its table is not in this process.
            std::mem::forget(cpu);
        }
    }
}
