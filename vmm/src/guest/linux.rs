//! A Linux guest: ring 0 on a PC. Unlike the shim's, its machine has interrupt controllers, a PC's
//! ports, more devices, and the tables that describe all this to its kernel.

use super::plan::{Attached, Facts, Guest, Hardware, Plan};
use crate::agent::linux::LinuxAgent;
use crate::agent::{AgentError, Agents};
use crate::boot::linux::{self, LinuxKernel, acpi, kernel, map};
use crate::boot::{self, BootError, KvmLimits, LinuxError, Platform};
use crate::config::VmConfig;
use crate::devices::blk::{self, Blk, DiskControl};
use crate::devices::console::Console;
use crate::devices::irq::Notifier;
use crate::devices::mmio::Transport;
use crate::devices::net::{self, Net, NetCounters};
use crate::devices::pc::Pc;
use crate::devices::rng::Rng;
use crate::devices::serial::{self, Serial};
use crate::devices::{self, Devices, VirtioDevice};
use crate::elastic::{Elastic, Need, Offers};
use crate::error::LaunchError;
use crate::exit::ExitReason;
use agent_abi::{Command, Report};
use guest_abi::GuestWord;
use kvm_bindings::{CpuId, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use llfree_control::report::LinuxAgentStatus;
use llfree_monitor::memory::AddressMap;
use llfree_monitor::{TenantStart, Terms};
use shared_layout::{HUGE_SIZE, HugeRange};
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The most CPUs that the ACPI tables can number.
const MAX_CPUS: u32 = 254;
/// The kernel parameter that says where the region shared with the host lies.
const HEADER_PARAMETER: &str = "llfree.header";
/// Devices that every VM has: the agent's port and the random number generator.
const ALWAYS: usize = 2;

/// The facts about this kind of guest. Whether a kernel shares its free memory it says when it runs; what its release is
/// called proves nothing.
pub static FACTS: Facts = Facts {
    offers: Offers { guest: "Linux", meets: &[Need::Table, Need::Balloon, Need::Mem] },
    elastic: Elastic::for_linux(),
    command_line: "console=ttyS0",
    has_console: true,
};

/// A Linux guest that fits its configuration.
pub(super) struct LinuxPlan<'a> {
    config: &'a VmConfig,
    kernel: &'a LinuxKernel,
    /// Where RAM lies.
    map: AddressMap,
    /// How much RAM the guest boots with, in bytes.
    boot_bytes: u64,
    initrd_address: u64,
    command_line: String,
    /// Disks and network cards, open.
    devices: Vec<Box<dyn VirtioDevice>>,
    disks: Vec<Arc<DiskControl>>,
    nets: Vec<Arc<NetCounters>>,
}

impl<'a> LinuxPlan<'a> {
    /// Checks all that can be checked before there is a machine, and opens what it needs.
    pub(super) fn new(config: &'a VmConfig, kernel: &'a LinuxKernel) -> Result<Self, LaunchError> {
        if config.cpus > MAX_CPUS {
            return Err(LinuxError::Cpus { asked: config.cpus, limit: MAX_CPUS }.into());
        }
        let way = config.elastic.way();
        way.check_linux(config.memory)?;
        let unusable = way.unusable_by_linux(config.memory);
        if unusable.0 > 0 {
            log::warn!(
                "Linux cannot use the last {unusable} of the region that {} manages: it adds memory in larger blocks; \
                 a region that is a multiple of 128 MiB wastes nothing",
                way.name()
            );
        }
        let (memory, boot_bytes) = (config.memory.0, way.boot_bytes(config.memory).0);
        let hot_plugged = way.is_hot_plugged();
        let (map, low) = if hot_plugged {
            (map::address_map_for_hotplug(memory, boot_bytes), boot_bytes)
        } else {
            (map::address_map(memory), memory.min(map::HOLE_START))
        };
        let initrd_address = kernel.initrd_address(config.linux.initrd.as_deref(), low, hot_plugged)?;
        let command_line = command_line(config, Platform::place(map.end()));
        kernel.check_command_line(&command_line)?;
        let mut plan = Self {
            config,
            kernel,
            map,
            boot_bytes,
            initrd_address,
            command_line,
            devices: Vec::new(),
            disks: Vec::new(),
            nets: Vec::new(),
        };
        plan.open_devices()?;
        // Last, so that a wrong configuration is reported as such on any machine.
        if !boot::runs_ring0() {
            return Err(LinuxError::NoRing0 { name: kernel.name().to_owned() }.into());
        }
        Ok(plan)
    }

    fn open_devices(&mut self) -> Result<(), LaunchError> {
        let linux = &self.config.linux;
        let moves_memory = usize::from(self.config.elastic.way().has_device());
        let asked = ALWAYS + linux.disks.len() + linux.nets.len() + moves_memory;
        let limit = map::DEVICE_GSIS.len();
        if asked > limit {
            return Err(LinuxError::Devices { asked, limit }.into());
        }
        blk::check_disks(&linux.disks)?;
        for disk in &linux.disks {
            let disk = Blk::open(disk)?;
            self.disks.push(disk.control());
            self.devices.push(Box::new(disk));
        }
        net::check_nets(&linux.nets)?;
        for net in &linux.nets {
            let net = Net::open(net)?;
            self.nets.push(net.counters());
            self.devices.push(Box::new(net));
        }
        Ok(())
    }

    /// Whether the kernel is offered to share its free memory.
    fn shares_table(&self) -> bool {
        self.config.elastic.way().needs() == Need::Table
    }

    /// The serial line, with its interrupt.
    fn serial(&self, vm: &VmFd) -> Result<Arc<Serial>, LaunchError> {
        let console = match &self.config.linux.console {
            Some(console) => console.try_clone(),
            None => File::create("/dev/null").map(Into::into),
        };
        let serial = console.and_then(|out| Serial::new(out, &self.config.threads)).map(Arc::new);
        let serial = serial.map_err(|source| LaunchError::Host { step: "open the console", source })?;
        vm.register_irqfd(serial.irq(), serial::GSI)
            .map_err(|source| LaunchError::Kvm { step: "register the serial line's interrupt", source })?;
        Ok(serial)
    }
}

impl Plan for LinuxPlan<'_> {
    fn image(&self) -> Range<u32> {
        // None: its RAM gets memory on first touch.
        0..0
    }

    /// All is the kernel's from the start. What it is loaded into has memory before it runs, as no thread is there
    /// yet to resolve a fault.
    fn start(&self) -> TenantStart {
        let (threads, all) = (self.config.cpus, (self.config.memory.0 / HUGE_SIZE) as u32);
        let loaded = |range: &Range<u64>| {
            let offset = self.map.offset(range.start, range.end - range.start).unwrap_or_default();
            let frames = HugeRange::around(offset..offset + (range.end - range.start));
            frames.first().0..frames.end().0
        };
        let initrd = self.config.linux.initrd.as_deref();
        let installed = self.kernel.loaded(initrd, self.initrd_address).iter().map(loaded).collect();
        TenantStart { threads, taken: 0..all, installed, ..TenantStart::default() }
    }

    fn address_map(&self) -> AddressMap {
        self.map
    }

    fn platform(&self, limits: &KvmLimits) -> Result<Platform, BootError> {
        Platform::above(self.map.end(), self.config.memory.0, self.config.cpus, limits.address_bits)
    }

    fn notifier(&self, _: &Arc<Platform>, _: &Arc<Agents>) -> Notifier {
        // It has real interrupts.
        Box::new(|| {})
    }

    fn prepare(&self, vm: &VmFd) -> Result<(), LaunchError> {
        let kvm = |step| move |source| LaunchError::Kvm { step, source };
        // Intel CPUs without unrestricted guests need these pages; others do not care.
        vm.set_tss_address(map::KVM_PAGES as usize).map_err(kvm("place its task segment"))?;
        vm.create_irq_chip().map_err(kvm("create the interrupt controllers"))?;
        let timer = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(timer).map_err(kvm("create the timer"))
    }

    fn cpuid(&self, kvm: &Kvm, supported: &CpuId, index: u32) -> Result<CpuId, LaunchError> {
        let has_deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
        // At most MAX_CPUS.
        Ok(linux::cpuid(supported, index as u8, self.config.cpus as u8, has_deadline_timer)?)
    }

    /// All devices, in the order in which the kernel finds them.
    fn devices(&mut self, hardware: &Hardware, elastic: Option<Arc<Transport>>) -> Result<Attached, LaunchError> {
        devices::outlive_file_limits()
            .map_err(|source| LaunchError::Host { step: "handle the signal of the file-size limit", source })?;
        let event = |source| LaunchError::Host { step: "create a device's events", source };
        let transport = |device: Box<dyn VirtioDevice>| {
            // It has real interrupts.
            Transport::new(device, hardware.ram.clone(), Box::new(|| {})).map(Arc::new).map_err(event)
        };
        let (console, port) = Console::new().map_err(event)?;
        let mut all = vec![transport(Box::new(console))?, transport(Box::<Rng>::default())?];
        for device in self.devices.drain(..) {
            all.push(transport(device)?);
        }
        all.extend(elastic);
        for (device, gsi) in all.iter().zip(map::DEVICE_GSIS) {
            let taken = hardware.vm.register_irqfd(device.irq().event(), gsi);
            taken.map_err(|source| LaunchError::Kvm { step: "register a device's interrupt", source })?;
        }
        let pc = Pc::new(self.serial(&hardware.vm)?, hardware.vm.clone());
        let agent = LinuxAgent::new(port);
        Ok(Attached {
            guest: Arc::new(Linux { pc, agent, shares_table: self.shares_table() }),
            devices: Devices::new(map::DEVICES_START, all),
            disks: std::mem::take(&mut self.disks),
            nets: std::mem::take(&mut self.nets),
        })
    }

    fn terms(&self, hardware: &Hardware) -> Result<Option<Terms>, LaunchError> {
        if !self.shares_table() {
            return Ok(None);
        }
        let low = self.map.parts().next().map_or(0, |part| (part.bytes / HUGE_SIZE) as u32);
        let has_hole = self.map.parts().count() > 1;
        hardware.platform.offer_to_own_allocator(if has_hole { low } else { 0 }, map::NOTICE_GSI);
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(|source| LaunchError::Host { step: "create the event of the table's interrupt", source })?;
        let taken = hardware.vm.register_irqfd(&event, map::NOTICE_GSI);
        taken.map_err(|source| LaunchError::Kvm { step: "register the table's interrupt", source })?;
        let platform = hardware.platform.clone();
        let floor = move || u32::try_from(platform.guest_word(GuestWord::Floor)).unwrap_or(u32::MAX);
        // It fails only when its counter is full, and then the interrupt is due already.
        let notice = move || event.write(1).unwrap_or_default();
        Ok(Some(Terms { floor: Box::new(floor), notice: Box::new(notice) }))
    }

    /// Copies the kernel and its boot data into guest RAM, and puts the first vCPU at its entry.
    fn load(&self, hardware: &Hardware, devices: &Devices, vcpus: &[VcpuFd]) -> Result<(), LaunchError> {
        let (ram, platform, boot_bytes) = (&hardware.ram, &hardware.platform, self.boot_bytes);
        let parts: Vec<_> = ram
            .map()
            .parts()
            .filter(|part| part.offset < boot_bytes)
            .map(|part| part.gpa..part.gpa + part.bytes.min(boot_bytes - part.offset))
            .collect();
        let platform_range = platform.header_gpa()..platform.doorbell_gpa() + guest_abi::call::DOORBELL_BYTES;
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

/// A running Linux guest. Its ports hold a reference to KVM's VM.
struct Linux {
    pc: Pc,
    agent: LinuxAgent,
    shares_table: bool,
}

impl Guest for Linux {
    fn facts(&self) -> &'static Facts {
        &FACTS
    }

    fn shares_table(&self) -> bool {
        self.shares_table
    }

    fn run(&self, command: Command, timeout: Duration, wanted: &dyn Fn() -> bool) -> Result<Report, AgentError> {
        self.agent.run_while(command, timeout, wanted)
    }

    fn wait_until_up(&self, timeout: Duration) -> Result<(), AgentError> {
        self.agent.wait_until_up(timeout)
    }

    fn pause(&self) {
        self.pc.serial().pause();
    }

    fn resume(&self) {
        self.pc.serial().resume();
    }

    fn stop(&self) {
        self.agent.stop();
        self.pc.serial().stop();
    }

    fn write_port(&self, port: u16, data: &[u8]) -> Option<ExitReason> {
        self.pc.write(port, data)
    }

    fn read_port(&self, port: u16, data: &mut [u8]) {
        self.pc.read(port, data);
    }

    fn press_power_button(&self) -> Result<bool, kvm_ioctls::Error> {
        self.pc.press_power_button().map(|()| true)
    }

    fn serial(&self) -> Option<&Arc<Serial>> {
        Some(self.pc.serial())
    }

    fn agent_status(&self) -> Option<LinuxAgentStatus> {
        Some(self.agent.status())
    }
}

/// The user's command line with what this machine adds, but for what a user has set already, who had a reason; the
/// shared region lies at `header`.
fn command_line(config: &VmConfig, header: u64) -> String {
    let given = &config.linux.command_line;
    let (given, init) = given.split_at(parameters_end(given));
    let name = |word: &str| word.split('=').next().map(str::to_owned);
    let header = format!("{HEADER_PARAMETER}={header:#x}");
    let ours = config.elastic.way().kernel_parameter().into_iter().chain([header.as_str()]);
    let ours = ours.filter(|ours| !given.split_whitespace().any(|word| name(word) == name(ours)));
    let words: Vec<_> =
        [given.trim_end()].into_iter().chain(ours).chain([init]).filter(|word| !word.is_empty()).collect();
    words.join(" ")
}

/// Where the kernel's parameters end: at a lone `--`, after which those of init begin.
fn parameters_end(line: &str) -> usize {
    let is_end = |at: usize| {
        let (before, after) = (&line[..at], &line[at + 2..]);
        let is_alone = before.chars().next_back().is_none_or(char::is_whitespace)
            && after.chars().next().is_none_or(char::is_whitespace);
        is_alone && before.matches('"').count() % 2 == 0
    };
    line.match_indices("--").map(|(at, _)| at).find(|at| is_end(*at)).unwrap_or(line.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LinuxConfig;

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
        assert_eq!(line("llfree.header=0x1000 quiet", "none"), "llfree.header=0x1000 quiet");
        assert_eq!(line("-- llfree.header=1", "none"), format!("{header} -- llfree.header=1"));
        let online = "memhp_default_state=online_movable";
        assert_eq!(line("quiet", "virtio-mem"), format!("quiet {online} {header}"));
        assert_eq!(line(online, "virtio-mem"), format!("{online} {header}"));
        assert_eq!(
            line("-- memhp_default_state=x", "virtio-mem"),
            format!("{online} {header} -- memhp_default_state=x")
        );
    }
}
