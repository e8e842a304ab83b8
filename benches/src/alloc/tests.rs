use super::*;
use crate::crew;
use crate::frames::{Frames, Visit as _};
use clap::ValueEnum as _;

fn plan(benches: &[&str], threads: &[u32], huge_frames: u32) -> Plan {
    let selections: Vec<Selection> = benches.iter().map(|bench| bench.parse().expect("there is one")).collect();
    Plan {
        entries: Selection::join(&selections),
        orders: None,
        threads: threads.to_vec(),
        allocators: vec![Allocator::Llfree, Allocator::Queue],
        huge_frames: Some(huge_frames),
        full: false,
        operations: Some(4_000),
        iterations: 1,
        cores: crew::cores().expect("a process has cores"),
    }
}

fn loops(threads: &[u32], huge_frames: u32) -> Plan {
    let orders = Some(vec![Order::BASE, Order::MAX]);
    Plan { orders, ..plan(&["bulk", "repeat", "random", "cross", "host"], threads, huge_frames) }
}

#[test]
fn a_baseline_is_left_out_where_it_has_no_such_order() {
    let rows = run(&loops(&[1], 16), Show::Nothing).expect("half the memory is enough");
    // alloc and free of three benches and a pair, for llfree twice and the queue once; four
    // state changes of two kinds.
    assert_eq!(rows.len(), 7 * 3 + 4 * 2);
    assert!(rows.iter().all(|row| row.allocator != "queue" || row.order == Some(0)));
    assert!(rows.iter().all(|row| row.ns_min > 0.0 && row.ns_min <= row.ns_max && row.cas_ns > 0.0));
    assert!(panels(&rows).iter().all(|panel| panel.title != "host: evict"));
}

#[test]
fn all_cores_work_together() {
    let cores = crew::cores().expect("a process has cores").len() as u32;
    let rows = run(&loops(&[cores], 64 * cores), Show::Nothing).expect("half the memory is enough");
    assert!(rows.iter().all(|row| row.threads == cores));
}

#[test]
fn plans_beyond_the_machine_or_the_memory_are_refused() {
    let few = run(&loops(&[1], 1), Show::Nothing).expect_err("no block of order 10");
    assert!(few.to_string().contains("use at least 8 MiB"), "{few}");
    let many = run(&loops(&[100_000], 64), Show::Nothing).expect_err("nobody has so many cores");
    assert!(many.to_string().contains("100000"), "{many}");
}

#[test]
fn loops_without_a_clock_do_every_operation() {
    let text = once(&loops(&[1], 8), Bench::Random, 8).expect("half the memory is enough");
    assert!(text.contains("random, order 0, llfree: 2048 operations of each kind"), "{text}");
}

/// What tells a row from all others of one size: bench, order, threads, allocator, op.
type Key = (&'static str, Option<u8>, u32, &'static str, &'static str);

fn key(row: &Row) -> Key {
    (row.bench, row.order, row.threads, row.allocator, row.op)
}

fn find(rows: &[Row], wanted: Key) -> &Row {
    rows.iter().find(|row| key(row) == wanted).unwrap_or_else(|| panic!("no row {wanted:?}"))
}

#[test]
fn mixed_rows_have_no_order_and_tails_of_small_and_large_blocks() {
    let cores = crew::cores().expect("a process has cores").len() as u32;
    let allocators = vec![Allocator::Llfree, Allocator::LlfreeShared, Allocator::Buddy, Allocator::Queue];
    let rows =
        run(&Plan { allocators, ..plan(&["mixed", "worn"], &[1, cores], 64) }, Show::Nothing).expect("frames are left");
    assert!(rows.iter().all(|row| row.order.is_none() && row.mem_mib == 128 && row.rounds == 1));
    assert!(rows.iter().all(|row| row.allocator != "queue"), "it has one order only");
    let vain = |bench| find(&rows, (bench, None, 1, "llfree", "refused")).operations;
    assert!(vain("worn-95") > vain("mixed-95"), "the blocks that are held have become smaller");
    for bench in ["mixed-50", "mixed-80", "mixed-90", "mixed-95", "worn-95"] {
        for (threads, allocator) in [(1, "llfree"), (1, "buddy"), (1, "llfree-shared"), (cores, "llfree")] {
            let row = |op| find(&rows, (bench, None, threads, allocator, op));
            let (alloc, free, refused) = (row("alloc"), row("free"), row("refused"));
            // Steps are allocations, frees and refusals, and nothing else; a round may end early.
            let steps = alloc.operations + free.operations + refused.operations;
            assert!(steps > 0 && steps <= 4_000 * u64::from(threads), "{bench} {allocator}: {steps}");
            // One request in eleven is of order 0; hardly any of these is refused, of the others many.
            let (small, large) = (row("alloc-0-max"), row("alloc-1-10-max"));
            assert_eq!(small.operations + large.operations, alloc.operations);
            assert!(small.operations * 2 < large.operations, "{small:?} {large:?}");
            let tails = ["alloc-0-p50", "alloc-0-p99", "alloc-0-p99.9", "alloc-0-max"].map(row);
            assert!(tails.windows(2).all(|pair| pair[0].ns_median <= pair[1].ns_median), "{tails:?}");
            assert!(alloc.ns_median > 0.0 && alloc.ratio_to_cas > 0.0);
            assert_eq!(refused.operations == 0, refused.ns_median.is_nan(), "{refused:?}");
        }
    }
}

#[test]
fn a_refusal_is_timed_the_first_time_again_and_after_a_free() {
    let allocators = vec![Allocator::Llfree, Allocator::LlfreeShared, Allocator::Buddy, Allocator::Queue];
    let rows =
        run(&Plan { allocators, ..plan(&["refuse", "shrunk"], &[1], 64) }, Show::Nothing).expect("all are refused");
    for (bench, order) in (0..=9).flat_map(|order| [("refuse", order), ("shrunk", order)]) {
        for op in ["first", "again", "after-free"] {
            let row = find(&rows, (bench, Some(order), 1, "llfree", op));
            assert!(row.ns_median >= 0.0 && (row.operations >= 3 || op == "first"), "{row:?}");
        }
    }
    assert!(rows.iter().all(|row| row.allocator != "queue" || row.order == Some(0)));
    let of_host: Vec<_> = rows.iter().filter(|row| row.bench == "shrunk").map(|row| row.allocator).collect();
    assert!(of_host.iter().all(|allocator| ["llfree", "llfree-shared"].contains(allocator)), "{of_host:?}");
}

#[test]
fn what_is_not_refused_is_an_error() {
    struct Generous;
    impl Frames for Generous {
        type Handle<'a> = Handle;
        fn handle(&self) -> Handle {
            Handle
        }
    }
    struct Handle;
    impl crate::frames::Handle for Handle {
        fn alloc(&mut self, _: Order) -> u64 {
            0
        }
        fn free(&mut self, _: u64, _: Order) -> bool {
            true
        }
    }
    let plan = plan(&["refuse"], &[1], 64);
    let cells = cells(&plan);
    let error =
        Refuse { round: cells[0].round(&plan, 0), hold: None }.visit(&Generous).expect_err("there is always a block");
    assert!(matches!(error, BenchError::Granted { bench: "refuse", order: 0 }), "{error}");
}

#[test]
fn crowds_are_larger_than_the_machine() {
    let allocators = vec![Allocator::Llfree, Allocator::LlfreeShared];
    let plan = Plan { allocators, ..plan(&["oversubscribed"], &[1], 512) };
    let rows = run(&plan, Show::Nothing).expect("memory is left");
    for (bench, order) in [("oversubscribed-few", Some(0)), ("oversubscribed-mixed", None)] {
        for threads in [2, 64] {
            let row = |op| find(&rows, (bench, order, threads, "llfree-shared", op));
            let (wall, p50, max) = (row("wall"), row("p50"), row("max"));
            assert!(wall.per_ms.is_some_and(|per_ms| (per_ms * wall.ns_median - 1e6).abs() < 1.0), "{wall:?}");
            assert!(wall.operations > 0 && p50.ns_median <= max.ns_median && p50.per_ms.is_none());
        }
    }
}

#[test]
fn every_other_workload_is_measured() {
    let benches = ["half-fragmented", "replace", "fresh", "full", "epoch", "cache"];
    let allocators = vec![Allocator::Llfree, Allocator::LlfreeShared, Allocator::Buddy];
    let plan = Plan { allocators, ..plan(&benches, &[1], 64) };
    let aged =
        Plan { operations: Some(40_000), allocators: plan.allocators.clone(), ..self::plan(&["aged"], &[1], 64) };
    let rows =
        [run(&plan, Show::Nothing), run(&aged, Show::Nothing)].map(|rows| rows.expect("memory is left")).concat();
    for allocator in ["llfree", "llfree-shared", "buddy"] {
        let operations = |bench, order, op| find(&rows, (bench, Some(order), 1, allocator, op)).operations;
        // A quarter of half of 128 MiB.
        assert_eq!([1, 5, 9].map(|order| operations("half-fragmented", order, "alloc-max")), [2048, 128, 8]);
        assert_eq!(operations("fresh", 0, "alloc-p99.9"), 4_000);
        assert!(operations("replace-90", 0, "pair") > 0 && operations("replace-50", 0, "alloc-max") > 0);
        assert_eq!(operations("aged", 0, "alloc-max"), 40_000, "several passes");
        let worst = rows.iter().find(|row| row.allocator == allocator && row.op == "alloc-worst");
        assert_eq!(
            worst.map(|row| row.operations),
            (allocator != "llfree-shared").then_some(40_000),
            "as many in each run"
        );
        assert!(operations("full-99", 0, "alloc") > 0);
        assert!(operations("cache", 9, "free-cold") == 4 && operations("cache", 0, "alloc-hot") > 1000);
    }
    for (order, op) in [(0, "first"), (0, "worst"), (9, "worst-max")] {
        assert!(find(&rows, ("epoch", Some(order), 1, "llfree", op)).operations == 64);
    }
    assert!(rows.iter().all(|row| row.bench != "epoch" || row.allocator != "buddy"), "no host takes its frames");
}

#[test]
fn a_default_run_has_the_sizes_of_its_workloads_and_a_full_one_more() {
    let sizes = |bench: &str, full| {
        let plan = Plan {
            huge_frames: None,
            full,
            allocators: Vec::from(Allocator::value_variants()),
            ..plan(&[bench], &[1], 1)
        };
        let mut sizes: Vec<_> =
            cells(&plan).iter().map(|cell| (cell.huge_frames / PER_GIB, cell.subject.name())).collect();
        sizes.dedup();
        sizes
    };
    let both = |gib| [(gib, "llfree"), (gib, "llfree-shared")];
    let small = [(1, "llfree"), (1, "llfree-shared"), (1, "buddy"), (1, "buddy-spin"), (1, "bitmap")];
    assert_eq!(sizes("mixed-80", false), small);
    assert_eq!(sizes("mixed-80", true), [&small[..], &both(8), &both(64)].concat());
    assert_eq!(sizes("epoch", true), [both(64), both(64), both(1024), both(1024)].concat());
    assert_eq!(sizes("replace-50", false), both(8));
}
