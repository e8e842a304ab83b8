//! Order 10 where trees are few: which pair comes first, and what a newcomer has of a handle's places.

use crate::common::{Table, order, ready};
use crate::huge::setup;
use llfree::{Allocation, Class, Cpu, Policy, Rank, Reclaim, Tenant};
use shared_layout::{FrameId, HugeId, Order};

/// Where a block lies, and whether it is ready.
fn place(block: Allocation) -> (u32, bool) {
    match block {
        Allocation::Ready(block) => (block.frame().huge().expect("in range").0, true),
        Allocation::Evicted(block) => (block.first_huge().0, false),
    }
}
fn pair(cpu: &mut Cpu<'_>) -> (u32, bool) {
    place(cpu.alloc(Order::MAX).expect("some"))
}
fn evict(table: &Table, tenant: &Tenant<'_>, some: &[u32]) {
    some.iter().for_each(|huge| assert!(table.reclaim(*huge, Reclaim::Soft)));
    tenant.recount();
}

/// Pairs go without a word to the hints of their trees.
#[test]
fn order_10_finds_the_pair_that_is_left_where_others_were_promised() {
    let table = Table::installed(32 * 8);
    let tenant = table.tenant();
    let pairs: Vec<u32> = (0..8).map(|tree| tree * 32 + 6).collect();
    let lone = (0..8).map(|tree| tree * 32 + 9);
    let free: Vec<u32> = pairs.iter().flat_map(|one| [*one, one + 1]).chain(lone).collect();
    // Among huge blocks, and among small ones.
    setup(&tenant, 8, |tree| tree < 4, &free);
    for left in 0..8 {
        let mut cpu = tenant.cpu();
        for gone in (0..8).filter(|tree| *tree != left) {
            assert!(tenant.alloc_at(HugeId(pairs[gone]).first_frame(), Order::MAX).is_ok());
        }
        assert_eq!(pair(&mut cpu).0, pairs[left]);
        assert!(cpu.alloc(Order::MAX).is_err());
        // The refusal goes with the first of them that comes back.
        for one in &pairs {
            tenant.free(HugeId(*one).first_frame(), Order::MAX).expect("ours");
            assert_eq!(pair(&mut cpu).0, *one);
        }
        pairs.iter().for_each(|one| tenant.free(HugeId(*one).first_frame(), Order::MAX).expect("ours"));
    }
}

#[test]
fn a_pair_with_memory_comes_before_a_nearer_one_without() {
    let table = Table::installed(32 * 4);
    let tenant = table.tenant();
    setup(&tenant, 4, |tree| tree == 2, &[6, 7, 9, 38, 39, 41, 70, 71, 73, 102, 103, 105]);
    // Half of one, one as a whole, one among small blocks as a whole.
    for huge in [6, 38, 39, 70, 71] {
        assert!(table.reclaim(huge, Reclaim::Soft));
    }
    let mut cpu = tenant.cpu();
    assert_eq!(pair(&mut cpu), (102, true));
    // Then those without, and those among small blocks last.
    let rest = [0; 3].map(|_| pair(&mut cpu));
    assert!(
        matches!(rest, [(6, false), (38, false), (70, false)] | [(38, false), (6, false), (70, false)]),
        "{rest:?}"
    );
    assert!(cpu.alloc(Order::MAX).is_err());
}

#[test]
fn order_10_prefers_a_tree_of_huge_blocks_then_what_is_near() {
    // The first tree is movable, with memory or both without.
    let table = Table::installed(64);
    let tenant = table.tenant();
    setup(&tenant, 2, |tree| tree == 0, &[6, 7, 9, 38, 39, 41]);
    assert_eq!(pair(&mut tenant.cpu()), (38, true));
    tenant.free(HugeId(38).first_frame(), Order::MAX).expect("ours");
    evict(&table, &tenant, &[6, 7, 9, 38, 39, 41]);
    assert_eq!(pair(&mut tenant.cpu()), (38, false));
    // A tree without blocks comes before one with small ones.
    let table = Table::installed(128);
    let tenant = table.tenant();
    let free: Vec<u32> = [6, 7, 9, 38, 39, 41].into_iter().chain(96..128).collect();
    setup(&tenant, 4, |tree| tree == 0, &free);
    let mut cpu = tenant.cpu();
    let got = [0; 2].map(|_| pair(&mut cpu).0);
    assert!(got[0] == 38 && got[1] >= 96, "{got:?}");
    // The first handle lives in the lower half.
    let table = Table::installed(512);
    let tenant = table.tenant();
    let free = |tree: u32| [tree * 32 + 6, tree * 32 + 7, tree * 32 + 9];
    setup(&tenant, 16, |tree| [5, 7, 13].contains(&tree), &[free(7), free(9), free(12)].concat());
    let (mut first, mut second) = (tenant.cpu(), tenant.cpu());
    assert!(first.alloc(Order::BASE).is_ok() && second.alloc(Order::BASE).is_ok());
    assert_eq!(pair(&mut first), (7 * 32 + 6, true));
}

#[test]
fn no_stranger_is_stolen_from_while_there_is_a_pair_without_memory_among_its_own() {
    let found = |take: &dyn Fn(&Tenant<'_>) -> (u32, bool)| {
        let table = Table::installed(64);
        let tenant = table.tenant();
        setup(&tenant, 2, |tree| tree == 0, &[6, 7, 38, 39]);
        evict(&table, &tenant, &[38, 39]);
        take(&tenant)
    };
    assert_eq!(found(&|tenant| pair(&mut tenant.cpu())), (38, false));
    // What a place without a handle remembers may be of another table, whose word it shares: that of few is.
    const PLACES: usize = 16;
    let at_place = |number: usize| found(&|tenant| place(tenant.at_place(number).alloc(Order::MAX).expect("two")));
    let kept = (0..PLACES).filter(|number| at_place(*number) == (38, false)).count();
    assert!(kept > PLACES / 2, "{kept} of {PLACES}");
}

#[test]
fn a_tree_that_is_demoted_comes_after_an_unused_one_and_gives_its_class_up() {
    let policy = Policy::DEFAULT.with(Class::HUGE, Class::MOVABLE, Rank::Demote);
    let table = Table::installed(64);
    let tenant = table.tenant().with_policy(policy);
    let free: Vec<u32> = [6, 7].into_iter().chain(32..64).collect();
    setup(&tenant, 2, |tree| tree == 0, &free);
    assert!(pair(&mut tenant.cpu()).0 >= 32);
    let table = Table::installed(64);
    let tenant = table.tenant().with_policy(policy);
    setup(&tenant, 2, |tree| tree == 0, &[6, 7]);
    assert_eq!(pair(&mut tenant.cpu()), (6, true));
    assert_eq!(tenant.class_of(HugeId(6)), Some(Class::HUGE));
}

/// Where nothing else has a pair.
#[test]
fn of_others_trees_the_one_with_memory_comes_first_then_that_of_huge_blocks() {
    let table = Table::installed(32 * 4);
    let tenant = table.tenant();
    setup(&tenant, 4, |tree| tree == 0 || tree == 2, &[6, 7, 70, 71]);
    evict(&table, &tenant, &[6, 7]);
    let (mut one, mut other) = (tenant.cpu(), tenant.cpu());
    let trees = [&mut one, &mut other].map(|cpu| ready(cpu.alloc(Order::BASE).expect("room")).0 / 512 / 32);
    assert_eq!(trees, [0, 2]);
    assert_eq!(pair(&mut tenant.cpu()), (70, true));
    let table = Table::installed(32 * 4);
    let tenant = table.tenant();
    let free: Vec<u32> = [6, 7].into_iter().chain(64..96).collect();
    setup(&tenant, 4, |tree| tree == 0, &free);
    let (mut one, mut other) = (tenant.cpu(), tenant.cpu());
    assert!(ready(one.alloc(Order::BASE).expect("room")).0 < 32 * 512);
    assert_eq!(place(other.alloc(Order::HUGE).expect("a tree of them")), (64, true));
    assert!(pair(&mut tenant.cpu()).0 >= 64);
}

/// A handle that took it believed that nothing had memory.
#[test]
fn after_a_pair_of_others_order_9_takes_what_has_memory() {
    let table = Table::installed(32 * 4);
    let tenant = table.tenant();
    let free: Vec<u32> = (0..32).chain([40, 42, 75, 77]).collect();
    setup(&tenant, 4, |_| false, &free);
    let mut one = tenant.cpu();
    assert!(place(one.alloc(Order::HUGE).expect("a tree of them")).0 < 32);
    (12..30).for_each(|huge| assert!(table.reclaim(huge, Reclaim::Soft)));
    let mut other = tenant.cpu();
    let mut got = vec![pair(&mut other)];
    got.extend((0..14).map(|_| place(other.alloc(Order::HUGE).expect("some"))));
    assert!(got.iter().all(|(_, is_ready)| *is_ready), "{got:?}");
}

/// Its own tree of small blocks is nobody else's.
#[test]
fn a_pair_in_the_tree_in_hand_is_as_good_as_another() {
    let table = Table::installed(64);
    let tenant = table.tenant();
    setup(&tenant, 2, |tree| tree == 1, &[38, 39, 42, 43]);
    let mut cpu = tenant.cpu();
    assert_eq!(ready(cpu.alloc(Order::BASE).expect("room")).0 / 512 / 32, 1);
    assert_eq!([0; 2].map(|_| pair(&mut cpu)), [(38, true), (42, true)]);
    assert!(cpu.alloc(Order::MAX).is_err());
}

#[test]
fn a_handle_that_was_drained_forgets_its_list_of_pairs() {
    let table = Table::installed(64);
    let tenant = table.tenant();
    setup(&tenant, 2, |_| false, &[34, 35, 37, 38, 39, 42, 43]);
    let mut cpu = tenant.cpu();
    assert_eq!(pair(&mut cpu), (34, true));
    cpu.drain();
    // Nearer to where it begins, and no other place is remembered.
    tenant.free(HugeId(6).first_frame(), Order::MAX).expect("ours");
    assert_eq!(pair(&mut cpu).0, 38, "the tree in hand is looked at first");
    cpu.drain();
    for huge in [42, 43] {
        assert!(tenant.alloc_at(HugeId(huge).first_frame(), Order::HUGE).is_ok());
    }
    assert_eq!(pair(&mut cpu), (6, true));
}

/// Pairs of a tree that a handle listed while it had all of memory.
#[test]
fn listed_pairs_are_a_newcomers_where_it_lives() {
    let table = Table::installed(512);
    let tenant = table.tenant();
    let some = |tree: u32| tree * 32..tree * 32 + 30;
    let free: Vec<u32> = some(12).chain(some(3)).collect();
    setup(&tenant, 16, |tree| tree == 12 || tree == 3, &free);
    let mut first = tenant.cpu();
    // Those of tree 3 are away while it lists those of tree 12.
    some(3).for_each(|huge| assert!(tenant.alloc_at(HugeId(huge).first_frame(), Order::HUGE).is_ok()));
    assert_eq!(pair(&mut first).0 / 32, 12);
    some(3).for_each(|huge| tenant.free(HugeId(huge).first_frame(), Order::HUGE).expect("ours"));
    let mut second = tenant.cpu();
    let _ = place(second.alloc(Order::HUGE).expect("some"));
    let trees: Vec<u32> = (0..10).map(|_| pair(&mut first).0 / 32).collect();
    assert!(trees.iter().all(|tree| *tree == 3), "{trees:?}");
}

/// The same for smaller blocks, each of which comes from where the last one of its order did.
#[test]
fn the_places_of_a_handles_last_blocks_are_a_newcomers_where_it_lives() {
    for o in [1, 2, 3, 4, 5] {
        let table = Table::installed(512);
        let tenant = table.tenant();
        let mut first = tenant.cpu();
        let mut held: Vec<FrameId> =
            (0..(316 * 512) >> o).map(|_| ready(first.alloc(order(o)).expect("free"))).collect();
        // With a row in hand, blocks of this order are taken one by one.
        let _row = ready(first.alloc(Order::BASE).expect("free"));
        fastrand::Rng::with_seed(3).shuffle(&mut held);
        held.iter().step_by(2).for_each(|block| tenant.free(*block, order(o)).expect("ours"));
        (0..300).for_each(|_| assert!(first.alloc(order(o)).is_ok()));
        let mut second = tenant.cpu();
        let home = ready(second.alloc(Order::ROW).expect("free")).0 / 512 / 32;
        let got: Vec<u64> = (0..1000).map(|_| ready(first.alloc(order(o)).expect("free")).0 / 512 / 32).collect();
        let abroad = got.iter().filter(|tree| **tree >= home).count();
        assert!(abroad <= 64, "order {o}: {abroad} of 1000 blocks at {home} or beyond: {got:?}");
    }
}
