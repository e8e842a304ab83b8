//! [`Agent`]: one vCPU that does what the host asks and reports.
//!
//! It keeps two sets of counters apart: a [`Tally`] for the command at hand, and the totals since
//! boot. Between commands, `allocs - frees` is the number of blocks held.

use crate::blocks::{Blocks, Counters, Tags};
use crate::burst::{self, Burst};
use crate::churn::{Churn, Plan};
use crate::clock::Clock;
use crate::devices::Devices;
use crate::host::{Doorbell, Host};
use crate::memory::{Memory, Refusal};
use crate::rng::Rng;
use crate::samples::{Recorder, Store};
use crate::shared::Shared;
use crate::stamp::Damage;
use crate::steady::Steady;
use llfree::Tenant;
use shared_layout::Order;
use shared_layout::agent::{Command, Outcome, Report, Samples};

/// How one command went.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tally {
    outcome: Outcome,
    bytes: u64,
    blocks: u64,
    detail: u64,
    samples: Samples,
    beside_nanos: u64,
    pub(crate) damage: Damage,
}

impl Tally {
    /// Nothing done, nothing wrong.
    pub(crate) fn new() -> Self {
        Self {
            outcome: Outcome::Ok,
            bytes: 0,
            blocks: 0,
            detail: 0,
            samples: Samples::default(),
            beside_nanos: 0,
            damage: Damage::default(),
        }
    }

    /// One more block.
    pub(crate) fn add(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.blocks += 1;
    }

    /// Bytes of all blocks so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Time that went by beside the samples.
    pub(crate) fn add_beside(&mut self, nanos: u64) {
        self.beside_nanos = self.beside_nanos.saturating_add(nanos);
    }

    /// All of the samples.
    pub(crate) fn measured(&mut self, samples: Recorder<'_>) {
        self.samples = samples.finish();
    }

    /// Whether nothing was done yet.
    pub(crate) fn is_idle(&self) -> bool {
        self.blocks == 0
    }

    /// The command ends because there is no block.
    pub(crate) fn refuse(&mut self, refusal: Refusal) {
        (self.outcome, self.detail) = match refusal {
            Refusal::OutOfMemory => (Outcome::OutOfMemory, 0),
            Refusal::InstallFailed(status) => (Outcome::InstallFailed, status),
        };
    }

    /// Lost data outweighs whatever else went wrong.
    pub(crate) fn settle(mut self) -> Self {
        if self.damage.pages > 0 {
            self.outcome = Outcome::Corrupt;
        }
        self
    }
}

/// One vCPU and all it owns.
pub struct Agent<'a, D> {
    shared: Shared,
    memory: Memory<'a, D>,
    clock: Clock,
    vcpu: u32,
    blocks: Blocks,
    counters: Counters,
    samples: Store,
    commands: u64,
    /// The devices, on the vCPU that runs their drivers.
    drives: Option<&'a Devices>,
}

/// The vCPU that runs the drivers.
const DRIVER_VCPU: u32 = 0;

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
        let clock = Clock::new(shared.header().tsc_khz);
        let (blocks, counters, samples) = (Blocks::new(), Counters::default(), Store::new());
        let drives = None;
        Some(Self { shared: shared.clone(), memory, clock, vcpu, blocks, counters, samples, commands: 0, drives })
    }

    /// Connects it to the guest's devices; vCPU 0 brings them up. Before [`run`](Self::run).
    pub fn attach(&mut self, devices: &'a Devices) {
        if !Devices::exist(&self.shared) {
            return;
        }
        devices.connect(&mut self.memory);
        if self.vcpu == DRIVER_VCPU {
            devices.probe(&self.shared, &mut self.memory);
            self.drives = Some(devices);
        }
    }

    /// Greets the host and obeys it for ever.
    pub fn run(mut self) -> ! {
        self.hello();
        loop {
            self.serve();
        }
    }

    /// Greets the host.
    pub fn hello(&mut self) {
        self.memory.host.hello();
    }

    /// Waits for one command, obeys it and reports.
    pub fn serve(&mut self) {
        let command = self.memory.host.wait();
        let report = self.obey(command);
        self.memory.host.done(&report);
    }

    fn obey(&mut self, command: Option<Command>) -> Report {
        self.commands += 1;
        let start = self.clock.now();
        let tally = match command {
            Some(Command::Alloc { bytes, order, seed }) => self.alloc(bytes, order, seed),
            Some(Command::Verify) => self.verify(),
            Some(Command::Free { bytes, random, seed }) => self.free(bytes, random.then(|| Rng::new(seed))),
            Some(Command::Churn { millis, bytes, seed }) => self.churn(Plan { millis, bytes, seed }),
            Some(Command::Burst { bytes, touch, keep, single }) => {
                self.memory.single = single;
                let tally = self.burst(burst::Plan { bytes, touch, keep });
                self.memory.single = false;
                tally
            }
            Some(Command::Stream { millis, bytes, beside }) => {
                self.steady(millis, beside, |load, samples| load.stream(bytes, samples))
            }
            Some(Command::Ftq { millis, quantum_us, beside }) => {
                self.steady(millis, beside, |load, samples| load.ftq(quantum_us, samples))
            }
            Some(Command::Drain) => {
                self.samples.release(&mut self.memory);
                self.memory.drain();
                Tally::new()
            }
            Some(Command::Stats | Command::Devices) => Tally::new(),
            None => Tally { outcome: Outcome::Unknown, ..Tally::new() },
        };
        let nanos = self.clock.nanos_since(start);
        let more = self.run_drivers(command == Some(Command::Devices));
        let stats = self.memory.stats();
        Report {
            outcome: tally.outcome as u64,
            bytes: tally.bytes,
            blocks: tally.blocks,
            held_bytes: self.blocks.bytes(),
            held_blocks: self.blocks.len(),
            mismatches: tally.damage.pages,
            bad_address: tally.damage.address,
            expected: tally.damage.expected,
            found: tally.damage.found,
            detail: tally.detail,
            allocs: self.counters.allocs,
            frees: self.counters.frees,
            installs: self.memory.installs,
            ahead: self.memory.ahead(),
            free_frames: stats.free_frames,
            free_huge: stats.free_huge,
            nanos,
            more: u64::from(more),
            samples: tally.samples,
            beside_nanos: tally.beside_nanos,
            ..Report::default()
        }
    }

    fn alloc(&mut self, bytes: u64, order: Order, seed: u64) -> Tally {
        let mut tally = Tally::new();
        let mut tags = self.tags(seed);
        while tally.bytes < bytes {
            self.heed_devices();
            match self.blocks.add(&mut self.memory, &mut self.counters, order, &mut tags) {
                Ok(()) => tally.add(order.bytes()),
                Err(refusal) => {
                    tally.refuse(refusal);
                    break;
                }
            }
        }
        tally
    }

    fn verify(&mut self) -> Tally {
        let mut tally = Tally::new();
        for index in 0..self.blocks.len() {
            let bytes = self.blocks.check(&self.memory, index, &mut tally.damage);
            tally.add(bytes);
        }
        tally.settle()
    }

    fn free(&mut self, bytes: u64, mut random: Option<Rng>) -> Tally {
        let mut tally = Tally::new();
        while tally.bytes < bytes
            && let Some(index) = self.blocks.pick(random.as_mut())
        {
            tally.add(self.blocks.remove(&mut self.memory, &mut self.counters, index));
        }
        tally
    }

    fn churn(&mut self, plan: Plan) -> Tally {
        let tags = self.tags(plan.seed);
        let Self { shared, memory, clock, counters, drives, .. } = self;
        Churn { memory, counters, shared, clock: *clock, drives: *drives }.run(plan, tags)
    }

    /// Lets the drivers work if they have something to do.
    fn heed_devices(&mut self) {
        if self.drives.is_some_and(|devices| devices.have_work(&self.shared)) {
            self.run_drivers(false);
        }
    }

    /// A turn of the drivers, if this vCPU runs them; true if there is more to do.
    fn run_drivers(&mut self, tick: bool) -> bool {
        let Some(devices) = self.drives else { return false };
        devices.run(&self.shared, &mut self.memory, self.clock, tick)
    }

    fn burst(&mut self, plan: burst::Plan) -> Tally {
        // Stamps of kept blocks need no seed of the host: the command's number tells them apart.
        let tags = self.tags(0);
        let Self { memory, counters, blocks, samples, clock, .. } = self;
        match samples.record(memory) {
            Ok(samples) => Burst { memory, counters, blocks, clock: *clock }.run(plan, samples, tags),
            Err(refusal) => refused(refusal),
        }
    }

    fn steady(
        &mut self,
        millis: u64,
        beside: u64,
        load: impl FnOnce(&mut Steady<'_, 'a, D>, Recorder<'_>) -> Tally,
    ) -> Tally {
        let Self { memory, samples, clock, shared, drives, .. } = self;
        match samples.record(memory) {
            Ok(samples) => {
                load(&mut Steady { memory, shared, drives: *drives, clock: *clock, millis, beside }, samples)
            }
            Err(refusal) => refused(refusal),
        }
    }

    fn tags(&self, seed: u64) -> Tags {
        Tags::new(seed, self.vcpu, self.commands)
    }
}

fn refused(refusal: Refusal) -> Tally {
    let mut tally = Tally::new();
    tally.refuse(refusal);
    tally
}

#[cfg(test)]
mod tests;
