//! [`Way`]: a way of moving memory as it was chosen, and [`Elasticity`]: the same at work in a VM.

use super::error::{DeviceError, ElasticError, MoveError, ResizeError};
use super::offers::Need;
use crate::devices::irq::Notifier;
use crate::devices::mmio::Transport;
use llfree_base::choices::{Settings, Switch};
use llfree_base::units::Bytes;
use llfree_control::report::{ElasticKind, ElasticStatus};
use llfree_monitor::memory::{AddressMap, Backing, GuestRam};
use llfree_monitor::{Monitor, Resize};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// The VM that a way of moving memory is checked against.
pub struct Shape<'a> {
    /// What RAM is made of.
    pub backing: Backing,
    /// Where the guest sees it.
    pub map: &'a AddressMap,
    /// The huge frames that hold the guest's image.
    pub image: &'a Range<u32>,
}

/// What a way of moving memory is built from.
pub struct Parts<'a> {
    /// Guest RAM.
    pub ram: &'a Arc<GuestRam>,
    /// Its owner.
    pub monitor: &'a Arc<Monitor>,
    /// What a device calls beside its interrupt.
    pub notifier: Notifier,
    /// Wakes an idle guest, so that its drivers look at their devices.
    pub nudge: Box<dyn Fn() + Send + Sync>,
    /// Has an idle guest give its caches back, for a bounded time.
    pub drain: Box<dyn Fn() + Send + Sync>,
}

/// A way in which memory can move, before there is a machine.
pub trait Way {
    /// The kind, without its options.
    fn kind(&self) -> ElasticKind;

    /// Its name on the command line and in reports.
    fn name(&self) -> &'static str {
        self.kind().name()
    }

    /// What it needs of the guest.
    fn needs(&self) -> Need;

    /// Its options, as errors list them.
    fn options(&self) -> &'static str {
        "none"
    }

    /// Sets an option; false if it has none of that name.
    ///
    /// # Errors
    /// A value that the option does not take.
    fn set(&mut self, _name: &str, _value: &str) -> Result<bool, ElasticError> {
        Ok(false)
    }

    /// How often the guest's drivers are to run unasked.
    fn tick(&self) -> Option<Duration> {
        None
    }

    /// Whether the guest may take memory back that a shrink took, without asking.
    fn grows_unasked(&self) -> bool {
        false
    }

    /// The part of `memory` that the guest has from the start; a driver brings the rest.
    fn boot_bytes(&self, memory: Bytes) -> Bytes {
        memory
    }

    /// Whether a driver adds memory that the guest did not boot with.
    fn is_hot_plugged(&self) -> bool {
        false
    }

    /// What a Linux kernel's command line must say for this way to work well, unless it says something
    /// about that already.
    fn kernel_parameter(&self) -> Option<&'static str> {
        None
    }

    /// Whether Linux' driver can do this with `memory` of RAM.
    ///
    /// # Errors
    /// What it lacks, and what to choose instead.
    fn check_linux(&self, _memory: Bytes) -> Result<(), DeviceError> {
        Ok(())
    }

    /// How much of `memory` Linux' driver leaves unused.
    fn unusable_by_linux(&self, _memory: Bytes) -> Bytes {
        Bytes(0)
    }

    /// Prepares this way for automatic reclaim, asked for at launch; what is left to switch on then.
    ///
    /// # Errors
    /// That it can do nothing of the kind, or not with these settings.
    fn prepare_auto_reclaim(&mut self, settings: Settings) -> Result<Switch, ResizeError> {
        match self.needs() {
            Need::Table => Ok(Switch(Some(settings))),
            _ => Err(ResizeError::NoTable { what: "automatic reclaim", kind: self.name() }),
        }
    }

    /// Whether automatic reclaim can be switched so while the VM runs.
    ///
    /// # Errors
    /// Why not.
    fn check_switch(&self, switch: Switch) -> Result<(), ResizeError> {
        match self.needs() {
            Need::Table => Ok(()),
            _ if switch.0.is_none() => Ok(()),
            _ => Err(ResizeError::NoTable { what: "automatic reclaim", kind: self.name() }),
        }
    }

    /// Whether it can be in such a VM.
    ///
    /// # Errors
    /// What does not fit together.
    fn check(&self, _shape: &Shape<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Builds it.
    ///
    /// # Errors
    /// If the host has no events to give.
    fn build(&self, parts: Parts<'_>) -> Result<Arc<dyn Elasticity>, DeviceError>;
}

/// How a running VM's memory moves.
pub trait Elasticity: Send + Sync {
    /// What the guest may use, in bytes.
    fn limit(&self) -> u64;

    /// What the host wants beyond that, in bytes.
    fn wanted(&self) -> u64;

    /// Moves the limit to `target` bytes, a multiple of 2 MiB and at most RAM, in whichever direction
    /// that is. Goes on while `keep_waiting` says so, given the time since the start.
    ///
    /// # Errors
    /// A target that cannot be reached this way, or a kernel that refuses. Falling short is none.
    fn resize(&self, target: u64, keep_waiting: &dyn Fn(Duration) -> bool) -> Result<Resize, MoveError>;

    /// Whether a resize that began `elapsed` ago, and that nobody set a time for, should go on.
    fn is_moving(&self, _elapsed: Duration) -> bool {
        false
    }

    /// The owner of memory that is tracked frame by frame; `None` where it comes by touch.
    fn table(&self) -> Option<&Monitor> {
        None
    }

    /// The device that does it, if one does.
    fn transport(&self) -> Option<&Arc<Transport>> {
        None
    }

    /// Its numbers, for a status.
    fn status(&self) -> ElasticStatus;
}

/// The value of an option that is on or off.
pub(super) fn switch(value: &str) -> Result<bool, ElasticError> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        other => Err(ElasticError::Switch(llfree_base::units::shorten(other))),
    }
}
