//! [`Agent`]: one command after another, and the report of each.
//!
//! All that it does to memory it does through the [`Heap`]; between commands, allocations less
//! frees is the number of blocks it holds.

use crate::heap::{Damage, Heap, Tags};
use crate::room::Room;
use crate::system::{self, Meminfo};
use crate::{burst, churn};
use shared_layout::agent::{Command, Outcome, Report, Samples};
use shared_layout::{FRAME_SIZE, Order};
use std::time::Instant;

/// How one command went.
#[derive(Clone, Copy, Debug)]
struct Tally {
    outcome: Outcome,
    bytes: u64,
    blocks: u64,
    damage: Damage,
    samples: Samples,
    beside_nanos: u64,
}

impl Tally {
    const fn new() -> Self {
        Self {
            outcome: Outcome::Ok,
            bytes: 0,
            blocks: 0,
            damage: Damage { pages: 0, address: 0, expected: 0, found: 0 },
            samples: Samples { count: 0, mean: 0, min: 0, p1: 0, p50: 0, p99: 0, p999: 0, max: 0 },
            beside_nanos: 0,
        }
    }

    /// Lost data outweighs whatever else went wrong.
    fn settle(mut self, damage: Damage) -> Self {
        self.damage = damage;
        if damage.pages > 0 {
            self.outcome = Outcome::Corrupt;
        }
        self
    }
}

/// The agent and all that it owns.
#[derive(Debug)]
pub struct Agent {
    heap: Heap,
    room: Room,
    commands: u64,
    allocs: u64,
    frees: u64,
}

impl Agent {
    /// An agent that allocates within `room`.
    #[must_use]
    pub fn new(room: Room) -> Self {
        Self { heap: Heap::default(), room, commands: 0, allocs: 0, frees: 0 }
    }

    /// Does what the host asks; `None` stands for words that are no command.
    pub fn obey(&mut self, command: Option<Command>) -> Report {
        self.commands += 1;
        let start = Instant::now();
        let tally = match command {
            Some(Command::Alloc { bytes, order, seed }) => self.alloc(bytes, order, seed),
            Some(Command::Verify) => self.verify(),
            Some(Command::Free { bytes, random, seed }) => {
                self.free(bytes, random.then(|| fastrand::Rng::with_seed(seed)))
            }
            Some(Command::Churn { millis, bytes, seed }) => self.churn(millis, bytes, seed),
            Some(Command::Burst { bytes, touch, keep, single: _ }) => {
                let mut tags = self.tags(0);
                let kept = keep.then_some(&mut self.heap);
                let burst = burst::run(bytes, touch, kept, &mut tags, &mut self.room);
                self.allocs += burst.blocks;
                self.frees += if keep { 0 } else { burst.blocks };
                Tally {
                    outcome: if burst.complete { Outcome::Ok } else { Outcome::OutOfMemory },
                    bytes: burst.blocks * Order::HUGE.bytes(),
                    blocks: burst.blocks,
                    samples: burst.samples,
                    beside_nanos: burst.beside_nanos,
                    ..Tally::new()
                }
            }
            Some(Command::Drain) => {
                // Refused where the agent is not root; the report's numbers show it.
                let _ = system::drain();
                Tally::new()
            }
            // The kernel looks after its devices by itself.
            Some(Command::Stats | Command::Devices) => Tally::new(),
            Some(Command::Stream { .. } | Command::Ftq { .. }) | None => {
                Tally { outcome: Outcome::Unknown, ..Tally::new() }
            }
        };
        let nanos = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        Report {
            outcome: tally.outcome as u64,
            bytes: tally.bytes,
            blocks: tally.blocks,
            held_bytes: self.heap.bytes(),
            held_blocks: self.heap.len(),
            mismatches: tally.damage.pages,
            bad_address: tally.damage.address,
            expected: tally.damage.expected,
            found: tally.damage.found,
            allocs: self.allocs,
            frees: self.frees,
            free_frames: Meminfo::now().free / FRAME_SIZE,
            free_huge: system::free_huge_frames(),
            nanos,
            samples: tally.samples,
            beside_nanos: tally.beside_nanos,
            ..Report::default()
        }
    }

    fn alloc(&mut self, bytes: u64, order: Order, seed: u64) -> Tally {
        let mut tags = self.tags(seed);
        let blocks = self.heap.fill(bytes, order, &mut tags, &mut self.room);
        self.allocs += blocks;
        let got = blocks * order.bytes();
        let outcome = if got < bytes { Outcome::OutOfMemory } else { Outcome::Ok };
        Tally { outcome, bytes: got, blocks, ..Tally::new() }
    }

    fn verify(&self) -> Tally {
        let mut damage = Damage::default();
        self.heap.check(&mut damage);
        Tally { bytes: self.heap.bytes(), blocks: self.heap.len(), ..Tally::new() }.settle(damage)
    }

    fn free(&mut self, bytes: u64, mut random: Option<fastrand::Rng>) -> Tally {
        let mut tally = Tally::new();
        while tally.bytes < bytes
            && let Some(block) = self.heap.take(random.as_mut())
        {
            tally.bytes += block.bytes();
            tally.blocks += 1;
        }
        self.frees += tally.blocks;
        tally
    }

    fn churn(&mut self, millis: u64, bytes: u64, seed: u64) -> Tally {
        let mut tags = self.tags(seed);
        let churn = churn::run(millis, bytes, seed, &mut tags, &mut self.room);
        self.allocs += churn.blocks;
        self.frees += churn.blocks;
        let outcome = if churn.starved && churn.blocks == 0 { Outcome::OutOfMemory } else { Outcome::Ok };
        Tally { outcome, bytes: churn.bytes, blocks: churn.blocks, ..Tally::new() }.settle(churn.damage)
    }

    fn tags(&self, seed: u64) -> Tags {
        Tags::new(seed, self.commands)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared_layout::agent::Touch;

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
        agent.heap.spoil();
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
