//! Unit tests of private parts that need atomics: they stay out of the files which the model
//! checkers compile against atomics of their own.

mod untold;

use crate::block::Allocation;
use crate::entries::{Entries, Want};
use crate::hint::{TreeHint, Trees, bitmap_words};
use crate::host::{Host, Reclaim, Residency};
use crate::ledger::{LEDGER_WORDS, Ledger};
use crate::lower::Lower;
use crate::refusal::{Refusal, Unsure};
use crate::rows::{ROWS, find_run, longest};
use crate::spot::{Place, Spot};
use crate::sync::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use crate::tenant::Tenant;
use crate::vicinity::{Look, Vicinity};
use shared_layout::table::next_epoch;
use shared_layout::{FrameId, HugeEntry, HugeId, Order, Run};
use std::vec::Vec;

fn listed_for(trees: &Trees<'_>, want: Want, home: u32) -> Vec<u32> {
    let mut seen = Vec::new();
    trees.visit(want, Order::HUGE, Vicinity::all(0), home, |tree| {
        seen.push(tree);
        Look::Next
    });
    seen
}

#[test]
fn a_lap_visits_every_listed_tree_once_from_home_on() {
    for count in [65u32, 127, 128, 130, 200] {
        let hints: Vec<_> = (0..count).map(|_| AtomicU16::new(0)).collect();
        let summary: Vec<_> = (0..bitmap_words(count)).map(|_| AtomicU64::new(0)).collect();
        let trees = Trees::new(&hints, &summary, count).expect("lengths fit");
        let free = TreeHint::count(&Entries::new([HugeEntry::FREE_EVICTED].into_iter())).hint;
        let listed: Vec<u32> = (0..count).filter(|tree| tree % 3 == 0 || tree % 64 == 63).collect();
        for tree in &listed {
            trees.change(*tree, |_| free);
        }
        for home in [0, 1, 62, 63, 64, 65, 129, 199, 500] {
            let mut seen = listed_for(&trees, Want::Free, home);
            let from = if home < count { home } else { 0 };
            let first = listed.iter().find(|tree| **tree >= from).or(listed.first());
            assert_eq!(seen.first(), first, "{count} trees from {home}");
            seen.sort_unstable();
            assert_eq!(seen, listed);
        }
        assert_eq!(listed_for(&trees, Want::Installed, 0), []);
    }
}

#[test]
fn a_lap_of_a_vicinity_shows_what_is_listed_in_it() {
    for count in [65u32, 100, 128, 200] {
        let hints: Vec<_> = (0..count).map(|_| AtomicU16::new(0)).collect();
        let summary: Vec<_> = (0..bitmap_words(count)).map(|_| AtomicU64::new(0)).collect();
        let trees = Trees::new(&hints, &summary, count).expect("lengths fit");
        let free = TreeHint::count(&Entries::new([HugeEntry::FREE_EVICTED].into_iter())).hint;
        let is_listed = |tree: &u32| tree % 5 != 2;
        (0..count).filter(is_listed).for_each(|tree| _ = trees.change(tree, |_| free));
        let firsts = [0, 1, count / 2, count - 1];
        for (first, len, home) in firsts
            .into_iter()
            .flat_map(|first| [1, 3, count / 2, count].map(|len| (first, len, (first + len / 2) % count)))
        {
            let vicinity = Vicinity::of(first, len);
            let lap = |from: u32, count_of: u32| (from..from + count_of).map(|tree| tree % count).filter(is_listed);
            let place = if len.min(count) > len / 2 { len / 2 } else { 0 };
            let expected: Vec<_> = lap(first + place, len.min(count) - place).chain(lap(first, place)).collect();
            let mut seen = Vec::new();
            trees.visit(Want::Free, Order::HUGE, vicinity, home, |tree| {
                seen.push(tree);
                Look::Next
            });
            assert_eq!(seen, expected, "{count} trees, {len} from {first} on, at home in {home}");
            assert!((0..count).all(|tree| vicinity.has(tree, count) == lap_has(first, len.min(count), tree, count)));
        }
    }
}

#[test]
fn after_looks_in_vain_a_lap_shows_each_tree_that_may_serve_once_and_no_other() {
    for count in [70usize, 128, 200] {
        let hints: Vec<_> = (0..count).map(|_| AtomicU16::new(0)).collect();
        let summary: Vec<_> = (0..bitmap_words(count as u32)).map(|_| AtomicU64::new(0)).collect();
        let trees = Trees::new(&hints, &summary, count as u32).expect("lengths fit");
        let order = |order| Order::new(order).expect("in range");
        let short =
            HugeEntry::FREE_INSTALLED.take(256).and_then(|entry| entry.lower(Run::of(order(2)))).expect("valid");
        let long = HugeEntry::FREE_INSTALLED.take(256).expect("valid");
        let serves = |tree: &u32| tree % 5 == 4 || tree % 64 == 63;
        for tree in 0..count as u32 {
            let entry = if serves(&tree) { long } else { short };
            trees.change(tree, |_| TreeHint::count(&Entries::new([entry, HugeEntry::HUGE_EVICTED].into_iter())).hint);
        }
        for (home, patience) in [(0, 1usize), (0, 3), (9, 1), (63, 2), (130, 5)] {
            let mut seen = Vec::new();
            let glances = trees.visit(Want::Mixed, order(4), Vicinity::all(0), home, |tree| {
                seen.push(tree);
                if seen.len() < patience { Look::Next } else { Look::NextThatServes }
            });
            let from = if home < count as u32 { home } else { 0 };
            let lap: Vec<_> = (from..count as u32).chain(0..from).collect();
            let (vain, rest) = lap.split_at(patience.min(count));
            let expected: Vec<_> = vain.iter().chain(rest.iter().filter(|tree| serves(tree))).copied().collect();
            assert_eq!(seen, expected, "{count} trees from {home} after {patience}");
            assert_eq!(glances > 0, count >= patience);
        }
    }
}

#[test]
fn a_lap_has_each_tree_of_a_vicinity_once_from_home_on() {
    for trees in [1u32, 2, 16, 65] {
        for (first, len, home) in [(0, u32::MAX, 0), (0, u32::MAX, trees / 2), (trees / 3, u32::MAX, 500)]
            .into_iter()
            .chain((0..trees).flat_map(|first| [1, 2, trees].map(|len| (first, len, (first + len / 2) % trees))))
        {
            let vicinity = Vicinity::of(first, len);
            let seen: Vec<u32> = vicinity.lap(home, trees).into_iter().flatten().collect();
            let case = std::format!("{len} of {trees} trees from {first} on, at home in {home}: {seen:?}");
            let is_home = home < trees && vicinity.has(home, trees);
            let expected = if is_home {
                home
            } else if vicinity.is_all() {
                0
            } else {
                first
            };
            assert_eq!(seen.first(), Some(&expected), "{case}");
            let mut sorted = seen.clone();
            sorted.sort_unstable();
            let all: Vec<u32> = (0..trees).filter(|tree| vicinity.has(*tree, trees)).collect();
            assert_eq!(sorted, all, "{case}");
        }
    }
}

/// Their bitmaps are one cache line, which all CPUs would meet in.
#[test]
fn few_trees_are_found_by_their_hints_alone() {
    for count in [1u32, 16, 64] {
        let hints: Vec<_> = (0..count).map(|_| AtomicU16::new(0)).collect();
        let summary: Vec<_> = (0..bitmap_words(count)).map(|_| AtomicU64::new(0)).collect();
        let trees = Trees::new(&hints, &summary, count).expect("lengths fit");
        let free = TreeHint::count(&Entries::new([HugeEntry::FREE_INSTALLED].into_iter())).hint;
        trees.change(count - 1, |_| free);
        assert!(trees.are_few() && summary.iter().all(|word| word.load(Ordering::Relaxed) == 0));
        let one_more: Vec<_> = (0..=64).map(|_| AtomicU16::new(0)).collect();
        let summary: Vec<_> = (0..bitmap_words(65)).map(|_| AtomicU64::new(0)).collect();
        assert!(!Trees::new(&one_more, &summary, 65).expect("lengths fit").are_few());
    }
}

fn lap_has(first: u32, len: u32, tree: u32, trees: u32) -> bool {
    (first..first + len).any(|at| at % trees == tree)
}

#[test]
fn a_block_comes_from_its_place_or_from_elsewhere_in_the_row() {
    let entries = [AtomicU16::new(HugeEntry::FREE_INSTALLED.bits())];
    let rows: Vec<_> = (0..8).map(|_| AtomicU64::new(0)).collect();
    let lower = Lower::new(&entries, &rows).expect("lengths fit");
    let order = |order| Order::new(order).expect("in range");
    let take = |frame, o| lower.take_in_row(FrameId(frame), order(o)).ok().map(|taken| taken.frame.0);
    assert_eq!(take(4, 2), Some(4), "lower ones are free, too");
    assert_eq!(take(4, 2), Some(0), "taken");
    assert_eq!(take(9, 1), Some(8), "no place of a block");
    assert_eq!(take(62, 0), Some(62));
    assert_eq!(take(48, 4), Some(16), "a part of it is taken");
    assert_eq!(take(100, 5), Some(64));
    assert_eq!(take(512, 0), None, "past the end");
}

#[test]
fn a_glance_at_a_tree_has_what_is_set_in_each_of_its_entries() {
    for count in [32usize, 64, 50] {
        for index in 0..count {
            let held = HugeEntry::FREE_EVICTED.hold().expect("free");
            let entry = |at| if at == index { held } else { HugeEntry::HUGE_INSTALLED };
            let entries: Vec<_> = (0..count).map(|at| AtomicU16::new(entry(at).bits())).collect();
            let rows: Vec<_> = (0..8 * count).map(|_| AtomicU64::new(0)).collect();
            let lower = Lower::new(&entries, &rows).expect("lengths fit");
            for tree in 0..count.div_ceil(32) {
                assert_eq!(lower.glance(tree as u32).has_held(), index / 32 == tree, "{index} of {count}");
            }
        }
    }
}

#[test]
fn bits_behind_the_last_tree_vanish() {
    let hints: Vec<_> = (0..70).map(|_| AtomicU16::new(0)).collect();
    let summary: Vec<_> = (0..bitmap_words(70)).map(|_| AtomicU64::new(u64::MAX)).collect();
    let trees = Trees::new(&hints, &summary, 70).expect("lengths fit");
    assert_eq!(listed_for(&trees, Want::Free, 0).len(), 70, "memory that was used before");
    trees.unlist_all();
    assert_eq!(listed_for(&trees, Want::Free, 0).len(), 0);
    assert!(summary.iter().all(|word| word.load(Ordering::Relaxed) == 0));
}

/// A recount that began before a CPU left its tree wrote the old word back: the tree stayed reserved for ever.
#[test]
fn a_recount_does_not_undo_that_a_cpu_left() {
    let hints = [AtomicU16::new(0)];
    let summary: Vec<_> = (0..bitmap_words(1)).map(|_| AtomicU64::new(0)).collect();
    let trees = Trees::new(&hints, &summary, 1).expect("lengths fit");
    trees.change(0, |hint| hint.reserved(true));
    let counted = TreeHint::count(&Entries::new([HugeEntry::FREE_EVICTED].into_iter())).hint;
    let left = core::cell::Cell::new(false);
    trees.change(0, |hint| {
        if !left.replace(true) {
            // Between the recount's look at the word and its change.
            trees.change(0, |hint| hint.reserved(false));
        }
        hint.recounted(counted)
    });
    let hint = trees.get(0);
    assert!(!hint.is_reserved() && hint.promises(Want::Free), "{hint:?}");
}

fn order(order: u8) -> Order {
    Order::new(order).expect("in range")
}

/// Whether blocks of an order are refused.
fn stands(refusal: Refusal<'_>, number: u8, epoch: u64) -> bool {
    refusal.unsure(order(number), epoch).is_none()
}

/// A look that finds nothing anywhere.
fn refuse(refusal: Refusal<'_>, number: u8) {
    let looking = refusal.begin(order(number), 0);
    assert!(refusal.conclude(looking, Unsure::NONE));
}

/// The trees of the first groups that may have a block of an order; none where it is refused.
fn unsure_trees(refusal: Refusal<'_>, number: u8) -> Vec<u32> {
    let unsure = refusal.unsure(order(number), 0).unwrap_or(Unsure::NONE);
    (0..16).filter(|tree| unsure.has(*tree)).collect()
}

#[test]
fn a_refusal_holds_for_larger_blocks_until_one_that_fits_comes_free() {
    let word = AtomicU64::new(0);
    let refusal = Refusal::new(&word);
    let looking = refusal.begin(order(3), 7);
    assert!(!stands(refusal, 3, 7), "not before it is concluded");
    assert!(refusal.conclude(looking, Unsure::NONE));
    assert!(stands(refusal, 3, 7) && stands(refusal, 10, 7));
    assert!(!stands(refusal, 2, 7), "a smaller one may fit");
    assert!(!stands(refusal, 3, 8), "the host returned memory");
    refusal.withdraw(0, order(2));
    assert!(stands(refusal, 3, 7));
    refusal.withdraw(0, order(3));
    assert!(!stands(refusal, 3, 7) && stands(refusal, 4, 7), "what came free is no larger than that");
    refusal.withdraw(0, Order::MAX);
    assert!(!stands(refusal, 10, 7));
    refuse(refusal, 3);
    refusal.forget_before(0);
    assert!(stands(refusal, 3, 0));
    refusal.forget_before(1);
    assert!(!stands(refusal, 3, 0) && !stands(refusal, 3, 1));
    refuse(refusal, 3);
    refusal.forget();
    assert!(!stands(refusal, 10, 0) && refusal.unsure(order(10), 0) == Some(Unsure::ALL));
}

#[test]
fn a_look_says_nothing_where_something_came_free_meanwhile() {
    let word = AtomicU64::new(0);
    let refusal = Refusal::new(&word);
    let large = refusal.begin(order(5), 0);
    let small = refusal.begin(order(2), 0);
    refusal.withdraw(0, order(1));
    assert!(refusal.conclude(large, Unsure::NONE) && stands(refusal, 5, 0) && !stands(refusal, 2, 0));
    assert!(refusal.conclude(small, Unsure::NONE) && stands(refusal, 2, 0));
    let known = refusal.begin(order(7), 0);
    assert!(refusal.conclude(known, Unsure::NONE) && stands(refusal, 2, 0), "that of the smaller one stays");
    let disturbed = refusal.begin(order(7), 0);
    refusal.withdraw(0, order(9));
    assert!(!refusal.conclude(disturbed, Unsure::NONE) && !stands(refusal, 9, 0) && stands(refusal, 10, 0));
    let next = refusal.begin(order(2), 0);
    assert!(!refusal.conclude(small, Unsure::NONE) && refusal.conclude(next, Unsure::NONE));
    // Where it may not be remembered it is true all the same.
    refusal.withdraw(0, Order::MAX);
    let unsure = refusal.begin(order(2), 0);
    assert!(refusal.conclude(unsure, Unsure::NONE.with(5)) && !stands(refusal, 2, 0));
}

#[test]
fn a_look_goes_where_something_came_free_since_the_last_one() {
    let word = AtomicU64::new(0);
    let refusal = Refusal::new(&word);
    assert_eq!(refusal.begin(order(6), 0).unsure, Unsure::ALL, "nothing is known");
    refuse(refusal, 6);
    refusal.withdraw(3, order(6));
    assert_eq!(unsure_trees(refusal, 6), [3]);
    assert_eq!(unsure_trees(refusal, 7), [0; 0], "refused still");
    assert_eq!(refusal.unsure(order(5), 0), Some(Unsure::ALL), "smaller ones were not looked for");
    refusal.withdraw(4 + 16, order(8));
    assert_eq!(unsure_trees(refusal, 7), [3, 4], "trees that leave the same rest are one group");
    // Somebody is at work in tree 3.
    let looking = refusal.begin(order(6), 0);
    assert!(refusal.conclude(looking, Unsure::NONE.with(3)));
    assert_eq!(unsure_trees(refusal, 6), [3]);
    // A larger block was looked for and is refused: that says nothing of the smaller ones ...
    refuse(refusal, 8);
    assert_eq!((unsure_trees(refusal, 6), stands(refusal, 8, 0)), ([3].into(), true));
    // ... unless more trees are unsure than that is worth.
    [7, 8].into_iter().for_each(|tree| refusal.withdraw(tree, order(6)));
    refusal.withdraw(9, order(8));
    assert_eq!(unsure_trees(refusal, 8), [3, 7, 8, 9]);
    refuse(refusal, 8);
    assert_eq!(refusal.unsure(order(6), 0), Some(Unsure::ALL));
    [order(6), order(8)].into_iter().for_each(|order| refusal.withdraw(11, order));
    assert_eq!(unsure_trees(refusal, 8), [11]);
}

/// Blocks that somebody freed who was stopped before he told are not hidden for good.
#[test]
fn some_looks_see_every_tree() {
    let mut spot = Spot::at(Vicinity::all(0), None);
    let all: Vec<usize> = (0..300).filter(|_| spot.sees_all()).collect();
    assert!(all.len() >= 300 / 16 && all[0] == 0 && all.windows(2).all(|two| two[1] - two[0] <= 16), "{all:?}");
    assert!(Spot::unpack(7, 16, &Place::numbered(0)).sees_all(), "without a handle all do");
}

#[test]
fn a_few_blocks_come_from_abroad_for_one_search() {
    let mut spot = Spot::at(Vicinity::of(4, 4), None);
    assert!(spot.may_stay_in(5, 16) && !spot.may_stay_in(3, 16));
    spot.found_in(3, 16);
    let stays = (0..100).filter(|_| spot.may_stay_in(3, 16)).count();
    assert!((8..=32).contains(&stays), "{stays}");
    spot.found_in(3, 16);
    spot.found_in(5, 16);
    assert!(!spot.may_stay_in(3, 16), "there was one at home");
}

#[test]
fn what_the_host_may_make_whole_is_not_refused_for_good() {
    let word = AtomicU64::new(0);
    let refusal = Refusal::new(&word);
    refuse(refusal, 10);
    assert!(refusal.has_undoubted_pairs(4));
    refusal.doubt_pairs(4);
    assert!(!stands(refusal, 10, 0) && !refusal.has_undoubted_pairs(4));
    assert!(refusal.unsure(Order::MAX, 0).expect("doubted").has(4));
    let looking = refusal.begin(Order::MAX, 0);
    refusal.doubt_pairs(4);
    assert!(refusal.conclude(looking, Unsure::NONE), "nothing came free that is enough");
    assert!(!stands(refusal, 10, 0) && refusal.unsure(Order::MAX, 0).expect("doubted").has(4));
    // A free huge frame is one of the smaller blocks: nothing that is said of these says more of pairs.
    refusal.withdraw(4, Order::MAX);
    refuse(refusal, 7);
    let looking = refusal.begin(order(3), 0);
    refusal.doubt_pairs(4);
    assert!(!refusal.conclude(looking, Unsure::NONE) && !stands(refusal, 7, 0));
    refusal.withdraw(4, Order::HUGE);
    assert!(!stands(refusal, 10, 0));
}

/// One half comes free and is the host's before that is told; the other one comes free beside it, and the first promise
/// makes the second one for it.
#[test]
fn a_pair_beside_what_the_host_gives_back_is_not_refused() {
    for smaller in [3, 9] {
        let parts = Parts::free(2);
        let (tenant, host) = (parts.tenant(), parts.host());
        tenant.recount();
        let used = [0, 512].map(|frame| tenant.alloc_at(FrameId(frame), Order::HUGE));
        assert!(used.iter().all(Result::is_ok) && (0..2).all(|_| tenant.alloc(order(smaller)).is_err()));
        assert!(stands(tenant.refusal, smaller, 0));
        let first = tenant.give(FrameId(0), Order::HUGE).expect("ours");
        let held = host.claim(HugeId(0)).expect("idle").reclaim(Reclaim::Hard).expect("free");
        let second = tenant.give(FrameId(512), Order::HUGE).expect("ours");
        assert!(tenant.is_news(HugeId(1), second, 512));
        tenant.refusal.doubt_pairs(0);
        tenant.change_hint(0, Order::BASE, |hint| hint.with_free(!first.is_evicted(), false));
        tenant.change_hint(0, Order::MAX, |hint| hint.with_free(!second.is_evicted(), false));
        // The discard failed: the frame is as it was, without a new epoch.
        drop(held);
        assert!(tenant.alloc(Order::MAX).is_ok(), "order {smaller} was refused before");
    }
}

#[test]
fn the_longest_run_is_that_of_the_largest_block_that_is_found() {
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let mut seen = [0; 9];
    for _ in 0..20_000 {
        // From nothing free to much, a longer run in one row, and some rows as a whole.
        let (kind, most, longer) = (next() % 8, next() % 9, next());
        let rows: [AtomicU64; ROWS] = core::array::from_fn(|row| {
            let used = (0..kind).fold(0, |used, _| used | next());
            AtomicU64::new(match next() % 8 {
                whole if whole < most / 3 => 0,
                _ if longer % 8 == row as u64 => used & !(0xffff_ffff >> (longer >> 8 & 31) << (longer >> 16 & 32)),
                _ if most < 4 => u64::MAX,
                _ => used,
            })
        });
        let found = (0..=8).filter_map(Order::new).filter(|order| find_run(&rows, *order).is_some()).max();
        let run = found.map_or(Run::SINGLE, Run::of);
        assert_eq!(longest(&rows), run, "{rows:?}");
        seen[usize::from(run.order().get())] += 1;
    }
    assert!(seen.iter().all(|times| *times > 0), "{seen:?}");
}

#[test]
fn the_trees_of_a_dead_handle_are_left_to_others() {
    let atomics = |count: usize| (0..count).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
    let entries: Vec<_> = (0..128).map(|_| AtomicU16::new(HugeEntry::FREE_INSTALLED.bits())).collect();
    let hints: Vec<_> = (0..Tenant::hint_len(128)).map(|_| AtomicU16::new(0)).collect();
    let (rows, summary, epoch) = (atomics(128 * ROWS), atomics(Tenant::summary_len(128)), AtomicU64::new(0));
    let tenant = Tenant::new(&entries, &rows, &hints, &summary, &epoch).expect("lengths fit");
    tenant.recount();
    let words = [const { AtomicU64::new(0) }; LEDGER_WORDS];
    let marked =
        || (0..4).filter(|tree| tenant.trees.get(*tree).is_reserved() || tenant.trees.get(*tree).is_home()).count();
    for orders in [[9, 9, 9], [6, 8, 7], [0, 3, 10]] {
        let mut cpu = tenant.recorded_cpu(Ledger::new(&words)).expect("nobody has it");
        for order in orders {
            assert!(cpu.alloc(Order::new(order).expect("in range")).is_ok());
        }
        core::mem::forget(cpu);
        assert!(marked() > 0);
        tenant.give_back(Ledger::new(&words));
        assert_eq!(marked(), 0);
    }
}

/// The words of a table in which all is free and has memory, and which nobody has counted yet.
struct Parts {
    entries: Vec<AtomicU16>,
    rows: Vec<AtomicU64>,
    hints: Vec<AtomicU16>,
    summary: Vec<AtomicU64>,
    residency: Vec<AtomicU8>,
    epoch: AtomicU64,
}

impl Parts {
    fn free(huge_frames: u32) -> Self {
        Self {
            entries: (0..huge_frames).map(|_| AtomicU16::new(HugeEntry::FREE_INSTALLED.bits())).collect(),
            rows: (0..huge_frames * 8).map(|_| AtomicU64::new(0)).collect(),
            hints: (0..Tenant::hint_len(huge_frames)).map(|_| AtomicU16::new(0)).collect(),
            summary: (0..Tenant::summary_len(huge_frames)).map(|_| AtomicU64::new(0)).collect(),
            residency: (0..huge_frames).map(|_| AtomicU8::new(Residency::Installed as u8)).collect(),
            epoch: AtomicU64::new(0),
        }
    }

    /// The same with a host that gives nothing back in this epoch.
    fn steady(self) -> Self {
        self.raise(true);
        self
    }

    /// Another epoch of the host.
    fn raise(&self, held_stays: bool) {
        self.epoch.store(next_epoch(self.epoch.load(Ordering::Relaxed), held_stays), Ordering::Release);
    }

    fn tenant(&self) -> Tenant<'_> {
        let Self { entries, rows, hints, summary, epoch, .. } = self;
        Tenant::new(entries, rows, hints, summary, epoch).expect("lengths fit")
    }

    fn host(&self) -> Host<'_> {
        Host::new(&self.entries, &self.residency).expect("lengths fit")
    }
}

#[test]
fn a_lap_of_any_values_ends_and_stays_in_the_table() {
    let large = [1 << 26, u32::MAX / 32, 1 << 31, u32::MAX - 1, u32::MAX];
    let odd: Vec<u32> = (0..=9).chain([31, 32, 33, 63, 64, 65, 66]).chain(large).collect();
    for trees in [0u32, 1, 2, 3, 5, 8, 33, 64, 65] {
        for &first in &odd {
            for &len in &odd {
                for &home in odd.iter().filter(|home| **home <= u32::MAX / 32) {
                    let seen: Vec<u32> = Vicinity::of(first, len).lap(home, trees).into_iter().flatten().collect();
                    let mut sorted = seen.clone();
                    sorted.sort_unstable();
                    sorted.dedup();
                    assert_eq!(sorted.len(), seen.len());
                    assert_eq!(seen.len() as u32, len.min(trees), "{first} {len} of {trees} from {home}: {seen:?}");
                    assert!(seen.iter().all(|tree| *tree < trees));
                }
            }
        }
    }
}

/// A tree that a handle forgot to give up would be reserved for ever.
#[test]
fn of_the_trees_that_a_newcomer_lives_around_a_handle_has_none_reserved() {
    for order in [0, 6, 9] {
        let parts = Parts::free(512);
        let tenant = parts.tenant();
        tenant.recount();
        let reserved =
            |trees: core::ops::Range<u32>| trees.filter(|tree| tenant.trees.get(*tree).is_reserved()).count();
        let order = Order::new(order).expect("in range");
        let (mut first, mut second) = (tenant.cpu(), tenant.cpu());
        // Into the tenth tree; then there is room where it will live.
        let mut take = || match first.alloc(order) {
            Ok(Allocation::Ready(block)) => block.frame(),
            other => panic!("{order:?}: {other:?}"),
        };
        let blocks: Vec<_> = (0..(9 * 32 + 1) * Order::HUGE.frames() / order.frames()).map(|_| take()).collect();
        for block in blocks.iter().filter(|block| block.0 < 8 * 32 * Order::HUGE.frames()) {
            tenant.free(*block, order).expect("ours");
        }
        assert_eq!(reserved(8..16), 1, "{order:?}");
        assert!(second.alloc(Order::BASE).is_ok());
        assert!(first.alloc(Order::MAX).is_ok());
        assert_eq!(reserved(8..16), 1, "that of the newcomer, {order:?}");
    }
}
