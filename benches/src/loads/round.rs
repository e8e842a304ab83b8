//! How much of a workload one round is, and on which cores.

use crate::crew::{cas_ns, on_cores};
use crate::error::{BenchError, Exhausted};
use crate::latency::Stopwatch;
use shared_layout::Order;
use std::time::Duration;

/// One round of one workload.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Round<'a> {
    /// The workload's name, for errors.
    pub(crate) bench: &'static str,
    pub(crate) huge_frames: u32,
    pub(crate) order: Order,
    pub(crate) threads: u32,
    /// Cores that this process may use.
    pub(crate) cores: &'a [usize],
    pub(crate) seed: u64,
    /// Operations of each thread ...
    pub(crate) operations: u64,
    /// ... unless they take longer than this.
    pub(crate) patience: Duration,
}

/// The unit and the clock, as they are on one core right before its round.
#[derive(Clone, Copy, Debug)]
pub(super) struct Units {
    pub(super) cas_ns: f64,
    pub(super) watch: Stopwatch,
}

impl Units {
    pub(super) fn measure() -> Self {
        Self { cas_ns: cas_ns(), watch: Stopwatch::new() }
    }
}

impl Round<'_> {
    /// What a thread's `None` means: a block was refused that the workload knows to be there.
    pub(super) fn exhausted(&self, order: Order) -> BenchError {
        BenchError::Exhausted(Exhausted { bench: self.bench, order: order.get() })
    }

    /// Runs `work` on the first core.
    pub(super) fn alone<T: Send>(&self, work: impl Fn() -> Option<T> + Sync) -> Result<T, BenchError> {
        let only = on_cores(self.cores, 1, |_, _| work())?.pop().flatten();
        only.ok_or_else(|| self.exhausted(self.order))
    }

    /// The counter's value at which a thread that begins now gives up.
    pub(super) fn deadline(&self, units: &Units) -> u64 {
        crate::latency::ticks() + units.watch.ticks_of(self.patience)
    }
}
