//! What every test agent does when its host asks: allocate, verify and free stamped memory, churn through
//! it, and time how fast it comes.
//!
//! An agent runs on a vCPU of the bare-metal guest or as a process in Linux. Where its memory comes from differs
//! and stays with it, behind three traits: [`Source`] hands out blocks, [`Clock`] tells the time, and
//! [`System`] is the rest of what a command touches. Everything here is `no_std`, allocates nothing and holds
//! no `unsafe`: pages are slices of atomics that a source lends out.
//!
//! | file | what it does |
//! |---|---|
//! | `rng` | cheap chance |
//! | `stamp` | what is written to each page, and what a check of it finds |
//! | `samples` | what a measuring command measured, and its percentiles |
//! | `source` | the traits: blocks of memory, time, and the system around them |
//! | `tally` | how one command went |
//! | `churn` | a mixed load that gives way when the host wants memory |
//! | `burst` | huge frames one after another, each timed |
//! | `agent` | one command after another, and the report of each |
//!
//! A new command is an arm in `agent`, and code there or in a file of its own; an agent's own crate changes only
//! if the command needs something from its system that no trait offers yet.
#![no_std]

#[cfg(test)]
extern crate std;

mod agent;
mod burst;
pub mod churn;
mod rng;
pub mod samples;
mod source;
pub mod stamp;
mod tally;

#[cfg(test)]
mod fake;

pub use agent::Agent;
pub use rng::{Rng, mix};
pub use source::{Blocks, Clock, Refusal, Source, System};
pub use tally::{Counters, Tally};
