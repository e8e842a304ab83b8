//! Which rounds a candidate takes part in that has fewer of them than the others.

/// Whether it is in round `round`: in the one to warm up, and in some of the others, evenly spread and always in the
/// last, so that it meets the machine in the same moods as the rest. `all` are the measured rounds of the run, `own`
/// those that it has.
pub(crate) fn takes_part((all, own): (u32, u32), round: u32) -> bool {
    // How many it should have had by the end of a round.
    let due = |round: u32| u64::from(round) * u64::from(own) / u64::from(all.max(1));
    round == 0 || due(round) > due(round - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_left_out_are_spread_over_the_run() {
        let rounds = |all, own| (0..=all).filter(|round| takes_part((all, own), *round)).collect::<Vec<_>>();
        assert_eq!(rounds(7, 3), [0, 3, 5, 7]);
        assert_eq!(rounds(2, 2), [0, 1, 2]);
        assert_eq!(rounds(15, 1), [0, 15]);
        for all in 1..=1000 {
            assert_eq!(rounds(all, all.min(3)).len() as u32, all.min(3) + 1);
        }
    }
}
