//! [`Target`]: a limit that a resize asked for and did not reach.

use llfree_monitor::Direction;
use std::sync::Mutex;
use std::time::Instant;

/// A limit that was not reached yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    /// The limit in bytes.
    pub bytes: u64,
    /// Which way it lies.
    pub direction: Direction,
    /// When it was set.
    pub since: Instant,
}

impl Target {
    /// Whether this limit is there, or beyond.
    pub(super) fn is_reached(&self, limit: u64) -> bool {
        match self.direction {
            Direction::Shrink => limit <= self.bytes,
            Direction::Grow => limit >= self.bytes,
        }
    }
}

/// The target, if there is one.
#[derive(Default)]
pub(super) struct Pursuit(pub(super) Mutex<Option<Target>>);
