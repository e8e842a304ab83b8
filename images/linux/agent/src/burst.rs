//! The burst: blocks of a huge frame, one after another, each of them timed.
//!
//! Linux allocates when memory is touched. So a sample is what it took to map a block and to write
//! its first word, with the page fault and whatever the host has to do for it; the rest of the
//! touching is timed apart.

use crate::heap::{Block, Heap, Tags};
use crate::room::Room;
use crate::samples;
use shared_layout::Order;
use shared_layout::agent::{Samples, Touch};
use std::time::Instant;

/// What a burst came to.
#[derive(Debug, Default)]
pub struct Burst {
    /// Blocks.
    pub blocks: u64,
    /// All that were asked for.
    pub complete: bool,
    /// Nanoseconds each.
    pub samples: Samples,
    /// Nanoseconds that the rest of the touching took.
    pub beside_nanos: u64,
}

/// Allocates `bytes` and frees them again, or keeps them in `kept`.
pub fn run(bytes: u64, touch: Touch, kept: Option<&mut Heap>, tags: &mut Tags, room: &mut Room) -> Burst {
    let wanted = bytes.div_ceil(Order::HUGE.bytes());
    let mut burst = Burst { complete: true, ..Burst::default() };
    let (mut blocks, mut samples) = (Vec::new(), Vec::new());
    for _ in 0..wanted {
        burst.complete = room.take(Order::HUGE.bytes());
        if !burst.complete {
            break;
        }
        let start = Instant::now();
        let Ok(block) = Block::single(Order::HUGE) else {
            burst.complete = false;
            break;
        };
        block.touch(false);
        let got = Instant::now();
        if touch == Touch::Pages {
            block.touch(true);
        }
        samples.push(nanos(start, got));
        burst.beside_nanos = burst.beside_nanos.saturating_add(nanos(got, Instant::now()));
        blocks.push(block);
    }
    burst.blocks = blocks.len() as u64;
    burst.samples = samples::summary(samples);
    if let Some(heap) = kept {
        blocks.into_iter().for_each(|block| heap.keep(block, tags.draw()));
    }
    burst
}

fn nanos(from: Instant, to: Instant) -> u64 {
    u64::try_from(to.duration_since(from).as_nanos()).unwrap_or(u64::MAX)
}
