//! What is measured, and how much of it a candidate has to do: all, or less where frames move page by page.
//!
//! Figures stay comparable: they are per frame, of guests with the same proportions, and the rounds that are left out are
//! spread over the run.

use crate::candidates::{Candidate, Moves};
use llfree_base::units::Bytes;
use llfree_monitor::memory::Backing;
use shared_layout::HUGE_SIZE;

/// Memory that the guest needs for itself: its image, the first frame that stays unused, records, samples.
pub(super) const GUEST_OWN: u64 = 16 << 20;
/// The measurement.
pub(crate) struct Plan {
    pub(crate) candidates: Vec<&'static Candidate>,
    pub(crate) mem: Bytes,
    pub(crate) to: Bytes,
    pub(crate) backing: Backing,
    pub(crate) iterations: u32,
    /// The limits on candidates that move single pages.
    pub(crate) pages: Allowance,
}

/// At most how much a candidate moves, and how often.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Allowance {
    /// 2 MiB frames, in a round.
    pub(crate) frames: u32,
    /// Rounds to measure, besides the one to warm up.
    pub(crate) rounds: u32,
}

impl Allowance {
    /// Some 5 s a round for a 4 KiB balloon, so that `inflate` ends within minutes.
    pub(crate) const PAGES: Self = Self { frames: 112, rounds: 3 };
    /// Whatever the plan says.
    pub(crate) const ALL: Self = Self { frames: u32::MAX, rounds: u32::MAX };
}

/// A candidate's share of a plan.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Share {
    pub(super) mem: Bytes,
    pub(super) to: Bytes,
    /// The measured rounds of the plan, and those in which this candidate takes part.
    pub(super) rounds: (u32, u32),
}

impl Share {
    /// All of the plan, or a guest made smaller until a round moves no more than is allowed. Memory and limit keep
    /// their proportion: a burst also touches the frames that never left, which nobody divides by.
    pub(super) fn of(plan: &Plan, moves: Moves) -> Self {
        let allowance = if moves == Moves::Pages { plan.pages } else { Allowance::ALL };
        let (to, all) = (plan.to.0 / HUGE_SIZE, (plan.mem.0 - plan.to.0) / HUGE_SIZE);
        let moved = all.min(allowance.frames.into());
        let to = (to * moved / all.max(1)).max(2 * GUEST_OWN / HUGE_SIZE);
        let (mem, to) = (Bytes((to + moved) * HUGE_SIZE), Bytes(to * HUGE_SIZE));
        Self { mem, to, rounds: (plan.iterations, plan.iterations.min(allowance.rounds)) }
    }
}
