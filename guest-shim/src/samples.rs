//! [`Store`] and [`Recorder`]: what a measuring command measured, and its percentiles.
//!
//! Samples lie in a block of the guest's own memory, which is allocated and touched before the
//! measurement, so that recording one costs a store and never an install. The store stays with its
//! vCPU from one command to the next, like a cache, until it is told to give caches up. When it is
//! full, every second sample is dropped and only every second one kept from then on: percentiles
//! are then of evenly spread samples, while count, mean, least and largest are of all.

use crate::host::Doorbell;
use crate::memory::{Memory, Refusal};
use llfree::Block;
use shared_layout::Order;
use shared_layout::agent::Samples;

/// Samples that are kept: 4 MiB of them.
const CAPACITY: usize = (Order::MAX.bytes() / 8) as usize;

/// Memory for samples.
#[derive(Default)]
pub(crate) struct Store(Option<Block>);

impl Store {
    /// None.
    pub(crate) const fn new() -> Self {
        Self(None)
    }

    /// A recorder without samples; all of its memory was touched.
    ///
    /// # Errors
    /// Why there is no memory.
    pub(crate) fn record<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>) -> Result<Recorder<'_>, Refusal> {
        let block = match self.0 {
            Some(block) => block,
            None => *self.0.insert(memory.take(Order::MAX)?),
        };
        // SAFETY: taken above, and given back only by `release`, which needs the recorder's borrow
        // of `self` to be over.
        let words = unsafe { memory.ram().block(block.frame(), block.order()) }.cast::<u64>();
        // SAFETY: the block is this store's alone and of this many words; an honest host writes to
        // no frame that the guest was given. Zeroes first, so all of it is initialized.
        let words = unsafe {
            words.write_bytes(0, CAPACITY);
            core::slice::from_raw_parts_mut(words, CAPACITY)
        };
        Ok(Recorder::new(words))
    }

    /// Gives the memory back.
    pub(crate) fn release<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>) {
        if let Some(block) = self.0.take() {
            memory.give(block.frame(), block.order());
        }
    }
}

/// Takes samples in.
pub(crate) struct Recorder<'s> {
    words: &'s mut [u64],
    kept: usize,
    /// One sample in so many is kept.
    stride: u64,
    count: u64,
    sum: u64,
    min: u64,
    max: u64,
}

impl<'s> Recorder<'s> {
    fn new(words: &'s mut [u64]) -> Self {
        Self { words, kept: 0, stride: 1, count: 0, sum: 0, min: u64::MAX, max: 0 }
    }

    /// Adds a sample.
    pub(crate) fn push(&mut self, sample: u64) {
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
        self.sum = self.sum.saturating_add(sample);
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

    /// All of them, summed up.
    pub(crate) fn finish(self) -> Samples {
        let sorted = &mut self.words[..self.kept];
        sorted.sort_unstable();
        let Some(mean) = self.sum.checked_div(self.count) else { return Samples::default() };
        let rank = |permille: usize| sorted[(sorted.len() * permille).div_ceil(1000).max(1) - 1];
        Samples {
            count: self.count,
            mean,
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
    use crate::fake::Table;
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

    #[test]
    fn the_store_keeps_its_block_until_it_is_released() {
        let table = Table::new(8, 1);
        let tenant = table.tenant();
        let mut memory = table.memory(&tenant, 0);
        let mut store = Store::new();
        let mut recorder = store.record(&mut memory).expect("room");
        recorder.push(9);
        assert_eq!(recorder.finish().p50, 9);
        let installs = memory.installs;
        assert_eq!(store.record(&mut memory).expect("room").finish(), Samples::default(), "old samples are gone");
        assert_eq!(memory.installs, installs);
        assert_eq!(tenant.stats().free_huge, 5);
        store.release(&mut memory);
        store.release(&mut memory);
        memory.drain();
        assert_eq!(tenant.stats().free_huge, 7);
    }
}
