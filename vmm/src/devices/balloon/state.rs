//! What the host controls a balloon with and sees of it: target, size, counters, and the
//! guest's statistics. Shared between the device's thread and the control plane.

use super::super::progress::Progress;
use llfree_base::counters::BalloonCounters;
use llfree_base::lock;
use llfree_base::metrics::Gauge;
use llfree_control::report::{BalloonStatus, GuestStatsReport};
use shared_layout::FRAME_SIZE;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Intervals without an answer after which the last statistics count as stale; a busy guest may be
/// late.
const LATE_INTERVALS: u32 = 3;
/// Statistics are not stale before this time, however short the interval is.
const LATE_AT_LEAST: Duration = Duration::from_secs(5);

/// The host's side of a balloon.
#[derive(Default, Debug)]
pub struct BalloonControl {
    target: AtomicU32,
    claimed: AtomicU32,
    inflated: AtomicI64,
    /// The driver may take pages back when the guest is out of memory.
    deflates_on_oom: AtomicBool,
    stats: Mutex<Option<(Instant, GuestStats)>>,
    /// Statistics older than this are stale.
    late_after_ms: Gauge,
    /// Signalled when the balloon came nearer to its target.
    pub progress: Progress,
    /// What the guest did since the VM started.
    pub counters: BalloonCounters,
}

impl BalloonControl {
    /// Sets the target size of the balloon, in pages of 4 KiB. The driver must be told.
    pub fn set_target(&self, pages: u32) {
        self.progress.aim(|| {
            self.target.store(pages, Ordering::Relaxed);
            self.distance()
        });
    }

    /// Pages between the size and the target.
    fn distance(&self) -> u64 {
        self.inflated.load(Ordering::Acquire).abs_diff(self.target_pages().into())
    }

    /// The target size, in pages of 4 KiB.
    #[must_use]
    pub fn target_pages(&self) -> u32 {
        self.target.load(Ordering::Relaxed)
    }

    /// The size that the driver claims, in pages of 4 KiB.
    #[must_use]
    pub fn claimed_pages(&self) -> u32 {
        self.claimed.load(Ordering::Relaxed)
    }

    /// The size by the device's own accounting, in bytes.
    #[must_use]
    pub fn inflated_bytes(&self) -> u64 {
        u64::try_from(self.inflated.load(Ordering::Acquire)).unwrap_or(0) * FRAME_SIZE
    }

    /// The driver's claim.
    pub(super) fn claim(&self, pages: u32) {
        self.claimed.store(pages, Ordering::Relaxed);
    }

    /// The balloon grew or shrank by this many pages.
    pub(super) fn moved(&self, pages: i64) {
        self.inflated.fetch_add(pages, Ordering::AcqRel);
        self.progress.moved(|| self.distance());
    }

    /// Sets the interval at which statistics are expected, if at all.
    pub(super) fn expect_stats(&self, interval: Option<Duration>) {
        let late = (interval.unwrap_or_default() * LATE_INTERVALS).max(LATE_AT_LEAST);
        self.late_after_ms.set(u64::try_from(late.as_millis()).unwrap_or(u64::MAX));
    }

    /// A driver has started.
    pub(super) fn started(&self, deflates_on_oom: bool) {
        self.deflates_on_oom.store(deflates_on_oom, Ordering::Relaxed);
    }

    /// A new driver has all pages, and has sent nothing yet.
    pub(super) fn emptied(&self) {
        *lock(&self.stats) = None;
        self.deflates_on_oom.store(false, Ordering::Relaxed);
        self.claimed.store(0, Ordering::Relaxed);
        // No progress of the driver's, even where it is what a resize waits for.
        self.inflated.store(0, Ordering::Release);
    }

    pub(super) fn set_stats(&self, stats: GuestStats) {
        *lock(&self.stats) = Some((Instant::now(), stats));
    }

    /// The last statistics that came, and their age.
    #[must_use]
    pub fn stats(&self) -> Option<(Duration, GuestStats)> {
        let stats = lock(&self.stats);
        stats.map(|(came, stats)| (came.elapsed(), stats))
    }

    /// The balloon's status.
    #[must_use]
    pub fn status(&self) -> BalloonStatus {
        BalloonStatus {
            target_bytes: u64::from(self.target_pages()) * FRAME_SIZE,
            inflated_bytes: self.inflated_bytes(),
            claimed_bytes: u64::from(self.claimed_pages()) * FRAME_SIZE,
            counts: self.counters.counts(),
            deflates_on_oom: self.deflates_on_oom.load(Ordering::Relaxed),
            guest: self.stats().map(|(age, stats)| stats.report(age, self.late_after_ms.get())),
        }
    }
}

/// What a guest says about its memory; `None` for what it does not say.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct GuestStats {
    values: [Option<u64>; STATS],
}

/// Statistics of the standard, by tag: swapped in and out, faults, free and total memory, and more.
const STATS: usize = 10;
const MAJOR_FAULTS: usize = 2;
const MINOR_FAULTS: usize = 3;
const FREE: usize = 4;
const TOTAL: usize = 5;
const AVAILABLE: usize = 6;
const CACHES: usize = 7;

impl GuestStats {
    /// Reads records of a tag (u16) and a value (u64); unknown tags and a torn end are ignored.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        let mut stats = Self::default();
        for record in bytes.as_chunks::<10>().0 {
            let (tag, value) = record.split_at(2);
            let tag = usize::from(u16::from_le_bytes([tag[0], tag[1]]));
            // The value of a driver that does not know is all ones.
            if let (Some(slot), Ok(value)) = (stats.values.get_mut(tag), <[u8; 8]>::try_from(value)) {
                *slot = Some(u64::from_le_bytes(value)).filter(|value| *value != u64::MAX);
            }
        }
        stats
    }

    fn report(&self, age: Duration, late_after_ms: u64) -> GuestStatsReport {
        let age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        GuestStatsReport {
            age_ms,
            stale: age_ms > late_after_ms,
            free_bytes: self.values[FREE],
            available_bytes: self.values[AVAILABLE],
            total_bytes: self.values[TOTAL],
            cache_bytes: self.values[CACHES],
            major_faults: self.values[MAJOR_FAULTS],
            minor_faults: self.values[MINOR_FAULTS],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_stale_after_three_intervals_and_five_seconds_at_least() {
        let stale = |interval: Option<u64>, age_ms: u64| {
            let control = BalloonControl::default();
            control.expect_stats(interval.map(Duration::from_millis));
            let late_after = control.late_after_ms.get();
            GuestStats::default().report(Duration::from_millis(age_ms), late_after).stale
        };
        assert!(!stale(Some(50), 5_000) && stale(Some(50), 5_001));
        assert!(!stale(Some(10_000), 30_000) && stale(Some(10_000), 30_001));
        assert!(stale(None, u64::MAX / 2));
    }
}
