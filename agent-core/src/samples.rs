//! [`Recorder`]: what a measuring command measured, and its percentiles.
//!
//! Samples lie in memory that was there before the measurement, so that recording one costs a store. When it
//! is full, every second sample is dropped and only every second one kept from then on: percentiles
//! are then of evenly spread samples, while count, mean, least and largest are of all.

use agent_abi::Samples;
use shared_layout::Order;

/// Samples that an agent keeps at most: 4 MiB of them.
pub const CAPACITY: usize = (Order::MAX.bytes() / 8) as usize;

/// Takes samples in.
#[derive(Debug)]
pub struct Recorder<'s> {
    words: &'s mut [u64],
    kept: usize,
    /// One sample in this many is kept.
    stride: u64,
    count: u64,
    /// Wide enough for any samples: a mean is never less than the smallest.
    sum: u128,
    min: u64,
    max: u64,
}

impl<'s> Recorder<'s> {
    /// None yet. At least one of them fits into `words`, whose contents do not matter.
    ///
    /// # Panics
    /// If `words` is empty.
    #[must_use]
    pub fn new(words: &'s mut [u64]) -> Self {
        assert!(!words.is_empty(), "a recorder needs room for a sample");
        Self { words, kept: 0, stride: 1, count: 0, sum: 0, min: u64::MAX, max: 0 }
    }

    /// Adds a sample.
    pub fn push(&mut self, sample: u64) {
        if self.count.is_multiple_of(self.stride) {
            if self.kept == self.words.len() {
                self.thin_out();
            }
            // The first one after a thinning is at a multiple of the new stride as well: all before
            // it were kept, and their number is even.
            self.words[self.kept] = sample;
            self.kept += 1;
        }
        self.count += 1;
        self.sum += u128::from(sample);
        self.min = self.min.min(sample);
        self.max = self.max.max(sample);
    }

    fn thin_out(&mut self) {
        self.kept /= 2;
        for i in 0..self.kept {
            self.words[i] = self.words[2 * i];
        }
        self.stride *= 2;
    }

    /// All of them, summed up by nearest rank; of none, zeroes.
    #[must_use]
    pub fn finish(self) -> Samples {
        let sorted = &mut self.words[..self.kept];
        sorted.sort_unstable();
        let Some(mean) = self.sum.checked_div(u128::from(self.count)) else { return Samples::default() };
        let rank = |permille: usize| sorted[(sorted.len() * permille).div_ceil(1000).max(1) - 1];
        Samples {
            count: self.count,
            // A mean is no more than the largest sample.
            mean: mean as u64,
            min: self.min,
            p1: rank(10),
            p50: rank(500),
            p99: rank(990),
            p999: rank(999),
            max: self.max,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;

    fn summary(samples: impl Iterator<Item = u64>, words: usize) -> Samples {
        let mut words = vec![0; words];
        let mut recorder = Recorder::new(&mut words);
        samples.for_each(|sample| recorder.push(sample));
        recorder.finish()
    }

    #[test]
    fn percentiles_are_samples_by_nearest_rank() {
        let samples = summary((1..=1000).rev(), 1000);
        assert_eq!((samples.count, samples.mean, samples.min, samples.max), (1000, 500, 1, 1000));
        assert_eq!((samples.p1, samples.p50, samples.p99, samples.p999), (10, 500, 990, 999));
        let few = summary([7, 3].into_iter(), 8);
        assert_eq!((few.p1, few.p50, few.p99, few.p999), (3, 3, 7, 7));
        assert_eq!(summary([5].into_iter(), 1), Samples { count: 1, ..all(5) });
        assert_eq!(summary([u64::MAX; 3].into_iter(), 3).mean, u64::MAX);
        assert_eq!(summary([].into_iter(), 1), Samples::default());
    }

    fn all(value: u64) -> Samples {
        let v = value;
        Samples { count: 0, mean: v, min: v, p1: v, p50: v, p99: v, p999: v, max: v }
    }

    #[test]
    fn a_full_store_keeps_evenly_spread_samples_and_exact_extremes() {
        let samples = summary(0..100_000, 64);
        assert_eq!((samples.count, samples.mean, samples.min, samples.max), (100_000, 49_999, 0, 99_999));
        for (found, expected) in [(samples.p50, 50_000_i64), (samples.p99, 99_000)] {
            assert!((found as i64 - expected).abs() < 5_000, "{found} for {expected}");
        }
    }
}
