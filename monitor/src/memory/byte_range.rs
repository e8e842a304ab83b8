//! Discards of single pages, for devices whose guests speak of 4 KiB.
//!
//! The same promise as for huge frames: what was discarded has gone back to the kernel and reads as
//! zero. A page out of a huge one makes the kernel split that, so that this costs more a byte.

use super::{GuestRam, MemoryError};
use llfree_base::faults;
use rustix::fs::FallocateFlags;
use rustix::io::retry_on_intr;
use rustix::mm::Advice;
use shared_layout::FRAME_SIZE;
use std::ops::Range;

impl GuestRam {
    /// Returns the memory of a range of whole 4 KiB pages to the kernel, with one system call.
    ///
    /// On [`Backing::Hugetlb`](super::Backing::Hugetlb) only whole 2 MiB pages of the range go back.
    ///
    /// # Errors
    /// [`MemoryError::BadBytes`], or [`MemoryError::DiscardBytes`] if the kernel refuses.
    pub fn discard_bytes(&self, range: Range<u64>) -> Result<(), MemoryError> {
        let Range { start, end } = range;
        let whole = start.is_multiple_of(FRAME_SIZE) && end.is_multiple_of(FRAME_SIZE);
        if start > end || end > self.bytes() || !whole {
            return Err(MemoryError::BadBytes { start, end, ram: self.bytes() });
        }
        if start == end {
            return Ok(());
        }
        let refused = |source| MemoryError::DiscardBytes { start, bytes: end - start, backing: self.backing, source };
        faults::point(faults::DISCARD).map_err(refused)?;
        match &self.file {
            Some(file) => {
                let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                retry_on_intr(|| rustix::fs::fallocate(file, punch, start, end - start))
            }
            // SAFETY: the range is inside our mapping, as checked above. What it holds is guest
            // memory, which is only ever accessed as volatile bytes and may change at any time.
            None => retry_on_intr(|| unsafe {
                let first = self.mapping.pointer(start as usize);
                rustix::mm::madvise(first, (end - start) as usize, Advice::LinuxDontNeed)
            }),
        }
        .map_err(|error| refused(error.into()))
    }
}
