//! The first allocations of a handle after the host gave memory back.
//!
//! The host raises the return epoch then, and each handle is to look anew at what is free. Several handles have
//! allocated a little each; the epoch rises; every handle in turn allocates up to 1024 blocks, each timed: `first` is
//! the first of them, `worst` the slowest, for a handle may put the look off until it has to search.

use super::round::{Round, Units};
use crate::error::BenchError;
use crate::frames::{FAILED, Frames, Handle, frames};
use crate::latency::{Latencies, between, ticks};
use crate::measured::Measured;

const HANDLES: usize = 16;
/// Blocks that a handle allocates after the epoch rose; fewer, if those of all handles would not fit in half of memory.
const BLOCKS: u64 = 1024;
/// Times that the epoch rises in a round.
const RISES: u64 = 4;

/// One round; `returned` raises the epoch.
pub(crate) fn first_after_a_return<F: Frames>(
    allocator: &F,
    round: Round<'_>,
    returned: impl Fn() + Sync,
) -> Result<Measured, BenchError> {
    let order = round.order;
    let fitting = frames(round.huge_frames) / 2 / HANDLES as u64 / order.frames();
    let blocks = BLOCKS.min(fitting);
    round.alone(|| {
        let mut handles: Vec<_> = (0..HANDLES).map(|_| allocator.handle()).collect();
        let mut held: Vec<Vec<u64>> = handles.iter().map(|_| Vec::with_capacity(blocks as usize)).collect();
        let [mut first, mut worst] = [HANDLES as u64 * RISES; 2].map(Latencies::with_room);
        let units = Units::measure();
        // One rise more, which warms up.
        for rise in 0..=RISES {
            returned();
            for (handle, held) in handles.iter_mut().zip(&mut held) {
                let mut slowest = 0;
                for block in 0..blocks {
                    let start = ticks();
                    let frame = handle.alloc(order);
                    let time = between(start, ticks());
                    if frame == FAILED {
                        return None;
                    }
                    held.push(frame);
                    slowest = slowest.max(time);
                    if block == 0 && rise > 0 {
                        first.push(time);
                    }
                }
                if rise > 0 && blocks > 0 {
                    worst.push(slowest);
                }
            }
            // All goes back and each takes one, so that the next rise finds handles in the middle of their work.
            for (handle, held) in handles.iter_mut().zip(&mut held) {
                if !held.drain(..).all(|frame| handle.free(frame, order)) {
                    return None;
                }
                let frame = handle.alloc(order);
                if frame == FAILED {
                    return None;
                }
                held.push(frame);
            }
        }
        let watch = &units.watch;
        let mut ops = vec![first.mean("first", watch), worst.mean("worst", watch)];
        ops.extend(first.tails(&[("first-max", 1.0)], watch));
        ops.extend(worst.tails(&[("worst-max", 1.0)], watch));
        Some(Measured { cas_ns: units.cas_ns, ops })
    })
}
