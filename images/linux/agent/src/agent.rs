//! [`Agent`]: one command after another, and the report of each.
//!
//! What a command means is `llfree_agent_core`'s; the process that it works with, and what the kernel says about
//! memory, are added here.

use crate::process::Process;
use crate::room::Room;
use crate::system::{self, Meminfo};
use agent_abi::{Command, Report};
use shared_layout::FRAME_SIZE;

/// The agent and all that it owns.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    work: llfree_agent_core::Agent<Process>,
}

impl Agent {
    /// An agent that allocates within `room`.
    #[must_use]
    pub fn new(room: Room) -> Self {
        Self { process: Process::new(room), work: llfree_agent_core::Agent::new(0) }
    }

    /// Does what the host asks; `None` stands for words that are not a command.
    pub fn obey(&mut self, command: Option<Command>) -> Report {
        let report = self.work.obey(&mut self.process, command);
        Report { free_frames: Meminfo::now().free / FRAME_SIZE, free_huge: system::free_huge_frames(), ..report }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent_abi::{Outcome, Touch};
    use shared_layout::Order;

    const MIB: u64 = 1 << 20;

    fn agent() -> Agent {
        Agent::new(Room::with_reserve(0))
    }

    fn alloc(bytes: u64, order: Order) -> Option<Command> {
        Some(Command::Alloc { bytes, order, seed: 1 })
    }

    fn outcome(report: &Report) -> Option<Outcome> {
        Outcome::from_word(report.outcome)
    }

    #[test]
    fn what_is_allocated_is_held_verified_and_freed() {
        let mut agent = agent();
        let report = agent.obey(alloc(9 * MIB, Order::HUGE));
        assert_eq!((outcome(&report), report.bytes, report.blocks), (Some(Outcome::Ok), 10 * MIB, 5));
        let report = agent.obey(alloc(MIB, Order::BASE));
        assert_eq!((report.held_bytes, report.held_blocks), (11 * MIB, 5 + 256));
        let report = agent.obey(Some(Command::Verify));
        assert_eq!((outcome(&report), report.bytes), (Some(Outcome::Ok), 11 * MIB));
        let report = agent.obey(Some(Command::Free { bytes: 2 * MIB, random: true, seed: 9 }));
        assert!(report.bytes >= 2 * MIB && report.held_bytes + report.bytes == 11 * MIB, "{report:?}");
        assert_eq!(outcome(&agent.obey(Some(Command::Verify))), Some(Outcome::Ok));
        let report = agent.obey(Some(Command::Free { bytes: u64::MAX, random: false, seed: 0 }));
        assert_eq!((report.held_bytes, report.held_blocks, report.allocs), (0, 0, report.frees));
    }

    #[test]
    fn a_wrong_page_is_reported_with_its_words() {
        let mut agent = agent();
        agent.obey(alloc(2 * MIB, Order::HUGE));
        agent.work.held().spoil();
        let report = agent.obey(Some(Command::Verify));
        assert_eq!((outcome(&report), report.mismatches), (Some(Outcome::Corrupt), 1));
        assert_eq!(report.expected, report.found ^ 1);
    }

    #[test]
    fn no_memory_is_an_answer_to_every_command_that_needs_some() {
        let mut agent = Agent::new(Room::with_reserve(u64::MAX));
        let burst = Command::Burst { bytes: MIB, touch: Touch::Pages, keep: true, single: false };
        let churn = Command::Churn { millis: 5, bytes: MIB, seed: 1 };
        for command in [alloc(u64::MAX, Order::BASE), alloc(1, Order::MAX), Some(burst), Some(churn)] {
            let report = agent.obey(command);
            assert_eq!((outcome(&report), report.held_bytes), (Some(Outcome::OutOfMemory), 0), "{command:?}");
        }
    }

    #[test]
    fn a_churn_without_memory_says_so_and_ends() {
        let mut agent = Agent::new(Room::with_reserve(u64::MAX));
        let report = agent.obey(Some(Command::Churn { millis: 20, bytes: 64 << 20, seed: 1 }));
        // Starved all the time.
        assert_eq!(outcome(&report), Some(Outcome::OutOfMemory));
        assert_eq!(report.blocks, 0);
    }

    #[test]
    fn loads_free_what_they_allocate_and_leave_the_rest_alone() {
        let mut agent = agent();
        agent.obey(alloc(4 * MIB, Order::BASE));
        let report = agent.obey(Some(Command::Churn { millis: 50, bytes: 16 * MIB, seed: 3 }));
        assert_eq!((outcome(&report), report.held_bytes), (Some(Outcome::Ok), 4 * MIB));
        let burst = |keep| Some(Command::Burst { bytes: 6 * MIB, touch: Touch::Frames, keep, single: true });
        let report = agent.obey(burst(false));
        assert_eq!((report.samples.count, report.held_bytes), (3, 4 * MIB));
        assert_eq!(agent.obey(burst(true)).held_bytes, 10 * MIB);
        assert_eq!(outcome(&agent.obey(Some(Command::Verify))), Some(Outcome::Ok));
    }

    #[test]
    fn unknown_commands_are_called_so_and_stats_count_memory() {
        let mut agent = agent();
        assert_eq!(outcome(&agent.obey(None)), Some(Outcome::Unknown));
        let stream = Command::Stream { millis: 1, bytes: 1, beside: 0 };
        assert_eq!(outcome(&agent.obey(Some(stream))), Some(Outcome::Unknown));
        let report = agent.obey(Some(Command::Stats));
        assert!(outcome(&report) == Some(Outcome::Ok) && report.free_frames > 0);
    }
}
