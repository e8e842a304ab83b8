//! The room for allocations: the memory that the kernel calls available, less a reserve for the system.
//!
//! Linux never fails a page fault; it kills somebody. So a caller that touches new memory asks here
//! first, and what is not there is reported as out of memory. The kernel is asked anew every 16
//! MiB, as a host may take memory meanwhile.

use crate::system::Meminfo;

/// The most that one look at the kernel's numbers allows.
const STRIDE: u64 = 16 << 20;
/// The least that stays with the system.
const LEAST_RESERVE: u64 = 32 << 20;

/// An allowance that is renewed as long as there is memory.
#[derive(Debug)]
pub struct Room {
    reserve: u64,
    left: u64,
}

impl Room {
    /// Leaves `reserve` bytes to the system.
    #[must_use]
    pub const fn with_reserve(reserve: u64) -> Self {
        Self { reserve, left: 0 }
    }

    /// Leaves a 32nd of memory to the system, and 32 MiB at least.
    #[must_use]
    pub fn usual() -> Self {
        Self::with_reserve((Meminfo::now().total / 32).max(LEAST_RESERVE))
    }

    /// True if `bytes` more may be touched.
    pub fn take(&mut self, bytes: u64) -> bool {
        if self.left < bytes {
            self.left = Meminfo::now().available.saturating_sub(self.reserve).min(STRIDE.max(bytes));
        }
        let fits = bytes <= self.left;
        self.left -= if fits { bytes } else { 0 };
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_left_alone() {
        assert!(!Room::with_reserve(u64::MAX).take(1));
        assert!(!Room::with_reserve(0).take(u64::MAX));
        let mut room = Room::with_reserve(0);
        assert!(room.take(4096));
        assert_eq!(room.left % 4096, STRIDE % 4096);
        assert!(room.take(2 * STRIDE), "one block may be larger than the stride");
    }
}
