//! The bare-metal guest: ring 3, one image, one agent per vCPU, and a table shared with the host.

use super::plan::{Attached, Facts, Guest, Hardware, Plan};
use crate::agent::{self, AgentError, Agents};
use crate::boot::{BootError, Image, Kernel, KvmLimits, LinuxError, LinuxOnly, Platform};
use crate::config::VmConfig;
use crate::devices::Devices;
use crate::devices::irq::Notifier;
use crate::devices::mmio::Transport;
use crate::elastic::{Elastic, Need, Offers};
use crate::error::LaunchError;
use agent_abi::{Command, Report};
use kvm_ioctls::VcpuFd;
use llfree_base::units::Bytes;
use llfree_monitor::TenantStart;
use llfree_monitor::memory::AddressMap;
use shared_layout::HUGE_SIZE;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The facts about this kind of guest.
pub static FACTS: Facts = Facts {
    offers: Offers {
        guest: "a guest of this project",
        meets: &[Need::Table, Need::Balloon, Need::HugeBalloon, Need::Mem],
    },
    elastic: Elastic::LLFREE,
    command_line: "",
    has_console: false,
};

/// A bare-metal guest that fits its configuration.
pub(super) struct ShimPlan<'a> {
    config: &'a VmConfig,
    image: &'a Arc<Image>,
    kernel: &'a Kernel,
}

impl<'a> ShimPlan<'a> {
    pub(super) fn new(config: &'a VmConfig, image: &'a Arc<Image>, kernel: &'a Kernel) -> Result<Self, LaunchError> {
        let linux = &config.linux;
        let only_linux = [
            (LinuxOnly::Initrd, linux.initrd.is_some()),
            (LinuxOnly::CommandLine, !linux.command_line.is_empty()),
            (LinuxOnly::Disk, !linux.disks.is_empty()),
            (LinuxOnly::Net, !linux.nets.is_empty()),
        ];
        if let Some((what, _)) = only_linux.into_iter().find(|(_, given)| *given) {
            let guest = if config.kernel.is_some() { kernel.name() } else { "the built-in guest" };
            return Err(LinuxError::NotLinux { what, guest: guest.to_owned() }.into());
        }
        let least = Bytes(u64::from(kernel.huge_frames().end) * HUGE_SIZE);
        if config.kernel.is_none() && config.memory < least {
            return Err(LaunchError::TooSmall { memory: config.memory, least });
        }
        kernel.check_fits(config.memory.0)?;
        Ok(Self { config, image, kernel })
    }
}

impl Plan for ShimPlan<'_> {
    fn image(&self) -> Range<u32> {
        self.kernel.huge_frames()
    }

    fn start(&self) -> TenantStart {
        // Null pointers fault in frame 0.
        TenantStart {
            threads: self.config.cpus,
            unusable: 0..1,
            image: vec![self.kernel.bytes()],
            ..TenantStart::default()
        }
    }

    fn address_map(&self) -> AddressMap {
        AddressMap::flat(self.config.memory.0)
    }

    fn platform(&self, limits: &KvmLimits) -> Result<Platform, BootError> {
        Platform::new(self.config.memory.0, self.config.cpus, limits.address_bits)
    }

    /// Instead of interrupts, the guest has a word to poll; a sleeping vCPU is woken to do so.
    fn notifier(&self, platform: &Arc<Platform>, agents: &Arc<Agents>) -> Notifier {
        let (platform, agents) = (platform.clone(), agents.clone());
        let events = AtomicU64::new(0);
        Box::new(move || {
            let number = events.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
            platform.set_device_events(number);
            agents.notify_driver();
        })
    }

    fn devices(&mut self, hardware: &Hardware, elastic: Option<Arc<Transport>>) -> Result<Attached, LaunchError> {
        let devices = Devices::new(hardware.platform.devices_gpa(), elastic.into_iter().collect());
        if devices.count() > 0 {
            hardware.platform.set_devices(devices.count());
        }
        let guest = Arc::new(Shim { image: self.image.clone(), agents: hardware.agents.clone() });
        Ok(Attached { guest, devices, disks: Vec::new(), nets: Vec::new() })
    }

    fn load(&self, hardware: &Hardware, _: &Devices, vcpus: &[VcpuFd]) -> Result<(), LaunchError> {
        // Writes only to memory that is there: no thread is there yet to resolve a fault.
        self.kernel.load(hardware.ram.guest_memory())?;
        for (index, vcpu) in vcpus.iter().enumerate() {
            hardware.platform.enter(vcpu, index as u32, self.kernel.entry())?;
        }
        Ok(())
    }
}

/// A running bare-metal guest.
struct Shim {
    /// Its symbols name addresses in crash reports.
    image: Arc<Image>,
    agents: Arc<Agents>,
}

impl Guest for Shim {
    fn facts(&self) -> &'static Facts {
        &FACTS
    }

    fn shares_table(&self) -> bool {
        true
    }

    fn run(&self, command: Command, timeout: Duration, wanted: &dyn Fn() -> bool) -> Result<Report, AgentError> {
        self.agents.run_while(command, timeout, wanted).map(|reports| agent::total(&reports))
    }

    fn stop(&self) {
        self.agents.stop();
    }

    fn kernel(&self) -> Option<&Kernel> {
        self.image.kernel()
    }
}
