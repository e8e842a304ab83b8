//! [`Source`]: where objects come from when a thread's cache has none, and where they go when it is full.
//!
//! From the table, memory that is resident first; from other threads' caches before memory that the kernel would have to
//! zero. What lies idle in caches goes back to the table.

use super::cache::{CLASSES, Cache, List};
use super::class::Class;
use super::stats::{ClassStats, Histogram, Stats};
use crate::error::{AllocError, FreeError};
use crate::hand::{Flushed, Grip, Taken, install};
use crate::reclaimer::{Flush, Status};
use crate::space::Space;
use llfree::run::Behind;
use shared_layout::{FrameId, HugeEntry, HugeRange, Order};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) struct Source {
    pub(crate) space: Arc<Space>,
    pub(super) caches: List,
    /// Bytes that each thread may keep.
    pub(super) local_bytes: AtomicU64,
    /// How long allocations took that no cache served.
    pub(super) slow: Histogram,
    stolen: AtomicU64,
    /// Objects that went from idle caches to the table.
    flushed: AtomicU64,
}

impl Source {
    pub(super) fn new(space: Arc<Space>, local_bytes: usize) -> Self {
        Self {
            space,
            caches: List::default(),
            local_bytes: AtomicU64::new(local_bytes as u64),
            slow: Histogram::default(),
            stolen: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
        }
    }

    /// The same for a thread at its very end, which has no grip any more.
    pub(super) fn take_without(&self, class: Class, zeroes: bool) -> Result<(FrameId, bool), AllocError> {
        let mut grip = Grip::new(&self.space);
        let found = self.take(&mut grip, class, zeroes);
        grip.let_go(&self.space);
        found
    }

    /// An object, and whether all of it is zero. That is made true if `zeroes` says so and the object is large enough
    /// for some of it to be zero already.
    pub(super) fn take(&self, grip: &mut Grip, class: Class, zeroes: bool) -> Result<(FrameId, bool), AllocError> {
        let Some(huge_frames) = class.huge_frames() else { return self.take_small(class) };
        if huge_frames == 1 {
            let Taken { frame, is_zeroed } = grip.take(&self.space, Order::HUGE)?;
            // The mark is gone, but nobody was faster than us with a frame that we own.
            return Ok((frame, is_zeroed));
        }
        let run = match grip.take_run(&self.space, huge_frames, Behind::Memory) {
            Ok(run) => run,
            Err(AllocError::OutOfMemory { .. }) => {
                if let Some(frame) = self.steal(class) {
                    return Ok((frame, false));
                }
                grip.take_run(&self.space, huge_frames, Behind::Any)?
            }
            Err(error) => return Err(error),
        };
        if zeroes && run.evicted > 0 && run.evicted < huge_frames {
            self.zero_resident(run.range);
        }
        self.space.tenant().self_install(run.range);
        Ok((run.range.first().first_frame(), run.evicted == huge_frames || zeroes && run.evicted > 0))
    }

    /// Below a huge frame: the start of a block, whose end goes back. Without a handle, which would keep rows of frames for
    /// as long as its thread does nothing.
    fn take_small(&self, class: Class) -> Result<(FrameId, bool), AllocError> {
        let tenant = self.space.tenant();
        let order = class.order();
        let taken = tenant.alloc(order).map_err(|_| AllocError::OutOfMemory { bytes: class.bytes() as u64 })?;
        let Taken { frame, is_zeroed } = install(&self.space, taken);
        for (frame, order) in class.offcuts(frame) {
            // Ours since a moment ago, so that it is allocated.
            let _ = tenant.free(frame, order);
        }
        Ok((frame, is_zeroed))
    }

    /// Of a run that is ours, and whose marks nobody has cleared yet.
    fn zero_resident(&self, range: HugeRange) {
        for huge in range {
            if !self.space.tenant().entry(huge).is_some_and(HugeEntry::is_evicted) {
                // SAFETY: the frame is ours alone, of this size, and nobody has a reference into it.
                unsafe { self.space.address(huge.first_frame()).write_bytes(0, shared_layout::HUGE_SIZE as usize) };
            }
        }
    }

    fn steal(&self, class: Class) -> Option<FrameId> {
        let stolen = self.caches.iter().find_map(|cache| cache.steal(class));
        self.stolen.fetch_add(stolen.is_some().into(), Ordering::Relaxed);
        stolen
    }

    /// Gives an object to the table.
    pub(super) fn give(&self, grip: Option<&mut Grip>, frame: FrameId, class: Class) -> Result<(), FreeError> {
        if let (Some(grip), Some(huge_frames), Some(first)) = (grip, class.huge_frames(), frame.huge()) {
            return match huge_frames {
                1 => grip.give(&self.space, frame, Order::HUGE),
                _ => grip.give_run(&self.space, HugeRange::saturating(first, huge_frames)),
            };
        }
        self.space.mark_freed(Space::huge_range(frame, class.frames()));
        self.give_directly(frame, class)
    }

    fn give_directly(&self, frame: FrameId, class: Class) -> Result<(), FreeError> {
        let tenant = self.space.tenant();
        if class.huge_frames().is_some() {
            return Ok(tenant.free_run(Space::huge_range(frame, class.frames()))?);
        }
        for (frame, order) in class.pieces(frame) {
            tenant.free(frame, order)?;
        }
        Ok(())
    }

    pub(super) fn give_all_back(&self) {
        for cache in self.caches.iter() {
            self.empty(cache, |_| true);
        }
    }

    /// Gives back what lies in those classes of a cache.
    pub(super) fn empty(&self, cache: &Cache, which: impl Fn(Class) -> bool) {
        if self.space.is_missing() {
            return;
        }
        for class in (0..CLASSES).map(Class::numbered).filter(|class| which(*class)) {
            while let Some(frame) = cache.steal(class) {
                self.flushed.fetch_add(1, Ordering::Relaxed);
                // It is no news that it is free: no mark. A table that somebody wrote may refuse it; then it is lost.
                if let Err(error) = self.give_directly(frame, class) {
                    log::error!("an object of {} bytes is lost: {error}", class.bytes());
                }
            }
        }
    }

    pub(super) fn stats(&self, area: Option<Status>) -> Stats {
        let mut classes = Vec::new();
        for class in (0..CLASSES).map(Class::numbered).filter(|class| class.is_in_use()) {
            let mut sum = ClassStats { bytes: class.bytes() as u64, ..ClassStats::default() };
            for cache in self.caches.iter() {
                let (allocations, deallocations) = cache.counts(class);
                sum.allocations += allocations;
                sum.deallocations += deallocations;
                sum.cached += cache.cached(class);
            }
            classes.push(sum);
        }
        Stats {
            classes,
            area,
            slow: self.slow.counts(),
            stolen: self.stolen.load(Ordering::Relaxed),
            flushed: self.flushed.load(Ordering::Relaxed),
        }
    }
}

impl Flush for Source {
    fn flush(&self, what: Flushed) {
        match what {
            Flushed::Idle => self.caches.iter().for_each(|cache| self.empty(cache, |class| cache.is_idle(class))),
            Flushed::All => self.give_all_back(),
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.give_all_back();
        // Threads that used them may go on without end, and the area without these objects. What those of a parent were at is
        // not known.
        if !self.space.is_copy() {
            self.caches.let_go(&self.space);
        }
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source").field("space", &self.space).finish_non_exhaustive()
    }
}
