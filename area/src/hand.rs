//! [`Grip`] and [`Hand`]: what one thread needs to take from an area's table and to give back to it.
//!
//! A handle of the table and a place to look for runs.

use crate::error::{AllocError, FreeError};
use crate::space::Space;
use llfree::run::{Behind, TakenRun};
use llfree::{Allocation, Cpu};
use shared_layout::{FrameId, HUGE_SIZE, HugeEntry, HugeId, HugeRange, Order};
use std::mem::ManuallyDrop;
use std::sync::Arc;

/// What a thread keeps of a table, not of the memory that it lies in. Dropped without [`let_go`](Grip::let_go), it touches
/// nothing: by then that memory may be gone.
#[derive(Debug)]
pub(crate) struct Grip {
    /// Borrows from the table of the space that every call is given.
    cpu: ManuallyDrop<Option<Cpu<'static>>>,
    /// Where the last run ended, or was freed.
    near: HugeId,
}

/// A block that was taken; it is installed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taken {
    pub(crate) frame: FrameId,
    pub(crate) is_zeroed: bool,
}

impl Grip {
    pub(crate) fn new(space: &Space) -> Self {
        let cpu = (!space.is_missing()).then(|| space.tenant().cpu());
        Self { cpu: ManuallyDrop::new(cpu), near: HugeId(0) }
    }

    /// Takes a block of an order.
    #[inline]
    pub(crate) fn take(&mut self, space: &Space, order: Order) -> Result<Taken, AllocError> {
        let cpu = match &mut *self.cpu {
            Some(cpu) if !space.is_missing() => cpu,
            _ => return Err(AllocError::Forked),
        };
        let taken = cpu.alloc(order).map_err(|_| AllocError::OutOfMemory { bytes: order.bytes() })?;
        Ok(install(space, taken))
    }

    /// Takes a run; the marks of evicted frames are as they were.
    pub(crate) fn take_run(&mut self, space: &Space, huge_frames: u32, behind: Behind) -> Result<TakenRun, AllocError> {
        if space.is_missing() {
            return Err(AllocError::Forked);
        }
        let out = AllocError::OutOfMemory { bytes: u64::from(huge_frames) * HUGE_SIZE };
        space.tenant().alloc_run(huge_frames, behind, &mut self.near).map_err(|_| out)
    }

    #[inline]
    pub(crate) fn give(&mut self, space: &Space, frame: FrameId, order: Order) -> Result<(), FreeError> {
        space.mark_freed(Space::huge_range(frame, order.frames()));
        let Some(cpu) = &mut *self.cpu else { return Err(FreeError::Forked) };
        Ok(cpu.free(frame, order)?)
    }

    pub(crate) fn give_run(&mut self, space: &Space, range: HugeRange) -> Result<(), FreeError> {
        space.mark_freed(range);
        // Warm: the next one begins here.
        self.near = range.first();
        Ok(space.tenant().free_run(range)?)
    }

    /// Gives back what it keeps to be fast.
    pub(crate) fn drain(&mut self, space: &Space) {
        if let Some(cpu) = &mut *self.cpu
            && !space.is_missing()
        {
            cpu.drain();
        }
    }

    /// Its end, while the space is there.
    pub(crate) fn let_go(&mut self, space: &Space) {
        let cpu = self.cpu.take();
        if space.is_missing() {
            // Its table is not in this process.
            std::mem::forget(cpu);
        }
    }
}

/// A grip, and the space that it is of. Keeps the table mapped, but not the area alive.
#[derive(Debug)]
pub(crate) struct Hand {
    pub(crate) grip: Grip,
    pub(crate) space: Arc<Space>,
}

impl Hand {
    pub(crate) fn new(space: Arc<Space>) -> Self {
        Self { grip: Grip::new(&space), space }
    }
}

impl Drop for Hand {
    fn drop(&mut self) {
        self.grip.let_go(&self.space);
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
