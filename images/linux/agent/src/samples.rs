//! Percentiles of what a measuring command measured, as the report carries them.

use shared_layout::agent::Samples;

/// A summary by nearest rank; of no samples, zeroes.
#[must_use]
pub fn summary(mut samples: Vec<u64>) -> Samples {
    samples.sort_unstable();
    let (Some(&min), Some(&max)) = (samples.first(), samples.last()) else { return Samples::default() };
    let rank = |permille: usize| samples[(samples.len() * permille).div_ceil(1000).max(1) - 1];
    let sum: u128 = samples.iter().copied().map(u128::from).sum();
    Samples {
        count: samples.len() as u64,
        // A mean is no more than the largest sample.
        mean: (sum / samples.len() as u128) as u64,
        min,
        p1: rank(10),
        p50: rank(500),
        p99: rank(990),
        p999: rank(999),
        max,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples_by_nearest_rank() {
        let samples = summary((1..=1000).rev().collect());
        assert_eq!((samples.count, samples.mean, samples.min, samples.max), (1000, 500, 1, 1000));
        assert_eq!((samples.p1, samples.p50, samples.p99, samples.p999), (10, 500, 990, 999));
        assert_eq!(summary(vec![u64::MAX; 3]).mean, u64::MAX);
        assert_eq!(summary(Vec::new()), Samples::default());
    }
}
