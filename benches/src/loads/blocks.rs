//! The account of a workload: blocks that it holds, and the states of memory that it starts from.

use crate::frames::{FAILED, Frames, Handle, frames};
use shared_layout::Order;

/// Blocks in use, in no order.
#[derive(Default, Debug)]
pub(super) struct Held {
    blocks: Vec<(u64, Order)>,
    frames: u64,
}

impl Held {
    /// With room for so many blocks.
    pub(super) fn with_room(blocks: usize) -> Self {
        Self { blocks: Vec::with_capacity(blocks), frames: 0 }
    }

    pub(super) fn add(&mut self, frame: u64, order: Order) {
        self.blocks.push((frame, order));
        self.frames += order.frames();
    }

    /// A block that is no longer held, each as likely as the others.
    pub(super) fn remove_any(&mut self, random: &mut fastrand::Rng) -> Option<(u64, Order)> {
        if self.blocks.is_empty() {
            return None;
        }
        let (frame, order) = self.blocks.swap_remove(random.usize(..self.blocks.len()));
        self.frames -= order.frames();
        Some((frame, order))
    }

    /// Base frames in all blocks.
    pub(super) fn frames(&self) -> u64 {
        self.frames
    }

    pub(super) fn blocks(&self) -> usize {
        self.blocks.len()
    }
}

/// The rule by which a mixer allocates or frees next.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rule {
    /// Allocate below so many base frames, free from there on.
    Level(u64),
    /// Either, by chance, with at most so many blocks.
    AtMost(usize),
}

/// The next operation.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Step {
    Alloc(Order),
    Free(u64, Order),
}

/// An endless series of allocations and frees at random.
#[derive(Debug)]
pub(super) struct Mixer<'a> {
    orders: &'a [Order],
    rule: Rule,
    held: Held,
    random: fastrand::Rng,
}

impl<'a> Mixer<'a> {
    /// Each of `orders` (one or more) is as likely as the others.
    pub(super) fn new(orders: &'a [Order], rule: Rule, seed: u64) -> Self {
        let room = match rule {
            // Frees of small blocks and large ones are alike, so these are about as many blocks as ever.
            Rule::Level(frames) => frames as usize / 16,
            Rule::AtMost(blocks) => blocks,
        };
        Self { orders, rule, held: Held::with_room(room), random: fastrand::Rng::with_seed(seed) }
    }

    /// What to do next. A block to be freed is no longer held; one that was allocated is to be [kept](Self::keep).
    #[inline]
    pub(super) fn next(&mut self) -> Step {
        let allocate = match self.rule {
            Rule::Level(frames) => self.held.frames() < frames,
            Rule::AtMost(most) => self.held.blocks() < most && (self.held.blocks() == 0 || self.random.bool()),
        };
        let freed = if allocate { None } else { self.held.remove_any(&mut self.random) };
        match freed {
            Some((frame, order)) => Step::Free(frame, order),
            None => Step::Alloc(self.orders[self.random.usize(..self.orders.len())]),
        }
    }

    pub(super) fn keep(&mut self, frame: u64, order: Order) {
        self.held.add(frame, order);
    }

    /// So many steps, untimed; false if a free was refused.
    pub(super) fn run(&mut self, handle: &mut impl Handle, steps: u64) -> bool {
        (0..steps).all(|_| match self.next() {
            Step::Free(frame, order) => handle.free(frame, order),
            Step::Alloc(order) => {
                let frame = handle.alloc(order);
                if frame != FAILED {
                    self.keep(frame, order);
                }
                true
            }
        })
    }

    /// Steps in which each block is replaced four times, by and large.
    pub(super) fn turnover(&self) -> u64 {
        8 * self.held.blocks() as u64
    }

    /// Allocates until the level is reached; false if so many requests were refused that it never will be.
    pub(super) fn fill(&mut self, handle: &mut impl Handle) -> bool {
        let Rule::Level(frames) = self.rule else { return true };
        // Nearly all blocks may be of one frame in the end, and that only once in so many requests.
        let mut patience = 4 * frames * self.orders.len() as u64;
        while self.held.frames() < frames && patience > 0 {
            patience -= 1;
            if !self.run(handle, 1) {
                return false;
            }
        }
        self.held.frames() >= frames
    }
}

/// Fills all memory with blocks of `order`, then frees those that `keep` does not want, by their number, in order: a
/// fresh instance in a known state. Nobody holds a handle afterwards. `None` if a block was refused.
pub(super) fn carve<F: Frames>(
    allocator: &F,
    huge_frames: u32,
    order: Order,
    keep: impl Fn(u64) -> bool,
) -> Option<()> {
    let mut handle = allocator.handle();
    let blocks = frames(huge_frames) / order.frames();
    let all = (0..blocks).all(|_| handle.alloc(order) != FAILED);
    let mut unwanted = (0..blocks).filter(|block| !keep(*block));
    (all && unwanted.all(|block| handle.free(block * order.frames(), order))).then_some(())
}

/// One block of two, without a pattern (the mixing function of splitmix64).
pub(super) fn by_chance(block: u64, seed: u64) -> bool {
    let mut x = block.wrapping_add(seed).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ (x >> 31)) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocator::Allocator;
    use crate::frames::Visit;
    use std::collections::HashSet;

    fn order(order: u8) -> Order {
        Order::new(order).expect("in range")
    }

    /// Hands out frames one after the other; every third request of a large order is refused.
    #[derive(Default)]
    struct Counter {
        next: u64,
        requests: u64,
        held: HashSet<u64>,
    }

    impl Handle for Counter {
        fn alloc(&mut self, order: Order) -> u64 {
            self.requests += 1;
            if order > Order::BASE && self.requests.is_multiple_of(3) {
                return FAILED;
            }
            let frame = self.next;
            self.next += order.frames();
            self.held.insert(frame);
            frame
        }

        fn free(&mut self, frame: u64, _: Order) -> bool {
            self.held.remove(&frame)
        }
    }

    #[test]
    fn a_level_is_reached_and_held() {
        let orders = [0, 3, 9].map(order);
        let mut counter = Counter::default();
        let mut mixer = Mixer::new(&orders, Rule::Level(10_000), 7);
        assert!(mixer.fill(&mut counter));
        for _ in 0..1_000 {
            assert!(mixer.run(&mut counter, 1), "each block is freed once");
            let used = mixer.held.frames();
            assert!((10_000 - 512..10_000 + 512).contains(&used), "{used}");
            assert_eq!(mixer.held.blocks(), counter.held.len());
        }
    }

    #[test]
    fn a_level_that_cannot_be_reached_is_not_waited_for() {
        struct Nothing;
        impl Handle for Nothing {
            fn alloc(&mut self, _: Order) -> u64 {
                FAILED
            }
            fn free(&mut self, _: u64, _: Order) -> bool {
                true
            }
        }
        assert!(!Mixer::new(&[Order::BASE], Rule::Level(100), 0).fill(&mut Nothing));
    }

    #[test]
    fn few_blocks_stay_few() {
        let mut counter = Counter::default();
        let mut mixer = Mixer::new(&[Order::BASE], Rule::AtMost(16), 1);
        let counts: Vec<usize> = (0..2_000)
            .map(|_| {
                assert!(mixer.run(&mut counter, 1));
                mixer.held.blocks()
            })
            .collect();
        assert_eq!(counts.iter().max(), Some(&16), "all of them at times");
        assert!(counts.contains(&0) && counts.contains(&8));
        assert_eq!(mixer.held.frames(), mixer.held.blocks() as u64);
    }

    #[test]
    fn the_same_seed_gives_the_same_series() {
        let orders = [0, 1, 2, 3].map(order);
        let series = |seed| {
            let mut mixer = Mixer::new(&orders, Rule::Level(64), seed);
            let mut next = 0;
            Vec::from_iter((0..200).map(|_| {
                let step = mixer.next();
                if let Step::Alloc(order) = step {
                    mixer.keep(next, order);
                    next += order.frames();
                }
                step
            }))
        };
        assert_eq!(series(3), series(3));
        assert_ne!(series(3), series(4));
    }

    struct Carved(Order);

    impl Visit for Carved {
        type Output = ();

        fn visit<F: Frames>(self, allocator: &F) {
            let keep = |block: u64| block % 2 == 1;
            carve(allocator, 4, self.0, keep).expect("all memory is free");
            let mut handle = allocator.handle();
            let free: HashSet<u64> =
                std::iter::repeat_with(|| handle.alloc(self.0)).take_while(|f| *f != FAILED).collect();
            let wanted = (0..frames(4) / self.0.frames()).filter(|block| !keep(*block)).map(|b| b * self.0.frames());
            assert_eq!(free, wanted.collect());
        }
    }

    #[test]
    fn what_is_carved_out_is_free_and_nothing_else() {
        for allocator in [Allocator::Llfree, Allocator::LlfreeShared, Allocator::Buddy, Allocator::Bitmap] {
            for order in [0, 3, 9].map(order) {
                allocator.with(4, Carved(order));
            }
        }
    }

    #[test]
    fn chance_is_even() {
        let kept = (0..10_000).filter(|block| by_chance(*block, 1)).count();
        assert!((4_800..5_200).contains(&kept), "{kept}");
        let alike = (0..10_000).filter(|block| by_chance(*block, 1) == by_chance(*block + 1, 1)).count();
        assert!((4_800..5_200).contains(&alike), "{alike}");
    }
}
