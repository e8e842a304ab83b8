//! What the allocator figures measure: one small trait, the baselines behind it, and their names.
//!
//! Everything is called through generics, so that a loop over an allocator is compiled for it as
//! it would be in a program that links nothing else.

use crate::tables::{Llfree, Shared, Tables};
use bitmap_allocator::{BitAlloc, BitAlloc16M};
use buddy_system_allocator::FrameAllocator;
use clap::ValueEnum;
use crossbeam_queue::ArrayQueue;
use shared_layout::{FRAME_SIZE, Order};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// In place of a frame: there was none.
pub(crate) const FAILED: u64 = u64::MAX;

/// An allocator that threads share, each through a handle of its own.
pub(crate) trait Frames: Sync {
    type Handle<'a>: Handle
    where
        Self: 'a;

    fn handle(&self) -> Self::Handle<'_>;
}

/// One thread's way to allocate and free.
pub(crate) trait Handle {
    /// The first frame of a block, or [`FAILED`].
    fn alloc(&mut self, order: Order) -> u64;

    /// False if the allocator refused.
    fn free(&mut self, frame: u64, order: Order) -> bool;
}

/// Something to do with an allocator, whichever it is.
pub(crate) trait Visit {
    type Output;

    fn visit<F: Frames>(self, frames: &F) -> Self::Output;
}

/// The allocators to choose from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, ValueEnum)]
pub(crate) enum Allocator {
    /// This project's, a handle for each CPU
    Llfree,
    /// The same without handles
    LlfreeShared,
    /// buddy_system_allocator's frame allocator behind a mutex
    Buddy,
    /// The same behind a spin lock
    BuddySpin,
    /// A list of free frames a core, refilled from a list behind a mutex
    PerCore,
    /// crossbeam's lock-free queue of free frames
    Queue,
    /// bitmap-allocator's bitmap of bitmaps behind a mutex
    Bitmap,
}

impl Allocator {
    /// The name in rows and on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Llfree => "llfree",
            Self::LlfreeShared => "llfree-shared",
            Self::Buddy => "buddy",
            Self::BuddySpin => "buddy-spin",
            Self::PerCore => "per-core",
            Self::Queue => "queue",
            Self::Bitmap => "bitmap",
        }
    }

    /// Whether it has blocks of this order, and can manage that many huge frames.
    pub(crate) fn supports(self, order: Order, huge_frames: u32) -> bool {
        match self {
            Self::Llfree | Self::LlfreeShared | Self::Buddy | Self::BuddySpin => true,
            Self::PerCore | Self::Queue => order == Order::BASE,
            Self::Bitmap => frames(huge_frames) <= BitAlloc16M::CAP as u64,
        }
    }

    /// A fresh instance over so many huge frames, all free.
    pub(crate) fn with<V: Visit>(self, huge_frames: u32, visit: V) -> V::Output {
        match self {
            Self::Llfree => visit.visit(&Llfree(Tables::new(huge_frames).tenant())),
            Self::LlfreeShared => visit.visit(&Shared(Tables::new(huge_frames).tenant())),
            Self::Buddy => visit.visit(&Mutex::new(buddy(huge_frames))),
            Self::BuddySpin => visit.visit(&spin::Mutex::new(buddy(huge_frames))),
            // The lowest frame is taken first.
            Self::PerCore => visit.visit(&PerCore(Mutex::new((0..frames(huge_frames)).rev().collect()))),
            Self::Queue => {
                let queue = ArrayQueue::new(frames(huge_frames) as usize);
                for frame in 0..frames(huge_frames) {
                    // It has room for all of them.
                    let _ = queue.push(frame);
                }
                visit.visit(&queue)
            }
            Self::Bitmap => {
                let mut bits = Box::new(BitAlloc16M::DEFAULT);
                bits.insert(0..frames(huge_frames) as usize);
                visit.visit(&Mutex::new(bits))
            }
        }
    }
}

/// Base frames in so many huge ones.
pub(crate) fn frames(huge_frames: u32) -> u64 {
    u64::from(huge_frames) * Order::HUGE.frames()
}

/// Huge frames in so many bytes, if a `u32` counts them.
pub(crate) fn huge_frames(bytes: u64) -> Option<u32> {
    u32::try_from(bytes / (FRAME_SIZE * Order::HUGE.frames())).ok()
}

/// What a lock protects; nobody panics while holding it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type Buddy = FrameAllocator<33>;

fn buddy(huge_frames: u32) -> Buddy {
    let mut buddy = Buddy::new();
    buddy.add_frame(0, frames(huge_frames) as usize);
    buddy
}

impl Frames for Mutex<Buddy> {
    type Handle<'a> = &'a Self;

    fn handle(&self) -> &Self {
        self
    }
}

impl Handle for &Mutex<Buddy> {
    #[inline]
    fn alloc(&mut self, order: Order) -> u64 {
        lock(self).alloc(1 << order.get()).map_or(FAILED, |frame| frame as u64)
    }

    #[inline]
    fn free(&mut self, frame: u64, order: Order) -> bool {
        lock(self).dealloc(frame as usize, 1 << order.get());
        true
    }
}

impl Frames for spin::Mutex<Buddy> {
    type Handle<'a> = &'a Self;

    fn handle(&self) -> &Self {
        self
    }
}

impl Handle for &spin::Mutex<Buddy> {
    #[inline]
    fn alloc(&mut self, order: Order) -> u64 {
        self.lock().alloc(1 << order.get()).map_or(FAILED, |frame| frame as u64)
    }

    #[inline]
    fn free(&mut self, frame: u64, order: Order) -> bool {
        self.lock().dealloc(frame as usize, 1 << order.get());
        true
    }
}

impl Frames for Mutex<Box<BitAlloc16M>> {
    type Handle<'a> = &'a Self;

    fn handle(&self) -> &Self {
        self
    }
}

impl Handle for &Mutex<Box<BitAlloc16M>> {
    #[inline]
    fn alloc(&mut self, order: Order) -> u64 {
        let mut bits = lock(self);
        let frame = if order == Order::BASE {
            bits.alloc()
        } else {
            bits.alloc_contiguous(None, 1 << order.get(), usize::from(order.get()))
        };
        frame.map_or(FAILED, |frame| frame as u64)
    }

    #[inline]
    fn free(&mut self, frame: u64, order: Order) -> bool {
        let mut bits = lock(self);
        if order == Order::BASE {
            bits.dealloc(frame as usize)
        } else {
            bits.dealloc_contiguous(frame as usize, 1 << order.get())
        }
    }
}

impl Frames for ArrayQueue<u64> {
    type Handle<'a> = &'a Self;

    fn handle(&self) -> &Self {
        self
    }
}

impl Handle for &ArrayQueue<u64> {
    #[inline]
    fn alloc(&mut self, _: Order) -> u64 {
        self.pop().unwrap_or(FAILED)
    }

    #[inline]
    fn free(&mut self, frame: u64, _: Order) -> bool {
        self.push(frame).is_ok()
    }
}

/// Frames that move between a core's list and the shared one at a time.
const BATCH: usize = 64;

/// The shared list of free frames.
pub(crate) struct PerCore(Mutex<Vec<u64>>);

/// One core's list. It checks nothing: about the least that any allocator can do.
pub(crate) struct Local<'a> {
    shared: &'a Mutex<Vec<u64>>,
    free: Vec<u64>,
}

impl Frames for PerCore {
    type Handle<'a> = Local<'a>;

    fn handle(&self) -> Local<'_> {
        Local { shared: &self.0, free: Vec::with_capacity(2 * BATCH) }
    }
}

impl Handle for Local<'_> {
    #[inline]
    fn alloc(&mut self, _: Order) -> u64 {
        if self.free.is_empty() {
            let mut shared = lock(self.shared);
            let rest = shared.len().saturating_sub(BATCH);
            self.free.extend(shared.drain(rest..));
        }
        self.free.pop().unwrap_or(FAILED)
    }

    #[inline]
    fn free(&mut self, frame: u64, _: Order) -> bool {
        if self.free.len() == 2 * BATCH {
            lock(self.shared).extend(self.free.drain(..BATCH));
        }
        self.free.push(frame);
        true
    }
}

impl Drop for Local<'_> {
    fn drop(&mut self) {
        lock(self.shared).append(&mut self.free);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    struct HandsOutEverything(Order, u32);

    impl Visit for HandsOutEverything {
        type Output = ();

        fn visit<F: Frames>(self, frames_of: &F) {
            let Self(order, huge) = self;
            let blocks = frames(huge) / order.frames();
            let mut handle = frames_of.handle();
            for _ in 0..2 {
                let taken: HashSet<u64> = (0..blocks).map(|_| handle.alloc(order)).collect();
                assert_eq!(taken.len() as u64, blocks);
                assert!(taken.iter().all(|frame| *frame < frames(huge) && frame % order.frames() == 0));
                assert_eq!(handle.alloc(order), FAILED);
                assert!(taken.iter().all(|frame| handle.free(*frame, order)));
            }
        }
    }

    #[test]
    fn every_allocator_hands_out_every_block_once() {
        for allocator in Allocator::value_variants() {
            for order in (0..=Order::MAX.get()).filter_map(Order::new) {
                if allocator.supports(order, 4) {
                    allocator.with(4, HandsOutEverything(order, 4));
                }
            }
        }
    }

    #[test]
    fn names_are_those_of_the_command_line() {
        for allocator in Allocator::value_variants() {
            let value = allocator.to_possible_value().expect("none is hidden");
            assert_eq!(value.get_name(), allocator.name());
        }
    }
}
