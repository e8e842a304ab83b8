//! virtio-mem: its option, what it and Linux's driver need of a VM, and its accounting.
//!
//! Statements about Linux's driver hold for drivers/virtio/virtio_mem.c from Linux 5.18 on.

use super::device::{Books, ByDevice};
use super::error::{DeviceError, ElasticError, ResizeError};
use super::offers::Need;
use super::way::{Elasticity, Parts, Shape, Way};
use crate::devices::mem::{Mem, MemControl};
use crate::devices::progress::Progress;
use llfree_base::units::{Bytes, parse_memory};
use llfree_control::report::{ElasticKind, ElasticStatus};
use llfree_monitor::memory::HOLE_START;
use shared_layout::{FRAME_SIZE, HUGE_SIZE};
use std::sync::Arc;
use std::time::Duration;

/// Linux adds and removes memory in blocks of this size; only large machines have larger ones.
const MEMORY_BLOCK: Bytes = Bytes(128 << 20);
/// Memory that a small kernel needs to boot, in bytes.
const LEAST_BOOT: u64 = 128 << 20;
/// Bytes that Linux keeps in its boot part for each page that it adds: `struct page`.
const PAGE_STRUCT: u64 = 64;
/// How often our guest's driver retries what it could not do before.
const UNPLUG_RETRY: Duration = Duration::from_secs(1);
/// How often the driver is told again. Linux's driver rests for 50 s or more when it could not move
/// anything, unless it is told again; it writes two lines to its log each time.
const TELL_AGAIN: Duration = Duration::from_secs(3);

/// The choice of virtio-mem.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemConfig {
    /// The size of the first part of RAM, which always stays with the guest.
    pub boot: Bytes,
}

impl MemConfig {
    /// 256 MiB always stay with the guest.
    pub const DEFAULT: Self = Self { boot: Bytes(256 << 20) };
}

impl Default for MemConfig {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Way for MemConfig {
    fn kind(&self) -> ElasticKind {
        ElasticKind::VirtioMem
    }

    fn needs(&self) -> Need {
        Need::Mem
    }

    fn options(&self) -> &'static str {
        "boot=SIZE"
    }

    fn set(&mut self, name: &str, value: &str) -> Result<bool, ElasticError> {
        if name != "boot" {
            return Ok(false);
        }
        self.boot = parse_memory(value).map_err(|error| ElasticError::Boot(error.to_string()))?;
        Ok(true)
    }

    fn tick(&self) -> Option<Duration> {
        // Nothing tells the driver when a block that it could not unplug becomes free.
        Some(UNPLUG_RETRY)
    }

    fn boot_bytes(&self, _: Bytes) -> Bytes {
        self.boot
    }

    fn is_hot_plugged(&self) -> bool {
        true
    }

    fn kernel_parameter(&self) -> Option<&'static str> {
        // Added memory outside the movable zone can rarely be taken back, and without such a parameter
        // some kernels leave it offline until a program brings it online.
        Some("memhp_default_state=online_movable")
    }

    fn check_linux(&self, memory: Bytes) -> Result<(), DeviceError> {
        let boot = self.boot;
        if boot >= memory {
            return Err(DeviceError::BootTooLarge { boot, memory });
        }
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

    fn unusable_by_linux(&self, memory: Bytes) -> Bytes {
        // The region starts at 4 GiB, which is also the start of a block.
        Bytes(memory.0.saturating_sub(self.boot.0) % MEMORY_BLOCK.0)
    }

    fn check(&self, shape: &Shape<'_>) -> Result<(), DeviceError> {
        let (boot, memory) = (self.boot, shape.map.bytes());
        let end = Bytes(u64::from(shape.image.end) * HUGE_SIZE);
        if boot.0 >= memory {
            return Err(DeviceError::BootTooLarge { boot, memory: Bytes(memory) });
        }
        if boot < end {
            return Err(DeviceError::BootTooSmall { end, boot });
        }
        if shape.map.contiguous(boot.0, memory - boot.0).is_none() {
            return Err(DeviceError::RegionInParts { boot });
        }
        Ok(())
    }

    fn build(&self, parts: Parts<'_>) -> Result<Arc<dyn Elasticity>, DeviceError> {
        let control = Arc::new(MemControl::new(parts.ram.bytes(), self.boot.0));
        let device = Box::new(Mem::new(parts.ram.clone(), control.clone()));
        Ok(ByDevice::build(self.kind(), control, device, parts)?)
    }
}

impl Books for MemControl {
    fn limit(&self, _: u64) -> u64 {
        self.boot_bytes() + self.plugged_bytes()
    }

    fn target(&self, _: u64) -> u64 {
        self.boot_bytes() + self.requested_bytes()
    }

    fn set_target(&self, _: u64, target: u64) -> Result<(), ResizeError> {
        let boot = self.boot_bytes();
        let below = ResizeError::BelowBoot { target: Bytes(target), boot: Bytes(boot) };
        self.request(target.checked_sub(boot).ok_or(below)?);
        Ok(())
    }

    fn progress(&self) -> &Progress {
        &self.progress
    }

    fn tell_again(&self) -> Option<Duration> {
        Some(TELL_AGAIN)
    }

    fn describe(&self, status: &mut ElasticStatus) {
        status.mem = Some(self.status());
    }
}
