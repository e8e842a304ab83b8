//! The shared table and a balloon, both offered: the default for Linux, as nobody knows before its boot whether a kernel
//! shares its free memory.
//!
//! | first | then |
//! |---|---|
//! | the kernel says Hello | the table serves, and there is no balloon: its device reads as an empty place |
//! | the balloon's driver is ready | the balloon serves; a Hello is refused |
//! | neither | limits wait for whoever comes |
//!
//! The [monitor](Monitor) decides, by one compare-and-exchange, and for good. A kernel that has both says Hello long before
//! it looks for devices, so its driver finds none. Pages that a balloon takes or that are reported to it go past the table,
//! so both at once is what must not be; memory that comes by touch, which is how all of them boot, suits both.

use super::device::ByDevice;
use super::error::{DeviceError, MoveError};
use super::offers::Need;
use super::table::{ByTable, Table};
use super::way::{Elasticity, Parts, Shape, Way};
use crate::devices::balloon::{Balloon, BalloonConfig, BalloonControl};
use crate::devices::mmio::Transport;
use llfree_control::report::{ChosenBy, ElasticKind, ElasticStatus};
use llfree_monitor::{Direction, HandOver, Monitor, Pass, Resize};
use shared_layout::HUGE_SIZE;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often a resize looks whether somebody has come.
const LOOK: Duration = Duration::from_millis(20);

/// The table and a balloon, both offered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Either {
    /// What serves a guest with the table.
    pub table: Table,
    /// What serves one without.
    pub balloon: BalloonConfig,
}

impl Either {
    /// What suits a Linux of which nothing is known.
    pub const FOR_LINUX: Self = Self { table: Table::STRICT, balloon: BalloonConfig::FOR_LINUX };
}

impl Way for Either {
    fn kind(&self) -> ElasticKind {
        ElasticKind::Undecided
    }

    fn needs(&self) -> Need {
        // A guest without it has the balloon.
        Need::Table
    }

    fn may_leave_table(&self) -> bool {
        true
    }

    fn has_device(&self) -> bool {
        true
    }

    fn tick(&self) -> Option<Duration> {
        self.balloon.tick()
    }

    fn grows_unasked(&self) -> bool {
        self.balloon.grows_unasked()
    }

    fn grows_on_need(&self) -> bool {
        self.table.grows_on_need()
    }

    fn check(&self, shape: &Shape<'_>) -> Result<(), DeviceError> {
        self.table.check(shape)?;
        self.balloon.check(shape)
    }

    fn build(&self, parts: Parts<'_>) -> Result<Arc<dyn Elasticity>, DeviceError> {
        let monitor = parts.monitor.clone();
        let table = ByTable::new(monitor.clone(), parts.words.clone(), parts.drain);
        let parts = Parts { drain: Box::new(|| ()), ..parts };
        let control = Arc::new(BalloonControl::default());
        let device = Balloon::new(self.balloon, parts.ram.clone(), control.clone()).instead_of_table(monitor.clone());
        let balloon = ByDevice::build(self.balloon.kind(), control, Box::new(device), parts)?;
        Ok(Arc::new(ByEither { ways: *self, monitor, table, balloon }))
    }
}

struct ByEither {
    ways: Either,
    monitor: Arc<Monitor>,
    table: ByTable,
    balloon: Arc<ByDevice>,
}

/// Who came first.
#[derive(Clone, Copy, PartialEq, Eq)]
enum First {
    Nobody,
    Hello,
    Driver,
}

impl ByEither {
    fn first(&self) -> First {
        match self.monitor.handed_over() {
            HandOver::Booting => First::Nobody,
            HandOver::ByTouch | HandOver::Complete => First::Hello,
            HandOver::ToDevice => First::Driver,
        }
    }

    /// What serves by now.
    fn at_work(&self) -> Option<&dyn Elasticity> {
        match self.first() {
            First::Nobody => None,
            First::Hello => Some(&self.table),
            First::Driver => Some(&*self.balloon),
        }
    }

    /// What is to carry out a resize: waits for it while `keep_waiting`, given the time since the start. A balloon's driver
    /// that comes later finds the target there; for the table it is whoever pursues the target that looks again.
    fn who_resizes(
        &self,
        target: u64,
        keep_waiting: &dyn Fn(Duration) -> bool,
    ) -> Result<Option<&dyn Elasticity>, MoveError> {
        let start = Instant::now();
        loop {
            if let Some(at_work) = self.at_work() {
                return Ok(Some(at_work));
            }
            self.balloon.ask_for(target)?;
            // All is the guest's as yet.
            if self.limit() == target || !keep_waiting(start.elapsed()) {
                return Ok(None);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Has a resize carried out by what serves, as soon as that is known; the wait for it counts as one of the resize.
    fn once_decided(
        &self,
        target: u64,
        keep_waiting: &dyn Fn(Duration) -> bool,
        resize: impl FnOnce(&dyn Elasticity, &dyn Fn(Duration) -> bool) -> Result<Resize, MoveError>,
    ) -> Result<Resize, MoveError> {
        let start = Instant::now();
        let Some(at_work) = self.who_resizes(target, keep_waiting)? else {
            return Ok(self.nothing_moved(target, start.elapsed()));
        };
        let before = start.elapsed();
        let resize = resize(at_work, &|elapsed| keep_waiting(before + elapsed))?;
        Ok(Resize { waited: resize.waited + before, ..resize })
    }

    /// A resize that nobody has carried out as yet.
    fn nothing_moved(&self, target: u64, waited: Duration) -> Resize {
        Resize { target, actual: self.limit(), pass: Pass::default(), duration: Duration::ZERO, waited }
    }
}

impl Elasticity for ByEither {
    fn limit(&self) -> u64 {
        self.at_work().map_or(u64::from(self.monitor.huge_frames()) * HUGE_SIZE, Elasticity::limit)
    }

    fn wanted(&self) -> u64 {
        self.at_work().unwrap_or(&*self.balloon).wanted()
    }

    fn way<'a>(&'a self, chosen: &'a dyn Way) -> &'a dyn Way {
        match self.first() {
            First::Nobody => chosen,
            First::Hello => &self.ways.table,
            First::Driver => &self.ways.balloon,
        }
    }

    fn resize(
        &self,
        direction: Direction,
        target: u64,
        keep_waiting: &dyn Fn(Duration) -> bool,
    ) -> Result<Resize, MoveError> {
        self.once_decided(target, keep_waiting, |at_work, keep_waiting| at_work.resize(direction, target, keep_waiting))
    }

    fn shrink_by_force(&self, target: u64, keep_waiting: &dyn Fn(Duration) -> bool) -> Result<Resize, MoveError> {
        self.once_decided(target, keep_waiting, |at_work, keep_waiting| at_work.shrink_by_force(target, keep_waiting))
    }

    fn take_free(&self, target: u64) -> Result<Pass, MoveError> {
        self.at_work().map_or_else(|| Ok(Pass::default()), |at_work| at_work.take_free(target))
    }

    fn is_moving(&self, elapsed: Duration) -> bool {
        self.at_work().is_some_and(|at_work| at_work.is_moving(elapsed))
    }

    fn table(&self) -> Option<&Monitor> {
        (self.first() != First::Driver).then_some(&*self.monitor)
    }

    fn transport(&self) -> Option<&Arc<Transport>> {
        self.balloon.transport()
    }

    fn status(&self) -> ElasticStatus {
        let first = self.first();
        let chosen_by = match first {
            First::Nobody => ChosenBy::Nobody,
            First::Hello => ChosenBy::Hello,
            First::Driver => ChosenBy::Driver,
        };
        let status = match first {
            First::Nobody => ElasticStatus { kind: ElasticKind::Undecided.into(), ..ElasticStatus::default() },
            First::Hello => self.table.status(),
            First::Driver => self.balloon.status(),
        };
        ElasticStatus { chosen_by: chosen_by.into(), ..status }
    }
}
