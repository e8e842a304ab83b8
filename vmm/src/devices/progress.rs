//! [`Progress`]: where the control plane waits for a device to make progress with a resize.
//!
//! Progress is to be nearer to the target than ever since the target was set. A driver that takes back what
//! it gave away, or starts over, comes no nearer, however busy it is: so it cannot keep anybody waiting.

use llfree_base::lock;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Counts steps towards a target and wakes those that wait for the next one.
#[derive(Debug)]
pub struct Progress {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// The least distance since the target was set.
    nearest: u64,
    steps: u64,
    last: Instant,
}

impl Default for Progress {
    fn default() -> Self {
        Self { state: Mutex::new(State { nearest: 0, steps: 0, last: Instant::now() }), changed: Condvar::new() }
    }
}

impl Progress {
    /// Sets a new target by `set`, which returns how far away it is. No step counts for it in the meantime.
    pub fn aim(&self, set: impl FnOnce() -> u64) {
        let mut state = self.lock();
        state.nearest = set();
    }

    /// The driver moved something: `distance` tells how far away the target is now.
    pub fn moved(&self, distance: impl FnOnce() -> u64) {
        let mut state = self.lock();
        let distance = distance();
        if distance < state.nearest {
            *state = State { nearest: distance, steps: state.steps.wrapping_add(1), last: Instant::now() };
            drop(state);
            self.changed.notify_all();
        }
    }

    /// The steps so far, and when the last one was made.
    #[must_use]
    pub fn last(&self) -> (u64, Instant) {
        let state = self.lock();
        (state.steps, state.last)
    }

    /// Waits for a step beyond `seen`, for at most `timeout`; returns the steps so far.
    #[must_use]
    pub fn wait(&self, seen: u64, timeout: Duration) -> u64 {
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, |state| state.steps == seen);
        waited.unwrap_or_else(PoisonError::into_inner).0.steps
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every update is one assignment; a panic cannot tear it.
        lock(&self.state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_comes_nearer_than_ever_is_a_step() {
        let progress = Progress::default();
        progress.aim(|| 10);
        // Nine is a step once; ten and back, or farther away and back, are none.
        [9, 10, 9, 100, 9].into_iter().for_each(|distance| progress.moved(|| distance));
        assert_eq!(progress.last().0, 1);
        [8, 0, 0, 3].into_iter().for_each(|distance| progress.moved(|| distance));
        assert_eq!(progress.last().0, 3);
        // A new target is far away again.
        progress.aim(|| 5);
        assert_eq!(progress.wait(3, Duration::from_millis(1)), 3, "to set it is no step");
        progress.moved(|| 4);
        assert_eq!(progress.wait(3, Duration::from_secs(60)), 4);
    }
}
