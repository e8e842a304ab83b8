//! [`LifeState`]: whether a VM runs, is paused or has stopped. Only `life` changes it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Running, paused or stopped.
#[derive(Default)]
pub(super) struct LifeState {
    /// Set once, for good: no new work begins.
    pub(super) stopped: AtomicBool,
    /// The time of the pause. Locked only for an instant, so that any thread may ask.
    pub(super) paused_since: Mutex<Option<Instant>>,
    /// Held by a pause or a resume, possibly for seconds.
    pub(super) turn: Mutex<()>,
}

impl LifeState {
    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }
}
