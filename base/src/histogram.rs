//! How long something takes, counted by powers of two.
//!
//! A measurement costs two atomic additions and no lock, so it may stand in a path that takes microseconds. The
//! buckets are the same everywhere: what is counted in two VMs can be added up.

use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Bounded buckets: below 1, 2, 4 ... 2^24 microseconds, which is 16.8 seconds.
pub const BOUNDED: usize = 25;

/// The bound of a bucket in microseconds, from the 0th on; what it counts took less.
#[must_use]
pub const fn bound_us(bucket: usize) -> u64 {
    1 << bucket
}

/// Counts durations.
#[derive(Default, Debug)]
pub struct Durations {
    /// The last one has no bound.
    buckets: [AtomicU64; BOUNDED + 1],
    sum_us: AtomicU64,
}

/// What was counted, for a report. An older VM counts nothing, which is the default.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct DurationCounts {
    /// The durations added up, in microseconds.
    pub sum_us: u64,
    /// How many took less than 1, less than 2, less than 4 microseconds and so on, each without those before it; the
    /// 26th took 2^24 microseconds or more. What is 0 at the end is left out.
    pub counts: Vec<u64>,
}

impl Durations {
    /// One more, of this length.
    pub fn record(&self, duration: Duration) {
        self.record_us(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX));
    }

    /// The same in microseconds.
    pub fn record_us(&self, us: u64) {
        let bucket = (u64::BITS - us.leading_zeros()) as usize;
        self.buckets[bucket.min(BOUNDED)].fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(us, Ordering::Relaxed);
    }

    /// What was counted until now. The parts are read one by one, so they may be from different moments.
    #[must_use]
    pub fn counts(&self) -> DurationCounts {
        let mut counts: Vec<u64> = self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect();
        while counts.last() == Some(&0) {
            counts.pop();
        }
        DurationCounts { sum_us: self.sum_us.load(Ordering::Relaxed), counts }
    }
}

impl DurationCounts {
    /// How many durations were counted.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counts.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// For each bounded bucket its bound in microseconds, and how many took less than that.
    pub fn cumulative(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        (0..BOUNDED).scan(0u64, |below, bucket| {
            *below = below.saturating_add(self.counts.get(bucket).copied().unwrap_or(0));
            Some((bound_us(bucket), *below))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_counts_where_it_belongs() {
        let durations = Durations::default();
        assert_eq!(durations.counts(), DurationCounts::default());
        for us in [0, 1, 1, 3, 4, u64::from(u32::MAX)] {
            durations.record_us(us);
        }
        let counts = durations.counts();
        assert_eq!(counts.counts[..4], [1, 2, 1, 1]);
        assert_eq!((counts.counts.len(), counts.total()), (BOUNDED + 1, 6));
        assert_eq!(counts.sum_us, 9 + u64::from(u32::MAX));
        let below: Vec<_> = counts.cumulative().collect();
        assert_eq!((below[0], below[1], below[2], below[3]), ((1, 1), (2, 3), (4, 4), (8, 5)));
        assert_eq!(below[BOUNDED - 1], (1 << 24, 5), "one took longer");
    }

    #[test]
    fn no_duration_is_out_of_bounds() {
        let durations = Durations::default();
        durations.record(Duration::MAX);
        durations.record_us((1 << 24) - 1);
        durations.record_us(1 << 24);
        assert_eq!(durations.counts().counts[BOUNDED - 1..], [1, 2]);
    }

    #[test]
    fn a_report_with_more_buckets_than_there_are_is_no_fault() {
        let counts = DurationCounts { sum_us: 0, counts: vec![u64::MAX; 90] };
        assert_eq!(counts.total(), u64::MAX);
        assert_eq!(counts.cumulative().count(), BOUNDED);
    }
}
