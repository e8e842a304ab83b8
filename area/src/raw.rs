//! Frames by their address: for allocators of others that ask an area for memory and keep its size themselves.
//!
//! Below 1 MiB as many pages of 4 KiB as are asked for, above it whole huge frames; no caches, no handle, no system call,
//! and nothing here waits or allocates, so that an allocator may hold its own locks meanwhile.

use crate::area::Area;
use crate::block::pieces;
use crate::error::{AllocError, FreeError};
use crate::hand::{Taken, install};
use crate::space::Space;
use llfree::run::Behind;
use shared_layout::{FRAME_SIZE, FrameId, HUGE_SIZE, HugeId, HugeRange, Order};
use std::alloc::Layout;
use std::ptr::NonNull;

/// Pages from which on it is whole huge frames.
const MOST_PAGES: u64 = 256;

/// What a layout comes to.
enum Extent {
    /// So many pages, at the start of a block of this order.
    Pages(u64, Order),
    Huge(u32),
}

impl Extent {
    fn of(layout: Layout) -> Result<Self, AllocError> {
        let (bytes, align) = (layout.size() as u64, layout.align() as u64);
        if align > HUGE_SIZE {
            return Err(AllocError::Alignment(layout.align()));
        }
        let pages = bytes.div_ceil(FRAME_SIZE).max(1);
        let block = pages.max(align / FRAME_SIZE).checked_next_power_of_two();
        match block.and_then(|block| Order::new(block.trailing_zeros() as u8)) {
            Some(order) if order.frames() <= MOST_PAGES => Ok(Self::Pages(pages, order)),
            _ => {
                let huge_frames = u32::try_from(bytes.div_ceil(HUGE_SIZE).max(1));
                huge_frames.map(Self::Huge).map_err(|_| AllocError::OutOfMemory { bytes })
            }
        }
    }
}

impl Area {
    /// Whether an address lies in the area.
    #[must_use]
    pub fn contains(&self, start: NonNull<u8>) -> bool {
        let base = self.space.address(FrameId(0)).as_ptr().addr();
        (start.as_ptr().addr().wrapping_sub(base) as u64) < self.bytes()
    }

    /// Memory for a layout, and whether all of it is zero. Waits for nobody: what the reclaimer has in hand at this moment
    /// counts as used.
    ///
    /// # Errors
    /// [`AllocError`].
    pub fn take(&self, layout: Layout) -> Result<(NonNull<u8>, bool), AllocError> {
        let out = AllocError::OutOfMemory { bytes: layout.size() as u64 };
        if self.space.is_missing() {
            return Err(AllocError::Forked);
        }
        let tenant = self.space.tenant();
        match Extent::of(layout)? {
            Extent::Pages(pages, order) => {
                let Taken { frame, is_zeroed } = install(&self.space, tenant.alloc(order).map_err(|_| out)?);
                for (frame, order) in pieces(frame.0 + pages, frame.0 + order.frames()) {
                    // Ours since a moment ago, so that it is allocated.
                    let _ = tenant.free(frame, order);
                }
                Ok((self.space.address(frame), is_zeroed))
            }
            Extent::Huge(count) => {
                let run = tenant.alloc_run(count, Behind::Any, &mut HugeId(0)).map_err(|_| out)?;
                tenant.self_install(run.range);
                Ok((self.space.address(run.range.first().first_frame()), run.evicted == count))
            }
        }
    }

    /// Frees what [`take`](Self::take) gave.
    ///
    /// # Safety
    /// It gave this address for this layout, and nobody uses the memory any more.
    ///
    /// # Errors
    /// [`FreeError`]; then nothing, or not all of it, was freed.
    pub unsafe fn give(&self, start: NonNull<u8>, layout: Layout) -> Result<(), FreeError> {
        if self.space.is_missing() {
            return Err(FreeError::Forked);
        }
        let frame = self.space.frame_at(start.as_ptr().addr()).ok_or(FreeError::Foreign)?;
        let tenant = self.space.tenant();
        match Extent::of(layout).map_err(|_| FreeError::Foreign)? {
            Extent::Pages(pages, _) => {
                self.space.mark_freed(Space::huge_range(frame, pages));
                for (frame, order) in pieces(frame.0, frame.0 + pages) {
                    tenant.free(frame, order)?;
                }
                Ok(())
            }
            Extent::Huge(count) => {
                let range = frame.huge().and_then(|first| HugeRange::new(first, count)).ok_or(FreeError::Foreign)?;
                self.space.mark_freed(range);
                Ok(tenant.free_run(range)?)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::MemoryKind;
    use llfree_base::choices::Switch;

    fn layout(bytes: usize, align: usize) -> Layout {
        Layout::from_size_align(bytes, align).expect("a layout")
    }

    #[test]
    fn every_layout_is_memory_of_its_owner_alone_and_goes_back() {
        let area = Area::builder().size(64 << 20).memory(MemoryKind::Private).auto_reclaim(Switch(None));
        let area = area.build().expect("address space");
        let mut random = fastrand::Rng::with_seed(11);
        let mut held: Vec<(NonNull<u8>, Layout, u8)> = Vec::new();
        for round in 0..3000 {
            let bytes = 1 << random.u32(..22);
            let layout = layout(random.usize(1..=bytes), 1 << random.u32(..22));
            if held.len() < 20
                && let Ok((start, is_zeroed)) = area.take(layout)
            {
                assert!(area.contains(start) && start.as_ptr().addr().is_multiple_of(layout.align()));
                // SAFETY: ours, this large, and written by the kernel at least.
                let all = unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), layout.size()) };
                assert!(!is_zeroed || all.iter().all(|byte| *byte == 0));
                all.fill(round as u8);
                held.push((start, layout, round as u8));
            } else if !held.is_empty() {
                let (start, layout, number) = held.swap_remove(random.usize(..held.len()));
                // SAFETY: as above.
                let all = unsafe { std::slice::from_raw_parts(start.as_ptr(), layout.size()) };
                assert!(all.iter().all(|byte| *byte == number), "somebody else wrote to it");
                // SAFETY: ours, and not used any more.
                unsafe { area.give(start, layout) }.expect("it was taken");
            }
        }
        for (start, layout, _) in held {
            // SAFETY: as above.
            unsafe { area.give(start, layout) }.expect("it was taken");
        }
        assert_eq!(area.status().expect("known").used_bytes, 0);
        for bytes in [4096, 60_000, 2 << 20, 7 << 20] {
            let (start, _) = area.take(layout(bytes, 1)).expect("room");
            // SAFETY: the first time it is ours; the second time the table refuses it, for nobody took it since.
            let twice = unsafe { [area.give(start, layout(bytes, 1)), area.give(start, layout(bytes, 1))] };
            assert!(twice[0].is_ok() && twice[1].is_err(), "{bytes}: {twice:?}");
        }
        let outside = NonNull::from(&area).cast();
        assert!(!area.contains(outside));
        // SAFETY: it is refused.
        assert_eq!(unsafe { area.give(outside, layout(4096, 1)) }, Err(FreeError::Foreign));
        assert_eq!(area.status().expect("known").used_bytes, 0, "neither changed anything");
        assert_eq!(area.take(layout(1, 4 << 20)), Err(AllocError::Alignment(4 << 20)));
        let bytes = isize::MAX as usize - 4096;
        assert_eq!(area.take(layout(bytes, 1)), Err(AllocError::OutOfMemory { bytes: bytes as u64 }));
    }
}
