//! Memory that never moves: the guest keeps all of it, and every resize is refused.

use super::error::{DeviceError, MoveError, ResizeError};
use super::offers::Need;
use super::way::{Elasticity, Parts, Way};
use llfree_control::report::{ElasticKind, ElasticStatus};
use llfree_monitor::{Direction, Resize};
use std::sync::Arc;
use std::time::Duration;

/// The choice of fixed memory; it has no options.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fixed;

impl Way for Fixed {
    fn kind(&self) -> ElasticKind {
        ElasticKind::None
    }

    fn needs(&self) -> Need {
        Need::Nothing
    }

    fn build(&self, parts: Parts<'_>) -> Result<Arc<dyn Elasticity>, DeviceError> {
        Ok(Arc::new(Unmoved { memory: parts.ram.bytes() }))
    }
}

struct Unmoved {
    memory: u64,
}

impl Elasticity for Unmoved {
    fn limit(&self) -> u64 {
        self.memory
    }

    fn wanted(&self) -> u64 {
        0
    }

    fn resize(&self, _: Direction, _: u64, _: &dyn Fn(Duration) -> bool) -> Result<Resize, MoveError> {
        Err(ResizeError::NotElastic.into())
    }

    fn status(&self) -> ElasticStatus {
        ElasticStatus { kind: Fixed.kind().into(), ..ElasticStatus::default() }
    }
}
