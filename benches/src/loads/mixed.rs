//! All orders mixed: blocks of a random order, freed at random, with memory held at a fill level.
//!
//! Every order from 0 to 10 is as likely as the others. Below the level a thread allocates, from there on it frees one of
//! its blocks, each as likely as the others; several threads share the level evenly. Reaching it and then as many steps
//! as replace each block some four times warm up: what is timed is memory that has been used for a while. Times are of single operations: the mean
//! over all that were granted, the tails of order 0 and of the others apart (else the many small ones hide the few large
//! ones), and what a refusal cost.
//!
//! A step that finds no room for a large block goes on to a smaller one, so where memory is short the blocks that are held
//! become smaller and smaller: `wear` is how long that goes on before anything is timed.

use super::blocks::{Mixer, Rule, Step};
use super::round::{Round, Units};
use crate::crew::{Gate, on_cores};
use crate::error::BenchError;
use crate::frames::{FAILED, Frames, Handle, Visit, frames};
use crate::latency::{Latencies, Tail, ticks};
use crate::measured::{Measured, Timed};
use shared_layout::Order;

/// Steps between two looks at the deadline.
const STRIDE: u64 = 64;

const BASE_TAILS: [Tail; 4] =
    [("alloc-0-p50", 0.5), ("alloc-0-p99", 0.99), ("alloc-0-p99.9", 0.999), ("alloc-0-max", 1.0)];
const OTHER_TAILS: [Tail; 4] =
    [("alloc-1-10-p50", 0.5), ("alloc-1-10-p99", 0.99), ("alloc-1-10-p99.9", 0.999), ("alloc-1-10-max", 1.0)];

/// One round.
pub(crate) struct Mixed<'a> {
    pub(crate) round: Round<'a>,
    /// Of all memory, for all threads together.
    pub(crate) percent: u32,
    /// Steps that warm up at least, as a multiple of those that are timed.
    pub(crate) wear: u64,
}

/// One thread's times.
struct Times {
    units: Units,
    base: Latencies,
    others: Latencies,
    free: Latencies,
    refused: Latencies,
}

impl Times {
    fn append(&mut self, other: Self) {
        self.base.append(other.base);
        self.others.append(other.others);
        self.free.append(other.free);
        self.refused.append(other.refused);
    }

    fn measured(self, cas_ns: f64) -> Measured {
        let watch = self.units.watch;
        let [base, others] = [&self.base, &self.others].map(|times| times.mean("alloc", &watch));
        let (count, sum) = [base, others]
            .iter()
            .filter(|timed| timed.count > 0)
            .fold((0, 0.0), |(count, sum), timed| (count + timed.count, sum + timed.ns * timed.count as f64));
        let mut ops = vec![
            Timed { op: "alloc", ns: sum / count as f64, count },
            self.free.mean("free", &watch),
            self.refused.mean("refused", &watch),
        ];
        ops.extend(self.base.tails(&BASE_TAILS, &watch));
        ops.extend(self.others.tails(&OTHER_TAILS, &watch));
        Measured { cas_ns, ops }
    }
}

impl Visit for Mixed<'_> {
    type Output = Result<Measured, BenchError>;

    fn visit<F: Frames>(self, allocator: &F) -> Self::Output {
        let orders: Vec<Order> = (0..=Order::MAX.get()).filter_map(Order::new).collect();
        let Round { cores, threads, .. } = self.round;
        let times = on_cores(cores, threads, |thread, gate| self.thread(allocator, &orders, thread, gate))?;
        let times: Option<Vec<Times>> = times.into_iter().collect();
        let times = times.ok_or_else(|| self.round.exhausted(Order::BASE))?;
        let cas_ns = times.iter().map(|thread| thread.units.cas_ns).sum::<f64>() / times.len() as f64;
        let all = times.into_iter().reduce(|mut all, thread| {
            all.append(thread);
            all
        });
        Ok(all.ok_or_else(|| self.round.exhausted(Order::BASE))?.measured(cas_ns))
    }
}

impl Mixed<'_> {
    /// Base frames that each thread keeps in use.
    fn level(&self) -> u64 {
        frames(self.round.huge_frames) * u64::from(self.percent) / 100 / u64::from(self.round.threads)
    }

    fn thread<F: Frames>(&self, allocator: &F, orders: &[Order], thread: u32, gate: &Gate) -> Option<Times> {
        let Round { seed, operations, .. } = self.round;
        let mut handle = allocator.handle();
        let mut mixer = Mixer::new(orders, Rule::Level(self.level()), seed << 8 | u64::from(thread));
        let ready = mixer.fill(&mut handle)
            && mixer.run(&mut handle, mixer.turnover().max(operations / 4).max(operations * self.wear));
        let [base, others, free, refused] = [operations; 4].map(Latencies::with_room);
        gate.wait();
        let units = Units::measure();
        let mut times = Times { units, base, others, free, refused };
        gate.wait();
        let deadline = self.round.deadline(&units);
        let mut ok = ready;
        let mut step = 0;
        while ok && step < operations && (step % STRIDE != 0 || ticks() < deadline) {
            step += 1;
            match mixer.next() {
                Step::Free(frame, order) => ok = times.free.time(|| handle.free(frame, order)),
                Step::Alloc(order) => {
                    let start = ticks();
                    let frame = handle.alloc(order);
                    let end = ticks();
                    let times = match frame {
                        FAILED => &mut times.refused,
                        _ if order == Order::BASE => &mut times.base,
                        _ => &mut times.others,
                    };
                    times.push(end.saturating_sub(start));
                    if frame != FAILED {
                        mixer.keep(frame, order);
                    }
                }
            }
        }
        ok.then_some(times)
    }
}
