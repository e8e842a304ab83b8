//! Memory that is nearly full: where the next frame of a handle comes from, and whose trees these are meanwhile.

use crate::common::{Table, ready};
use shared_layout::table::HUGE_PER_TREE;
use shared_layout::{FrameId, Order};
use std::sync::atomic::Ordering;

const HUGE: u64 = Order::HUGE.frames();
const TREE: u64 = HUGE * HUGE_PER_TREE as u64;
const RESERVED: u16 = 1 << 7;

/// Two trees of which all is taken but some frames.
fn full_but(free: impl Fn(u64) -> bool) -> Table {
    let table = Table::installed(2 * HUGE_PER_TREE as usize);
    let tenant = table.tenant();
    for frame in 0..2 * TREE {
        assert!(tenant.alloc_at(FrameId(frame), Order::BASE).is_ok());
    }
    for frame in (0..2 * TREE).filter(|frame| free(*frame)) {
        tenant.free(FrameId(frame), Order::BASE).expect("ours");
    }
    tenant.recount();
    table
}

fn reserved(table: &Table) -> Vec<usize> {
    let stride = table.hints.len() / 2;
    (0..2).filter(|tree| table.hints[tree * stride].load(Ordering::Relaxed) & RESERVED != 0).collect()
}

#[test]
fn a_tree_is_nobodys_after_a_refusal_that_another_handle_found() {
    let table = full_but(|frame| frame % HUGE == 7 && frame < 4 * HUGE);
    let tenant = table.tenant();
    let mut first = tenant.cpu();
    for _ in 0..4 {
        ready(first.alloc(Order::BASE).expect("free"));
    }
    assert!(tenant.cpu().alloc(Order::BASE).is_err());
    assert!(first.alloc(Order::BASE).is_err());
    drop(first);
    assert_eq!(reserved(&table), Vec::<usize>::new());
}

#[test]
fn a_handle_stays_in_a_tree_that_has_room_again_and_keeps_its_mark() {
    // Both have some, so that a search may know of no better.
    let table = full_but(|frame| frame % HUGE == 7);
    let tenant = table.tenant();
    let mut cpu = tenant.cpu();
    let mut taken = Vec::new();
    for _ in 0..HUGE_PER_TREE {
        taken.push(ready(cpu.alloc(Order::BASE).expect("free")));
    }
    let tree = taken[0].0 / TREE;
    assert!(taken.iter().all(|frame| frame.0 / TREE == tree));
    for frame in taken.drain(..20) {
        tenant.free(frame, Order::BASE).expect("ours");
    }
    let next = ready(cpu.alloc(Order::BASE).expect("free"));
    assert_eq!((next.0 / TREE, reserved(&table)), (tree, vec![tree as usize]));
    drop(cpu);
    assert_eq!(reserved(&table), Vec::<usize>::new());
}

#[test]
fn each_frame_of_nearly_full_memory_is_found_whatever_number_a_huge_frame_has() {
    let free = |frame: u64| (frame % HUGE).is_multiple_of(37) && (frame / 37) % 11 < frame / HUGE % 12;
    let table = full_but(free);
    let tenant = table.tenant();
    let mut cpu = tenant.cpu();
    let mut found = Vec::new();
    while let Ok(block) = cpu.alloc(Order::BASE) {
        found.push(ready(block).0);
    }
    found.sort_unstable();
    assert_eq!(found, (0..2 * TREE).filter(|frame| free(*frame)).collect::<Vec<_>>());
    drop(cpu);
    assert_eq!((tenant.validate(), reserved(&table)), (Ok(()), Vec::new()));
}

#[test]
fn a_handle_keeps_what_makes_no_block_and_gives_up_what_does() {
    // Eight frames of the first huge frame, and all of the second but what a handle has.
    let table = full_but(|frame| frame < 8 || (HUGE..2 * HUGE).contains(&frame));
    let tenant = table.tenant();
    let (mut cpu, mut other) = (tenant.cpu(), tenant.cpu());
    let first = ready(cpu.alloc(Order::BASE).expect("free"));
    assert!(first.0 < 8, "the fullest huge frame comes first: {first:?}");
    let large = Order::new(8).expect("in range");
    let halves = [(); 2].map(|()| ready(other.alloc(large).expect("free")));
    assert!(cpu.alloc(large).is_err() && cpu.alloc(Order::HUGE).is_err());
    assert_eq!(reserved(&table), Vec::<usize>::new());
    // The handle has some frames of its row, and others have the rest.
    let others = std::iter::from_fn(|| other.alloc(Order::BASE).ok()).count();
    let own = std::iter::from_fn(|| cpu.alloc(Order::BASE).ok()).count();
    assert!(own > 0 && others + own == 7, "{others} and {own}");
    // What it holds of a huge frame that is free otherwise goes back for order 9.
    tenant.free(halves[0], large).expect("ours");
    tenant.free(halves[1], large).expect("ours");
    let frame = ready(cpu.alloc(Order::BASE).expect("free"));
    assert!(frame.0 / HUGE == 1 && cpu.alloc(Order::HUGE).is_err(), "a frame of it is in use");
    cpu.free(frame, Order::BASE).expect("ours");
    assert_eq!(ready(cpu.alloc(Order::HUGE).expect("free")).0, HUGE);
}
