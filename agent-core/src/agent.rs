//! [`Agent`]: one command after another, and the report of each.
//!
//! It keeps two sets of counters apart: a [`Tally`] for the command at hand, and the totals since
//! it started. Between commands, allocations less frees is the number of blocks held.

use crate::burst;
use crate::churn::{Churn, Plan};
use crate::rng::Rng;
use crate::source::{Blocks, Clock, System};
use crate::stamp::Tags;
use crate::tally::{Counters, Tally};
use agent_abi::{Command, Report};
use shared_layout::Order;

/// An agent's memory and its record of work. Each method is given the system that the first one was given.
#[derive(Debug)]
pub struct Agent<S: System> {
    number: u32,
    held: S::Blocks,
    counters: Counters,
    commands: u64,
}

impl<S: System> Agent<S> {
    /// The agent with this number among those of its guest; it holds no block.
    #[must_use]
    pub fn new(number: u32) -> Self {
        Self { number, held: S::Blocks::default(), counters: Counters::default(), commands: 0 }
    }

    /// The blocks that the host told it to allocate.
    pub fn held(&self) -> &S::Blocks {
        &self.held
    }

    /// Does what the host asks and reports on it; `None` stands for words that are not a command. What only the system
    /// knows, such as how much memory is free, is left 0.
    pub fn obey(&mut self, system: &mut S, command: Option<Command>) -> Report {
        self.report(system, |agent, system| agent.work(system, command))
    }

    /// Reports on a command that only this system's agent knows how to do, as [`obey`](Self::obey) does on the others.
    pub fn report(&mut self, system: &mut S, work: impl FnOnce(&mut Self, &mut S) -> Tally) -> Report {
        self.commands += 1;
        let clock = system.clock();
        let start = clock.now();
        let tally = work(self, system);
        Report {
            held_bytes: self.held.bytes(),
            held_blocks: self.held.len(),
            allocs: self.counters.allocs,
            frees: self.counters.frees,
            nanos: clock.nanos_since(start),
            ..tally.report()
        }
    }

    fn work(&mut self, system: &mut S, command: Option<Command>) -> Tally {
        match command {
            Some(Command::Alloc { bytes, order, seed }) => self.alloc(system, bytes, order, seed),
            Some(Command::Verify) => self.verify(system),
            Some(Command::Free { bytes, random, seed }) => self.free(system, bytes, random.then(|| Rng::new(seed))),
            Some(Command::Churn { millis, bytes, seed }) => {
                let tags = self.tags(seed);
                Churn::new(system, &mut self.counters, Plan { millis, bytes, seed }, tags).run()
            }
            Some(Command::Burst { bytes, touch, keep, single }) => {
                // Stamps of kept blocks need no seed of the host: the command's number tells them apart.
                let mut tags = self.tags(0);
                let plan = burst::Plan { bytes, touch, keep, single };
                burst::run(system, &mut self.held, &mut self.counters, plan, &mut tags)
            }
            Some(Command::Drain) => {
                system.drain();
                Tally::new()
            }
            // Drivers, where there are any, run outside the time that a command takes.
            Some(Command::Stats | Command::Devices) => Tally::new(),
            Some(Command::Stream { .. } | Command::Ftq { .. }) | None => Tally::unknown(),
        }
    }

    fn alloc(&mut self, system: &mut S, bytes: u64, order: Order, seed: u64) -> Tally {
        let (mut tally, mut tags) = (Tally::new(), self.tags(seed));
        let (blocks, result) = system.fill(&mut self.held, order, bytes.div_ceil(order.bytes()), &mut tags);
        self.counters.allocs += blocks;
        tally.add_all(blocks, blocks * order.bytes());
        if let Err(refusal) = result {
            tally.refuse(refusal);
        }
        tally
    }

    fn verify(&self, system: &S) -> Tally {
        let mut tally = Tally::new();
        for index in 0..self.held.len() {
            let bytes = system.check(&self.held, index, &mut tally.damage);
            tally.add(bytes);
        }
        tally.settle()
    }

    fn free(&mut self, system: &mut S, bytes: u64, mut random: Option<Rng>) -> Tally {
        let mut tally = Tally::new();
        while tally.bytes() < bytes
            && let Some(index) = self.held.pick(random.as_mut())
        {
            let block = system.remove(&mut self.held, index);
            tally.add(system.give(block));
            self.counters.frees += 1;
        }
        tally
    }

    fn tags(&self, seed: u64) -> Tags {
        Tags::new(seed, self.number, self.commands)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Model;
    use crate::source::Refusal;
    use agent_abi::{Outcome, Touch};
    use shared_layout::{FRAME_SIZE, HUGE_SIZE};

    const ALL: Command = Command::Free { bytes: u64::MAX, random: false, seed: 0 };
    const BURST: Command = Command::Burst { bytes: 6 * HUGE_SIZE, touch: Touch::Pages, keep: true, single: false };

    fn alloc(bytes: u64, order: Order) -> Command {
        Command::Alloc { bytes, order, seed: 1 }
    }

    fn order(agent: &mut Agent<Model>, model: &mut Model, command: Command) -> (Option<Outcome>, Report) {
        let report = agent.obey(model, Some(command));
        assert_eq!(report.allocs - report.frees, report.held_blocks, "{report:?}");
        assert_eq!(report.held_bytes, model.used, "{report:?}");
        (Outcome::from_word(report.outcome), report)
    }

    #[test]
    fn sizes_are_rounded_up_to_whole_blocks() {
        let (mut agent, mut model) = (Agent::new(0), Model::new(u64::MAX));
        let (outcome, report) = order(&mut agent, &mut model, alloc(2 * HUGE_SIZE + 1, Order::HUGE));
        assert_eq!((outcome, report.blocks, report.bytes), (Some(Outcome::Ok), 3, 3 * HUGE_SIZE));
        let freed = order(&mut agent, &mut model, Command::Free { bytes: 1, random: true, seed: 3 }).1;
        assert_eq!((freed.blocks, freed.bytes, freed.held_blocks), (1, HUGE_SIZE, 2));
        assert_eq!(order(&mut agent, &mut model, ALL).1.held_blocks, 0);
    }

    #[test]
    fn a_refusal_ends_a_command_and_is_reported_and_what_was_got_is_kept() {
        for refusal in [Refusal::OutOfMemory, Refusal::InstallFailed(4)] {
            let (mut agent, mut model) = (Agent::new(0), Model::new(3 * HUGE_SIZE));
            model.refusal = refusal;
            let expected = match refusal {
                Refusal::OutOfMemory => (Some(Outcome::OutOfMemory), 0),
                Refusal::InstallFailed(status) => (Some(Outcome::InstallFailed), status),
            };
            let (outcome, report) = order(&mut agent, &mut model, alloc(u64::MAX, Order::HUGE));
            assert_eq!(((outcome, report.detail), report.held_blocks), (expected, 3));
            order(&mut agent, &mut model, ALL);
            let (outcome, report) = order(&mut agent, &mut model, BURST);
            assert_eq!(((outcome, report.detail), report.samples.count), (expected, 3));
            let (outcome, report) = order(&mut agent, &mut model, Command::Verify);
            assert_eq!((outcome, report.blocks), (Some(Outcome::Ok), 3));
        }
    }

    #[test]
    fn damage_outweighs_everything_else() {
        let (mut agent, mut model) = (Agent::new(0), Model::new(u64::MAX));
        order(&mut agent, &mut model, alloc(5 * FRAME_SIZE, Order::BASE));
        agent.held.spoil(2);
        let (outcome, report) = order(&mut agent, &mut model, Command::Verify);
        assert_eq!((outcome, report.mismatches, report.blocks), (Some(Outcome::Corrupt), 1, 5));
        assert_eq!(report.expected, report.found ^ 1);
    }

    #[test]
    fn loads_free_what_they_allocate_and_leave_the_rest_alone() {
        let (mut agent, mut model) = (Agent::new(0), Model::new(20 * HUGE_SIZE));
        order(&mut agent, &mut model, alloc(HUGE_SIZE, Order::BASE));
        let churn = Command::Churn { millis: 20, bytes: u64::MAX, seed: 3 };
        let (outcome, report) = order(&mut agent, &mut model, churn);
        assert_eq!((outcome, report.held_bytes), (Some(Outcome::Ok), HUGE_SIZE));
        assert!(report.blocks > 100, "{report:?}");
        let burst = Command::Burst { bytes: 3 * HUGE_SIZE, touch: Touch::Nothing, keep: false, single: true };
        assert_eq!(order(&mut agent, &mut model, burst).1.samples.count, 3);
        assert_eq!(order(&mut agent, &mut model, BURST).1.held_bytes, 7 * HUGE_SIZE);
        assert_eq!(order(&mut agent, &mut model, Command::Verify).0, Some(Outcome::Ok));
    }

    #[test]
    fn commands_that_no_system_shares_are_unknown_here() {
        let (mut agent, mut model) = (Agent::new(0), Model::new(0));
        let stream = Command::Stream { millis: 1, bytes: 1, beside: 0 };
        for command in [None, Some(stream)] {
            assert_eq!(agent.obey(&mut model, command).outcome, Outcome::Unknown as u64);
        }
        assert_eq!(agent.report(&mut model, |_, _| Tally::new()).outcome, Outcome::Ok as u64);
    }
}
