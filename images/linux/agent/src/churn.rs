//! The churn: a mixed load of many small and some huge blocks for as long as it is told.
//!
//! The load breathes: it grows or shrinks towards a size that is drawn anew whenever it is reached.
//! Blocks die at random, and each is checked before it goes. It frees some when there is no memory,
//! and all when it ends; blocks of earlier commands are never touched.

use crate::heap::{Block, Damage, Heap, Tags};
use crate::room::Room;
use shared_layout::Order;
use std::time::{Duration, Instant};

/// The most blocks at a time: each may be a mapping of its own, of which Linux allows 65530.
const MOST_BLOCKS: u64 = 16_384;
/// Blocks freed after an allocation that found no memory.
const FREES: u32 = 4;

/// What a churn came to.
#[derive(Debug, Default)]
pub struct Churn {
    /// Bytes allocated.
    pub bytes: u64,
    /// Blocks allocated, and freed again.
    pub blocks: u64,
    /// What the checks found.
    pub damage: Damage,
    /// There was a time without a block to hold or to get.
    pub starved: bool,
}

/// Churns for `millis` with at most `bytes` at a time.
pub fn run(millis: u64, bytes: u64, seed: u64, tags: &mut Tags, room: &mut Room) -> Churn {
    // A time that no clock reaches is for ever.
    let end = Instant::now().checked_add(Duration::from_millis(millis));
    let mut rng = fastrand::Rng::with_seed(seed);
    let (mut heap, mut churn, mut target) = (Heap::default(), Churn::default(), bytes);
    while end.is_none_or(|end| Instant::now() < end) {
        let against = rng.u8(0..4) == 0;
        let full = heap.len() >= MOST_BLOCKS;
        if (heap.bytes() < target) == against || full {
            free_one(&mut heap, &mut rng, &mut churn.damage);
        } else if let Some(order) = draw(&mut rng, bytes.saturating_sub(heap.bytes())) {
            match room.take(order.bytes()).then(|| Block::single(order)) {
                Some(Ok(block)) => {
                    churn.bytes += block.bytes();
                    churn.blocks += 1;
                    heap.keep(block, tags.draw());
                }
                _ => {
                    churn.starved |= heap.is_empty();
                    (0..FREES).for_each(|_| free_one(&mut heap, &mut rng, &mut churn.damage));
                }
            }
        }
        let reached = heap.bytes().abs_diff(target) < Order::MAX.bytes() || full;
        if reached {
            target = rng.u64(0..=bytes);
        }
    }
    while !heap.is_empty() {
        free_one(&mut heap, &mut rng, &mut churn.damage);
    }
    churn
}

fn free_one(heap: &mut Heap, rng: &mut fastrand::Rng, damage: &mut Damage) {
    if let Some(block) = heap.take(Some(rng)) {
        block.check(damage);
    }
}

/// The order of the next block, small and huge ones most often; `None` if not even a page fits.
fn draw(rng: &mut fastrand::Rng, room: u64) -> Option<Order> {
    let order = match rng.u8(0..100) {
        0..50 => 0,
        50..75 => rng.u8(1..4),
        75..85 => rng.u8(4..9),
        85..97 => 9,
        _ => 10,
    };
    // Among those that fit, one of the same kind would be as good: simply the largest.
    (0..=order).rev().filter_map(Order::new).find(|order| order.bytes() <= room)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_order_is_drawn_and_none_that_does_not_fit() {
        let mut rng = fastrand::Rng::with_seed(5);
        let mut seen = [0; 11];
        for _ in 0..10_000 {
            seen[usize::from(draw(&mut rng, u64::MAX).expect("room").get())] += 1;
            assert!(draw(&mut rng, 64 << 10).is_some_and(|order| order.bytes() <= 64 << 10));
        }
        assert!(seen.iter().all(|count| *count > 50), "{seen:?}");
        assert_eq!(draw(&mut rng, 4095), None);
    }

    #[test]
    fn a_churn_without_memory_says_so_and_ends() {
        let churn = run(20, 64 << 20, 1, &mut Tags::new(1, 1), &mut Room::with_reserve(u64::MAX));
        assert!(churn.starved);
        assert_eq!(churn.blocks, 0);
    }
}
