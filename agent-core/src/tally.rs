//! [`Tally`]: how one command went, and [`Counters`]: what an agent did since it started.

use crate::source::Refusal;
use crate::stamp::Damage;
use agent_abi::{Outcome, Report, Samples};

/// Blocks that an agent was told to allocate, and freed again, since it started.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counters {
    /// Allocations.
    pub allocs: u64,
    /// Frees.
    pub frees: u64,
}

/// The outcome of one command.
#[derive(Clone, Copy, Debug)]
pub struct Tally {
    outcome: Outcome,
    bytes: u64,
    blocks: u64,
    detail: u64,
    samples: Samples,
    beside_nanos: u64,
    /// The findings of its checks.
    pub damage: Damage,
}

impl Default for Tally {
    fn default() -> Self {
        Self::new()
    }
}

impl Tally {
    /// Nothing done, nothing wrong.
    #[must_use]
    pub fn new() -> Self {
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

    /// Nothing done, as the agent does not know the command.
    #[must_use]
    pub fn unknown() -> Self {
        Self { outcome: Outcome::Unknown, ..Self::new() }
    }

    /// One more block.
    pub fn add(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.blocks += 1;
    }

    /// More blocks, which have `bytes` together.
    pub fn add_all(&mut self, blocks: u64, bytes: u64) {
        self.bytes += bytes;
        self.blocks += blocks;
    }

    /// Bytes of all blocks so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether nothing was done yet.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.blocks == 0
    }

    /// Time that passed between the samples.
    pub fn add_beside(&mut self, nanos: u64) {
        self.beside_nanos = self.beside_nanos.saturating_add(nanos);
    }

    /// The measurements, or the reason that there are none.
    pub fn measured(&mut self, samples: Result<Samples, Refusal>) {
        match samples {
            Ok(samples) => self.samples = samples,
            Err(refusal) => self.refuse(refusal),
        }
    }

    /// The command ends because there is no block.
    pub fn refuse(&mut self, refusal: Refusal) {
        (self.outcome, self.detail) = match refusal {
            Refusal::OutOfMemory => (Outcome::OutOfMemory, 0),
            Refusal::InstallFailed(status) => (Outcome::InstallFailed, status),
        };
    }

    /// Lost data outweighs whatever else went wrong.
    #[must_use]
    pub fn settle(mut self) -> Self {
        if self.damage.pages > 0 {
            self.outcome = Outcome::Corrupt;
        }
        self
    }

    /// The tally's words of a report; the others are 0.
    pub(crate) fn report(&self) -> Report {
        Report {
            outcome: self.outcome as u64,
            bytes: self.bytes,
            blocks: self.blocks,
            mismatches: self.damage.pages,
            bad_address: self.damage.address,
            expected: self.damage.expected,
            found: self.damage.found,
            detail: self.detail,
            samples: self.samples,
            beside_nanos: self.beside_nanos,
            ..Report::default()
        }
    }
}
