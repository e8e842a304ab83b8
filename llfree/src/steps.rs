//! The steps of a search: which tree is tried first for a block, as tables.
//!
//! A tree offers some combination of room, free and backed huge frames (see [`Offer`]), and its class has
//! a rank in the policy; the number of the first step that takes both says how well the tree suits. Constants only.

use crate::class::Rank;
use crate::entries::Want;
use crate::hint::Offer;

/// One attempt: a want, the worst rank that a tree may have for it, and whether little room, or half of a pair, will do.
pub(crate) struct Step(pub(crate) Want, Rank, bool);

/// The attempts for small blocks, best first.
pub(crate) const SMALL_STEPS: [Step; 16] = [
    Step(Want::Crowded, Rank::Match, false),
    Step(Want::Mixed, Rank::Match, false),
    Step(Want::Sparse, Rank::Match, false),
    Step(Want::Crowded, Rank::Match, true),
    Step(Want::Installed, Rank::Fresh, true),
    Step(Want::Free, Rank::Fresh, true),
    Step(Want::Crowded, Rank::Demote, false),
    Step(Want::Crowded, Rank::Demote, true),
    Step(Want::Installed, Rank::Demote, true),
    Step(Want::Free, Rank::Demote, true),
    // A huge frame of its own rather than a place among strangers.
    Step(Want::Installed, Rank::Steal, true),
    Step(Want::Free, Rank::Steal, true),
    Step(Want::Crowded, Rank::Steal, false),
    Step(Want::Mixed, Rank::Steal, false),
    Step(Want::Sparse, Rank::Steal, false),
    Step(Want::Crowded, Rank::Steal, true),
];
/// The first of them: room in a tree that is nearly full.
pub(crate) const SMALL_FULL: u8 = 0;
/// The last of them that takes no class's memory.
pub(crate) const SMALL_GOOD: u8 = 5;
/// The last of them that finds room among blocks of the same class.
pub(crate) const SMALL_PARTIAL: u8 = 3;
/// The last of them that needs no install and takes no class's memory.
pub(crate) const SMALL_NEAR: u8 = 4;
/// The number of lists of trees in use among these.
pub(crate) const PARTIAL_PASSES: usize = 3;
/// The lists to go through, and the step after which no other list has a better one.
pub(crate) const SMALL_PASSES: [(Want, u8); 5] =
    [(Want::Crowded, 0), (Want::Mixed, 1), (Want::Sparse, 3), (Want::Installed, 4), (Want::Free, 5)];
/// The attempts for huge blocks, best first: those of order 9 spare the pairs that order 10 needs.
pub(crate) const HUGE_STEPS: [Step; 9] = [
    Step(Want::Installed, Rank::Fresh, false),
    Step(Want::Installed, Rank::Fresh, true),
    Step(Want::Free, Rank::Fresh, true),
    Step(Want::Installed, Rank::Demote, false),
    Step(Want::Installed, Rank::Demote, true),
    Step(Want::Free, Rank::Demote, true),
    Step(Want::Installed, Rank::Steal, false),
    Step(Want::Installed, Rank::Steal, true),
    Step(Want::Free, Rank::Steal, true),
];
/// The last of them that takes no class's memory.
pub(crate) const HUGE_GOOD: u8 = 2;
/// The last of these that needs no install.
pub(crate) const HUGE_NEAR: u8 = 1;
pub(crate) const HUGE_PASSES: [(Want, u8); 2] = [(Want::Installed, 0), (Want::Free, 1)];

impl Step {
    /// Whether it takes no tree with little room and, for order 9, none with nothing but pairs.
    pub(crate) const fn is_choosy(&self) -> bool {
        !self.2
    }
}

/// The number of the first step that a tree serves, by rank and offer; [`NO_STEP`] for none.
pub(crate) type StepTable = [[u8; Offer::ALL]; 5];
pub(crate) const NO_STEP: u8 = u8::MAX;

const fn table(steps: &[Step]) -> StepTable {
    let mut table = [[NO_STEP; Offer::ALL]; 5];
    let mut rank = Rank::Match as usize;
    while rank < table.len() {
        let mut offer = 0;
        while offer < Offer::ALL {
            let mut step = steps.len();
            while step > 0 {
                step -= 1;
                let Step(want, worst, few) = &steps[step];
                if rank <= *worst as usize && Offer::from_index(offer).serves(*want, *few) {
                    table[rank][offer] = step as u8;
                }
            }
            offer += 1;
        }
        rank += 1;
    }
    table
}

const SMALL: StepTable = table(&SMALL_STEPS);
pub(crate) static SMALL_TABLE: StepTable = SMALL;
pub(crate) static HUGE_TABLE: StepTable = table(&HUGE_STEPS);

/// When a walk past all trees takes a step for small blocks: what is nearly full comes first, also with little room, so that
/// trees with more of it come free. (A walk by lists passes over most of these: there a search for little room is long.)
pub(crate) const fn turn(step: u8) -> u8 {
    match step {
        SMALL_FULL => SMALL_FULL,
        SMALL_PARTIAL => SMALL_FULL + 1,
        step if step < SMALL_PARTIAL => step + 1,
        step => step,
    }
}

/// The step that has this turn.
pub(crate) const fn step_at(turn: u8) -> u8 {
    match turn {
        SMALL_FULL => SMALL_FULL,
        turn if turn == SMALL_FULL + 1 => SMALL_PARTIAL,
        turn if turn <= SMALL_PARTIAL => turn - 1,
        turn => turn,
    }
}

/// The turns of all steps.
pub(crate) static SMALL_TURNS: StepTable = {
    let mut turns = SMALL;
    let mut rank = Rank::Match as usize;
    while rank < turns.len() {
        let mut offer = 0;
        while offer < Offer::ALL {
            turns[rank][offer] = turn(turns[rank][offer]);
            offer += 1;
        }
        rank += 1;
    }
    turns
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_has_a_turn_of_its_own() {
        for step in (0..SMALL_STEPS.len() as u8).chain([NO_STEP]) {
            assert_eq!(step_at(turn(step)), step);
        }
        let mut steps: [u8; 6] = [0, 1, 2, 3, 4, 5];
        steps.sort_by_key(|step| turn(*step));
        assert_eq!(steps, [SMALL_FULL, SMALL_PARTIAL, 1, 2, SMALL_NEAR, SMALL_GOOD]);
    }
}
