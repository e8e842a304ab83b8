//! The allocators by name, and a fresh instance of each for whatever is to be done with it.

use crate::baselines::{self, PerCore};
use crate::frames::{Visit, frames};
use crate::tables::{Llfree, Shared, Tables};
use clap::ValueEnum;
use shared_layout::Order;
use std::sync::Mutex;

/// The allocators to choose from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, ValueEnum)]
pub(crate) enum Allocator {
    /// This project's, a handle for each CPU
    Llfree,
    /// The same without handles
    LlfreeShared,
    /// buddy_system_allocator's frame allocator behind a mutex
    Buddy,
    /// The same behind a spin lock
    BuddySpin,
    /// A list of free frames a core, refilled from a list behind a mutex
    PerCore,
    /// crossbeam's lock-free queue of free frames
    Queue,
    /// bitmap-allocator's bitmap of bitmaps behind a mutex
    Bitmap,
}

impl Allocator {
    /// The name in rows and on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Llfree => "llfree",
            Self::LlfreeShared => "llfree-shared",
            Self::Buddy => "buddy",
            Self::BuddySpin => "buddy-spin",
            Self::PerCore => "per-core",
            Self::Queue => "queue",
            Self::Bitmap => "bitmap",
        }
    }

    /// Whether it has blocks of this order, and can manage that many huge frames.
    pub(crate) fn supports(self, order: Order, huge_frames: u32) -> bool {
        match self {
            Self::Llfree | Self::LlfreeShared | Self::Buddy | Self::BuddySpin => true,
            Self::PerCore | Self::Queue => order == Order::BASE,
            Self::Bitmap => frames(huge_frames) <= baselines::BITMAP_FRAMES,
        }
    }

    /// A fresh instance over this many huge frames, all free.
    pub(crate) fn with<V: Visit>(self, huge_frames: u32, visit: V) -> V::Output {
        match self {
            Self::Llfree => visit.visit(&Llfree(Tables::new(huge_frames).tenant())),
            Self::LlfreeShared => visit.visit(&Shared(Tables::new(huge_frames).tenant())),
            Self::Buddy => visit.visit(&Mutex::new(baselines::buddy(huge_frames))),
            Self::BuddySpin => visit.visit(&spin::Mutex::new(baselines::buddy(huge_frames))),
            Self::PerCore => visit.visit(&PerCore::new(huge_frames)),
            Self::Queue => visit.visit(&baselines::queue(huge_frames)),
            Self::Bitmap => visit.visit(&Mutex::new(baselines::bitmap(huge_frames))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frames::{FAILED, Frames, Handle};
    use std::collections::HashSet;

    struct HandsOutEverything(Order, u32);

    impl Visit for HandsOutEverything {
        type Output = ();

        fn visit<F: Frames>(self, frames_of: &F) {
            let Self(order, huge) = self;
            let blocks = frames(huge) / order.frames();
            let mut handle = frames_of.handle();
            for _ in 0..2 {
                let taken: HashSet<u64> = (0..blocks).map(|_| handle.alloc(order)).collect();
                assert_eq!(taken.len() as u64, blocks);
                assert!(taken.iter().all(|frame| *frame < frames(huge) && frame % order.frames() == 0));
                assert_eq!(handle.alloc(order), FAILED);
                assert!(taken.iter().all(|frame| handle.free(*frame, order)));
            }
        }
    }

    #[test]
    fn every_allocator_hands_out_every_block_once() {
        for allocator in Allocator::value_variants() {
            for order in (0..=Order::MAX.get()).filter_map(Order::new) {
                if allocator.supports(order, 4) {
                    allocator.with(4, HandsOutEverything(order, 4));
                }
            }
        }
    }

    #[test]
    fn names_are_those_of_the_command_line() {
        for allocator in Allocator::value_variants() {
            let value = allocator.to_possible_value().expect("none is hidden");
            assert_eq!(value.get_name(), allocator.name());
        }
    }
}
