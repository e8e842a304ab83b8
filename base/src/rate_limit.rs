//! [`RateLimit`]: how many of many like events reach the log.
//!
//! Every line that a guest or a client can cause repeatedly goes through one, so that none of
//! them fills the host's disk.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts events and says which of them to log: the 1st, 2nd, 4th, 8th and so on, at most 64 of them.
#[derive(Default, Debug)]
pub struct RateLimit(AtomicU64);

impl RateLimit {
    /// One that has counted nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Counts one more event; returns its number, from 1, if it should be logged.
    pub fn tick(&self) -> Option<u64> {
        let number = self.0.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        number.is_power_of_two().then_some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_a_guest_causes_grow_rare() {
        let limit = RateLimit::default();
        let logged: Vec<u64> = (0..1000).filter_map(|_| limit.tick()).collect();
        assert_eq!(logged, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]);
    }
}
