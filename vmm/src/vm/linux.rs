//! What a Linux guest's machine has and others have not: interrupt controllers, a PC's ports, more
//! devices, and the tables that describe all this to its kernel.

use super::config::VmConfig;
use super::error::LaunchError;
use crate::agent::linux::LinuxAgent;
use crate::boot::linux::{self, LinuxKernel, acpi, kernel, map};
use crate::boot::{self, LinuxError, Platform};
use crate::devices::blk::{self, Blk, DiskControl};
use crate::devices::console::Console;
use crate::devices::mmio::Transport;
use crate::devices::net::{self, Net, NetCounters};
use crate::devices::pc::Pc;
use crate::devices::rng::Rng;
use crate::devices::serial::{self, Serial};
use crate::devices::{self, Devices, VirtioDevice};
use crate::elastic::{Elastic, MEMORY_BLOCK};
use kvm_bindings::{CpuId, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use llfree_monitor::memory::{AddressMap, GuestRam};
use std::fs::File;
use std::sync::Arc;

/// What the ACPI tables have numbers for.
const MAX_CPUS: u32 = 254;
/// The word by which a kernel finds the region that it shares with its host.
const HEADER_PARAMETER: &str = "llfree.header";
/// Devices that nobody asks for: the agent's port and random numbers.
const ALWAYS: usize = 2;

/// A Linux guest that was checked against its configuration.
pub(super) struct Plan<'a> {
    config: &'a VmConfig,
    kernel: &'a LinuxKernel,
    /// Where RAM lies.
    pub(super) map: AddressMap,
    initrd_address: u64,
    command_line: String,
    /// Disks and network cards, open.
    devices: Vec<Box<dyn VirtioDevice>>,
    disks: Vec<Arc<DiskControl>>,
    nets: Vec<Arc<NetCounters>>,
}

/// What belongs to the machine from then on.
pub(super) struct Parts {
    pub(super) pc: Arc<Pc>,
    pub(super) agent: Arc<LinuxAgent>,
    pub(super) disks: Vec<Arc<DiskControl>>,
    pub(super) nets: Vec<Arc<NetCounters>>,
}

impl<'a> Plan<'a> {
    /// Checks all that can be checked before there is a machine, and opens what it needs.
    pub(super) fn new(config: &'a VmConfig, kernel: &'a LinuxKernel) -> Result<Self, LaunchError> {
        if config.cpus > MAX_CPUS {
            return Err(LinuxError::Cpus { asked: config.cpus, limit: MAX_CPUS }.into());
        }
        config.elastic.check_linux(config.memory)?;
        let unusable = config.elastic.unusable_by_linux(config.memory);
        if unusable.0 > 0 {
            log::warn!(
                "Linux adds memory in blocks of {MEMORY_BLOCK}: it cannot use the last {unusable} of virtio-mem's \
                 region; a region that is a multiple of that wastes nothing"
            );
        }
        let memory = config.memory.0;
        let (map, low, hotplug) = match config.elastic {
            Elastic::Mem { boot } => (map::address_map_for_hotplug(memory, boot.0), boot.0, true),
            _ => (map::address_map(memory), memory.min(map::HOLE_START), false),
        };
        let initrd_address = kernel.initrd_address(config.linux.initrd.as_deref(), low, hotplug)?;
        let command_line = command_line(config, Platform::place(map.end()));
        kernel.check_command_line(&command_line)?;
        let linux = &config.linux;
        let asked = ALWAYS + linux.disks.len() + linux.nets.len() + usize::from(config.elastic != Elastic::None);
        let limit = map::DEVICE_GSIS.len();
        if asked > limit {
            return Err(LinuxError::Devices { asked, limit }.into());
        }
        let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
        blk::check_disks(&linux.disks)?;
        let mut disks = Vec::new();
        for disk in &linux.disks {
            let disk = Blk::open(disk)?;
            disks.push(disk.control());
            devices.push(Box::new(disk));
        }
        net::check_nets(&linux.nets)?;
        let mut nets = Vec::new();
        for net in &linux.nets {
            let net = Net::open(net)?;
            nets.push(net.counters());
            devices.push(Box::new(net));
        }
        // Last, so that all that is wrong with the flags comes to light on any machine.
        if !boot::runs_ring0() {
            return Err(LinuxError::NoRing0 { name: kernel.name().to_owned() }.into());
        }
        Ok(Self { config, kernel, map, initrd_address, command_line, devices, disks, nets })
    }

    /// What every vCPU needs before it is made.
    pub(super) fn prepare(&self, vm: &VmFd) -> Result<(), LaunchError> {
        let kvm = |step| move |source| LaunchError::Kvm { step, source };
        // Intel CPUs without unrestricted guests need these pages; others do not care.
        vm.set_tss_address(map::KVM_PAGES as usize).map_err(kvm("place its task segment"))?;
        vm.create_irq_chip().map_err(kvm("make interrupt controllers"))?;
        let timer = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(timer).map_err(kvm("make a timer"))
    }

    /// What each vCPU is.
    pub(super) fn cpuid(&self, kvm: &Kvm, supported: &CpuId, index: u32) -> Result<CpuId, LaunchError> {
        let has_deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
        // At most MAX_CPUS.
        Ok(linux::cpuid(supported, index as u8, self.config.cpus as u8, has_deadline_timer)?)
    }

    /// All devices, in the order in which the kernel finds them; `elastic` is the last of them.
    pub(super) fn devices(
        &mut self,
        vm: &Arc<VmFd>,
        ram: &Arc<GuestRam>,
        elastic: Option<Arc<Transport>>,
    ) -> Result<(Devices, Parts), LaunchError> {
        devices::outlive_file_limits()
            .map_err(|source| LaunchError::Host { step: "catch the signal of a full file", source })?;
        let event = |source| LaunchError::Host { step: "make a device's events", source };
        let transport = |device: Box<dyn VirtioDevice>| {
            // It has real interrupts.
            Transport::new(device, ram.clone(), Box::new(|| {})).map(Arc::new).map_err(event)
        };
        let (console, port) = Console::new().map_err(event)?;
        let mut all = vec![transport(Box::new(console))?, transport(Box::<Rng>::default())?];
        for device in self.devices.drain(..) {
            all.push(transport(device)?);
        }
        all.extend(elastic);
        for (device, gsi) in all.iter().zip(map::DEVICE_GSIS) {
            vm.register_irqfd(device.irq().event(), gsi)
                .map_err(|source| LaunchError::Kvm { step: "take a device's interrupts", source })?;
        }
        let console = match &self.config.linux.console {
            Some(console) => console.try_clone(),
            None => File::create("/dev/null").map(Into::into),
        };
        let serial = console.and_then(|out| Serial::new(out, &self.config.threads)).map(Arc::new);
        let serial = serial.map_err(|source| LaunchError::Host { step: "open the console", source })?;
        vm.register_irqfd(serial.irq(), serial::GSI)
            .map_err(|source| LaunchError::Kvm { step: "take the serial line's interrupts", source })?;
        let parts = Parts {
            pc: Arc::new(Pc::new(serial, vm.clone())),
            agent: Arc::new(LinuxAgent::new(port)),
            disks: std::mem::take(&mut self.disks),
            nets: std::mem::take(&mut self.nets),
        };
        Ok((Devices::new(map::DEVICES_START, all), parts))
    }

    /// Copies the kernel, and all it is told, into its memory, and puts the first vCPU at its entry.
    pub(super) fn load(
        &self,
        ram: &GuestRam,
        platform: &Platform,
        devices: &Devices,
        vcpus: &[VcpuFd],
    ) -> Result<(), LaunchError> {
        let boot_bytes = match self.config.elastic {
            Elastic::Mem { boot } => boot.0,
            _ => self.config.memory.0,
        };
        let parts: Vec<_> = ram
            .map()
            .parts()
            .filter(|part| part.offset < boot_bytes)
            .map(|part| part.gpa..part.gpa + part.bytes.min(boot_bytes - part.offset))
            .collect();
        let platform_range = platform.header_gpa()..platform.doorbell_gpa() + shared_layout::call::DOORBELL_BYTES;
        let memory_map = map::e820(&parts, platform_range);
        let lines: Vec<_> = (0..devices.count() as usize)
            .filter_map(map::device)
            // Below 4 GiB, as the hole is.
            .map(|(page, gsi)| acpi::Mmio { page: page as u32, gsi })
            .collect();
        let setup = kernel::Setup {
            initrd: self.config.linux.initrd.as_deref(),
            command_line: &self.command_line,
            memory_map: &memory_map,
            acpi: &acpi::tables(self.config.cpus as u8, &lines),
        };
        self.kernel.load(ram.guest_memory(), &setup, self.initrd_address)?;
        let [first, others @ ..] = vcpus else { return Ok(()) };
        linux::start(first, ram.guest_memory(), self.kernel.entry())?;
        for vcpu in others {
            linux::start_other(vcpu)?;
        }
        Ok(())
    }
}

/// The user's words, and what this machine adds to them: the region that it shares lies at `header`.
fn command_line(config: &VmConfig, header: u64) -> String {
    let given = &config.linux.command_line;
    let (given, init) = given.split_at(parameters_end(given));
    let mut words = vec![given.trim_end().to_owned()];
    if let Some(parameter) = config.elastic.kernel_parameters() {
        let name = |word: &str| word.split('=').next().map(str::to_owned);
        // Whoever wrote it has a reason.
        if !given.split_whitespace().any(|word| name(word) == name(parameter)) {
            words.push(parameter.to_owned());
        }
    }
    words.push(format!("{HEADER_PARAMETER}={header:#x}"));
    words.push(init.to_owned());
    words.retain(|word| !word.is_empty());
    words.join(" ")
}

/// Where the kernel's parameters end: at a lone `--`, behind which those of init begin.
fn parameters_end(line: &str) -> usize {
    let is_end = |at: usize| {
        let (before, behind) = (&line[..at], &line[at + 2..]);
        let is_alone = before.chars().next_back().is_none_or(char::is_whitespace)
            && behind.chars().next().is_none_or(char::is_whitespace);
        is_alone && before.matches('"').count() % 2 == 0
    };
    line.match_indices("--").map(|(at, _)| at).find(|at| is_end(*at)).unwrap_or(line.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::LinuxConfig;

    #[test]
    fn what_is_added_is_the_kernels_and_not_inits() {
        let line = |given: &str, elastic: &str| {
            let linux = LinuxConfig { command_line: given.to_owned(), ..LinuxConfig::default() };
            let elastic = elastic.parse().expect("a kind");
            command_line(&VmConfig { linux, elastic, ..VmConfig::default() }, 0x4000_0000)
        };
        let header = "llfree.header=0x40000000";
        assert_eq!(line("", "none"), header);
        assert_eq!(line("quiet  ro ", "none"), format!("quiet  ro {header}"));
        assert_eq!(line("quiet -- single", "none"), format!("quiet {header} -- single"));
        assert_eq!(line("--", "none"), format!("{header} --"));
        assert_eq!(line("a=\"b -- c\" --x x-- --", "none"), format!("a=\"b -- c\" --x x-- {header} --"));
        let online = "memhp_default_state=online_movable";
        assert_eq!(line("quiet", "virtio-mem"), format!("quiet {online} {header}"));
        assert_eq!(line(online, "virtio-mem"), format!("{online} {header}"));
        assert_eq!(
            line("-- memhp_default_state=x", "virtio-mem"),
            format!("{online} {header} -- memhp_default_state=x")
        );
    }
}
