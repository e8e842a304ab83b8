//! virtio-balloon, in pages or in 2 MiB blocks: its options, what it needs of a VM, and its accounting.

use super::device::{Books, ByDevice};
use super::error::{DeviceError, ElasticError, ResizeError};
use super::offers::Need;
use super::way::{Elasticity, Parts, Shape, Way, switch};
use crate::devices::balloon::{Balloon, BalloonConfig, BalloonControl};
use crate::devices::progress::Progress;
use llfree_base::choices::{Settings, Switch};
use llfree_base::units::{Bytes, parse_duration};
use llfree_control::report::{ElasticKind, ElasticStatus};
use llfree_monitor::memory::Backing;
use shared_layout::FRAME_SIZE;
use std::sync::Arc;
use std::time::Duration;

/// How often to ask a balloon's guest for statistics, by default.
const DEFAULT_STATS: Duration = Duration::from_secs(2);
/// The delay of free-page reporting, the same as Linux's.
const REPORTING_DELAY: Duration = Duration::from_secs(2);

impl BalloonConfig {
    /// The balloon that suits an unmodified Linux: it reports free pages, and takes pages back when
    /// it runs out of memory.
    pub const FOR_LINUX: Self = Self { deflate_on_oom: true, reporting: Some(true), ..Self::plain(false) };

    /// A balloon as it is without options.
    #[must_use]
    pub const fn plain(huge: bool) -> Self {
        Self { huge, deflate_on_oom: false, reporting: None, coalesce: true, stats: Some(DEFAULT_STATS) }
    }
}

impl Way for BalloonConfig {
    fn kind(&self) -> ElasticKind {
        if self.huge { ElasticKind::BalloonHuge } else { ElasticKind::Balloon }
    }

    fn needs(&self) -> Need {
        if self.huge { Need::HugeBalloon } else { Need::Balloon }
    }

    fn options(&self) -> &'static str {
        "coalesce=on|off, deflate-on-oom=on|off, reporting=on|off and stats=TIME|off"
    }

    fn set(&mut self, name: &str, value: &str) -> Result<bool, ElasticError> {
        match name {
            "deflate-on-oom" => self.deflate_on_oom = switch(value)?,
            "coalesce" => self.coalesce = switch(value)?,
            "reporting" => self.reporting = Some(switch(value)?),
            "stats" if value == "off" => self.stats = None,
            "stats" => {
                let time = parse_duration(value).map_err(|error| ElasticError::Stats(error.to_string()))?;
                if time < Duration::from_millis(10) {
                    return Err(ElasticError::Stats("too short".to_owned()));
                }
                self.stats = Some(time);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn tick(&self) -> Option<Duration> {
        (self.reporting == Some(true)).then_some(REPORTING_DELAY)
    }

    fn grows_unasked(&self) -> bool {
        self.deflate_on_oom
    }

    fn prepare_auto_reclaim(&mut self, settings: Settings) -> Result<Switch, ResizeError> {
        if self.reporting == Some(false) {
            return Err(ResizeError::ReportingContradicted);
        }
        if settings != Settings::default() {
            return Err(ResizeError::ReportingHasNoSettings);
        }
        // The guest reports free pages on its own, so there is nothing left for the host to switch.
        self.reporting = Some(true);
        Ok(Switch(None))
    }

    fn check_switch(&self, switch: Switch) -> Result<(), ResizeError> {
        // Switching it off would report it as off while the guest goes on reporting.
        if switch.0.is_some() || self.reporting == Some(true) {
            return Err(ResizeError::ReportingAtLaunch);
        }
        Ok(())
    }

    fn check(&self, shape: &Shape<'_>) -> Result<(), DeviceError> {
        if !self.huge && shape.backing == Backing::Hugetlb {
            return Err(DeviceError::SmallPagesOfHugetlb);
        }
        // Page numbers count guest-physical addresses, holes included.
        if u32::try_from(shape.map.end() / FRAME_SIZE).is_err() {
            return Err(DeviceError::TooManyPages(Bytes(shape.map.bytes())));
        }
        Ok(())
    }

    fn build(&self, parts: Parts<'_>) -> Result<Arc<dyn Elasticity>, DeviceError> {
        let control = Arc::new(BalloonControl::default());
        let device = Box::new(Balloon::new(*self, parts.ram.clone(), control.clone()));
        Ok(ByDevice::build(self.kind(), control, device, parts)?)
    }
}

impl Books for BalloonControl {
    fn limit(&self, memory: u64) -> u64 {
        memory.saturating_sub(self.inflated_bytes())
    }

    fn target(&self, memory: u64) -> u64 {
        memory.saturating_sub(u64::from(self.target_pages()) * FRAME_SIZE)
    }

    fn set_target(&self, memory: u64, target: u64) -> Result<(), ResizeError> {
        // At most RAM, whose pages were counted at the start.
        BalloonControl::set_target(self, ((memory - target) / FRAME_SIZE) as u32);
        Ok(())
    }

    fn progress(&self) -> &Progress {
        &self.progress
    }

    fn describe(&self, status: &mut ElasticStatus) {
        status.balloon = Some(self.status());
    }
}
