//! More threads than cores: what the threads get done together, and how long each waits for an operation.
//!
//! Every thread makes the same number of operations, so that one that is kept from working is missed at the end: `wall`
//! is the time until the last is through, divided by the operations of all. Threads are dealt out to the cores in turn.
//! A time includes what the thread was off its core for while it was in the middle of an operation.

use super::blocks::{Mixer, Rule, Step};
use super::round::{Round, Units};
use crate::crew::{Gate, on_cores};
use crate::error::BenchError;
use crate::frames::{FAILED, Frames, Handle, Visit, frames};
use crate::latency::{Latencies, Tail, ticks};
use crate::measured::{Measured, Timed};
use shared_layout::Order;
use std::time::Instant;

/// Blocks that a thread holds at most, where it holds few.
const FEW: usize = 256;
/// Percent of memory that is in use, where much is.
const PERCENT: u64 = 80;
/// Steps between two looks at the deadline.
const STRIDE: u64 = 64;
const TAILS: [Tail; 5] = [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("p99.99", 0.9999), ("max", 1.0)];

/// The work of each thread.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum CrowdKind {
    /// Up to 256 frames, allocated and freed at random.
    Few,
    /// Orders 0, 3 and 9 mixed, with 80 % of memory in use.
    Mixed,
}

/// One round.
pub(crate) struct Crowd<'a> {
    pub(crate) round: Round<'a>,
    pub(crate) kind: CrowdKind,
}

struct Times {
    start: Instant,
    end: Instant,
    all: Latencies,
    refused: Latencies,
}

impl Visit for Crowd<'_> {
    type Output = Result<Measured, BenchError>;

    fn visit<F: Frames>(self, allocator: &F) -> Self::Output {
        let Round { cores, threads, .. } = self.round;
        // Before the crowd comes: in the middle of it a compare-and-swap would be as disturbed as the rest.
        let units = self.round.alone(|| Some(Units::measure()))?;
        let crowd: Vec<usize> = cores.iter().copied().cycle().take(threads as usize).collect();
        let times = on_cores(&crowd, threads, |thread, gate| self.thread(allocator, &units, thread, gate))?;
        let times: Option<Vec<Times>> = times.into_iter().collect();
        let times = times.ok_or_else(|| self.round.exhausted(Order::BASE))?;
        let (start, end) = (times.iter().map(|thread| thread.start).min(), times.iter().map(|thread| thread.end).max());
        let wall = start.zip(end).map_or(f64::NAN, |(start, end)| (end - start).as_secs_f64() * 1e9);
        let (mut all, mut refused) = (Latencies::default(), Latencies::default());
        for thread in times {
            all.append(thread.all);
            refused.append(thread.refused);
        }
        let count = all.count() + refused.count();
        let mut ops = vec![Timed { op: "wall", ns: wall / count as f64, count }, refused.mean("refused", &units.watch)];
        ops.extend(all.tails(&TAILS, &units.watch));
        Ok(Measured { cas_ns: units.cas_ns, ops })
    }
}

impl Crowd<'_> {
    fn thread<F: Frames>(&self, allocator: &F, units: &Units, thread: u32, gate: &Gate) -> Option<Times> {
        let Round { huge_frames, threads, seed, operations, .. } = self.round;
        let [base, small, huge] = [Order::BASE, Order::new(3)?, Order::HUGE];
        let (orders, rule) = match self.kind {
            CrowdKind::Few => (&[base][..], Rule::AtMost(FEW)),
            CrowdKind::Mixed => {
                (&[base, small, huge][..], Rule::Level(frames(huge_frames) * PERCENT / 100 / u64::from(threads)))
            }
        };
        let mut handle = allocator.handle();
        let mut mixer = Mixer::new(orders, rule, seed << 8 | u64::from(thread));
        let mut ok = mixer.fill(&mut handle) && mixer.run(&mut handle, mixer.turnover().max(operations / 16));
        let (mut all, mut refused) = (Latencies::with_room(operations), Latencies::default());
        gate.wait();
        let start = Instant::now();
        let deadline = self.round.deadline(units);
        let mut step = 0;
        while ok && step < operations && (step % STRIDE != 0 || ticks() < deadline) {
            step += 1;
            match mixer.next() {
                Step::Free(frame, order) => ok = all.time(|| handle.free(frame, order)),
                Step::Alloc(order) => {
                    let start = ticks();
                    let frame = handle.alloc(order);
                    let end = ticks();
                    if frame == FAILED {
                        refused.push(end.saturating_sub(start));
                    } else {
                        all.push(end.saturating_sub(start));
                        mixer.keep(frame, order);
                    }
                }
            }
        }
        ok.then_some(Times { start, end: Instant::now(), all, refused })
    }
}
