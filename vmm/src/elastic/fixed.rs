//! Memory that stays as it is.

use super::error::{DeviceError, MoveError, ResizeError};
use super::offers::Need;
use super::way::{Elasticity, Parts, Way};
use llfree_control::report::ElasticStatus;
use llfree_monitor::Resize;
use std::sync::Arc;
use std::time::Duration;

/// The choice of it; it has no options.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fixed;

impl Way for Fixed {
    fn name(&self) -> &'static str {
        "none"
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

    fn resize(&self, _: u64, _: &dyn Fn(Duration) -> bool) -> Result<Resize, MoveError> {
        Err(ResizeError::NotElastic.into())
    }

    fn status(&self) -> ElasticStatus {
        ElasticStatus { kind: Fixed.name().to_owned(), ..ElasticStatus::default() }
    }
}
