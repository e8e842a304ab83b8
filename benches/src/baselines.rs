//! The allocators that a user would pick instead of llfree, each behind the lock that it needs.
//!
//! Nothing is added to what the crates do: a lock, and the frame number as ours are counted. The list a core
//! ([`PerCore`]) is our own and checks nothing: about the least that any allocator can do.

use crate::crew::lock;
use crate::frames::{FAILED, Frames, Handle, frames};
use bitmap_allocator::{BitAlloc, BitAlloc16M};
use buddy_system_allocator::FrameAllocator;
use crossbeam_queue::ArrayQueue;
use shared_layout::Order;
use std::sync::Mutex;

pub(crate) type Buddy = FrameAllocator<33>;

/// A buddy allocator over that many huge frames, all free.
pub(crate) fn buddy(huge_frames: u32) -> Buddy {
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

/// Base frames that the bitmap can manage.
pub(crate) const BITMAP_FRAMES: u64 = BitAlloc16M::CAP as u64;

/// A bitmap of bitmaps, likewise; too large for a stack.
pub(crate) fn bitmap(huge_frames: u32) -> Box<BitAlloc16M> {
    // Without optimizations its two MiB pass over the stack on their way to the heap: over one that has room for them.
    let maker = std::thread::Builder::new().stack_size(64 << 20).spawn(|| Box::new(BitAlloc16M::DEFAULT));
    let mut bits = maker.expect("a thread").join().expect("no panic");
    bits.insert(0..frames(huge_frames) as usize);
    bits
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

/// A queue with every base frame in it.
pub(crate) fn queue(huge_frames: u32) -> ArrayQueue<u64> {
    let queue = ArrayQueue::new(frames(huge_frames) as usize);
    for frame in 0..frames(huge_frames) {
        // It has room for all of them.
        let _ = queue.push(frame);
    }
    queue
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

impl PerCore {
    /// Every base frame; the lowest is taken first.
    pub(crate) fn new(huge_frames: u32) -> Self {
        Self(Mutex::new((0..frames(huge_frames)).rev().collect()))
    }
}

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
