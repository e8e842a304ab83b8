//! A program whose large blocks lie in an area, with a global allocator in two tiers.

mod common;

use common::fork;
use llfree_area::Tier;
use llfree_area::tier::large_objects;
use std::alloc::System;
use std::collections::HashMap;

#[global_allocator]
static ALLOCATOR: Tier<System> = Tier::new(System);

const MIB: usize = 1 << 20;

fn used() -> u64 {
    let objects = large_objects().expect("an area");
    let cached: u64 = objects.stats().classes.iter().map(|class| class.cached * class.bytes).sum();
    objects.area().status().expect("known").used_bytes - cached
}

// One test, for there is one area in the process, and tests run at once.
#[test]
fn large_blocks_lie_in_the_area_and_small_ones_do_not() {
    let before = used();
    let large = vec![7u8; 3 * MIB];
    assert_eq!(used() - before, 4 << 20);
    let small = vec![7u8; 400 << 10];
    assert_eq!(used() - before, 4 << 20);
    assert!(large[..small.len()] == small[..]);
    drop(large);
    assert_eq!(used(), before);

    // Through all sizes, both tiers and every kind of move.
    let mut vector = Vec::new();
    for number in 0..4_000_000u64 {
        vector.push(number);
    }
    assert!((0..).zip(&vector).all(|(number, element)| number == *element));
    vector.truncate(300_000);
    vector.shrink_to_fit();
    assert_eq!(vector.iter().sum::<u64>(), 299_999 * 150_000);
    vector.truncate(1000);
    vector.shrink_to_fit();
    assert_eq!(vector.iter().sum::<u64>(), 999 * 500);
    assert_eq!(used(), before, "it went to the other tier");

    assert!(vec![0u8; 50 * MIB].iter().all(|byte| *byte == 0));
    assert!(vec![0u8; 50 * MIB].iter().all(|byte| *byte == 0));
    let map: HashMap<u64, u64> = (0..200_000).map(|n| (n, n * n)).collect();
    assert!(map.iter().all(|(n, square)| n * n == *square));

    // More than the area has: the other tier has it, or not.
    let bytes = large_objects().expect("an area").area().bytes() as usize;
    let _ = Vec::<u8>::new().try_reserve(bytes + 1);

    let inherited = vec![5u8; 8 * MIB];
    let child = fork(|| {
        let more = vec![6u8; 8 * MIB];
        let all = inherited.iter().all(|byte| *byte == 5) && more.iter().all(|byte| *byte == 6);
        drop(more);
        all
    });
    assert!(child, "a child has its heap");
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            scope.spawn(move || {
                for round in 0..200usize {
                    let vector = vec![thread; (round % 40 + 1) * 200_000];
                    assert!(vector.iter().step_by(997).all(|byte| *byte == thread));
                }
            });
        }
    });
}
