//! Workloads that no loop over one order shows: memory that is mixed, fragmented, full, old or shared by many.
//!
//! Each file has one, with the state that it starts from; all are deterministic in their seed, and equal for all
//! allocators up to what these refuse. `round` says how much of it one round is, `blocks` keeps account of who holds
//! what. Only what a row names is timed: picking a victim, shuffling and filling are between the times.

mod aging;
mod blocks;
mod cache;
mod crowd;
mod epoch;
mod halves;
mod mixed;
mod refuse;
mod round;

pub(crate) use aging::{Aged, Fresh, Replace, SAME_RUNS, aged};
pub(crate) use cache::{Cache, sweep_bytes};
pub(crate) use crowd::{Crowd, CrowdKind};
pub(crate) use epoch::first_after_a_return;
pub(crate) use halves::Halves;
pub(crate) use mixed::Mixed;
pub(crate) use refuse::Refuse;
pub(crate) use round::Round;
