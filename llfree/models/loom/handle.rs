//! Whole handles: allocations, frees and drains of two CPUs and a host, hints and all. Interleavings
//! are explored up to a bound on preemptions: without one the hints' many words would take hours.

use super::order;
use super::shared::Shared;
use super::walk::walk;
use crate::block::Allocation;
use crate::cpu::Cpu;
use crate::host::{Reclaim, Residency};
use crate::sync::Ordering;
use loom::sync::Arc;
use loom::thread;
use shared_layout::{FrameId, HugeEntry, HugeId, Order, Run};

/// One installed huge frame of which only `free` bits of row 0 are free.
fn almost_full(free: u64) -> Shared {
    let entry = HugeEntry::FREE_INSTALLED.take(512 - free.count_ones() as u16).expect("some are taken");
    Shared::new(&[(entry, Residency::Installed)], |row| if row == 0 { !free } else { u64::MAX })
}

/// One installed huge frame, all of it free.
fn all_free() -> Shared {
    Shared::new(&[(HugeEntry::FREE_INSTALLED, Residency::Installed)], |_| 0)
}

fn reclaim(shared: &Shared, how: Reclaim) -> bool {
    let claim = shared.host().claim(HugeId(0)).expect("one host thread");
    claim.reclaim(how).map(crate::host::Reclaimed::done).is_ok()
}

/// Two parties and what must hold after them, with trees that are listed and with trees that are looked at one by one.
fn race<A: Send + 'static, B: Send + 'static>(
    shared: impl Fn() -> Shared + Send + Sync + Copy + 'static,
    a: impl Fn(&Shared) -> A + Send + Sync + Copy + 'static,
    b: impl Fn(&Shared) -> B + Send + Sync + Copy + 'static,
    after: impl Fn(&Shared, A, B) + Send + Sync + Copy + 'static,
) {
    race_prepared(shared, |_| (), a, b, after);
}

/// The same after some preparation.
fn race_prepared<A: Send + 'static, B: Send + 'static>(
    shared: impl Fn() -> Shared + Send + Sync + Copy + 'static,
    prepare: impl Fn(&Shared) + Send + Sync + Copy + 'static,
    a: impl Fn(&Shared) -> A + Send + Sync + Copy + 'static,
    b: impl Fn(&Shared) -> B + Send + Sync + Copy + 'static,
    after: impl Fn(&Shared, A, B) + Send + Sync + Copy + 'static,
) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(1);
    // A search that finds nothing looks at every entry and hint several times.
    model.max_branches = 20_000;
    for listed in [true, false] {
        walk(&model, move || {
            let shared = Arc::new(shared().listed(listed));
            prepare(&shared);
            let other = shared.clone();
            let first = thread::spawn(move || a(&other));
            let b = b(&shared);
            let a = first.join().expect("no panic");
            after(&shared, a, b);
            shared.tenant().validate().expect("counters fit the bits");
            shared.host().validate().expect("entries fit R");
        });
    }
}

/// The frames of some allocations by a handle that is then leaked with what it holds back.
fn alloc(shared: &Shared, count: usize) -> Vec<u64> {
    let tenant = shared.tenant();
    let mut cpu = tenant.cpu();
    let got = (0..count).filter_map(|_| cpu.alloc(Order::BASE).ok()).map(|a| a.position().0.0).collect();
    std::mem::forget(cpu);
    got
}

fn once(mut frames: Vec<u64>) {
    let all = frames.len();
    frames.sort_unstable();
    frames.dedup();
    assert_eq!(frames.len(), all, "a frame with two owners");
}

#[test]
fn a_handle_and_a_caller_without_one() {
    race(
        || almost_full(0b11),
        |m| alloc(m, 1),
        |m| m.tenant().alloc(Order::BASE).ok().map(|a| a.position().0.0),
        |_, a, b| once(a.into_iter().chain(b).collect()),
    );
}

#[test]
fn frees_and_a_drain_against_an_allocation() {
    race(
        || almost_full(0b1000),
        |m| {
            let tenant = m.tenant();
            let mut cpu = tenant.cpu();
            (0..2).for_each(|f| cpu.free(FrameId(f), Order::BASE).expect("ours"));
            cpu.drain();
        },
        |m| alloc(m, 2),
        |m, (), got| {
            assert!(!got.is_empty(), "frame 3 was free all along");
            once(got);
            assert!(m.tenant().stats().free_frames <= 2);
        },
    );
}

#[test]
fn a_handle_knows_what_the_host_evicted() {
    race(
        all_free,
        |m| reclaim(m, Reclaim::Soft),
        |m| {
            let tenant = m.tenant();
            let mut cpu = tenant.cpu();
            // Frames leave the handle past it and come back: the host has its chance in between.
            let got = cpu.alloc(Order::ROW).expect("soft reclaim leaves it free");
            let (first, _) = got.position();
            cpu.free(first, Order::ROW).expect("ours");
            let got = cpu.alloc(Order::BASE).expect("soft reclaim leaves it free");
            let evicted = m.tenant().entry(HugeId(0)).expect("in the table").is_evicted();
            assert_eq!(matches!(got, Allocation::Evicted(_)), evicted, "nothing evicts it while it is ours");
        },
        |_, _, ()| {},
    );
}

#[test]
fn hold_against_a_handle() {
    race(
        all_free,
        |m| reclaim(m, Reclaim::Hard),
        |m| {
            let tenant = m.tenant();
            let mut cpu: Cpu<'_> = tenant.cpu();
            let got = cpu.alloc(order(3)).is_ok();
            std::mem::forget(cpu);
            got
        },
        |_, held, got| assert!(held != got, "exactly one owner"),
    );
}

/// One installed huge frame, none of it free.
fn full() -> Shared {
    let entry = HugeEntry::FREE_INSTALLED.take(512).expect("free");
    Shared::new(&[(entry, Residency::Installed)], |_| u64::MAX)
}

#[test]
fn a_hint_denies_nothing_that_a_free_left() {
    for o in [0, 2] {
        race(
            full,
            |m| _ = m.tenant().recount_tree(0),
            move |m| m.tenant().free(FrameId(0), order(o)).expect("ours"),
            move |m, (), ()| assert!(!m.tenant().trees.get(0).offer(order(o)).is_none(), "order {o} is free"),
        );
    }
    // The promise is there at first, and broken: the recount takes it back, or who leaves the tree with nothing in it.
    let recount: fn(&Shared) = |m| _ = m.tenant().recount_tree(0);
    for take_back in [recount, |m| m.tenant().leave_emptied(0)] {
        race(
            || {
                let shared = full();
                let more = HugeEntry::FREE_INSTALLED.take(1).expect("free");
                shared.tenant().trees.change(0, |hint| hint.with_room(more).reserved(true));
                shared
            },
            take_back,
            |m| m.tenant().free(FrameId(0), Order::BASE).expect("ours"),
            |m, (), ()| assert!(!m.tenant().trees.get(0).offer(Order::BASE).is_none(), "a frame is free"),
        );
    }
    // Two free the halves of a run: whoever counts last has counted all of it.
    race(
        full,
        |m| m.tenant().free(FrameId(0), order(7)).expect("ours"),
        |m| m.tenant().free(FrameId(128), order(7)).expect("ours"),
        |m, (), ()| assert!(!m.tenant().trees.get(0).offer(order(8)).is_none(), "four rows are free"),
    );
    // The second half comes while somebody counts the first.
    race(
        || {
            let shared = full();
            shared.tenant().free(FrameId(128), order(7)).expect("ours");
            shared
        },
        |m| _ = m.tenant().recount_tree(0),
        |m| m.tenant().free(FrameId(0), order(7)).expect("ours"),
        |m, (), ()| assert!(!m.tenant().trees.get(0).offer(order(8)).is_none(), "four rows are free"),
    );
}

#[test]
fn a_tree_that_was_left_is_nobodys() {
    let leave: fn(&Shared) = |m| m.tenant().leave(Some(0));
    for leave in [leave, |m| m.tenant().leave_emptied(0)] {
        race(
            || {
                let shared = full();
                shared.tenant().trees.change(0, |hint| hint.reserved(true));
                shared
            },
            leave,
            |m| _ = m.tenant().recount_tree(0),
            |m, (), ()| assert!(!m.tenant().trees.get(0).is_reserved()),
        );
    }
}

#[test]
fn a_refusal_does_not_outlive_a_free() {
    race(
        full,
        |m| m.tenant().alloc(Order::BASE).is_ok(),
        |m| m.tenant().free(FrameId(5), Order::BASE).expect("ours"),
        |m, got, ()| {
            let again = m.tenant().alloc(Order::BASE).is_ok();
            assert!(got != again, "the frame is had once, and is not refused when all is done");
        },
    );
}

/// The host has one half of a pair for a while, without a word, and the other half comes free: none of them sees both.
#[test]
fn a_pair_that_the_host_gave_back_is_not_refused_for_good() {
    let hold_and_release = |m: &Shared| {
        let claim = || m.host().claim(HugeId(1)).expect("nobody else claims it");
        if let Ok(held) = claim().reclaim(Reclaim::Hard) {
            held.done();
            claim().release().expect("held");
        }
    };
    let half_free = || {
        let entries = [HugeEntry::HUGE_INSTALLED, HugeEntry::FREE_INSTALLED];
        Shared::new(&entries.map(|entry| (entry, Residency::Installed)), |_| 0)
    };
    let check = |m: &Shared| assert!(m.tenant().alloc(Order::MAX).is_ok(), "both halves are free");
    let free = |m: &Shared| m.tenant().free(FrameId(0), Order::HUGE).expect("ours");
    // Refused before, and believed: what promises the half promises no pair.
    race_prepared(
        half_free,
        |m| assert!(m.tenant().alloc(Order::MAX).is_err()),
        hold_and_release,
        free,
        move |m, (), ()| check(m),
    );
    // Refused meanwhile.
    race(
        half_free,
        move |m| {
            let held = m.host().claim(HugeId(1)).expect("idle").reclaim(Reclaim::Hard).expect("free");
            held.done();
            free(m);
            m.host().claim(HugeId(1)).expect("idle").release().expect("held");
        },
        |m| m.tenant().alloc(Order::MAX).is_ok(),
        move |m, (), got| assert!(got || m.tenant().alloc(Order::MAX).is_ok(), "both halves are free"),
    );
}

#[test]
fn a_block_whose_taker_gives_up_is_not_refused_for_good() {
    // Order 1 lowers the counter and may find its pair broken: for a moment nothing seems free.
    race(
        || almost_full(0b11),
        |m| m.tenant().alloc(order(1)).is_ok(),
        |m| m.tenant().alloc(Order::BASE).is_ok(),
        |m, pair, frame| {
            assert!(!(pair && frame));
            let left = 2 - if pair { 2 } else { 0 } - if frame { 1 } else { 0 };
            let found = (0..2).filter(|_| m.tenant().alloc(Order::BASE).is_ok()).count();
            assert_eq!(found, left);
        },
    );
}

#[test]
fn a_bound_that_one_lowers_while_another_frees_is_believed_by_nobody() {
    let mut model = loom::model::Builder::new();
    // It takes three to see the fault; they take half a minute, which is for `.ci/run`.
    let preemptions = std::env::var("LLFREE_PREEMPTIONS").ok().and_then(|number| number.parse().ok());
    model.preemption_bound = Some(preemptions.unwrap_or(2));
    model.max_branches = 20_000;
    walk(&model, move || {
        // One frame is free, in row 1, with a bound from before; row 2 is ours.
        let entry = HugeEntry::FREE_INSTALLED.take(511).and_then(|entry| entry.lower(Run::of(order(6))));
        let rows = |row| if row == 1 { !1 } else { u64::MAX };
        let shared = Arc::new(Shared::new(&[(entry.expect("valid"), Residency::Installed)], rows));
        let other = shared.clone();
        let taker = thread::spawn(move || {
            // As a search does that found no run.
            let tenant = other.tenant();
            let _ = tenant.noted(HugeId(0), Err::<(), _>(tenant.lower.bound(HugeId(0))));
        });
        shared.tenant().free(FrameId(128), order(6)).expect("ours");
        let _ = shared.tenant().alloc(order(6));
        taker.join().expect("no panic");
        let is_left = shared.rows.iter().any(|row| row.load(Ordering::Relaxed) == 0);
        let is_served = shared.tenant().alloc(order(6)).is_ok();
        assert!(!is_left || is_served, "at rest a free block is refused: {:?}", shared.tenant().entry(HugeId(0)));
    });
}
