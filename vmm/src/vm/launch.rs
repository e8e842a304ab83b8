//! [`Vm::launch`]: from a configuration to running vCPUs.
//!
//! The order matters twice: what can be refused is refused before there is memory, and the memory
//! is there before KVM hears of it. Guests of ours and Linux take the same steps; where they
//! differ, the step says so or is in [`linux`](super::linux).

use super::config::VmConfig;
use super::error::LaunchError;
use super::linux::Plan;
use super::{End, ExitNotifier, Vm, devices};
use crate::agent::Agents;
use crate::boot::{self, Image, Kernel, LinuxError, Platform};
use crate::devices::Devices;
use crate::doorbell::Doorbell;
use crate::elastic::{Elastic, ElasticDevice};
use crate::exit::ExitReason;
use crate::parking::EndsWith;
use crate::roles;
use crate::vcpu::{self, Guest, VcpuContext, VcpuHandle};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use llfree_base::units::Bytes;
use llfree_monitor::auto::AutoReclaim;
use llfree_monitor::memory::{AddressMap, GuestRam, Supply};
use llfree_monitor::{Monitor, Occupied, Violations};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use shared_layout::HUGE_SIZE;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

impl Vm {
    /// Builds and starts a VM.
    ///
    /// # Errors
    /// [`LaunchError`]. When a vCPU's thread cannot be started, those before it ran for an instant.
    pub fn launch(mut config: VmConfig) -> Result<Self, LaunchError> {
        let started = Instant::now();
        let image = match &config.kernel {
            Some(image) => image.clone(),
            None => Arc::new(Image::parse("the embedded guest", images::SHIM_ELF.to_vec())?),
        };
        let (mut plan, frames) = match &*image {
            Image::Own(kernel) => (None, check_own(&config, kernel)?),
            Image::Linux(kernel) => (Some(Plan::new(&config, kernel)?), 0..0),
        };
        let kvm = boot::open_kvm()?;
        let limits = boot::limits(&kvm)?;
        if config.cpus == 0 || config.cpus > limits.max_vcpus {
            return Err(LaunchError::Cpus { asked: config.cpus, limit: limits.max_vcpus });
        }
        check_cores(&config.pin)?;
        let memory = config.memory.0;
        let map = plan.as_ref().map_or_else(|| AddressMap::flat(memory), |plan| plan.map);
        let platform = Arc::new(match plan {
            None => Platform::new(memory, config.cpus, limits.address_bits)?,
            Some(_) => Platform::above(map.end(), memory, config.cpus, limits.address_bits)?,
        });
        let (pool, on_violation, use_userfaultfd) =
            config.install.resolve(config.memory, config.backing, config.elastic == Elastic::Llfree)?;
        let ram = Arc::new(GuestRam::with_map(memory, config.backing, map)?);
        let supply = Supply::new(ram.clone(), pool, use_userfaultfd, &config.threads)?;
        let agents = Arc::new(Agents::new(config.cpus).with_tick(config.elastic.tick()));
        let notifier = match plan {
            None => devices::interrupt(platform.clone(), agents.clone()),
            // It has real interrupts.
            Some(_) => Box::new(|| {}),
        };
        let elastic = ElasticDevice::new(&config.elastic, &ram, &frames, notifier)?;
        let table = platform.table().clone();
        // Null pointers fault in frame 0.
        let occupied = Occupied { unusable: 0..1, installed: frames };
        let monitor = Arc::new(match config.elastic {
            Elastic::Llfree => Monitor::new(ram.clone(), supply, table, occupied)?,
            _ => Monitor::untracked(ram.clone(), supply, table, occupied, config.elastic.kept_back(memory))?,
        });

        let vm = Arc::new(create_vm(&kvm).map_err(|source| LaunchError::Kvm { step: "create a VM", source })?);
        let (gpa, host_address, bytes) = platform.memslot();
        let slots = ram.map().parts().map(|part| (part.gpa, ram.host_address() + part.offset, part.bytes));
        for (slot, (gpa, host_address, bytes)) in slots.chain([(gpa, host_address, bytes)]).enumerate() {
            add_memslot(&vm, slot as u32, gpa, host_address, bytes)?;
        }
        if let Some(plan) = &plan {
            plan.prepare(&vm)?;
        }
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|source| LaunchError::Kvm { step: "tell which CPU features it supports", source })?;
        let mut fds = Vec::new();
        for index in 0..config.cpus {
            let fd = vm
                .create_vcpu(u64::from(index))
                .map_err(|source| LaunchError::Kvm { step: "create a vCPU", source })?;
            let cpuid = plan.as_ref().map(|plan| plan.cpuid(&kvm, &supported, index)).transpose()?;
            fd.set_cpuid2(cpuid.as_ref().unwrap_or(&supported))
                .map_err(|source| LaunchError::Kvm { step: "set a vCPU's features", source })?;
            if index == 0 {
                // An unknown frequency only costs the guest its clock.
                platform.set_tsc_khz(fd.get_tsc_khz().map_or(0, u64::from));
            }
            fds.push(fd);
        }
        let transport = elastic.as_ref().map(|device| device.transport().clone());
        let (devices, linux) = match &mut plan {
            None => {
                let devices = Devices::new(platform.devices_gpa(), transport.into_iter().collect());
                if devices.count() > 0 {
                    platform.set_devices(devices.count());
                }
                (devices, None)
            }
            Some(plan) => {
                let (devices, parts) = plan.devices(&vm, &ram, transport)?;
                (devices, Some(parts))
            }
        };
        match (&plan, &*image) {
            (Some(plan), _) => plan.load(&ram, &platform, &devices, &fds)?,
            (None, Image::Own(kernel)) => {
                // It writes to frames that are there: a fault would wait for a thread that is not.
                kernel.load(ram.guest_memory())?;
                for (index, fd) in fds.iter().enumerate() {
                    platform.enter(fd, index as u32, kernel.entry())?;
                }
            }
            // Linux has a plan.
            (None, Image::Linux(_)) => {}
        }
        vcpu::prepare_kick()
            .map_err(|e| LaunchError::Host { step: "install the signal that stops vCPUs", source: e.into() })?;
        let end_event = EventFd::new(EFD_NONBLOCK)
            .map_err(|source| LaunchError::Host { step: "make an event for the guest's end", source })?;

        let devices = Arc::new(devices);
        let workers = devices::start(&vm, &devices, &config.threads)?;
        let doorbell = Arc::new(Doorbell::new(platform.clone(), monitor.clone(), agents.clone()));
        let vcpus: Vec<_> = (0..config.cpus).map(|index| Arc::new(VcpuHandle::new(index))).collect();
        let exit_notifier = ExitNotifier {
            end: Arc::new(End::default()),
            event: Arc::new(end_event),
            agents: agents.clone(),
            linux_agent: linux.as_ref().map(|parts| parts.agent.clone()),
        };
        let on_end = exit_notifier.clone();
        let end = move |violation| on_end.notify(ExitReason::Violation(violation));
        let violations =
            Violations::watch(monitor.clone(), identify(vcpus.clone()), on_violation, end, &config.threads)
                .map_err(|source| LaunchError::Host { step: "start the thread that sees violations", source })?;
        drop(plan);
        if let Image::Linux(kernel) = &*image {
            // The guest has both by now, and the host is not to pay for them twice.
            config.kernel = Some(Arc::new(Image::Linux(kernel.without_image())));
            config.linux.initrd = None;
        }
        let guest = match &linux {
            Some(parts) => Guest::Linux(parts.pc.clone()),
            None => Guest::Own(image),
        };
        let auto_reclaim = AutoReclaim::new(monitor.clone(), config.threads.clone());
        let machine = Self {
            _vm: vm,
            vcpus,
            config,
            platform,
            auto_reclaim,
            monitor,
            agents,
            linux,
            doorbell,
            devices,
            elastic,
            workers: Mutex::new(workers),
            violations,
            life: Default::default(),
            exit_notifier,
            started,
            next_seed: AtomicU32::new(1),
            cgroup: OnceLock::new(),
        };
        for (index, fd) in fds.into_iter().enumerate() {
            // A thread that cannot start drops the machine, which stops those that did.
            machine.start_vcpu(fd, index as u32, &guest)?;
        }
        Ok(machine)
    }

    fn start_vcpu(&self, fd: VcpuFd, index: u32, guest: &Guest) -> Result<(), LaunchError> {
        let vcpu = &self.vcpus[index as usize];
        let context = VcpuContext {
            platform: self.platform.clone(),
            doorbell: self.doorbell.clone(),
            devices: self.devices.clone(),
            guest: guest.clone(),
            vcpu: vcpu.clone(),
        };
        let core = self.config.pin.get(index as usize % self.config.pin.len().max(1)).copied();
        let exit_notifier = self.exit_notifier.clone();
        let pin = move || {
            if let Some(core) = core
                && let Err(error) = pin_to(core)
            {
                log::warn!("vCPU {index} could not be pinned to core {core}: {error}");
            }
        };
        let body = move || {
            // Last: whoever sees it gone finds the reason.
            let _end = EndsWith(context.vcpu.parking());
            if let Some(reason) = vcpu::run(fd, &context) {
                exit_notifier.notify(reason);
            }
        };
        let thread = self
            .config
            .threads
            .spawn_after(format!("vcpu{index}"), roles::VCPU, pin, body)
            .map_err(|source| LaunchError::Host { step: "start a vCPU's thread", source })?;
        vcpu.started(thread);
        Ok(())
    }
}

/// Tells which vCPU a thread of this process is.
fn identify(vcpus: Vec<Arc<VcpuHandle>>) -> impl Fn(i32) -> Option<u32> {
    move |thread| {
        let vcpu = vcpus.iter().position(|vcpu| vcpu.counters().thread.load(Ordering::Relaxed) == thread)?;
        u32::try_from(vcpu).ok()
    }
}

/// Checks a guest of ours against its configuration: the huge frames of its image.
fn check_own(config: &VmConfig, kernel: &Kernel) -> Result<std::ops::Range<u32>, LaunchError> {
    let linux = &config.linux;
    let flags = [
        ("--initrd", linux.initrd.is_some()),
        ("--append", !linux.command_line.is_empty()),
        ("--disk", !linux.disks.is_empty()),
        ("--net", !linux.nets.is_empty()),
    ];
    if let Some((flag, _)) = flags.into_iter().find(|(_, given)| *given) {
        let guest = if config.kernel.is_some() { kernel.name() } else { "the built-in guest" };
        return Err(LinuxError::NotLinux { flag, guest: guest.to_owned() }.into());
    }
    let frames = kernel.huge_frames();
    let least = Bytes(u64::from(frames.end) * HUGE_SIZE);
    if config.kernel.is_none() && config.memory < least {
        return Err(LaunchError::TooSmall { memory: config.memory, least });
    }
    kernel.check_fits(config.memory.0)?;
    Ok(frames)
}

fn check_cores(cores: &[u32]) -> Result<(), LaunchError> {
    if cores.is_empty() {
        return Ok(());
    }
    // Of the first thread, as the one that launches may sit on a core itself.
    let set = sched_getaffinity(Some(rustix::process::getpid()))
        .map_err(|e| LaunchError::Host { step: "tell which cores this process may use", source: e.into() })?;
    let allowed: Vec<u32> = (0..CpuSet::MAX_CPU as u32).filter(|core| set.is_set(*core as usize)).collect();
    match cores.iter().find(|core| !allowed.contains(core)) {
        Some(core) => Err(LaunchError::Pin { core: *core, allowed }),
        None => Ok(()),
    }
}

/// Keeps the calling thread on one core, which [`check_cores`] knows.
fn pin_to(core: u32) -> rustix::io::Result<()> {
    let mut set = CpuSet::new();
    set.set(core as usize);
    sched_setaffinity(None, &set)
}

/// KVM gives up on a new VM when a signal comes; the signal's own handler is what acts on it.
fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            other => return other,
        }
    }
}

fn add_memslot(vm: &VmFd, slot: u32, gpa: u64, host_address: u64, bytes: u64) -> Result<(), LaunchError> {
    let region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: gpa,
        memory_size: bytes,
        userspace_addr: host_address,
    };
    // SAFETY: the range is a mapping that outlives the VM's fd and those of its vCPUs: in `launch`
    // it was made before them, in `Vm` it is dropped after them, and a vCPU's thread owns a share of
    // it. Guest and host both expect the other to change it at any time.
    unsafe { vm.set_user_memory_region(region) }.map_err(|source| LaunchError::Memslot {
        gpa,
        memory: Bytes(bytes),
        source,
    })
}
