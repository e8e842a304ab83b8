//! Single operations timed one by one, for what a mean hides.
//!
//! The clock is the processor's time stamp counter, read with `rdtscp`, which waits until all earlier instructions are
//! through; `Instant` has the same source and takes twice as long. Two readings with nothing between them are not zero
//! apart: what they are apart in the mean is the timer's overhead, measured by each thread right before its round and
//! subtracted from every time. The counter may advance in steps (10 ns on some machines): a percentile is no finer than
//! that, a mean of many is.

use crate::measured::Timed;
use std::arch::x86_64::__rdtscp;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long the counter is compared with the system's clock.
const CALIBRATION: Duration = Duration::from_millis(20);
/// Readings for the overhead: the median of so many means of so many pairs. An interrupt spoils one mean.
const OVERHEAD: (usize, usize) = (65, 64);

/// The counter now.
#[inline]
pub(crate) fn ticks() -> u64 {
    let mut processor = 0;
    // SAFETY: it reads a register; every processor with KVM has it, and no kernel here takes it away.
    unsafe { __rdtscp(&raw mut processor) }
}

/// Nanoseconds of a tick, measured once.
fn ns_per_tick() -> f64 {
    static RATE: OnceLock<f64> = OnceLock::new();
    *RATE.get_or_init(|| {
        let (start, first) = (Instant::now(), ticks());
        while start.elapsed() < CALIBRATION {
            std::hint::spin_loop();
        }
        let (last, elapsed) = (ticks(), start.elapsed());
        elapsed.as_secs_f64() * 1e9 / last.saturating_sub(first).max(1) as f64
    })
}

/// Ticks made nanoseconds, without the timer's own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stopwatch {
    ns_per_tick: f64,
    /// Ticks between two readings with nothing between them.
    overhead: f64,
}

impl Stopwatch {
    /// Measured on this core, now.
    pub(crate) fn new() -> Self {
        let (means, pairs) = OVERHEAD;
        let mean = |_| {
            let sum: u64 = (0..pairs).map(|_| between(ticks(), ticks())).sum();
            sum as f64 / pairs as f64
        };
        let mut all: Vec<f64> = (0..means).map(mean).collect();
        all.sort_by(f64::total_cmp);
        Self { ns_per_tick: ns_per_tick(), overhead: all[means / 2] }
    }

    /// The nanoseconds of `count` times that are `ticks` together, each.
    pub(crate) fn each(&self, ticks: u64, count: u64) -> f64 {
        if count == 0 {
            return f64::NAN;
        }
        ((ticks as f64 / count as f64 - self.overhead) * self.ns_per_tick).max(0.0)
    }

    /// The ticks of a time, for a deadline.
    pub(crate) fn ticks_of(&self, time: Duration) -> u64 {
        (time.as_secs_f64() * 1e9 / self.ns_per_tick) as u64
    }
}

/// The ticks between two readings; none if the second core's counter is behind that of the first.
#[inline]
pub(crate) fn between(start: u64, end: u64) -> u64 {
    end.saturating_sub(start)
}

/// Times of one kind of operation. Written to without a look, so that the cost is one store to the end of a list.
#[derive(Clone, Default, Debug)]
pub(crate) struct Latencies {
    ticks: Vec<u32>,
}

/// A quantile: the name of its row, and the share of all times that are no longer.
pub(crate) type Tail = (&'static str, f64);

impl Latencies {
    /// Room for this many, touched before the first is timed.
    pub(crate) fn with_room(count: u64) -> Self {
        let mut ticks = vec![u32::MAX; count as usize];
        ticks.clear();
        Self { ticks }
    }

    /// Adds a time; one of more than a second counts as one.
    #[inline]
    pub(crate) fn push(&mut self, ticks: u64) {
        self.ticks.push(u32::try_from(ticks).unwrap_or(u32::MAX));
    }

    /// Times `work`.
    #[inline]
    pub(crate) fn time<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let start = ticks();
        let result = work();
        self.push(between(start, ticks()));
        result
    }

    /// Adds another thread's.
    pub(crate) fn append(&mut self, mut other: Self) {
        self.ticks.append(&mut other.ticks);
    }

    /// Of each time the least of those at its place, as far as all have one.
    pub(crate) fn least<'a>(mut all: impl Iterator<Item = &'a Self>) -> Self {
        let mut ticks = all.next().map(|first| first.ticks.clone()).unwrap_or_default();
        for other in all {
            ticks.truncate(other.ticks.len());
            ticks.iter_mut().zip(&other.ticks).for_each(|(least, ticks)| *least = (*least).min(*ticks));
        }
        Self { ticks }
    }

    pub(crate) fn count(&self) -> u64 {
        self.ticks.len() as u64
    }

    /// The mean of all.
    pub(crate) fn mean(&self, op: &'static str, watch: &Stopwatch) -> Timed {
        let sum = self.ticks.iter().map(|ticks| u64::from(*ticks)).sum();
        Timed { op, ns: watch.each(sum, self.count()), count: self.count() }
    }

    /// Quantiles: the smallest time that at least that share of all do not exceed.
    pub(crate) fn tails(mut self, tails: &[Tail], watch: &Stopwatch) -> Vec<Timed> {
        self.ticks.sort_unstable();
        let count = self.count();
        let at = |share: f64| {
            let rank = (share * count as f64).ceil() as usize;
            self.ticks.get(rank.clamp(1, self.ticks.len().max(1)) - 1)
        };
        let timed = |(op, share): &Tail| {
            let ns = at(*share).map_or(f64::NAN, |ticks| watch.each(u64::from(*ticks), 1));
            Timed { op, ns, count }
        };
        tails.iter().map(timed).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Stopwatch = Stopwatch { ns_per_tick: 0.5, overhead: 10.0 };

    fn latencies(ticks: impl IntoIterator<Item = u64>) -> Latencies {
        let mut latencies = Latencies::default();
        ticks.into_iter().for_each(|ticks| latencies.push(ticks));
        latencies
    }

    #[test]
    fn the_overhead_is_in_no_time() {
        let mean = latencies([10, 30, 50]).mean("alloc", &PLAIN);
        assert_eq!(mean, Timed { op: "alloc", ns: 10.0, count: 3 });
        // Shorter than the timer is zero, not less.
        assert_eq!(latencies([4]).mean("alloc", &PLAIN).ns, 0.0);
    }

    #[test]
    fn a_quantile_is_a_time_that_was_measured() {
        // 1 to 1000 above the overhead, in any order.
        let all = latencies((1..=1000).rev().map(|ticks| ticks + 10));
        let tails = [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)];
        let ns: Vec<f64> = all.tails(&tails, &PLAIN).iter().map(|tail| tail.ns * 2.0).collect();
        assert_eq!(ns, [500.0, 990.0, 999.0, 1000.0]);
        let one = latencies([30]).tails(&tails, &PLAIN);
        assert!(one.iter().all(|tail| tail.ns == 10.0 && tail.count == 1));
    }

    #[test]
    fn the_least_of_some_runs_is_that_of_each_place() {
        let runs = [latencies([10, 90, 30, 70]), latencies([20, 15, 40]), latencies([11, 80, 29, 1])];
        assert_eq!(Latencies::least(runs.iter()).ticks, [10, 15, 29]);
        assert_eq!(Latencies::least(std::iter::empty()).count(), 0);
    }

    #[test]
    fn of_no_times_there_is_no_mean_and_no_quantile() {
        let none = Latencies::with_room(100);
        assert!(none.mean("alloc", &PLAIN).ns.is_nan());
        assert!(none.tails(&[("max", 1.0)], &PLAIN)[0].ns.is_nan());
    }

    #[test]
    fn a_sleep_takes_as_long_as_it_does() {
        let watch = Stopwatch::new();
        let mut latencies = Latencies::default();
        latencies.time(|| std::thread::sleep(Duration::from_millis(5)));
        let ns = latencies.mean("sleep", &watch).ns;
        assert!(ns > 4.5e6, "{ns}");
        assert!(watch.ticks_of(Duration::from_nanos(1000)) > 0);
    }
}
