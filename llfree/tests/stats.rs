//! The numbers that a monitor sees, against counting by hand.

use crate::common::Table;
use llfree::{Allocation, Class, ORDERS, Stats};
use shared_layout::{FRAMES_PER_HUGE, FrameId, HugeId, Order};

fn order(order: usize) -> Order {
    Order::new(order as u8).expect("in range")
}

/// Free blocks by trying every aligned position, from the largest order down.
fn by_hand(free: &[bool]) -> [u64; ORDERS] {
    let mut left = free.to_vec();
    let mut blocks = [0; ORDERS];
    for o in (0..ORDERS).rev() {
        for block in left.chunks_exact_mut(1 << o) {
            if block.iter().all(|frame| *frame) {
                block.fill(false);
                blocks[o] += 1;
            }
        }
    }
    blocks
}

#[test]
fn every_free_frame_counts_once_in_its_largest_block() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    for huge in [1, 2, 5, 16, 17] {
        let table = Table::evicted(huge);
        let tenant = table.tenant();
        assert_eq!(tenant.free_blocks(), by_hand(&vec![true; huge * 512]));
        let mut free = vec![true; huge * FRAMES_PER_HUGE as usize];
        for _ in 0..huge * 12 {
            let o = order(rng.usize(..ORDERS));
            let frame = rng.usize(..free.len()) as u64 / o.frames() * o.frames();
            if tenant.alloc_at(FrameId(frame), o).is_ok() {
                free[frame as usize..(frame + o.frames()) as usize].fill(false);
            }
            let blocks = tenant.free_blocks();
            assert_eq!(blocks, by_hand(&free));
            let frames: u64 = blocks.iter().enumerate().map(|(o, blocks)| blocks << o).sum();
            assert_eq!(frames, tenant.stats().free_frames);
        }
    }
}

#[test]
fn classes_add_up_to_the_table() {
    let table = Table::evicted(100);
    let tenant = table.tenant();
    let mut cpu = tenant.cpu();
    let frame = |allocation: Allocation| allocation.position().0;
    let immovable = frame(cpu.alloc_class(Order::BASE, Class::IMMOVABLE).expect("free"));
    let movable = frame(cpu.alloc(Order::BASE).expect("free"));
    let huge = frame(cpu.alloc(Order::HUGE).expect("free"));
    for (frame, class) in [(immovable, Class::IMMOVABLE), (movable, Class::MOVABLE), (huge, Class::HUGE)] {
        assert_eq!(tenant.class_of(frame.huge().expect("in range")), Some(class));
    }
    assert_eq!(tenant.class_of(HugeId(99)), None, "nothing is in that tree");
    assert_eq!(tenant.class_of(HugeId(100)), None, "there is no such tree");
    let by_class = tenant.stats_by_class();
    assert_eq!(by_class[usize::from(Class::HUGE.get())].allocated_huge, 1);
    assert_eq!(tenant.stats().evicted_huge, 100);
    table.host().claim(HugeId(50)).expect("idle").install().expect("not held").done();
    assert_eq!((tenant.stats().evicted_huge, tenant.stats().free_evicted_huge), (99, 96));
    let by_class = tenant.stats_by_class();
    let mut sum = Stats::default();
    by_class.into_iter().for_each(|stats| sum += stats);
    assert_eq!(sum, tenant.stats());
}
