//! Plans, the books, and one small measurement of each kind.

use super::*;
use crate::candidates::ELASTIC;
use crate::candidates::Moves;
use crate::series::Table as _;
use test_support::skipped;

#[test]
fn times_are_divided_by_what_moved_and_compared_with_their_limit() {
    let mut book = Book::default();
    for round in 1..=3 {
        book.add((RAW, "discard", "discard"), Duration::from_micros(round * 10), 10).expect("it moved");
        book.add(("llfree", "reclaim", "discard"), Duration::from_micros(round * 20), 5).expect("it moved");
    }
    let rows = book.rows();
    assert_eq!((rows[0].candidate, rows[0].us_per_frame_median, rows[0].ratio_to_limit), ("llfree", 8.0, 4.0));
    assert_eq!((rows[1].op, rows[1].frames, rows[1].ratio_to_limit), ("discard", 10, 1.0));
    assert!(book.add(("llfree", "reclaim", "discard"), Duration::ZERO, 0).is_err());
}

#[test]
fn every_candidate_is_measured_in_every_way() {
    if let Err(error) = vmm::boot::open_kvm() {
        return skipped(llfree_base::error_line(&error));
    }
    let plan = |to: u64| Plan {
        candidates: ELASTIC.iter().collect(),
        mem: Bytes(96 << 20),
        to: Bytes(to << 20),
        backing: Backing::Anon,
        iterations: 1,
        pages: Allowance::PAGES,
    };
    let rows = run(&plan(64), Show::Nothing).unwrap_or_else(|error| panic!("{}", llfree_base::error_line(&error)));
    for candidate in ELASTIC {
        let ops = rows.iter().filter(|row| row.candidate == candidate.name).count();
        assert!(ops >= 5, "{ops} of {}", candidate.name);
    }
    assert!(rows.iter().all(|row| row.us_per_frame_median > 0.0 && row.frames > 0), "{rows:?}");
    assert!(rows.iter().all(|row| row.ratio_to_limit.is_finite()), "{rows:?}");
    assert!(run(&plan(8), Show::Nothing).is_err(), "the guest needs more for itself");
}

fn plan(mem: u64, to: u64, iterations: u32, pages: Allowance) -> Plan {
    let candidates = ["balloon", "balloon-huge"].map(|name| crate::candidates::elastic(name).expect("there is one"));
    let (mem, to) = (Bytes(mem << 20), Bytes(to << 20));
    Plan { candidates: candidates.to_vec(), mem, to, backing: Backing::Anon, iterations, pages }
}

#[test]
fn a_balloon_of_pages_has_a_smaller_guest_of_the_same_proportions_and_fewer_rounds() {
    let default = plan(2048, 256, 7, Allowance::PAGES);
    let [pages, huge] = [Moves::Pages, Moves::Frames].map(|moves| Share::of(&default, moves));
    assert_eq!((pages.mem, pages.to, pages.rounds), (Bytes(256 << 20), Bytes(32 << 20), (7, 3)));
    assert_eq!((huge.mem, huge.to, huge.rounds), (default.mem, default.to, (7, 7)));
    assert_eq!((pages.mem.0 - pages.to.0) / HUGE_SIZE, u64::from(Allowance::PAGES.frames));
    // A high limit stays high; one that would be lower than the guest can live with does not.
    let high = Share::of(&plan(4096, 2048, 7, Allowance::PAGES), Moves::Pages);
    assert_eq!((high.mem, high.to), (Bytes(448 << 20), Bytes(224 << 20)));
    let low = Share::of(&plan(8192, 64, 7, Allowance::PAGES), Moves::Pages);
    assert_eq!((low.mem, low.to), (Bytes(256 << 20), Bytes(32 << 20)));
}

#[test]
fn what_is_small_or_asked_for_in_full_is_not_made_smaller() {
    for (plan, own) in [(plan(128, 64, 2, Allowance::PAGES), 2), (plan(2048, 256, 15, Allowance::ALL), 15)] {
        let share = Share::of(&plan, Moves::Pages);
        assert_eq!((share.mem, share.to, share.rounds), (plan.mem, plan.to, (own, own)));
    }
}

#[test]
fn rows_say_how_many_frames_and_rounds_they_are_of() {
    if let Err(error) = vmm::boot::open_kvm() {
        return skipped(llfree_base::error_line(&error));
    }
    let plan = plan(256, 64, 2, Allowance { frames: 16, rounds: 1 });
    let rows = run(&plan, Show::Nothing).unwrap_or_else(|error| panic!("{}", llfree_base::error_line(&error)));
    let reclaims = |name: &str| {
        let own = rows.iter().filter(|row| row.candidate == name && row.op.starts_with("reclaim"));
        own.map(|row| (row.rounds, row.frames)).collect::<Vec<_>>()
    };
    assert_eq!(reclaims("balloon"), [(1, 16); 3]);
    assert_eq!(reclaims("balloon-huge"), [(2, 96); 3]);
    let table = Row::table(&rows);
    assert!(table.lines().next().is_some_and(|head| head.contains("rounds") && head.contains("frames")), "{table}");
    assert!(rows.iter().all(|row| row.us_per_frame_min <= row.us_per_frame_median), "{rows:?}");
    assert!(rows.iter().all(|row| row.us_per_frame_median <= row.us_per_frame_max), "{rows:?}");
}
