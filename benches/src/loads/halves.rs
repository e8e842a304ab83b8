//! Half of memory free, the other half in pieces: every second stretch of 64 MiB is free as a whole, of the others every
//! second frame is used.
//!
//! A block of order 1 or more fits only into the free half, so an allocator that looks for the fullest place first looks
//! in vain, unless it knows how long a free run is. A quarter of what fits is allocated, through a fresh handle, each
//! block timed.

use super::blocks::carve;
use super::round::{Round, Units};
use crate::error::BenchError;
use crate::frames::{FAILED, Frames, Handle, Visit, frames};
use crate::latency::{Latencies, Tail, ticks};
use crate::measured::Measured;
use shared_layout::Order;

/// A stretch: what llfree calls a tree, 32 huge frames.
const STRETCH: u64 = 32 * Order::HUGE.frames();
const TAILS: [Tail; 3] = [("alloc-p50", 0.5), ("alloc-p99", 0.99), ("alloc-max", 1.0)];

/// One round.
pub(crate) struct Halves<'a>(pub(crate) Round<'a>);

/// Whether the frame is used at the start.
fn is_used(frame: u64) -> bool {
    (frame / STRETCH).is_multiple_of(2) && !frame.is_multiple_of(2)
}

/// Base frames in the stretches that are free.
fn free_frames(huge_frames: u32) -> u64 {
    let all = frames(huge_frames);
    let pairs = all / (2 * STRETCH);
    pairs * STRETCH + (all % (2 * STRETCH)).saturating_sub(STRETCH)
}

impl Visit for Halves<'_> {
    type Output = Result<Measured, BenchError>;

    fn visit<F: Frames>(self, allocator: &F) -> Self::Output {
        let Self(round) = self;
        let count = free_frames(round.huge_frames) / 4 / round.order.frames();
        round.alone(|| {
            carve(allocator, round.huge_frames, Order::BASE, is_used)?;
            let mut times = Latencies::with_room(count);
            let mut handle = allocator.handle();
            let units = Units::measure();
            let deadline = round.deadline(&units);
            while times.count() < count && ticks() < deadline {
                if times.time(|| handle.alloc(round.order)) == FAILED {
                    return None;
                }
            }
            let mut ops = vec![times.mean("alloc", &units.watch)];
            ops.extend(times.tails(&TAILS, &units.watch));
            Some(Measured { cas_ns: units.cas_ns, ops })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_stretches_are_free_and_a_quarter_of_all_frames_is_used() {
        for huge_frames in [64, 128, 4096] {
            assert_eq!(free_frames(huge_frames), frames(huge_frames) / 2);
            let used = (0..frames(huge_frames)).filter(|frame| is_used(*frame)).count() as u64;
            assert_eq!(used, frames(huge_frames) / 4);
        }
        assert_eq!(free_frames(32), 0);
        assert_eq!(free_frames(33), Order::HUGE.frames(), "the first of the second stretch");
    }
}
