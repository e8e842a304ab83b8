//! [`Progress`]: where the control plane waits for a device to make progress with a resize.

use llfree_base::lock;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Counts steps and wakes those that wait for the next one.
#[derive(Debug)]
pub struct Progress {
    last: Mutex<(u64, Instant)>,
    changed: Condvar,
}

impl Default for Progress {
    fn default() -> Self {
        Self { last: Mutex::new((0, Instant::now())), changed: Condvar::new() }
    }
}

impl Progress {
    /// A step was made.
    pub fn made(&self) {
        let mut last = self.lock();
        *last = (last.0.wrapping_add(1), Instant::now());
        drop(last);
        self.changed.notify_all();
    }

    /// The steps so far, and when the last one was made.
    #[must_use]
    pub fn last(&self) -> (u64, Instant) {
        *self.lock()
    }

    /// Waits for a step beyond `seen`, for at most `timeout`; returns the steps so far.
    #[must_use]
    pub fn wait(&self, seen: u64, timeout: Duration) -> u64 {
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, |last| last.0 == seen);
        waited.unwrap_or_else(PoisonError::into_inner).0.0
    }

    fn lock(&self) -> MutexGuard<'_, (u64, Instant)> {
        // Every update is one assignment; a panic cannot tear it.
        lock(&self.last)
    }
}
