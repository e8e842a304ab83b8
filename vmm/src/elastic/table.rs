//! The shared table: the host takes free frames out of it without any code running in the guest.

use super::error::{DeviceError, ElasticError, MoveError};
use super::offers::Need;
use super::way::{Elasticity, Parts, Way, switch};
use crate::boot::Platform;
use guest_abi::GuestWord;
use llfree_base::units::shorten;
use llfree_control::report::{ElasticKind, ElasticStatus, HandOver, TableStatus};
use llfree_monitor::{self as monitor, Direction, Monitor, Pass, Resize};
use shared_layout::{FRAME_SIZE, HUGE_SIZE};
use std::sync::Arc;
use std::time::Duration;

/// The choice of the shared table.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Table {
    /// Whether a guest that is about to kill for want of memory gets held frames back: the limit is then what
    /// it makes of it.
    pub grow_on_need: bool,
    /// Whether all frames have memory from the start: a device that reaches memory by itself finds none without.
    pub starts_installed: bool,
}

impl Table {
    /// The guest never exceeds its limit, and starts without memory.
    pub const STRICT: Self = Self { grow_on_need: false, starts_installed: false };
}

impl Way for Table {
    fn kind(&self) -> ElasticKind {
        ElasticKind::Llfree
    }

    fn needs(&self) -> Need {
        Need::Table
    }

    fn options(&self) -> &'static str {
        "grow-on-need=on|off and start=evicted|installed"
    }

    fn set(&mut self, name: &str, value: &str) -> Result<bool, ElasticError> {
        match name {
            "grow-on-need" => self.grow_on_need = switch(value)?,
            "start" => {
                self.starts_installed = match value {
                    "installed" => true,
                    "evicted" => false,
                    other => return Err(ElasticError::Start(shorten(other))),
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn grows_unasked(&self) -> bool {
        self.grow_on_need
    }

    fn grows_on_need(&self) -> bool {
        self.grow_on_need
    }

    fn starts_installed(&self) -> bool {
        self.starts_installed
    }

    fn build(&self, parts: Parts<'_>) -> Result<Arc<dyn Elasticity>, DeviceError> {
        Ok(Arc::new(ByTable::new(parts.monitor.clone(), parts.words, parts.drain)))
    }
}

/// Frames that are free in the table, and those that are held.
pub(super) struct ByTable {
    monitor: Arc<Monitor>,
    words: Arc<Platform>,
    drain: Box<dyn Fn() + Send + Sync>,
}

impl ByTable {
    pub(super) fn new(monitor: Arc<Monitor>, words: Arc<Platform>, drain: Box<dyn Fn() + Send + Sync>) -> Self {
        Self { monitor, words, drain }
    }

    /// What a guest with an allocator of its own says, in units of `unit` bytes; at most RAM.
    fn said(&self, word: GuestWord, unit: u64) -> u64 {
        let memory = u64::from(self.monitor.huge_frames()) * HUGE_SIZE;
        self.words.guest_word(word).saturating_mul(unit).min(memory)
    }
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

    fn shrink_by_force(&self, target: u64, keep_waiting: &dyn Fn(Duration) -> bool) -> Result<Resize, MoveError> {
        Ok(self.monitor.resize_by_force((target / HUGE_SIZE) as u32, &self.drain, keep_waiting)?)
    }

    fn take_free(&self, target: u64) -> Result<Pass, MoveError> {
        Ok(self.monitor.shrink((target / HUGE_SIZE) as u32)?)
    }

    fn table(&self) -> Option<&Monitor> {
        Some(&self.monitor)
    }

    fn status(&self) -> ElasticStatus {
        let hand_over = match self.monitor.handed_over() {
            monitor::HandOver::Booting | monitor::HandOver::ToDevice => HandOver::Booting,
            monitor::HandOver::ByTouch => HandOver::ByTouch,
            monitor::HandOver::Complete => HandOver::Complete,
        };
        let table = self.monitor.has_terms().then(|| TableStatus {
            hand_over: hand_over.into(),
            floor_bytes: self.said(GuestWord::Floor, HUGE_SIZE),
            fragmented_bytes: self.said(GuestWord::FragmentedFrames, FRAME_SIZE),
            set_aside_bytes: self.said(GuestWord::SetAside, HUGE_SIZE),
        });
        let driven = hand_over != HandOver::Booting;
        ElasticStatus { kind: ElasticKind::Llfree.into(), driven, table, ..ElasticStatus::default() }
    }
}
