//! [`Way`]: a way of moving memory as configured, and [`Elasticity`]: the same in a running VM.

use super::error::{DeviceError, ElasticError, MoveError, ResizeError};
use super::offers::Need;
use crate::boot::Platform;
use crate::devices::irq::Notifier;
use crate::devices::mmio::Transport;
use llfree_base::choices::{Settings, Switch};
use llfree_base::units::Bytes;
use llfree_control::report::{ElasticKind, ElasticStatus};
use llfree_monitor::memory::{AddressMap, Backing, GuestRam};
use llfree_monitor::{Direction, Monitor, Pass, Resize};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// The VM that a way of moving memory is checked against.
pub struct Shape<'a> {
    /// What backs RAM.
    pub backing: Backing,
    /// Where the guest sees RAM.
    pub map: &'a AddressMap,
    /// The huge frames that hold the guest's image.
    pub image: &'a Range<u32>,
}

/// What a way of moving memory is built from.
pub struct Parts<'a> {
    /// Guest RAM.
    pub ram: &'a Arc<GuestRam>,
    /// The owner of guest RAM.
    pub monitor: &'a Arc<Monitor>,
    /// What a device calls in addition to its interrupt.
    pub notifier: Notifier,
    /// Wakes an idle guest, so that its drivers look at their devices.
    pub nudge: Box<dyn Fn() + Send + Sync>,
    /// The region shared with the guest, where a guest with an allocator of its own has words.
    pub words: Arc<Platform>,
    /// Makes an idle guest give its caches back; returns after a bounded time.
    pub drain: Box<dyn Fn() + Send + Sync>,
}

/// A way of moving memory, before there is a machine.
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

    /// How often the guest's drivers should run without being notified; `None` if they need not.
    fn tick(&self) -> Option<Duration> {
        None
    }

    /// Whether the guest may take back, without asking, memory that a shrink took.
    fn grows_unasked(&self) -> bool {
        false
    }

    /// Whether a guest that is about to kill for want of memory gets held frames back.
    fn grows_on_need(&self) -> bool {
        false
    }

    /// Whether all frames have memory from the start.
    fn starts_installed(&self) -> bool {
        false
    }

    /// Whether it may turn out that the guest's memory moves by a device, though the table is offered to it.
    fn may_leave_table(&self) -> bool {
        false
    }

    /// Whether it comes with a device.
    fn has_device(&self) -> bool {
        !matches!(self.needs(), Need::Nothing | Need::Table)
    }

    /// The part of `memory` that the guest boots with; a driver adds the rest.
    fn boot_bytes(&self, memory: Bytes) -> Bytes {
        memory
    }

    /// Whether a driver adds memory that the guest did not boot with.
    fn is_hot_plugged(&self) -> bool {
        false
    }

    /// The parameter that a Linux kernel's command line needs for this way to work well, unless the user
    /// set it already.
    fn kernel_parameter(&self) -> Option<&'static str> {
        None
    }

    /// Checks that Linux's driver can work with `memory` of RAM.
    ///
    /// # Errors
    /// What it lacks, and what to choose instead.
    fn check_linux(&self, _memory: Bytes) -> Result<(), DeviceError> {
        Ok(())
    }

    /// How much of `memory` Linux's driver leaves unused.
    fn unusable_by_linux(&self, _memory: Bytes) -> Bytes {
        Bytes(0)
    }

    /// Prepares this way for automatic reclaim requested at launch. Returns what is left to switch on
    /// once the VM runs.
    ///
    /// # Errors
    /// A way without automatic reclaim, or one that does not take these settings.
    fn prepare_auto_reclaim(&mut self, settings: Settings) -> Result<Switch, ResizeError> {
        match self.needs() {
            Need::Table => Ok(Switch(Some(settings))),
            _ => Err(ResizeError::NoTable { what: "automatic reclaim", kind: self.name() }),
        }
    }

    /// Checks that automatic reclaim can be switched like this while the VM runs.
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

    /// Checks that a VM of this shape can have it.
    ///
    /// # Errors
    /// The first thing that does not fit.
    fn check(&self, _shape: &Shape<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Builds it for a VM.
    ///
    /// # Errors
    /// The host cannot create events.
    fn build(&self, parts: Parts<'_>) -> Result<Arc<dyn Elasticity>, DeviceError>;
}

/// How a running VM's memory moves. Sizes are in bytes.
pub trait Elasticity: Send + Sync {
    /// The memory that the guest may use.
    fn limit(&self) -> u64;

    /// How much of that the host still wants back.
    fn wanted(&self) -> u64;

    /// The way at work, given the one that was chosen at launch: another one if that left it to the guest.
    fn way<'a>(&'a self, chosen: &'a dyn Way) -> &'a dyn Way {
        chosen
    }

    /// Moves the limit to `target`, a multiple of 2 MiB and at most RAM. Goes on while
    /// `keep_waiting` says so, given the time since the start.
    ///
    /// # Errors
    /// A target that cannot be reached this way, or a refusal by the kernel. Falling short is not an error.
    fn resize(
        &self,
        direction: Direction,
        target: u64,
        keep_waiting: &dyn Fn(Duration) -> bool,
    ) -> Result<Resize, MoveError>;

    /// Lowers the limit to `target` like [`resize`](Self::resize), even if that takes what the guest asks to be left. A
    /// device's driver decides by itself what it gives.
    ///
    /// # Errors
    /// As [`resize`](Self::resize).
    fn shrink_by_force(&self, target: u64, keep_waiting: &dyn Fn(Duration) -> bool) -> Result<Resize, MoveError> {
        self.resize(Direction::Shrink, target, keep_waiting)
    }

    /// Takes what is free now, down to a limit of `target`: a look at a resize that fell short. A device's driver
    /// goes on by itself, so there is nothing to take.
    ///
    /// # Errors
    /// A refusal by the kernel.
    fn take_free(&self, _target: u64) -> Result<Pass, MoveError> {
        Ok(Pass::default())
    }

    /// Whether a resize without a deadline that began `elapsed` ago should go on.
    fn is_moving(&self, _elapsed: Duration) -> bool {
        false
    }

    /// The owner of memory that is tracked frame by frame; `None` where frames get memory on first touch.
    fn table(&self) -> Option<&Monitor> {
        None
    }

    /// The device that moves memory, if there is one.
    fn transport(&self) -> Option<&Arc<Transport>> {
        None
    }

    /// The numbers for a status.
    fn status(&self) -> ElasticStatus;
}

/// Parses the value of an option that is on or off.
pub(super) fn switch(value: &str) -> Result<bool, ElasticError> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        other => Err(ElasticError::Switch(llfree_base::units::shorten(other))),
    }
}
