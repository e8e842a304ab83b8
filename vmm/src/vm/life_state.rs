//! [`LifeState`]: what a VM knows of its own life. `life` changes it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Running, paused or stopped.
#[derive(Default)]
pub(super) struct LifeState {
    /// Set once, for good: no work is begun any more.
    pub(super) stopped: AtomicBool,
    /// Held for an instant, so that anybody may ask.
    pub(super) paused_since: Mutex<Option<Instant>>,
    /// Held by a pause or a resume, for seconds.
    pub(super) turn: Mutex<()>,
}

impl LifeState {
    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }
}
