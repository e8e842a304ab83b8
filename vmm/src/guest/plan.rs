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
use llfree_monitor::{TenantStart, Terms};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Facts about every guest of a kind.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Its offers to the ways of moving memory.
    pub offers: Offers,
    /// How its memory moves by default.
    pub elastic: Elastic,
    /// Its kernel's default command line.
    pub command_line: &'static str,
    /// Whether it has a console, which takes over the terminal.
    pub has_console: bool,
}

/// The parts of a machine that a guest is loaded into.
pub struct Hardware {
    /// KVM's VM, with its memory and with vCPUs that do not run yet.
    pub vm: Arc<VmFd>,
    /// Guest RAM.
    pub ram: Arc<GuestRam>,
    /// The platform region beside RAM.
    pub platform: Arc<Platform>,
    /// The vCPUs' agents, from which idle vCPUs get their work.
    pub agents: Arc<Agents>,
}

/// A machine's devices, and the host's ends of those that a status shows.
pub struct Attached {
    /// The guest that will run, with the ports and agents that it talks through.
    pub guest: Arc<dyn Guest>,
    /// All devices.
    pub devices: Devices,
    /// Disks, in the order of their flags.
    pub disks: Vec<Arc<DiskControl>>,
    /// Network cards, in the order of their flags.
    pub nets: Vec<Arc<NetCounters>>,
}

/// A guest that was checked against its configuration, and its part of each step of the launch. The
/// methods from [`platform`](Self::platform) on are called in the order in which they are listed.
pub trait Plan {
    /// The huge frames of RAM that hold its image.
    fn image(&self) -> Range<u32>;

    /// What it starts with where the table tracks its memory frame by frame.
    fn start(&self) -> TenantStart;

    /// Where the guest sees its RAM.
    fn address_map(&self) -> AddressMap;

    /// Builds the platform region.
    ///
    /// # Errors
    /// Numbers that do not fit this machine.
    fn platform(&self, limits: &KvmLimits) -> Result<Platform, BootError>;

    /// What a device calls in addition to its interrupt.
    fn notifier(&self, platform: &Arc<Platform>, agents: &Arc<Agents>) -> Notifier;

    /// Sets KVM up as far as it must be before there is a vCPU.
    ///
    /// # Errors
    /// KVM refuses a step.
    fn prepare(&self, _vm: &VmFd) -> Result<(), LaunchError> {
        Ok(())
    }

    /// The CPUID of vCPU `index`, given what KVM supports.
    ///
    /// # Errors
    /// A CPUID that KVM has no room for.
    fn cpuid(&self, _kvm: &Kvm, supported: &CpuId, _index: u32) -> Result<CpuId, LaunchError> {
        Ok(supported.clone())
    }

    /// Builds all devices; `elastic`, the one that moves memory, comes last if there is one.
    ///
    /// # Errors
    /// The host cannot create events or threads, or KVM refuses a step.
    fn devices(&mut self, hardware: &Hardware, elastic: Option<Arc<Transport>>) -> Result<Attached, LaunchError>;

    /// What it says in words of its own beside the table, if it has an allocator of its own; offers the table to it.
    ///
    /// # Errors
    /// The host cannot create an event, or KVM refuses a step.
    fn terms(&self, _hardware: &Hardware) -> Result<Option<Terms>, LaunchError> {
        Ok(None)
    }

    /// Copies the image into memory, and puts each vCPU at its start.
    ///
    /// # Errors
    /// An image that does not fit, or a step that KVM refuses.
    fn load(&self, hardware: &Hardware, devices: &Devices, vcpus: &[VcpuFd]) -> Result<(), LaunchError>;
}

/// A running guest.
pub trait Guest: Send + Sync {
    /// The facts about its kind.
    fn facts(&self) -> &'static Facts;

    /// Whether it shares a table with the host, whatever moves its memory.
    fn shares_table(&self) -> bool;

    /// Has its agent carry out a command, and waits for the report while it is `wanted`.
    ///
    /// # Errors
    /// Why there is no report.
    fn run(&self, command: Command, timeout: Duration, wanted: &dyn Fn() -> bool) -> Result<Report, AgentError>;

    /// Waits for an agent that has to boot first.
    ///
    /// # Errors
    /// The agent does not come up in time.
    fn wait_until_up(&self, _timeout: Duration) -> Result<(), AgentError> {
        Ok(())
    }

    /// Sends back vCPUs that wait for room for output, and holds input back, until
    /// [`resume`](Self::resume).
    fn pause(&self) {}

    /// Undoes [`pause`](Self::pause).
    fn resume(&self) {}

    /// Ends every wait for the guest or for room for its output, for good.
    fn stop(&self);

    /// Handles a write to an I/O port. Returns the reason if the write ends the guest.
    fn write_port(&self, _port: u16, _data: &[u8]) -> Option<ExitReason> {
        None
    }

    /// Handles a read of an I/O port: all ones, as on a bus, if nothing is there.
    fn read_port(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    /// Presses its power button; false if it has none.
    ///
    /// # Errors
    /// KVM does not take the interrupt.
    fn press_power_button(&self) -> Result<bool, kvm_ioctls::Error> {
        Ok(false)
    }

    /// Its symbols, for crash reports.
    fn kernel(&self) -> Option<&Kernel> {
        None
    }

    /// Its console.
    fn serial(&self) -> Option<&Arc<Serial>> {
        None
    }

    /// Its agent's numbers, if the agent is a program in the guest.
    fn agent_status(&self) -> Option<LinuxAgentStatus> {
        None
    }
}
