//! [`Vm::launch`]: from a configuration to running vCPUs.
//!
//! A launch is a list of steps, each of which needs only what earlier ones made. The order matters
//! twice: a configuration is refused before guest memory is allocated, and memory exists before KVM
//! hears of it. Kinds of guests differ inside the steps ([`Plan`]), ways of moving memory in one of
//! them ([`Way::build`](crate::elastic::Way::build)).

use super::end::{End, ExitNotifier};
use super::guest_tables::GuestTables;
use super::{Vm, devices};
use crate::agent::Agents;
use crate::boot::{self, Image, KvmLimits, Platform};
use crate::config::VmConfig;
use crate::doorbell::Doorbell;
use crate::elastic::{Elasticity, Need, Parts};
use crate::error::LaunchError;
use crate::exit::ExitReason;
use crate::guest::{self, Attached, Hardware, Plan};
use crate::parking::EndsWith;
use crate::roles;
use crate::vcpu::{self, VcpuContext, VcpuHandle};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use llfree_base::identity::this_process;
use llfree_base::units::Bytes;
use llfree_monitor::auto::AutoReclaim;
use llfree_monitor::memory::{GuestRam, Supply, UseUserfaultfd};
use llfree_monitor::{Ending, Monitor, OnViolation, TenantStart, Violations};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use shared_layout::HUGE_SIZE;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// How long an idle vCPU may take to give its cached frames back during a shrink.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(100);

/// Guest memory, its owner, and the policy for violations.
struct Memory {
    ram: Arc<GuestRam>,
    monitor: Arc<Monitor>,
    on_violation: OnViolation,
}

impl Vm {
    /// Builds and starts a VM.
    ///
    /// # Errors
    /// [`LaunchError`]. If a vCPU's thread cannot be started, the ones before it ran for an instant.
    pub fn launch(config: VmConfig) -> Result<Self, LaunchError> {
        let started = Instant::now();
        let image = image_of(&config)?;
        let mut plan = guest::plan(&config, &image)?;
        let (kvm, limits) = open_host(&config)?;
        let platform = Arc::new(plan.platform(&limits)?);
        let agents = Arc::new(Agents::new(config.cpus).with_tick(config.elastic.way().tick()));
        let memory = take_memory(&config, &*plan, &platform)?;
        let elastic = build_elasticity(&config, &*plan, &memory, &platform, &agents)?;
        let vm = Arc::new(create_vm(&kvm, &memory.ram, &platform)?);
        plan.prepare(&vm)?;
        let vcpus = create_vcpus(&kvm, &vm, &config, &*plan, &platform)?;
        let hardware = Hardware { vm, ram: memory.ram.clone(), platform, agents };
        let attached = plan.devices(&hardware, elastic.transport().cloned())?;
        if let Some(terms) = plan.terms(&hardware)? {
            memory.monitor.agree(terms);
        }
        plan.load(&hardware, &attached.devices, &vcpus)?;
        drop(plan);
        let machine = Self::assemble(started, config, &memory, (hardware, attached), elastic)?;
        machine.start_vcpus(vcpus)?;
        Ok(machine)
    }

    /// Puts the machine together, with all its threads except those of the vCPUs.
    fn assemble(
        started: Instant,
        mut config: VmConfig,
        memory: &Memory,
        (hardware, attached): (Hardware, Attached),
        elastic: Arc<dyn Elasticity>,
    ) -> Result<Self, LaunchError> {
        let host = |step| move |source| LaunchError::Host { step, source };
        config.forget_contents();
        vcpu::prepare_kick().map_err(|error| host("install the signal that stops vCPUs")(error.into()))?;
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host("create an event for the guest's end"))?;
        let Hardware { vm, platform, agents, .. } = hardware;
        let Attached { guest, devices, disks, nets } = attached;
        let grows_on_need = config.elastic.way().grows_on_need();
        let devices = Arc::new(devices);
        let workers = devices::start(&vm, &devices, &config.threads)?;
        let monitor = memory.monitor.clone();
        let vcpus: Vec<_> = (0..config.cpus).map(|index| Arc::new(VcpuHandle::new(index))).collect();
        let exit_notifier = ExitNotifier {
            end: Arc::new(End::default()),
            event: Arc::new(event),
            agents: agents.clone(),
            guest: Arc::downgrade(&guest),
            vcpus: vcpus.clone(),
        };
        let on_end = exit_notifier.clone();
        // Whoever asked for a userfaultfd does not want to go on without one.
        let must = config.install.userfaultfd == UseUserfaultfd::On;
        let end = move |ending| {
            on_end.notify(match ending {
                Ending::Violation(violation) => ExitReason::Violation(violation),
                Ending::Unwatched(error) => ExitReason::Unwatched(error),
            });
        };
        let violations = Violations::watch(
            monitor.clone(),
            identify(vcpus.clone()),
            memory.on_violation,
            must,
            end,
            &config.threads,
        )
        .map_err(host("start the thread that handles violations"))?;
        let no_statistics = |error: &std::io::Error| log::debug!("KVM keeps no statistics of the VM: {error}");
        let guest_tables = GuestTables::open(&vm).inspect_err(no_statistics).ok();
        Ok(Self {
            _vm: vm,
            guest_tables,
            guest,
            auto_reclaim: AutoReclaim::new(monitor.clone(), config.threads.clone()),
            doorbell: Arc::new(Doorbell::new(platform.clone(), monitor.clone(), agents.clone(), grows_on_need)),
            config,
            platform,
            monitor,
            agents,
            devices,
            disks,
            nets,
            elastic,
            workers: Mutex::new(workers),
            vcpus,
            violations,
            life: Default::default(),
            pursuit: Default::default(),
            exit_notifier,
            started,
            next_seed: AtomicU32::new(1),
            cgroup: OnceLock::new(),
        })
    }

    /// Starts the vCPUs' threads. If one cannot start, the caller drops the machine, which stops the others.
    fn start_vcpus(&self, vcpus: Vec<VcpuFd>) -> Result<(), LaunchError> {
        vcpus.into_iter().zip(0..).try_for_each(|(vcpu, index)| self.start_vcpu(vcpu, index))
    }

    fn start_vcpu(&self, fd: VcpuFd, index: u32) -> Result<(), LaunchError> {
        let vcpu = &self.vcpus[index as usize];
        let context = VcpuContext {
            platform: self.platform.clone(),
            doorbell: self.doorbell.clone(),
            devices: self.devices.clone(),
            guest: self.guest.clone(),
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
            // Dropped last: once the thread counts as gone, the reason is known.
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

/// The image that the VM runs: the configured one, or the built-in one.
fn image_of(config: &VmConfig) -> Result<Arc<Image>, LaunchError> {
    match &config.kernel {
        Some(image) => Ok(image.clone()),
        #[cfg(feature = "embedded-guest")]
        None => Ok(Arc::new(Image::parse("the embedded guest", images::SHIM_ELF.to_vec())?)),
        #[cfg(not(feature = "embedded-guest"))]
        None => Err(LaunchError::NoImage),
    }
}

/// Opens KVM, and checks that it can run the configured vCPUs on cores that this process may use.
fn open_host(config: &VmConfig) -> Result<(Kvm, KvmLimits), LaunchError> {
    let kvm = boot::open_kvm()?;
    let limits = boot::limits(&kvm)?;
    if config.cpus == 0 || config.cpus > limits.max_vcpus {
        return Err(LaunchError::Cpus { asked: config.cpus, limit: limits.max_vcpus });
    }
    check_cores(&config.pin)?;
    Ok((kvm, limits))
}

/// Maps guest RAM, and puts the monitor in charge of it.
fn take_memory(config: &VmConfig, plan: &dyn Plan, platform: &Platform) -> Result<Memory, LaunchError> {
    let (pool, on_violation, use_userfaultfd) = config.supply()?;
    let ram = Arc::new(GuestRam::with_map(config.memory.0, config.backing, plan.address_map())?);
    let supply = Supply::new(ram.clone(), pool, use_userfaultfd, &config.threads)?;
    let table = platform.table().clone();
    let way = config.elastic.way();
    let monitor = if way.needs() == Need::Table {
        Monitor::new(ram.clone(), supply, table, TenantStart { populated: way.starts_installed(), ..plan.start() })?
    } else {
        // Null pointers fault in frame 0.
        let (unusable, installed) = (0..1, vec![plan.image()]);
        let start = TenantStart { threads: config.cpus, unusable, installed, ..TenantStart::default() };
        // RAM has at most 2^25 huge frames.
        let frames = |bytes: Bytes| (bytes.0 / HUGE_SIZE) as u32;
        let kept_back = frames(way.boot_bytes(config.memory))..frames(config.memory);
        Monitor::untracked(ram.clone(), supply, table, start, kept_back)?
    };
    Ok(Memory { ram, monitor: Arc::new(monitor), on_violation })
}

/// Builds what moves that memory.
fn build_elasticity(
    config: &VmConfig,
    plan: &dyn Plan,
    memory: &Memory,
    platform: &Arc<Platform>,
    agents: &Arc<Agents>,
) -> Result<Arc<dyn Elasticity>, LaunchError> {
    let (idle, asleep) = (agents.clone(), agents.clone());
    let parts = Parts {
        ram: &memory.ram,
        monitor: &memory.monitor,
        notifier: plan.notifier(platform, agents),
        nudge: Box::new(move || asleep.notify_driver()),
        words: platform.clone(),
        // Whether it drained does not matter: the passes that follow look again.
        drain: Box::new(move || {
            idle.drain_if_idle(DRAIN_TIMEOUT);
        }),
    };
    Ok(config.elastic.way().build(parts)?)
}

/// Creates KVM's VM with all its memory.
fn create_vm(kvm: &Kvm, ram: &GuestRam, platform: &Platform) -> Result<VmFd, LaunchError> {
    let vm = new_vm(kvm).map_err(|source| LaunchError::Kvm { step: "create a VM", source })?;
    let slots = ram.map().parts().map(|part| (part.gpa, ram.host_address() + part.offset, part.bytes));
    for (slot, (gpa, host_address, bytes)) in slots.chain([platform.memslot()]).enumerate() {
        add_memslot(&vm, slot as u32, gpa, host_address, bytes)?;
    }
    Ok(vm)
}

/// Creates the vCPUs with their CPUID; they do not run yet.
fn create_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    config: &VmConfig,
    plan: &dyn Plan,
    platform: &Platform,
) -> Result<Vec<VcpuFd>, LaunchError> {
    let failed = |step| move |source| LaunchError::Kvm { step, source };
    let supported =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("list the CPU features it supports"))?;
    let create = |index: u32| {
        let vcpu = vm.create_vcpu(index.into()).map_err(failed("create a vCPU"))?;
        vcpu.set_cpuid2(&plan.cpuid(kvm, &supported, index)?).map_err(failed("set a vCPU's features"))?;
        if index == 0 {
            // An unknown frequency only costs the guest its clock.
            platform.set_tsc_khz(vcpu.get_tsc_khz().map_or(0, u64::from));
        }
        Ok(vcpu)
    };
    (0..config.cpus).map(create).collect()
}

/// Maps a thread id of this process to the vCPU that it runs.
fn identify(vcpus: Vec<Arc<VcpuHandle>>) -> impl Fn(i32) -> Option<u32> {
    move |thread| {
        let vcpu = vcpus.iter().position(|vcpu| vcpu.counters().thread.load(Ordering::Relaxed) == thread)?;
        u32::try_from(vcpu).ok()
    }
}

fn check_cores(cores: &[u32]) -> Result<(), LaunchError> {
    if cores.is_empty() {
        return Ok(());
    }
    // The first thread's: the one that launches may be pinned itself.
    let set = sched_getaffinity(Pid::from_raw(this_process()))
        .map_err(|e| LaunchError::Host { step: "list the cores this process may use", source: e.into() })?;
    let allowed: Vec<u32> = (0..CpuSet::MAX_CPU as u32).filter(|core| set.is_set(*core as usize)).collect();
    match cores.iter().find(|core| !allowed.contains(core)) {
        Some(core) => Err(LaunchError::Pin { core: *core, allowed }),
        None => Ok(()),
    }
}

/// Pins the calling thread to one core, which [`check_cores`] has accepted.
fn pin_to(core: u32) -> rustix::io::Result<()> {
    let mut set = CpuSet::new();
    set.set(core as usize);
    sched_setaffinity(None, &set)
}

/// Retries when a signal interrupts KVM; acting on the signal is up to its handler.
fn new_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
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
