//! "Out of memory": what it costs to say that no block is there.
//!
//! For orders 0 and 9 all memory is in use, as blocks of that order. For the others every second frame is free: half of
//! memory, and nothing for them. Where a host takes part it holds every second huge frame: a machine that was shrunk to half of
//! its memory, and the other half is like that. `first` is the first request of a fresh handle in a fresh instance, `again` the same
//! request right after, with nothing changed, and `after-free` the request after a block was freed and taken again that
//! was of no use to it: an allocator that remembers a refusal may have to look anew.

use super::blocks::carve;
use super::round::{Round, Units};
use crate::error::BenchError;
use crate::frames::{FAILED, Frames, Handle, Visit, frames};
use crate::latency::{Latencies, ticks};
use crate::measured::Measured;
use shared_layout::Order;
use std::time::Duration;

/// Requests after the first of each kind; fewer, but some, if they take too long.
const REPEATS: u64 = 1_000;
const LEAST: u64 = 3;
const PATIENCE: Duration = Duration::from_millis(20);

/// One round.
pub(crate) struct Refuse<'a> {
    pub(crate) round: Round<'a>,
    /// Takes a free huge frame for a host, if one takes part; false if it is unavailable.
    pub(crate) hold: Option<&'a (dyn Fn(u32) -> bool + Sync)>,
}

/// Whether nothing at all is free.
fn all_full(order: Order) -> bool {
    order == Order::BASE || order >= Order::HUGE
}

/// A request that must be refused; true if it was.
fn refused(handle: &mut impl Handle, order: Order, times: &mut Latencies) -> bool {
    times.time(|| handle.alloc(order)) == FAILED
}

/// Whether a frame lies in a huge frame that a host holds, if one takes part.
fn is_hosts(frame: u64) -> bool {
    frame & Order::HUGE.frames() != 0
}

/// Frees a block and takes it back (or another of its kind), with the number of blocks in use as before.
fn disturb(handle: &mut impl Handle, order: Order, block: u64) -> bool {
    if all_full(order) {
        handle.free(block, order) && handle.alloc(order) != FAILED
    } else {
        let frame = handle.alloc(Order::BASE);
        frame != FAILED && handle.free(frame, Order::BASE)
    }
}

impl Visit for Refuse<'_> {
    type Output = Result<Measured, BenchError>;

    fn visit<F: Frames>(self, allocator: &F) -> Self::Output {
        let Self { round, hold } = self;
        let Round { bench, huge_frames, order, .. } = round;
        let is_held = |frame| hold.is_some() && is_hosts(frame);
        let measured = round.alone(|| {
            if all_full(order) {
                carve(allocator, huge_frames, order, |block| !is_held(block * order.frames()))?;
            } else {
                carve(allocator, huge_frames, Order::BASE, |frame| frame % 2 == 1 && !is_held(frame))?;
            }
            if let Some(hold) = hold
                && !(1..huge_frames).step_by(2).all(hold)
            {
                return None;
            }
            let mut random = fastrand::Rng::with_seed(round.seed);
            let [mut first, mut again, mut after_free] = [1, REPEATS, REPEATS].map(Latencies::with_room);
            let mut handle = allocator.handle();
            let units = Units::measure();
            let mut all_refused = refused(&mut handle, order, &mut first);
            let patience = units.watch.ticks_of(PATIENCE);
            let deadline = ticks() + patience;
            while all_refused && again.count() < REPEATS && (again.count() < LEAST || ticks() < deadline) {
                all_refused = refused(&mut handle, order, &mut again);
            }
            let deadline = ticks() + patience;
            while all_refused && after_free.count() < REPEATS && (after_free.count() < LEAST || ticks() < deadline) {
                let block = random.u64(..frames(huge_frames) / order.frames()) * order.frames();
                let ours = if is_held(block) { block - Order::HUGE.frames() } else { block };
                if !disturb(&mut handle, order, ours) {
                    return None;
                }
                all_refused = refused(&mut handle, order, &mut after_free);
            }
            let ops = [("first", first), ("again", again), ("after-free", after_free)];
            let ops = ops.map(|(op, times)| times.mean(op, &units.watch)).to_vec();
            Some(all_refused.then_some(Measured { cas_ns: units.cas_ns, ops }))
        })?;
        measured.ok_or(BenchError::Granted { bench, order: order.get() })
    }
}
