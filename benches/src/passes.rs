//! The loops that are timed, and the passes that a crew makes over them.
//!
//! A loop stores frames into a vector that was written to before, or reads them from it, and does
//! nothing else; the loops are functions of their own so that a profiler can be told to count them
//! alone. All checks happen between two timings.

use crate::crew::{Gate, cas_ns, lock, nanoseconds, on_cores};
use crate::error::{BenchError, Exhausted};
use crate::frames::{FAILED, Frames, Handle, Visit};
use crate::measured::{Measured, Timed};
use crate::tables::StateChanges;
use clap::ValueEnum;
use shared_layout::Order;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Operations of one kind that a cell measures at least, in each round ...
pub(crate) const LEAST_OPS: u64 = 100_000;
/// ... unless they take longer than this.
pub(crate) const PATIENCE: Duration = Duration::from_millis(50);
/// Pairs between two looks at the clock; as many warm up.
const PAIRS: u64 = 1_000;

/// The workloads of the threads.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Bench {
    /// Allocate half the memory, free it in order
    Bulk,
    /// Allocate and free one block, again and again
    Repeat,
    /// Allocate half the memory, free it in random order
    Random,
    /// Allocate half the memory, free it through another thread's handle
    Cross,
    /// Evict, install, hold and release each huge frame
    Host,
}

impl Bench {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bulk => "bulk",
            Self::Repeat => "repeat",
            Self::Random => "random",
            Self::Cross => "cross",
            Self::Host => "host",
        }
    }
}

/// One cell's round on the blocks of an allocator.
#[derive(Clone, Copy)]
pub(crate) struct Blocks<'a> {
    pub(crate) bench: Bench,
    pub(crate) order: Order,
    /// Blocks that each thread allocates.
    pub(crate) count: usize,
    pub(crate) threads: u32,
    pub(crate) cores: &'a [usize],
}

impl Visit for Blocks<'_> {
    type Output = Result<Measured, BenchError>;

    fn visit<F: Frames>(self, frames: &F) -> Self::Output {
        let shared =
            Shared { stop: AtomicBool::new(false), slots: (0..self.threads).map(|_| Mutex::default()).collect() };
        let threads = on_cores(self.cores, self.threads, |thread, gate| match self.bench {
            Bench::Repeat => self.repeat(frames, gate),
            _ => self.passes(frames, thread, gate, &shared),
        })?;
        let exhausted = || BenchError::Exhausted(Exhausted { bench: self.bench.name(), order: self.order.get() });
        let threads = threads.into_iter().collect::<Option<Vec<_>>>().ok_or_else(exhausted)?;
        Ok(Measured::average(&threads))
    }
}

/// State shared by the threads of a cell.
struct Shared {
    /// Written before the gate at the end of a pass, read after it: all threads see the same.
    stop: AtomicBool,
    /// Blocks that a thread leaves for another to free.
    slots: Vec<Mutex<Vec<u64>>>,
}

impl Shared {
    fn swap(&self, thread: u32, blocks: &mut Vec<u64>) {
        let slot = &self.slots[thread as usize % self.slots.len()];
        std::mem::swap(&mut *lock(slot), blocks);
    }
}

impl Blocks<'_> {
    /// `None` if the allocator ran out of blocks or did not take one back.
    fn passes<F: Frames>(&self, frames: &F, thread: u32, gate: &Gate, shared: &Shared) -> Option<Measured> {
        let Self { bench, order, count, threads, .. } = *self;
        let mut handle = frames.handle();
        let mut second = (bench == Bench::Cross && threads == 1).then(|| frames.handle());
        let mut random = fastrand::Rng::with_seed(u64::from(thread));
        let mut blocks = vec![FAILED; count];
        let (mut alloc, mut free, mut ops) = (0.0, 0.0, 0);
        let mut ok = true;
        // A short pass warms caches and branch predictors up; a long one does that on its own.
        let mut warm_up = (count as u64) < LEAST_OPS;
        gate.wait();
        let cas_ns = cas_ns();
        let begin = Instant::now();
        loop {
            gate.wait();
            let start = Instant::now();
            alloc_loop(&mut handle, &mut blocks, order);
            alloc += nanoseconds(start, 1);
            if bench == Bench::Random {
                random.shuffle(&mut blocks);
            }
            if bench == Bench::Cross && threads > 1 {
                shared.swap(thread, &mut blocks);
                gate.wait();
                shared.swap(thread + 1, &mut blocks);
            }
            ok &= !blocks.contains(&FAILED);
            let handle = second.as_mut().unwrap_or(&mut handle);
            gate.wait();
            if ok {
                let start = Instant::now();
                ok = free_loop(handle, &blocks, order);
                free += nanoseconds(start, 1);
            }
            ops += count as u64;
            if std::mem::take(&mut warm_up) {
                (alloc, free, ops) = (0.0, 0.0, 0);
            } else if thread == 0 && (ops >= LEAST_OPS || begin.elapsed() > PATIENCE) {
                shared.stop.store(true, Ordering::Relaxed);
            }
            if !ok {
                shared.stop.store(true, Ordering::Relaxed);
            }
            gate.wait();
            if shared.stop.load(Ordering::Relaxed) {
                break;
            }
        }
        let timed = |op, sum: f64| Timed { op, ns: sum / ops.max(1) as f64, count: ops };
        ok.then(|| Measured { cas_ns, ops: vec![timed("alloc", alloc), timed("free", free)] })
    }

    fn repeat<F: Frames>(&self, frames: &F, gate: &Gate) -> Option<Measured> {
        let mut handle = frames.handle();
        gate.wait();
        let cas_ns = cas_ns();
        let mut ok = pair_loop(&mut handle, self.order, PAIRS);
        let (mut time, mut pairs) = (0.0, 0);
        gate.wait();
        let begin = Instant::now();
        while ok && pairs < LEAST_OPS && begin.elapsed() < PATIENCE {
            let start = Instant::now();
            ok = pair_loop(&mut handle, self.order, PAIRS);
            time += nanoseconds(start, 1);
            pairs += PAIRS;
        }
        let pair = Timed { op: "pair", ns: time / pairs.max(1) as f64, count: pairs };
        ok.then(|| Measured { cas_ns, ops: vec![pair] })
    }
}

/// The loops of one thread, once, untimed: for a profiler that counts instructions. The operations
/// that were made, or `None` if the allocator failed.
pub(crate) struct Once(pub(crate) Bench, pub(crate) Order, pub(crate) usize);

impl Visit for Once {
    type Output = Option<usize>;

    fn visit<F: Frames>(self, frames: &F) -> Self::Output {
        let Self(bench, order, count) = self;
        let (mut handle, mut second) = (frames.handle(), frames.handle());
        if bench == Bench::Repeat {
            return pair_loop(&mut handle, order, count as u64).then_some(count);
        }
        let mut blocks = vec![FAILED; count];
        alloc_loop(&mut handle, &mut blocks, order);
        if blocks.contains(&FAILED) {
            return None;
        }
        if bench == Bench::Random {
            fastrand::Rng::with_seed(0).shuffle(&mut blocks);
        }
        let handle = if bench == Bench::Cross { &mut second } else { &mut handle };
        free_loop(handle, &blocks, order).then_some(count)
    }
}

/// Fills `blocks`; [`FAILED`] where there was none.
#[inline(never)]
pub(crate) fn alloc_loop<H: Handle>(handle: &mut H, blocks: &mut [u64], order: Order) {
    for block in blocks {
        *block = handle.alloc(order);
    }
}

/// Frees `blocks`; false if one was refused.
#[inline(never)]
pub(crate) fn free_loop<H: Handle>(handle: &mut H, blocks: &[u64], order: Order) -> bool {
    let mut ok = true;
    for block in blocks {
        ok &= handle.free(*block, order);
    }
    ok
}

/// Allocates and frees `count` times; false if that failed once.
#[inline(never)]
pub(crate) fn pair_loop<H: Handle>(handle: &mut H, order: Order, count: u64) -> bool {
    let mut ok = true;
    for _ in 0..count {
        let block = handle.alloc(order);
        ok &= block != FAILED && handle.free(block, order);
    }
    ok
}

/// Changes the state of each huge frame, pass after pass, each thread those of its own share.
pub(crate) fn state_changes(
    changes: &impl StateChanges,
    huge_frames: u32,
    threads: u32,
    cores: &[usize],
) -> Result<Measured, BenchError> {
    let share = huge_frames / threads;
    let passes = (LEAST_OPS as u32).div_ceil(share);
    let measured = on_cores(cores, threads, |thread, gate| {
        let own = thread * share..(thread + 1) * share;
        let mut sums = [0.0; 4];
        let mut ok = true;
        gate.wait();
        let cas_ns = cas_ns();
        for pass in 0..=passes {
            // From installed back to installed; the second install is as the first.
            let loops = [
                change_loop(gate, own.clone(), |huge| changes.evict(huge)),
                change_loop(gate, own.clone(), |huge| changes.installed(huge)),
                change_loop(gate, own.clone(), |huge| changes.hold(huge)),
                change_loop(gate, own.clone(), |huge| changes.release(huge)),
            ];
            ok &= loops.iter().all(|(ok, _)| *ok) & own.clone().all(|huge| changes.installed(huge));
            // The first pass warms up.
            if pass > 0 {
                sums.iter_mut().zip(loops).for_each(|(sum, (_, ns))| *sum += ns);
            }
        }
        let count = u64::from(passes) * u64::from(share);
        let names = ["evict", "installed", "hold", "release"].into_iter();
        let ops = names.zip(sums).map(|(op, sum)| Timed { op, ns: sum / count as f64, count }).collect();
        ok.then_some(Measured { cas_ns, ops })
    })?;
    let exhausted = || BenchError::Exhausted(Exhausted { bench: Bench::Host.name(), order: Order::HUGE.get() });
    Ok(Measured::average(&measured.into_iter().collect::<Option<Vec<_>>>().ok_or_else(exhausted)?))
}

#[inline(never)]
fn change_loop(gate: &Gate, huge: std::ops::Range<u32>, change: impl Fn(u32) -> bool) -> (bool, f64) {
    gate.wait();
    let start = Instant::now();
    let mut ok = true;
    for huge in huge {
        ok &= change(huge);
    }
    (ok, nanoseconds(start, 1))
}
