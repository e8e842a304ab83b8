//! Rows of frames that handles take and give at once, against all that others may do meanwhile.

use super::{H0, Table, order, race, reclaim};
use crate::host::{Reclaim, Residency};
use crate::rows::ROWS;
use crate::sync::Ordering;
use loom::sync::Arc;
use shared_layout::{FrameId, HugeEntry, Order, Run};

/// All rests of the one huge frame, as bits of row 0.
fn take_rest(t: &Table) -> u64 {
    let mut rows = [0; ROWS];
    let taken = t.lower().take_rest(H0, 64, |row, bits| rows[row] |= bits).ok();
    assert_eq!(taken.is_some(), rows != [0; ROWS], "some or none");
    assert!(rows[1..].iter().all(|bits| *bits == 0), "these have no free frame");
    rows[0]
}

fn take(t: &Table, o: u8) -> u64 {
    let size = order(o).frames();
    t.lower().take(H0, order(o)).ok().map_or(0, |taken| ((1 << size) - 1) << taken.frame.0)
}

fn take_row(t: &Table) -> u64 {
    t.lower().take_row(H0, Order::BASE, 64).ok().map_or(0, |row| row.bits)
}

/// Two parties took these bits of row 0, where `free` were free at the start, and `given` came in.
fn disjoint(t: &Table, free: u64, given: u64, a: u64, b: u64) {
    assert_eq!(a & b, 0, "a frame with two owners");
    assert_eq!((a | b) & !(free | given), 0, "a frame that was not free");
    let left = (free | given) & !(a | b);
    assert_eq!(t.rows[0].load(Ordering::Relaxed), !left, "bits that nobody owns");
    assert_eq!(u32::from(t.entry(0).free()), left.count_ones());
    t.check_counter();
}

#[test]
fn rest_against_take() {
    for o in [0, 1] {
        race(
            || Table::one_row(0b1111),
            take_rest,
            move |t| take(t, o),
            move |t, rest, frame| {
                disjoint(t, 0b1111, 0, rest, frame);
                assert!(o > 0 || rest | frame == 0b1111 || frame == 0, "somebody gets each frame");
            },
        );
    }
}

#[test]
fn rest_against_take_of_a_given_frame() {
    // A rest leaves the low bits to others: a request for the highest one gets in its way.
    race(
        || Table::one_row(0b1111),
        take_rest,
        |t| t.lower().take_at(FrameId(3), order(0)).map_or(0, |_| 0b1000),
        |t, rest, frame| disjoint(t, 0b1111, 0, rest, frame),
    );
}

#[test]
fn a_pair_that_loses_its_place_gives_its_budget_back() {
    // The counter lets both in, but the base frame comes out of the only pair.
    race(
        || Table::one_row(0b10011),
        |t| take(t, 1),
        |t| take(t, 0),
        |t, pair, frame| {
            disjoint(t, 0b10011, 0, pair, frame);
            assert!(frame != 0, "two frames are left for it in any case");
        },
    );
}

#[test]
fn two_rows_that_lose_the_second_give_back_the_first() {
    // As above with whole rows: 192 frames are free, but row 1 has one owner.
    let table = || {
        let table = Table::one_row(u64::MAX);
        table.rows[1].store(0, Ordering::Relaxed);
        table.rows[2].store(0, Ordering::Relaxed);
        table.entries[0].store(HugeEntry::FREE_INSTALLED.take(320).expect("free").bits(), Ordering::Relaxed);
        table
    };
    race(
        table,
        |t| t.lower().take_at(FrameId(0), order(7)).is_ok(),
        |t| t.lower().take_at(FrameId(64), order(6)).is_ok(),
        |t, both, second| {
            assert!(both != second, "the last one to set row 1 has lost, the other has won");
            let left = 192 - if both { 128 } else { 64 };
            assert_eq!(t.entry(0).free(), left);
            t.check_counter();
        },
    );
}

#[test]
fn rest_against_rest() {
    race(
        || Table::one_row(0b1101),
        take_rest,
        take_rest,
        |t, a, b| {
            disjoint(t, 0b1101, 0, a, b);
            assert_eq!(a | b, 0b1101, "one of them gets them");
        },
    );
}

#[test]
fn rest_against_a_row() {
    race(|| Table::one_row(0b1101), take_rest, take_row, |t, rest, row| disjoint(t, 0b1101, 0, rest, row));
}

#[test]
fn rest_against_give() {
    race(
        || Table::one_row(0b110),
        take_rest,
        |t| t.lower().give(FrameId(0), order(0)),
        |t, rest, given| {
            given.expect("ours");
            disjoint(t, 0b110, 1, rest, 0);
            assert!(rest.count_ones() >= 2, "two were free all along");
        },
    );
}

/// One of few free frames of the huge frame, as a bit of row 0.
fn take_one(t: &Table) -> u64 {
    t.lower().take_one(H0).ok().map_or(0, |(taken, _)| 1 << taken.frame.0)
}

#[test]
fn the_only_frame_has_one_taker() {
    for other in [take_one, |t: &Table| take(t, 0), take_row, take_rest] {
        race(
            || Table::one_row(0b100),
            take_one,
            other,
            |t, one, other| {
                disjoint(t, 0b100, 0, one, other);
                assert_eq!(one | other, 0b100, "one of them gets it");
            },
        );
    }
}

#[test]
fn one_of_two_frames_against_a_taker() {
    for other in [take_one, |t: &Table| take(t, 0), take_rest] {
        race(
            || Table::one_row(0b101),
            take_one,
            other,
            |t, one, other| {
                disjoint(t, 0b101, 0, one, other);
                assert!(one | other != 0, "one of them gets one");
            },
        );
    }
}

/// As a handle does: where somebody else is at work it tries the way that waits for nobody.
#[test]
fn what_others_leave_alone_is_found() {
    race(
        || Table::one_row(0b111),
        |t| {
            let one = take_one(t);
            if one == 0 { take(t, 0) } else { one }
        },
        |t| t.lower().take_at(FrameId(0), order(0)).is_ok() && t.lower().give_in_row(FrameId(0), order(0)).is_some(),
        |t, one, _| {
            assert!(one != 0, "two were free all the time");
            disjoint(t, 0b111, 0, one, 0);
        },
    );
}

#[test]
fn one_frame_against_give() {
    race(
        || Table::one_row(0b100),
        take_one,
        |t| t.lower().give_in_row(FrameId(0), order(0)).is_some(),
        |t, one, given| {
            assert!(given);
            disjoint(t, 0b100, 1, one, 0);
        },
    );
}

#[test]
fn rest_against_a_row_given_back() {
    race(
        || Table::one_row(0b1000),
        take_rest,
        |t| t.lower().give_row(FrameId(0), 0b11).is_some(),
        |t, rest, given| {
            assert!(given);
            disjoint(t, 0b1000, 0b11, rest, 0);
        },
    );
}

#[test]
fn a_block_that_two_free_at_once_is_freed_once() {
    for o in [0, 1] {
        race(
            || Table::one_row(0b110_0000),
            move |t| t.lower().give_in_row(FrameId(0), order(o)).is_some(),
            move |t| t.lower().give(FrameId(0), order(o)).is_ok(),
            move |t, short, long| {
                assert!(short != long, "one of them");
                disjoint(t, 0b110_0000, (1 << order(o).frames()) - 1, 0, 0);
            },
        );
    }
}

#[test]
fn a_frame_given_the_short_way_against_takers_of_rows() {
    race(
        || Table::one_row(0b1000),
        |t| t.lower().give_in_row(FrameId(0), order(0)).is_some(),
        take_row,
        |t, given, row| {
            assert!(given);
            disjoint(t, 0b1000, 1, row, 0);
        },
    );
    race(
        || Table::one_row(0b1000),
        |t| t.lower().give_in_row(FrameId(0), order(0)).is_some(),
        take_rest,
        |t, given, rest| {
            assert!(given);
            disjoint(t, 0b1000, 1, rest, 0);
        },
    );
}

#[test]
fn a_row_against_give() {
    race(
        || Table::one_row(0b110),
        take_row,
        |t| t.lower().give(FrameId(0), order(0)),
        |t, row, given| {
            given.expect("ours");
            disjoint(t, 0b110, 1, row, 0);
        },
    );
}

#[test]
fn a_row_given_back_against_takes() {
    for o in [0, 1] {
        race(
            || Table::one_row(0b100),
            |t| t.lower().give_row(FrameId(0), 0b11).is_some(),
            move |t| take(t, o),
            |t, given, frame| {
                assert!(given);
                disjoint(t, 0b100, 0b11, 0, frame);
            },
        );
    }
}

#[test]
fn a_row_given_back_against_a_double_free_into_it() {
    race(
        || Table::one_row(0b100),
        |t| t.lower().give_row(FrameId(0), 0b11),
        |t| t.lower().give(FrameId(1), order(0)),
        |t, _, _| disjoint(t, 0b100, 0b11, 0, 0),
    );
}

#[test]
fn overlapping_frees_lose_nothing() {
    // One of the two is wrong, whichever comes second; rows 0 and 1 are one block of order 7.
    let table = || {
        let table = Table::one_row(0);
        table.rows[0].store(u64::MAX, Ordering::Relaxed);
        table
    };
    race(
        table,
        |t| t.lower().give(FrameId(0), order(7)).is_ok(),
        |t| t.lower().give(FrameId(64), order(6)).is_ok(),
        |t, both, second| {
            assert!(both || second, "the first one is right");
            t.check_counter();
        },
    );
}

fn almost_free() -> Arc<Table> {
    let table = Table::new(&[(HugeEntry::FREE_INSTALLED, Residency::Installed)]);
    table.entries[0].store(HugeEntry::FREE_INSTALLED.take(2).expect("free").bits(), Ordering::Relaxed);
    table.rows[0].store(0b11, Ordering::Relaxed);
    table
}

#[test]
fn hold_against_a_row_given_back() {
    race(
        almost_free,
        |t| reclaim(t, Reclaim::Hard),
        |t| t.lower().give_row(FrameId(0), 0b11),
        |t, held, after| {
            assert_eq!(after, Some(HugeEntry::FREE_INSTALLED));
            assert_eq!(t.entry(0).is_held(), held);
            assert_eq!(t.lower().clear_bits(H0), 512, "a held frame has no owner inside");
        },
    );
}

#[test]
fn hold_and_evict_against_a_row() {
    for how in [Reclaim::Hard, Reclaim::Soft] {
        race(
            || Table::new(&[(HugeEntry::FREE_INSTALLED, Residency::Installed)]),
            move |t| reclaim(t, how),
            |t| t.lower().take_row(H0, Order::BASE, 64).ok(),
            move |t, reclaimed, row| {
                if how == Reclaim::Hard {
                    assert!(reclaimed != row.is_some(), "exactly one owner");
                } else {
                    assert_eq!(row.expect("soft reclaim leaves it free").evicted, reclaimed);
                }
                t.check_counter();
            },
        );
    }
}

#[test]
fn hold_against_a_rest() {
    race(
        || Table::one_row(0b101),
        |t| reclaim(t, Reclaim::Hard),
        take_rest,
        |t, held, rest| {
            assert!(!held, "it is in use");
            disjoint(t, 0b101, 0, rest, 0);
            assert_eq!(rest, 0b101);
        },
    );
}

#[test]
fn a_huge_frame_taken_only_with_memory_against_evict() {
    race(
        || Table::new(&[(HugeEntry::FREE_INSTALLED, Residency::Installed)]),
        |t| reclaim(t, Reclaim::Soft),
        |t| t.lower().take_huge_if(H0, |e| !e.is_evicted()),
        |t, evicted, taken| {
            assert!(evicted != taken.is_some(), "what was taken has memory, what was evicted was not taken");
            assert!(taken.is_none_or(|taken| !taken.evicted));
            assert_eq!(t.entry(0).is_huge(), taken.is_some());
        },
    );
}

#[test]
fn a_huge_block_given_back_against_hold() {
    race(
        || Table::new(&[(HugeEntry::HUGE_INSTALLED, Residency::Installed)]),
        |t| reclaim(t, Reclaim::Hard),
        |t| t.lower().give_one_huge(H0),
        |t, held, given| {
            assert_eq!(given, Some(HugeEntry::FREE_INSTALLED));
            assert_eq!(t.entry(0).is_held(), held);
        },
    );
}

#[test]
fn a_rest_whose_frame_moves_to_a_row_behind() {
    // Frame 64 is free and frame 0 is not, then the other way round.
    let table = || {
        let table = Table::one_row(0);
        table.rows[1].store(!1, Ordering::Relaxed);
        table.entries[0].store(HugeEntry::FREE_INSTALLED.take(511).expect("free").bits(), Ordering::Relaxed);
        table
    };
    race(
        table,
        |t| {
            let mut rows = [0; ROWS];
            let _ = t.lower().take_rest(H0, 64, |row, bits| rows[row] |= bits).ok();
            (rows[0], rows[1])
        },
        |t| {
            t.lower().give(FrameId(0), order(0)).expect("ours");
            t.lower().take_at(FrameId(64), order(0)).is_ok()
        },
        |t, (row0, row1), moved| {
            assert!(row1 == 0 || !moved, "frame 64 has two owners");
            let taken = row0.count_ones() + row1.count_ones() + u32::from(moved);
            assert_eq!(u32::from(t.entry(0).free()), 2 - taken, "a budget was lost");
            t.check_counter();
        },
    );
}

#[test]
fn a_bound_is_not_lowered_below_a_run_that_came_meanwhile() {
    // Two pairs of frames, each with one of them taken.
    race(
        || Table::one_row(0b1010),
        |t| _ = t.lower().bound(H0),
        |t| t.lower().give_in_row(FrameId(0), order(0)).is_some(),
        |t, (), given| {
            assert!(given);
            disjoint(t, 0b1010, 1, 0, 0);
            assert!(t.entry(0).may_fit(order(1)), "a pair is free");
        },
    );
    race(
        || Table::one_row(0b1010),
        |t| t.lower().take(H0, order(1)).is_ok(),
        |t| t.lower().give_row(FrameId(0), 0b101).is_some(),
        |t, taken, given| {
            assert!(given);
            disjoint(t, 0b1010, 0b101, if taken { !t.rows[0].load(Ordering::Relaxed) ^ 0b1111 } else { 0 }, 0);
        },
    );
}

/// Two free the halves of a pair, one sees both, and takes the only other frame before the other one has counted its
/// half: fewer frames are counted than the pair has, and yet it is there.
#[test]
fn a_pair_is_known_although_a_taker_came_between_its_halves() {
    race(
        || Table::one_row(0b1000),
        |t| t.lower().give_in_row(FrameId(4), order(0)).is_some(),
        |t| {
            let given = t.lower().give_in_row(FrameId(5), order(0)).is_some();
            (given, t.lower().take_at(FrameId(3), order(0)).is_ok())
        },
        |t, a, (b, taken)| {
            assert!(a && b && taken);
            t.check_counter();
            assert!(t.entry(0).may_fit(order(1)), "frames 4 and 5 are free");
        },
    );
}

#[test]
fn of_two_that_free_neighbouring_rows_one_sees_both() {
    let table = || {
        let table = Table::one_row(0);
        let entry = HugeEntry::FREE_INSTALLED.take(511).and_then(|e| e.lower(Run::SINGLE)).expect("one is left");
        table.rows[7].store(!1, Ordering::Relaxed);
        table.entries[0].store(entry.bits(), Ordering::Relaxed);
        table
    };
    race(
        table,
        |t| t.lower().give(FrameId(0), order(6)).is_ok(),
        |t| t.lower().give(FrameId(64), order(6)).is_ok(),
        |t, a, b| {
            assert!(a && b);
            t.check_counter();
            assert!(t.entry(0).may_fit(order(7)));
        },
    );
}

#[test]
fn a_part_of_a_block_of_several_rows_that_is_left_is_known() {
    // A taker may get a frame out of the block before its giver looks at the neighbours.
    let table = || {
        let table = Table::one_row(0);
        let entry = HugeEntry::FREE_INSTALLED.take(510).and_then(|e| e.lower(Run::SINGLE)).expect("two are left");
        table.rows[7].store(!0b1001, Ordering::Relaxed);
        table.entries[0].store(entry.bits(), Ordering::Relaxed);
        table
    };
    for o in [7, 8] {
        race(
            table,
            move |t| t.lower().give(FrameId(0), order(o)).is_ok(),
            |t| t.lower().take(H0, order(0)).is_ok(),
            |t, given, taken| {
                assert!(given && taken);
                t.check_counter();
            },
        );
    }
}
