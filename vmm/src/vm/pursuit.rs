//! Pursuing the limit that the VM is to have, from the resize that did not reach it on.
//!
//! A target stands until the VM has it or another resize replaces it. Whoever carries out resizes looks
//! again now and then ([`Vm::look_again`]); what a device's driver moves it moves by itself, and this only
//! notices.

use super::target::Target;
use super::{Vm, VmError};
use llfree_base::lock;
use llfree_monitor::{Direction, Pass};
use std::time::Instant;

/// What a look at a target came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// It is reached, and no longer pursued.
    Reached(Target),
    /// Some way.
    Closer(Pass),
    /// Nothing has changed.
    Same,
    /// There is no target.
    None,
}

impl Vm {
    /// Pursues a limit from now on, instead of any other.
    pub fn pursue(&self, bytes: u64, direction: Direction) {
        *lock(&self.pursuit.0) = Some(Target { bytes, direction, since: Instant::now() });
    }

    /// Pursues nothing any more.
    pub fn stop_pursuing(&self) {
        *lock(&self.pursuit.0) = None;
    }

    /// The limit that is pursued.
    #[must_use]
    pub fn target(&self) -> Option<Target> {
        *lock(&self.pursuit.0)
    }

    /// Looks whether the target can be approached now, and takes what the guest has freed. Never waits for the
    /// guest.
    ///
    /// # Errors
    /// A discard that the kernel refused; the target stands.
    pub fn look_again(&self) -> Result<Step, VmError> {
        let Some(target) = self.target() else { return Ok(Step::None) };
        let pass = match target.direction {
            Direction::Shrink if !target.is_reached(self.limit()) => self.elastic.take_free(target.bytes)?,
            _ => Pass::default(),
        };
        if pass.frames > 0 {
            self.settle_cgroup();
        }
        if target.is_reached(self.limit()) {
            self.stop_pursuing();
            return Ok(Step::Reached(target));
        }
        Ok(if pass.frames > 0 { Step::Closer(pass) } else { Step::Same })
    }
}
