//! What an unmodified Linux makes of each kind of elastic memory: the default for it, what it cannot
//! do, what its command line needs, and what automatic reclaim is where a device does it.
//!
//! Pure: configurations in, configurations or reasons out. What is said of Linux' drivers holds for
//! drivers/virtio/virtio_balloon.c and virtio_mem.c from Linux 5.18 on.

use super::{DEFAULT_STATS, DeviceError, Elastic, ResizeError};
use crate::devices::balloon::BalloonConfig;
use llfree_base::choices::{Settings, Switch};
use llfree_base::units::Bytes;
use llfree_monitor::memory::HOLE_START;
use shared_layout::{FRAME_SIZE, HUGE_SIZE};

/// Linux adds and removes memory in blocks of this size; a smaller machine has none larger.
pub const MEMORY_BLOCK: Bytes = Bytes(128 << 20);
/// What a small kernel needs to boot.
const LEAST_BOOT: u64 = 128 << 20;
/// What Linux keeps about each page that it adds, in its boot part: `struct page`.
const PAGE_STRUCT: u64 = 64;

impl Elastic {
    /// What a Linux guest gets when nobody chooses.
    #[must_use]
    pub const fn for_linux() -> Self {
        Self::Balloon(BalloonConfig {
            huge: false,
            deflate_on_oom: true,
            reporting: Some(true),
            coalesce: true,
            stats: Some(DEFAULT_STATS),
        })
    }

    /// What the kernel's command line must say for this kind to work well, unless it says something
    /// about that already.
    #[must_use]
    pub const fn kernel_parameters(&self) -> Option<&'static str> {
        match self {
            // Memory that was added and is not put into the movable zone can rarely be taken again;
            // and without any such word some kernels leave it unused until a program puts it to use.
            Self::Mem { .. } => Some("memhp_default_state=online_movable"),
            _ => None,
        }
    }

    /// Whether an unmodified Linux with `memory` of RAM can do this.
    ///
    /// # Errors
    /// [`DeviceError`]: what it lacks, and what to use instead.
    pub fn check_linux(&self, memory: Bytes) -> Result<(), DeviceError> {
        match *self {
            Self::Llfree => Err(DeviceError::LinuxSharesNothing),
            Self::Balloon(BalloonConfig { huge: true, .. }) => Err(DeviceError::LinuxHasSmallPages),
            Self::Mem { boot } if boot >= memory => Err(DeviceError::BootTooLarge { boot, memory }),
            Self::Mem { boot } => {
                let region = memory.0 - boot.0;
                let least = Bytes((LEAST_BOOT + region / FRAME_SIZE * PAGE_STRUCT).next_multiple_of(HUGE_SIZE));
                if boot.0 > HOLE_START {
                    return Err(DeviceError::BootAboveHole { boot, most: Bytes(HOLE_START) });
                }
                if boot < least {
                    return Err(DeviceError::BootTooSmallForLinux { boot, region: Bytes(region), least });
                }
                if region < MEMORY_BLOCK.0 {
                    return Err(DeviceError::RegionTooSmall { region: Bytes(region), least: MEMORY_BLOCK });
                }
                Ok(())
            }
            Self::Balloon(_) | Self::None => Ok(()),
        }
    }

    /// How much of `memory` Linux cannot use: what the end of virtio-mem's region has beyond whole
    /// blocks of 128 MiB. The region starts at 4 GiB, which is such a block's start.
    #[must_use]
    pub fn unusable_by_linux(&self, memory: Bytes) -> Bytes {
        match self {
            Self::Mem { boot } => Bytes(memory.0.saturating_sub(boot.0) % MEMORY_BLOCK.0),
            _ => Bytes(0),
        }
    }

    /// This kind and `--auto-reclaim` together: with the shared table the host scans; with a balloon
    /// the guest reports free pages by itself, and nothing is left for the host to switch.
    ///
    /// # Errors
    /// Kinds that can do neither, settings that only a scan has, and `reporting=off` beside it.
    pub fn with_auto_reclaim(self, switch: Switch) -> Result<(Self, Switch), ResizeError> {
        let Some(settings) = switch.0 else { return Ok((self, switch)) };
        match self {
            Self::Llfree => Ok((self, switch)),
            Self::Balloon(BalloonConfig { reporting: Some(false), .. }) => Err(ResizeError::ReportingContradicted),
            Self::Balloon(_) if settings != Settings::default() => Err(ResizeError::ReportingHasNoSettings),
            Self::Balloon(config) => {
                Ok((Self::Balloon(BalloonConfig { reporting: Some(true), ..config }), Switch(None)))
            }
            Self::Mem { .. } | Self::None => Err(ResizeError::NoTable { what: "automatic reclaim", kind: self.name() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;

    fn elastic(text: &str) -> Elastic {
        text.parse().expect(text)
    }

    fn on() -> Switch {
        "on".parse().expect("a switch")
    }

    #[test]
    fn the_default_for_linux_is_what_people_would_write() {
        assert_eq!(Elastic::for_linux(), elastic("balloon,reporting=on,deflate-on-oom=on,stats=2s"));
        assert!(Elastic::for_linux().check_linux(Bytes(GIB)).is_ok());
        assert_eq!(Elastic::for_linux().kernel_parameters(), None);
        assert_eq!(elastic("virtio-mem").kernel_parameters(), Some("memhp_default_state=online_movable"));
    }

    #[test]
    fn what_linux_cannot_do_is_refused_with_what_it_can() {
        let refusal = |text: &str, bytes: u64| {
            elastic(text).check_linux(Bytes(bytes)).map_err(|error| error.to_string()).expect_err(text)
        };
        let text = refusal("llfree", GIB);
        assert!(text.contains("unmodified Linux") && text.contains("balloon, virtio-mem or none"), "{text}");
        let text = refusal("balloon-huge", GIB);
        assert!(text.contains("use balloon"), "{text}");
        let text = refusal("virtio-mem,boot=4G", 8 * GIB);
        assert!(text.contains("4 GiB") && text.contains("at most 3 GiB"), "{text}");
        let text = refusal("virtio-mem,boot=64M", GIB);
        assert!(text.contains("64 MiB") && text.contains("boot=144M or more"), "{text}");
        let text = refusal("virtio-mem,boot=256M", 64 * GIB);
        assert!(text.contains("boot=1148M or more"), "{text}");
        let text = refusal("virtio-mem,boot=1G", GIB);
        assert!(text.contains("boot="), "{text}");
        let text = refusal("virtio-mem,boot=960M", GIB);
        assert!(text.contains("64 MiB") && text.contains("128 MiB"), "{text}");
        for (fine, bytes) in [("virtio-mem", GIB), ("virtio-mem,boot=3G", 8 * GIB), ("none", GIB), ("balloon", GIB)] {
            assert!(elastic(fine).check_linux(Bytes(bytes)).is_ok(), "{fine}");
        }
    }

    #[test]
    fn what_is_no_whole_block_linux_cannot_use() {
        let mem = elastic("virtio-mem,boot=256M");
        assert_eq!(mem.unusable_by_linux(Bytes(GIB)), Bytes(0));
        assert_eq!(mem.unusable_by_linux(Bytes(GIB + 100 * MIB)), Bytes(100 * MIB));
        assert_eq!(elastic("balloon").unusable_by_linux(Bytes(GIB + 2 * MIB)), Bytes(0));
    }

    #[test]
    fn automatic_reclaim_of_a_balloon_is_reporting() {
        assert_eq!(Elastic::Llfree.with_auto_reclaim(on()), Ok((Elastic::Llfree, on())));
        for text in ["balloon", "balloon,reporting=on", "balloon-huge,stats=1s"] {
            let (Elastic::Balloon(config), switch) = elastic(text).with_auto_reclaim(on()).expect(text) else {
                panic!("{text} stays what it is")
            };
            assert_eq!((config.reporting, switch), (Some(true), Switch(None)), "{text}");
        }
        // Off leaves all as it is, also reporting that somebody asked for.
        for text in ["balloon", "balloon,reporting=on", "balloon,reporting=off", "virtio-mem", "none"] {
            assert_eq!(elastic(text).with_auto_reclaim(Switch(None)), Ok((elastic(text), Switch(None))));
        }
    }

    #[test]
    fn automatic_reclaim_that_cannot_be_is_refused() {
        let refusal = |text: &str, switch: &str| {
            let switch = switch.parse().expect(switch);
            elastic(text).with_auto_reclaim(switch).map_err(|error| error.to_string()).expect_err(text)
        };
        assert!(refusal("balloon,reporting=off", "on").contains("reporting=off"));
        assert!(refusal("balloon", "interval=1s").contains("has no settings"));
        for kind in ["virtio-mem", "none"] {
            assert!(refusal(kind, "on").contains(&format!("impossible with memory of kind {kind}")));
        }
    }
}
