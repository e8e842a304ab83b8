//! Where huge blocks of a handle come from: order 9 spares the pairs that order 10 needs, and neither takes what is evicted, far
//! away or others' while there is something better.

use crate::common::{Table, ready};
use llfree::{Allocation, Class, Cpu, Reclaim, Tenant};
use shared_layout::{HugeId, Order};

/// All huge frames are taken, but of the trees that `movable` names one has a small block; then these are freed and counted.
pub(crate) fn setup(tenant: &Tenant<'_>, trees: u32, movable: impl Fn(u32) -> bool, free: &[u32]) {
    for tree in 0..trees {
        for huge in tree * 32..tree * 32 + 32 {
            if movable(tree) && huge % 32 == 31 {
                continue;
            }
            if movable(tree) && huge % 32 == 0 {
                // The first block gives the tree its class.
                let last = HugeId(tree * 32 + 31).first_frame();
                assert!(tenant.alloc_at(last, Order::BASE).is_ok());
            }
            assert!(tenant.alloc_at(HugeId(huge).first_frame(), Order::HUGE).is_ok());
        }
    }
    for huge in free {
        tenant.free(HugeId(*huge).first_frame(), Order::HUGE).expect("ours");
    }
    tenant.recount();
}
fn huge_of(a: Allocation) -> u32 {
    ready(a).huge().expect("in range").0
}
fn take(cpu: &mut Cpu<'_>) -> u32 {
    huge_of(cpu.alloc(Order::HUGE).expect("free"))
}
fn is_free(tenant: &Tenant<'_>, huge: u32) -> bool {
    tenant.entry(HugeId(huge)).expect("there").is_all_free()
}

#[test]
fn a_tree_that_is_through_leaves_its_pairs_alone() {
    let table = Table::installed(64);
    let tenant = table.tenant();
    // Each tree: a pair and two lone ones.
    setup(&tenant, 2, |_| false, &[2, 3, 8, 13, 34, 35, 40, 45]);
    let mut cpu = tenant.cpu();
    let got: Vec<_> = (0..4).map(|_| take(&mut cpu)).collect();
    let mut sorted = got.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, [8, 13, 40, 45], "in order {got:?}");
}

#[test]
fn after_the_last_lone_huge_frame_of_a_tree_comes_that_of_another() {
    let table = Table::installed(128);
    let tenant = table.tenant();
    setup(&tenant, 4, |_| false, &[3, 6, 7, 35, 38, 39, 67, 70, 71, 99, 102, 103]);
    let mut cpu = tenant.cpu();
    let got: Vec<_> = (0..4).map(|_| take(&mut cpu)).collect();
    let mut sorted = got.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, [3, 35, 67, 99], "in order {got:?}");
}

#[test]
fn what_became_half_of_a_pair_is_not_lone() {
    let table = Table::installed(96);
    let tenant = table.tenant();
    // Nothing in the first tree, so the search decides.
    setup(&tenant, 3, |_| false, &[34, 72, 77]);
    tenant.free(HugeId(35).first_frame(), Order::HUGE).expect("ours");
    let mut cpu = tenant.cpu();
    assert!([72, 77].contains(&take(&mut cpu)));
}

#[test]
fn order_9_does_not_steal_because_order_10_had_to() {
    let table = Table::installed(32 * 16);
    let tenant = table.tenant();
    // Trees 0..14: movable, a pair each. Tree 15: huge, lone ones.
    let mut free: Vec<u32> = (0..15).flat_map(|tree| [tree * 32 + 4, tree * 32 + 5]).collect();
    free.extend((0..15).map(|n| 15 * 32 + 2 * n));
    setup(&tenant, 16, |tree| tree < 15, &free);
    let mut cpu = tenant.cpu();
    ready(cpu.alloc(Order::MAX).expect("a pair"));
    let got: Vec<_> = (0..10).map(|_| take(&mut cpu) / 32).collect();
    assert!(got.iter().all(|tree| *tree == 15), "trees {got:?}");
}

#[test]
fn a_free_tree_comes_before_a_strangers() {
    let table = Table::installed(32 * 16);
    let tenant = table.tenant();
    let free: Vec<u32> = (0..15).flat_map(|tree| [tree * 32 + 4, tree * 32 + 9]).collect();
    setup(&tenant, 16, |tree| tree < 15, &free);
    let mut cpu = tenant.cpu();
    take(&mut cpu);
    for huge in 15 * 32..16 * 32 {
        tenant.free(HugeId(huge).first_frame(), Order::HUGE).expect("ours");
    }
    // The other lone one of the first tree is on the list; the rest should be of the free tree.
    let got: Vec<_> = (0..24).map(|_| take(&mut cpu) / 32).collect();
    let stolen = got.iter().filter(|tree| **tree != 15).count();
    assert!(stolen <= 1, "trees {got:?}");
}

#[test]
fn order_10_does_not_take_a_pair_without_memory_first() {
    let table = Table::installed(32);
    let tenant = table.tenant();
    setup(&tenant, 1, |_| false, &[8, 20, 21, 25]);
    let mut cpu = tenant.cpu();
    take(&mut cpu);
    // The neighbour of 13 is free and evicted; then the handle frees 13.
    tenant.free(HugeId(12).first_frame(), Order::HUGE).expect("ours");
    assert!(table.reclaim(12, Reclaim::Soft));
    cpu.free(HugeId(13).first_frame(), Order::HUGE).expect("ours");
    take(&mut cpu);
    let pair = cpu.alloc(Order::MAX).expect("two");
    assert!(matches!(pair, Allocation::Ready(_)), "{pair:?} while 20, 21 are installed: {}", is_free(&tenant, 20));
}

#[test]
fn order_10_does_not_take_a_pair_that_was_evicted_since() {
    let table = Table::installed(32);
    let tenant = table.tenant();
    setup(&tenant, 1, |_| false, &[8, 20, 21, 25]);
    let mut cpu = tenant.cpu();
    take(&mut cpu);
    for huge in [12, 13] {
        cpu.free(HugeId(huge).first_frame(), Order::HUGE).expect("ours");
    }
    assert_eq!(take(&mut cpu), 25);
    assert!(table.reclaim(12, Reclaim::Soft) && table.reclaim(13, Reclaim::Soft));
    let pair = cpu.alloc(Order::MAX).expect("two");
    assert!(matches!(pair, Allocation::Ready(_)), "{pair:?} while 20, 21 are installed: {}", is_free(&tenant, 20));
}

#[test]
fn movable_huge_blocks_stay_near() {
    let table = Table::installed(32 * 32);
    let tenant = table.tenant();
    // One tree in the second handle's half that is movable with a lone huge frame.
    for huge in 20 * 32 + 1..21 * 32 {
        let order = if huge == 20 * 32 + 1 { Order::BASE } else { Order::HUGE };
        assert!(tenant.alloc_at(HugeId(huge).first_frame(), order).is_ok());
    }
    tenant.recount();
    let (mut one, mut other) = (tenant.cpu(), tenant.cpu());
    // Alone, a handle has all of memory: both are there first.
    assert!(one.alloc(Order::BASE).is_ok() && other.alloc(Order::BASE).is_ok());
    let movable = |cpu: &mut Cpu<'_>| huge_of(cpu.alloc_class(Order::HUGE, Class::MOVABLE).expect("free")) / 32;
    let got: Vec<_> = (0..3).map(|_| (movable(&mut one), movable(&mut other))).collect();
    assert!(got.iter().all(|(one, other)| *one < 16 && *other >= 16), "got {got:?}");
}

#[test]
fn a_handle_that_was_drained_comes_back_to_no_tree_that_is_anothers_now() {
    let table = Table::installed(32 * 4);
    let tenant = table.tenant();
    let mut one = tenant.cpu();
    let blocks: Vec<_> = (0..32).map(|_| ready(one.alloc(Order::HUGE).expect("free"))).collect();
    blocks.iter().for_each(|b| one.free(*b, Order::HUGE).expect("ours"));
    one.drain();
    let tree = blocks[0].0 / 512 / 32;
    // Somebody makes it his.
    let mut other = tenant.cpu();
    let mut mine = Vec::new();
    let _first = ready(other.alloc(Order::BASE).expect("free"));
    loop {
        let frame = ready(other.alloc(Order::BASE).expect("free"));
        mine.push(frame);
        if frame.0 / 512 / 32 == tree {
            break;
        }
        if mine.len() > 40000 {
            panic!("never there");
        }
    }
    let got: Vec<_> = (0..8).map(|_| take(&mut one) / 32).collect();
    let there = got.iter().filter(|t| **t == u32::try_from(tree).unwrap()).count();
    assert!(there <= 1, "{got:?}, tree {tree}");
}

#[test]
fn evicted_lone_ones_do_not_cost_an_installed_pair() {
    let table = Table::installed(96);
    let tenant = table.tenant();
    setup(&tenant, 3, |_| false, &[34, 35, 40, 72]);
    assert!(table.reclaim(40, Reclaim::Soft));
    tenant.recount();
    let mut cpu = tenant.cpu();
    assert_eq!(take(&mut cpu), 72);
}

#[test]
fn order_9_spares_the_pairs_that_order_10_needs() {
    let table = Table::installed(32);
    let tenant = table.tenant();
    (0..32).for_each(|_| assert!(tenant.alloc(Order::HUGE).is_ok()));
    let free = |huge: u32| tenant.free(HugeId(huge).first_frame(), Order::HUGE).expect("ours");
    // One pair, before and between some that are none.
    [0, 3, 6, 7, 8, 13].into_iter().for_each(free);
    tenant.recount();
    let mut cpu = tenant.cpu();
    let huge = |cpu: &mut Cpu<'_>| ready(cpu.alloc(Order::HUGE).expect("free")).huge().expect("in range").0;
    let mut lone: Vec<_> = (0..4).map(|_| huge(&mut cpu)).collect();
    lone.sort_unstable();
    assert_eq!(lone, [0, 3, 8, 13]);
    // Where a handle freed some, too: the second makes a pair of what was none.
    [8, 13, 12].into_iter().for_each(|huge| cpu.free(HugeId(huge).first_frame(), Order::HUGE).expect("ours"));
    assert_eq!(huge(&mut cpu), 8);
    let mut pairs = [0; 2].map(|_| ready(cpu.alloc(Order::MAX).expect("two pairs")).huge().expect("in range").0);
    pairs.sort_unstable();
    assert_eq!(pairs, [6, 12]);
    // Nothing else is left then, a pair is broken.
    cpu.free(HugeId(6).first_frame(), Order::MAX).expect("ours");
    let mut halves = [0; 2].map(|_| huge(&mut cpu));
    halves.sort_unstable();
    assert_eq!(halves, [6, 7]);
    assert!(cpu.alloc(Order::HUGE).is_err());
}
