//! Pause and resume as the protocol defines them, and what a status says about them.

use super::report::{micros, millis};
use crate::vm::{LifeChange, Vm, VmError};
use llfree_control::report::{Event, LifeReport, VmState};

/// A change to the VM's life that a client asks for, short of stopping it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Change {
    /// Pause.
    Pause,
    /// Resume.
    Resume,
}

/// What the thread of pauses does.
#[derive(Clone, Copy, Debug)]
pub(super) enum LifeJob {
    /// A pause or a resume.
    Change(Change),
    /// A press of the power button.
    PowerButton,
}

impl Change {
    /// What has happened then.
    pub(super) const fn event(self) -> Event {
        match self {
            Self::Pause => Event::Paused,
            Self::Resume => Event::Resumed,
        }
    }
}

/// Pauses the VM, or resumes it.
pub(super) fn change(vm: &Vm, change: Change) -> Result<LifeReport, VmError> {
    let report = |state: VmState, change: LifeChange| LifeReport {
        state: state.into(),
        changed: change.changed,
        duration_us: micros(change.duration),
        paused_ms: change.paused_for.map(millis),
    };
    match change {
        Change::Pause => Ok(report(VmState::Paused, vm.pause()?)),
        Change::Resume => Ok(report(VmState::Running, vm.resume()?)),
    }
}
