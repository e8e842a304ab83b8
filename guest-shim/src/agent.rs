//! [`Agent`]: one vCPU that does what the host asks and reports.
//!
//! What every agent does is in `llfree_agent_core`; here are the two loads that only this guest knows, and what only it
//! can report: installs, the state of the table, and whether its drivers have more to do.

use crate::devices::Devices;
use crate::guest::Guest;
use crate::host::{Doorbell, Host};
use crate::memory::Memory;
use crate::shared::Shared;
use crate::steady::Steady;
use agent_abi::{Command, Report};
use llfree::Tenant;

/// One vCPU and all it owns.
pub struct Agent<'a, D: Doorbell> {
    guest: Guest<'a, D>,
    work: llfree_agent_core::Agent<Guest<'a, D>>,
    vcpu: u32,
}

impl<'a, D: Doorbell> Agent<'a, D> {
    /// vCPU `vcpu` of the region `shared`, whose frames `tenant` hands out; `None` if the region
    /// has no such vCPU.
    ///
    /// # Safety
    /// `tenant` is a tenant of the region, and its hints were recounted since boot. `doorbell`
    /// makes the host look at this vCPU's mailbox, which nobody else uses as long as the agent
    /// lives.
    pub unsafe fn new(shared: &Shared, tenant: &'a Tenant<'a>, vcpu: u32, doorbell: D) -> Option<Self> {
        let mailbox = shared.mailbox(vcpu)?;
        // SAFETY: mapped as `Shared::attach` promises, and this vCPU's by contract.
        let host = unsafe { Host::new(mailbox, doorbell) };
        // SAFETY: of one region by contract.
        let memory = unsafe { Memory::new(tenant, host, shared.ram()) };
        Some(Self { guest: Guest::new(shared, memory), work: llfree_agent_core::Agent::new(vcpu), vcpu })
    }

    /// Connects it to the guest's devices; vCPU 0 brings them up. Before [`run`](Self::run).
    pub fn attach(&mut self, devices: &'a Devices) {
        self.guest.attach(devices, self.vcpu);
    }

    /// Greets the host and obeys it forever.
    pub fn run(mut self) -> ! {
        self.hello();
        loop {
            self.serve();
        }
    }

    /// Greets the host.
    pub fn hello(&mut self) {
        self.guest.memory.host.hello();
    }

    /// Waits for one command, obeys it and reports.
    pub fn serve(&mut self) {
        let command = self.guest.memory.host.wait();
        let report = self.obey(command);
        self.guest.memory.host.done(&report);
    }

    fn obey(&mut self, command: Option<Command>) -> Report {
        let Self { guest, work, .. } = self;
        let report = match command {
            Some(Command::Stream { millis, bytes, beside }) => {
                work.report(guest, |_, guest| Steady { guest, millis, beside }.stream(bytes))
            }
            Some(Command::Ftq { millis, quantum_us, beside }) => {
                work.report(guest, |_, guest| Steady { guest, millis, beside }.ftq(quantum_us))
            }
            shared => work.obey(guest, shared),
        };
        let more = guest.run_drivers(command == Some(Command::Devices));
        let stats = guest.memory.stats();
        Report {
            installs: guest.memory.installs,
            ahead: guest.memory.ahead(),
            free_frames: stats.free_frames,
            free_huge: stats.free_huge,
            more: u64::from(more),
            ..report
        }
    }
}

#[cfg(test)]
mod tests;
