//! The shared table: the host takes free frames out of it without any code running in the guest.

use super::error::{DeviceError, MoveError};
use super::offers::Need;
use super::way::{Elasticity, Parts, Way};
use llfree_control::report::{ElasticKind, ElasticStatus};
use llfree_monitor::{Direction, Monitor, Pass, Resize};
use shared_layout::HUGE_SIZE;
use std::sync::Arc;
use std::time::Duration;

/// The choice of the shared table; it has no options.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Table;

impl Way for Table {
    fn kind(&self) -> ElasticKind {
        ElasticKind::Llfree
    }

    fn needs(&self) -> Need {
        Need::Table
    }

    fn build(&self, parts: Parts<'_>) -> Result<Arc<dyn Elasticity>, DeviceError> {
        Ok(Arc::new(ByTable { monitor: parts.monitor.clone(), drain: parts.drain }))
    }
}

struct ByTable {
    monitor: Arc<Monitor>,
    drain: Box<dyn Fn() + Send + Sync>,
}

impl Elasticity for ByTable {
    fn limit(&self) -> u64 {
        u64::from(self.monitor.limit()) * HUGE_SIZE
    }

    fn wanted(&self) -> u64 {
        self.monitor.wanted().saturating_mul(HUGE_SIZE)
    }

    fn resize(
        &self,
        direction: Direction,
        target: u64,
        keep_waiting: &dyn Fn(Duration) -> bool,
    ) -> Result<Resize, MoveError> {
        // At most RAM, whose huge frames fit a u32.
        Ok(self.monitor.resize(direction, (target / HUGE_SIZE) as u32, &self.drain, keep_waiting)?)
    }

    fn take_free(&self, target: u64) -> Result<Pass, MoveError> {
        Ok(self.monitor.shrink((target / HUGE_SIZE) as u32)?)
    }

    fn table(&self) -> Option<&Monitor> {
        Some(&self.monitor)
    }

    fn status(&self) -> ElasticStatus {
        ElasticStatus { kind: Table.kind().into(), driven: true, ..ElasticStatus::default() }
    }
}
