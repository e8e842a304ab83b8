//! What there is to count: by class, and how long the slow way took. Values, and the counters of a histogram.

use crate::reclaimer::Status;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets of a histogram.
pub const BUCKETS: usize = 40;

/// The objects of one class, of all threads that ever were.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct ClassStats {
    /// The size of each.
    pub bytes: u64,
    /// How many were allocated.
    pub allocations: u64,
    /// How many were freed.
    pub deallocations: u64,
    /// How many threads keep for their next allocation.
    pub cached: u64,
}

impl ClassStats {
    /// Objects in use.
    #[must_use]
    pub fn in_use(&self) -> u64 {
        self.allocations.saturating_sub(self.deallocations)
    }
}

/// Statistics of [`Objects`](super::Objects); torn where threads are at work.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stats {
    /// Classes up to 64 MiB, the smallest first.
    pub classes: Vec<ClassStats>,
    /// The area: what is resident, used and free. Unknown where the kernel does not say.
    pub area: Option<Status>,
    /// Allocations that no cache served, one in 16 of them, by their time: bucket `n` has those of less than `2^n` nanoseconds, and not less
    /// than half of that.
    pub slow: [u64; BUCKETS],
    /// Objects that threads took out of others' caches.
    pub stolen: u64,
    /// Objects that were given back out of caches, idle ones above all.
    pub flushed: u64,
}

/// Counts by powers of two.
pub(super) struct Histogram([AtomicU64; BUCKETS]);

impl Default for Histogram {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; BUCKETS])
    }
}

impl Histogram {
    pub(super) fn note(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - nanos.leading_zeros()) as usize;
        self.0[bucket.min(BUCKETS - 1)].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn counts(&self) -> [u64; BUCKETS] {
        std::array::from_fn(|bucket| self.0[bucket].load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_has_what_is_less_than_its_power() {
        let histogram = Histogram::default();
        for nanos in [0, 1, 2, 3, 4, 1023, 1024, u64::MAX] {
            histogram.note(Duration::from_nanos(nanos));
        }
        let counts = histogram.counts();
        assert_eq!([counts[0], counts[1], counts[2], counts[3]], [1, 1, 2, 1]);
        assert_eq!([counts[10], counts[11], counts[BUCKETS - 1]], [1, 1, 1]);
    }
}
