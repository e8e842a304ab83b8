//! What the allocator figures measure: one small trait for an allocator, one for a thread's handle to it.
//!
//! Everything is called through generics, so that a loop over an allocator is compiled for it as
//! it would be in a program that links nothing else. The allocators themselves lie above: this project's in
//! `tables`, the others in `baselines`, the list of both in `allocator`.

use shared_layout::{FRAME_SIZE, Order};

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

/// Base frames in this many huge ones.
pub(crate) fn frames(huge_frames: u32) -> u64 {
    u64::from(huge_frames) * Order::HUGE.frames()
}

/// Huge frames in this many bytes, if a `u32` counts them.
pub(crate) fn huge_frames(bytes: u64) -> Option<u32> {
    u32::try_from(bytes / (FRAME_SIZE * Order::HUGE.frames())).ok()
}
