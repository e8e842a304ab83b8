//! [`Plan`] and [`Guest`]: a kind of guest before and after its machine starts.

use crate::agent::{AgentError, Agents};
use crate::boot::Kernel;
use crate::boot::{BootError, KvmLimits, Platform};
use crate::devices::Devices;
use crate::devices::blk::DiskControl;
use crate::devices::irq::Notifier;
use crate::devices::mmio::Transport;
use crate::devices::net::NetCounters;
use crate::devices::serial::Serial;
use crate::elastic::{Elastic, Offers};
use crate::error::LaunchError;
use crate::exit::ExitReason;
use agent_abi::{Command, Report};
use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use llfree_control::report::LinuxAgentStatus;
use llfree_monitor::memory::{AddressMap, GuestRam};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// What is so for every guest of a kind.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// What it offers to ways of moving memory.
    pub offers: Offers,
    /// How its memory moves when nobody chooses.
    pub elastic: Elastic,
    /// Its kernel's command line when nobody writes one.
    pub command_line: &'static str,
    /// Whether it has a console, which takes the terminal.
    pub has_console: bool,
}

/// The parts of a machine that a guest is loaded into.
pub struct Hardware {
    /// KVM's VM, with memory and without vCPUs.
    pub vm: Arc<VmFd>,
    /// Guest RAM.
    pub ram: Arc<GuestRam>,
    /// The region beside it.
    pub platform: Arc<Platform>,
    /// What vCPUs ask for work.
    pub agents: Arc<Agents>,
}

/// A machine's devices, and the host's ends of those that people see.
pub struct Attached {
    /// All of them.
    pub devices: Devices,
    /// Disks, in the order of their flags.
    pub disks: Vec<Arc<DiskControl>>,
    /// Network cards, in the order of their flags.
    pub nets: Vec<Arc<NetCounters>>,
}

/// A guest that was checked against its configuration, and its part in each step of the launch, in
/// this order.
pub trait Plan {
    /// What is so for its kind.
    fn facts(&self) -> &'static Facts;

    /// The huge frames of RAM that hold its image.
    fn image(&self) -> Range<u32>;

    /// Where it sees its RAM.
    fn address_map(&self) -> AddressMap;

    /// Makes the region beside RAM.
    ///
    /// # Errors
    /// Numbers that do not fit this machine.
    fn platform(&self, limits: &KvmLimits) -> Result<Platform, BootError>;

    /// What a device calls beside its interrupt.
    fn notifier(&self, platform: &Arc<Platform>, agents: &Arc<Agents>) -> Notifier;

    /// What KVM must know before there is a vCPU.
    ///
    /// # Errors
    /// KVM's.
    fn prepare(&self, _vm: &VmFd) -> Result<(), LaunchError> {
        Ok(())
    }

    /// What vCPU `index` is, of what KVM supports.
    ///
    /// # Errors
    /// Features that the kind cannot do without.
    fn cpuid(&self, _kvm: &Kvm, supported: &CpuId, _index: u32) -> Result<CpuId, LaunchError> {
        Ok(supported.clone())
    }

    /// All devices, with the one that moves memory, if one does, as the last.
    ///
    /// # Errors
    /// A host without events, or KVM's.
    fn devices(&mut self, hardware: &Hardware, elastic: Option<Arc<Transport>>) -> Result<Attached, LaunchError>;

    /// Puts the image into memory, and each vCPU where it starts.
    ///
    /// # Errors
    /// An image that does not fit, or KVM's.
    fn load(&self, hardware: &Hardware, devices: &Devices, vcpus: &[VcpuFd]) -> Result<(), LaunchError>;

    /// The guest that runs then.
    fn guest(&self, hardware: &Hardware) -> Arc<dyn Guest>;
}

/// A guest that runs.
pub trait Guest: Send + Sync {
    /// What is so for its kind.
    fn facts(&self) -> &'static Facts;

    /// Has its agent carry a command out.
    ///
    /// # Errors
    /// Why there is no report.
    fn run(&self, command: Command, timeout: Duration) -> Result<Report, AgentError>;

    /// Waits for an agent that has to boot first.
    ///
    /// # Errors
    /// If it does not come up in time.
    fn wait_until_up(&self, _timeout: Duration) -> Result<(), AgentError> {
        Ok(())
    }

    /// Sends vCPUs back that wait for room for its output, and keeps input outside, until
    /// [`resume`](Self::resume).
    fn pause(&self) {}

    /// It runs again.
    fn resume(&self) {}

    /// Ends what waits for the guest, or for room for its output.
    fn stop(&self);

    /// A write to an I/O port; the guest's end, if that is what the port is for.
    fn write_port(&self, _port: u16, _data: &[u8]) -> Option<ExitReason> {
        None
    }

    /// A read of an I/O port: ones, as on a bus, if nothing is there.
    fn read_port(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    /// Its symbols, for crash reports.
    fn kernel(&self) -> Option<&Kernel> {
        None
    }

    /// Its console.
    fn serial(&self) -> Option<&Arc<Serial>> {
        None
    }

    /// Its agent's numbers, if that is a program.
    fn agent_status(&self) -> Option<LinuxAgentStatus> {
        None
    }
}
