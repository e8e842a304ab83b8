//! How a VM's memory is made smaller and larger: by the shared table, by a device, or not at all.
//!
//! [`Elastic`] is what people choose (`--elastic`), [`ElasticDevice`] the device that a VM then has,
//! with the host's end of it: set a target, tell the driver, watch the device's own books until they
//! say that it was reached. With a device nobody tracks residency: the guest's frames get memory
//! when they are touched, and all that is known is what the driver gave away.

mod error;
mod linux;

pub use error::{DeviceError, ElasticError, ResizeError};
pub use linux::MEMORY_BLOCK;

use crate::devices::balloon::{Balloon, BalloonConfig, BalloonControl};
use crate::devices::irq::Notifier;
use crate::devices::mem::{Mem, MemControl};
use crate::devices::mmio::Transport;
use crate::devices::progress::Progress;
use llfree_base::units::{Bytes, parse_duration, parse_memory};
use llfree_control::report::ElasticStatus;
use llfree_monitor::memory::{Backing, GuestRam};
use shared_layout::{FRAME_SIZE, HUGE_SIZE};
use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The part of RAM that virtio-mem leaves alone, by default.
const DEFAULT_BOOT: Bytes = Bytes(256 << 20);
/// How often to ask a balloon's guest for statistics, by default.
const DEFAULT_STATS: Duration = Duration::from_secs(2);
const REPORTING_DELAY: Duration = Duration::from_secs(2);
/// How often virtio-mem's driver looks whether it can do now what it could not do before.
const UNPLUG_RETRY: Duration = Duration::from_secs(1);
/// How often virtio-mem's driver is told again while somebody waits: Linux writes two lines to its log
/// each time.
const TELL_AGAIN: Duration = Duration::from_secs(3);
/// Without a step for so long, a resize that nobody set a time for is over.
const GIVE_UP: Duration = Duration::from_secs(2);
/// While nothing moves, the driver is told again: it may have given up before memory became free.
const NUDGE: Duration = Duration::from_millis(50);

/// How a VM's memory is made smaller and larger.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Elastic {
    /// The host takes free frames out of the table that it shares with the guest.
    #[default]
    Llfree,
    /// virtio-balloon.
    Balloon(BalloonConfig),
    /// virtio-mem.
    Mem {
        /// The first part of RAM, which stays the guest's.
        boot: Bytes,
    },
    /// Not at all.
    None,
}

impl Elastic {
    /// The kind's name on the command line and in reports.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Llfree => "llfree",
            Self::Balloon(BalloonConfig { huge: false, .. }) => "balloon",
            Self::Balloon(BalloonConfig { huge: true, .. }) => "balloon-huge",
            Self::Mem { .. } => "virtio-mem",
            Self::None => "none",
        }
    }

    /// A balloon as it is without options.
    #[must_use]
    pub const fn balloon(huge: bool) -> Self {
        let stats = Some(DEFAULT_STATS);
        Self::Balloon(BalloonConfig { huge, deflate_on_oom: false, reporting: None, coalesce: true, stats })
    }

    /// virtio-mem as it is without options.
    #[must_use]
    pub const fn virtio_mem() -> Self {
        Self::Mem { boot: DEFAULT_BOOT }
    }

    /// How often the guest's drivers are to run unasked: the delay of free-page reporting, as long as
    /// Linux' is.
    #[must_use]
    pub fn tick(&self) -> Option<Duration> {
        match self {
            Self::Balloon(BalloonConfig { reporting: Some(true), .. }) => Some(REPORTING_DELAY),
            // Nobody tells its driver when a block that it could not unplug comes free.
            Self::Mem { .. } => Some(UNPLUG_RETRY),
            _ => None,
        }
    }

    /// Whether the guest may take memory back that a shrink took, without asking.
    #[must_use]
    pub const fn grows_unasked(&self) -> bool {
        matches!(self, Self::Balloon(BalloonConfig { deflate_on_oom: true, .. }))
    }

    /// The huge frames of `memory` bytes of RAM that a driver must bring to the guest first.
    #[must_use]
    pub fn kept_back(&self, memory: u64) -> Range<u32> {
        match self {
            // RAM has at most 2^25 huge frames.
            Self::Mem { boot } => (boot.0 / HUGE_SIZE) as u32..(memory / HUGE_SIZE) as u32,
            _ => 0..0,
        }
    }

    fn set(&mut self, option: &str) -> Result<(), ElasticError> {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let kind = self.name();
        let no = |has| Err(ElasticError::Option { option: llfree_base::units::shorten(option), kind, has });
        match self {
            Self::Balloon(config) => match name {
                "deflate-on-oom" => config.deflate_on_oom = switch(value)?,
                "coalesce" => config.coalesce = switch(value)?,
                "reporting" => config.reporting = Some(switch(value)?),
                "stats" if value == "off" => config.stats = None,
                "stats" => {
                    let time = parse_duration(value).map_err(|error| ElasticError::Stats(error.to_string()))?;
                    if time < Duration::from_millis(10) {
                        return Err(ElasticError::Stats("too short".to_owned()));
                    }
                    config.stats = Some(time);
                }
                _ => return no("coalesce=on|off, deflate-on-oom=on|off, reporting=on|off and stats=TIME|off"),
            },
            Self::Mem { boot } => match name {
                "boot" => *boot = parse_memory(value).map_err(|error| ElasticError::Boot(error.to_string()))?,
                _ => return no("boot=SIZE"),
            },
            Self::Llfree | Self::None => return no("none"),
        }
        Ok(())
    }
}

fn switch(value: &str) -> Result<bool, ElasticError> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        other => Err(ElasticError::Switch(llfree_base::units::shorten(other))),
    }
}

impl FromStr for Elastic {
    type Err = ElasticError;

    fn from_str(text: &str) -> Result<Self, ElasticError> {
        let mut parts = text.split(',');
        let kind = parts.next().unwrap_or_default();
        let mut elastic = match kind {
            "llfree" => Self::Llfree,
            "balloon" => Self::balloon(false),
            "balloon-huge" => Self::balloon(true),
            "virtio-mem" => Self::virtio_mem(),
            "none" => Self::None,
            other => return Err(ElasticError::Kind(llfree_base::units::shorten(other))),
        };
        let mut seen: Vec<&str> = Vec::new();
        for option in parts {
            elastic.set(option)?;
            // There are few, or the line above had refused one.
            let name = option.split('=').next().unwrap_or_default();
            if seen.contains(&name) {
                return Err(ElasticError::Twice(name.to_owned()));
            }
            seen.push(name);
        }
        Ok(elastic)
    }
}

impl fmt::Display for Elastic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

enum Control {
    Balloon(Arc<BalloonControl>),
    Mem(Arc<MemControl>),
}

/// The device by which a VM's memory is made smaller and larger.
pub struct ElasticDevice {
    control: Control,
    transport: Arc<Transport>,
    memory: u64,
}

impl ElasticDevice {
    /// The device that `elastic` wants, if it wants one. `image` is where the guest's image lies, in
    /// huge frames.
    ///
    /// # Errors
    /// What does not fit together, or a host without events.
    pub fn new(
        elastic: &Elastic,
        ram: &Arc<GuestRam>,
        image: &Range<u32>,
        notifier: Notifier,
    ) -> Result<Option<Self>, DeviceError> {
        let memory = ram.bytes();
        let (control, device): (_, Box<dyn crate::devices::VirtioDevice>) = match *elastic {
            Elastic::Llfree | Elastic::None => return Ok(None),
            Elastic::Balloon(config) => {
                if !config.huge && ram.backing() == Backing::Hugetlb {
                    return Err(DeviceError::SmallPagesOfHugetlb);
                }
                // Page numbers count guest-physical addresses, holes included.
                if u32::try_from(ram.map().end() / FRAME_SIZE).is_err() {
                    return Err(DeviceError::TooManyPages(Bytes(memory)));
                }
                let control = Arc::new(BalloonControl::default());
                let device = Balloon::new(config, ram.clone(), control.clone());
                (Control::Balloon(control), Box::new(device))
            }
            Elastic::Mem { boot } => {
                let end = Bytes(u64::from(image.end) * HUGE_SIZE);
                if boot.0 >= memory {
                    return Err(DeviceError::BootTooLarge { boot, memory: Bytes(memory) });
                }
                if boot < end {
                    return Err(DeviceError::BootTooSmall { end, boot });
                }
                if ram.map().contiguous(boot.0, memory - boot.0).is_none() {
                    return Err(DeviceError::RegionInParts { boot });
                }
                let control = Arc::new(MemControl::new(memory, boot.0));
                (Control::Mem(control.clone()), Box::new(Mem::new(ram.clone(), control)))
            }
        };
        let transport = Arc::new(Transport::new(device, ram.clone(), notifier).map_err(DeviceError::Host)?);
        Ok(Some(Self { control, transport, memory }))
    }

    /// Its registers and queues.
    #[must_use]
    pub fn transport(&self) -> &Arc<Transport> {
        &self.transport
    }

    /// What the guest may use, in bytes: all of RAM but what its driver gave away.
    #[must_use]
    pub fn limit(&self) -> u64 {
        match &self.control {
            Control::Balloon(balloon) => self.memory.saturating_sub(balloon.inflated_bytes()),
            Control::Mem(mem) => mem.boot_bytes() + mem.plugged_bytes(),
        }
    }

    /// What the host wants beyond that, in bytes.
    #[must_use]
    pub fn wanted(&self) -> u64 {
        let target = match &self.control {
            Control::Balloon(balloon) => self.memory.saturating_sub(u64::from(balloon.target_pages()) * FRAME_SIZE),
            Control::Mem(mem) => mem.boot_bytes() + mem.requested_bytes(),
        };
        self.limit().saturating_sub(target)
    }

    /// Since the last step of the driver.
    #[must_use]
    pub fn idle(&self) -> Duration {
        self.progress().last().1.elapsed()
    }

    /// Whether a resize that began `elapsed` ago, and that nobody set a time for, should go on.
    #[must_use]
    pub fn is_moving(&self, elapsed: Duration) -> bool {
        self.idle().min(elapsed) < GIVE_UP
    }

    /// Whether its driver made a step just now.
    #[must_use]
    pub fn is_at_it(&self) -> bool {
        self.idle() < GIVE_UP
    }

    fn progress(&self) -> &Progress {
        match &self.control {
            Control::Balloon(balloon) => &balloon.progress,
            Control::Mem(mem) => &mem.progress,
        }
    }

    /// Has the driver make the guest's memory `target` bytes, a multiple of 2 MiB and at most RAM.
    /// Waits for it while `keep_waiting` says so, given the time since the start; `nudge` wakes an
    /// idle guest. Returns the time until the driver's last step.
    ///
    /// # Errors
    /// A target that no driver can reach. Falling short is none.
    pub fn resize(
        &self,
        target: u64,
        nudge: impl Fn(),
        keep_waiting: impl Fn(Duration) -> bool,
    ) -> Result<Duration, ResizeError> {
        let start = Instant::now();
        match &self.control {
            // At most RAM, whose pages were counted at the start.
            Control::Balloon(balloon) => balloon.set_target(((self.memory - target) / FRAME_SIZE) as u32),
            Control::Mem(mem) => {
                let boot = mem.boot_bytes();
                let below = ResizeError::BelowBoot { target: Bytes(target), boot: Bytes(boot) };
                mem.request(target.checked_sub(boot).ok_or(below)?);
            }
        }
        let grows = target > self.limit();
        let mut seen = self.progress().last().0;
        self.transport.config_changed();
        let mut told = Instant::now();
        let reached = || if grows { self.limit() >= target } else { self.limit() <= target };
        while !reached() && keep_waiting(start.elapsed()) {
            let now = self.progress().wait(seen, NUDGE);
            if now == seen {
                nudge();
                // Linux' driver of virtio-mem rests for 50 s or more when it could move nothing, unless it
                // is told again. That of a balloon tries on by itself.
                if matches!(self.control, Control::Mem(_)) && told.elapsed() >= TELL_AGAIN {
                    self.transport.config_changed();
                    told = Instant::now();
                }
            }
            seen = now;
        }
        let last = self.progress().last().1;
        Ok(last.saturating_duration_since(start))
    }

    /// Its numbers, for a status.
    #[must_use]
    pub fn status(&self, kind: &str) -> ElasticStatus {
        let (balloon, mem) = match &self.control {
            Control::Balloon(balloon) => (Some(balloon.status()), None),
            Control::Mem(mem) => (None, Some(mem.status())),
        };
        ElasticStatus {
            kind: kind.to_owned(),
            driven: self.transport.is_driven(),
            device_errors: self.transport.driver_errors(),
            balloon,
            mem,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llfree_monitor::memory::AddressMap;
    use std::sync::atomic::{AtomicU32, Ordering};
    use virtio_bindings::virtio_mmio as reg;

    const MIB: u64 = 1 << 20;

    /// A device over 64 MiB, the first half below the hole of a PC, and how often it interrupted.
    fn device(text: &str) -> Result<(ElasticDevice, Arc<AtomicU32>), DeviceError> {
        let map = AddressMap::with_hole(64 * MIB, 32 * MIB);
        let ram = Arc::new(GuestRam::with_map(64 * MIB, Backing::Anon, map).expect("small"));
        let interrupts = Arc::new(AtomicU32::new(0));
        let count = interrupts.clone();
        let notifier = Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let device = ElasticDevice::new(&text.parse().expect(text), &ram, &(0..1), notifier)?;
        Ok((device.expect("a kind with a device"), interrupts))
    }

    #[test]
    fn a_region_with_the_hole_in_it_is_refused() {
        let Err(error) = device("virtio-mem,boot=16M") else { panic!("refused") };
        assert!(error.to_string().contains("boot part of 16 MiB"), "{error}");
        assert!(device("virtio-mem,boot=32M").is_ok() && device("virtio-mem,boot=48M").is_ok());
    }

    #[test]
    fn a_driver_that_rests_is_told_again_while_somebody_waits() {
        let (device, interrupts) = device("virtio-mem,boot=32M").expect("it fits");
        let write = |register: u32, value: u32| device.transport().write(register.into(), &value.to_le_bytes());
        [0, 1, 3].into_iter().for_each(|status| write(reg::VIRTIO_MMIO_STATUS, status));
        write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        write(reg::VIRTIO_MMIO_DRIVER_FEATURES, 1);
        [11, 15].into_iter().for_each(|status| write(reg::VIRTIO_MMIO_STATUS, status));
        assert!(device.transport().is_driven());
        // All is requested and nothing plugged: it waits for the driver, which does nothing.
        let told = || interrupts.load(Ordering::Relaxed);
        device.resize(64 * MIB, || {}, |_| told() < 2).expect("a target above the boot part");
        assert_eq!((told(), device.limit()), (2, 32 * MIB));
    }

    #[test]
    fn kinds_and_options_are_read_as_people_write_them() {
        for kind in ["llfree", "balloon", "balloon-huge", "virtio-mem", "none"] {
            assert_eq!(kind.parse::<Elastic>().expect(kind).name(), kind);
        }
        let text = "balloon,reporting=on,deflate-on-oom=on,coalesce=off,stats=500ms";
        let Ok(Elastic::Balloon(config)) = text.parse() else { panic!("{text}") };
        assert!(config.reporting == Some(true) && config.deflate_on_oom && !config.coalesce && !config.huge);
        assert_eq!(config.stats, Some(Duration::from_millis(500)));
        assert_eq!("virtio-mem,boot=64M".parse(), Ok(Elastic::Mem { boot: Bytes(64 << 20) }));
    }

    #[test]
    fn what_cannot_be_is_refused_with_what_can() {
        let text = |text: &str| text.parse::<Elastic>().expect_err(text).to_string();
        assert!(text("ballon").contains("use llfree, balloon"));
        assert!(text("llfree,boot=1G").contains("no option of llfree; it has none"));
        assert!(text("balloon,reporting=yes").contains("neither on nor off"));
        assert!(text("balloon,stats=1us").contains("10ms"), "{}", text("balloon,stats=1us"));
        assert!(text("virtio-mem,boot=3K").contains("boot"), "{}", text("virtio-mem,boot=3K"));
        assert!(text("").contains("unknown kind"));
    }
}
