//! Threads pinned to cores that start a loop together, and the unit that all their times are given in.
//!
//! A thread of a crew sits on one core for good, so that no migration is in its times. The
//! [`Gate`] spins: a thread that had to be woken would start microseconds after its fellows. The
//! unit is an uncontended compare-and-swap on a word in L1, timed by the same threads right before
//! their loops: absolute times drift with clocks and neighbours, the ratio hardly.

use crate::error::BenchError;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Compare-and-swaps in one measurement: half a millisecond, in parts. What is preempted in one of them is not the unit.
const CAS_PARTS: usize = 9;
const CAS_COUNT: u64 = 10_000;
/// Looks at the gate before the core is yielded.
const SPINS: u32 = 20_000;

/// Cores that this process may use.
pub(crate) fn cores() -> Result<Vec<usize>, BenchError> {
    let set = sched_getaffinity(None).map_err(|errno| BenchError::Cores(errno.into()))?;
    Ok((0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect())
}

/// A meeting point of a crew's threads, for use any number of times.
pub(crate) struct Gate {
    threads: u32,
    arrived: AtomicU32,
    opened: AtomicU32,
}

impl Gate {
    fn new(threads: u32) -> Self {
        Self { threads, arrived: AtomicU32::new(0), opened: AtomicU32::new(0) }
    }

    /// Returns when all threads are here.
    pub(crate) fn wait(&self) {
        let opened = self.opened.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.threads {
            self.arrived.store(0, Ordering::Relaxed);
            // Release: a thread that goes on sees what all others did before they arrived.
            self.opened.store(opened.wrapping_add(1), Ordering::Release);
            return;
        }
        let mut spins = 0;
        while self.opened.load(Ordering::Acquire) == opened {
            spin_loop();
            spins += 1;
            if spins % SPINS == 0 {
                std::thread::yield_now();
            }
        }
    }
}

/// Runs `work(thread, gate)` once on each of the first `threads` cores; results in that order.
pub(crate) fn on_cores<T: Send>(
    cores: &[usize],
    threads: u32,
    work: impl Fn(u32, &Gate) -> T + Sync,
) -> Result<Vec<T>, BenchError> {
    let results: Vec<_> = (0..threads).map(|_| Mutex::new(None)).collect();
    each_on_its_core(cores, threads, &|thread, gate| {
        let result = work(thread, gate);
        *lock(&results[thread as usize]) = Some(result);
    })?;
    Ok(results.into_iter().filter_map(|result| result.into_inner().unwrap_or_else(PoisonError::into_inner)).collect())
}

/// The part of it that is compiled once and not for each workload on each allocator.
///
/// A thread that panics ends the process, so nobody waits for it at the gate.
fn each_on_its_core(cores: &[usize], threads: u32, work: &(dyn Fn(u32, &Gate) + Sync)) -> Result<(), BenchError> {
    let gate = &Gate::new(threads);
    let run = move |thread: u32, core: usize| {
        let mut set = CpuSet::new();
        set.set(core);
        let pinned = sched_setaffinity(None, &set).map_err(|errno| BenchError::Cores(errno.into()));
        // Also a thread that was not pinned takes part: the others count on it at the gate.
        work(thread, gate);
        pinned
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..threads).zip(cores).map(|(thread, core)| scope.spawn(move || run(thread, *core))).collect();
        // A panic would have ended the process already.
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| unreachable!()))
    })
}

/// Nanoseconds of one uncontended compare-and-swap, on this core, now.
pub(crate) fn cas_ns() -> f64 {
    let word = AtomicU64::new(0);
    let part = |_| {
        let start = Instant::now();
        cas_loop(&word);
        nanoseconds(start, CAS_COUNT)
    };
    (0..CAS_PARTS).for_each(|_| cas_loop(&word));
    let mut parts = [0; CAS_PARTS].map(part);
    parts.sort_by(f64::total_cmp);
    parts[CAS_PARTS / 2]
}

#[inline(never)]
fn cas_loop(word: &AtomicU64) {
    let word = black_box(word);
    let first = word.load(Ordering::Relaxed);
    for value in first..first + CAS_COUNT {
        let _ = black_box(word.compare_exchange(value, value + 1, Ordering::AcqRel, Ordering::Acquire));
    }
}

/// Nanoseconds since `start`, for each of `count` operations.
pub(crate) fn nanoseconds(start: Instant, count: u64) -> f64 {
    start.elapsed().as_secs_f64() * 1e9 / count.max(1) as f64
}

/// The contents of a lock; nobody panics while holding it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_passes_the_gate_before_the_last_one_came() {
        let cores = cores().expect("a process has cores");
        let threads = cores.len().min(4) as u32;
        let arrived = AtomicU32::new(0);
        let seen = on_cores(&cores, threads, |_, gate| {
            for round in 1..=100 {
                arrived.fetch_add(1, Ordering::Relaxed);
                gate.wait();
                if arrived.load(Ordering::Relaxed) < round * threads {
                    return false;
                }
                gate.wait();
            }
            true
        });
        assert_eq!(seen.expect("own cores can be pinned to"), vec![true; threads as usize]);
    }

    #[test]
    fn each_thread_has_its_core() {
        let cores = cores().expect("a process has cores");
        let own = on_cores(&cores, cores.len() as u32, |_, _| super::cores().expect("a thread has cores"));
        assert_eq!(own.expect("pinned"), cores.iter().map(|core| vec![*core]).collect::<Vec<_>>());
    }
}
