//! Reclaim, return and install, per 2 MiB frame, and the raw system calls that limit them.
//!
//! A guest of each candidate is shrunk and grown repeatedly; next to them lies memory of the same
//! kind and size that no guest uses, on which the bare system calls are made in the same round:
//!
//! | op | what is timed | its limit |
//! |---|---|---|
//! | `reclaim_touched` | shrink while all free frames are backed by memory | `discard_touched_bulk` |
//! | | and of the same memory, mapped by the guest | `discard_mapped_bulk` |
//! | `reclaim_untouched_first` | shrink a VM that booted just now | `discard_untouched_bulk` |
//! | `reclaim_untouched_repeated` | shrink it again, after a grow | `discard_untouched_bulk` |
//! | `reclaim_scattered` | soft reclaim after the guest freed a random half | `discard_scattered_per_run` |
//! | `return` | grow | `discard_untouched_bulk`: the cheapest call for a frame |
//! | `install` | the guest allocates each frame and writes one word to it | `populate_per_frame` |
//! | `return_install_touch` | grow, then the guest allocates each frame and writes to every page | `populate_touch_per_frame` |
//!
//! Times are divided by the frames that moved: by the limit for resizes, by the kernel's account of
//! resident memory for installs, since some of what a guest allocates may have been there already. So a row does
//! not depend on how many they were, and a balloon of 4 KiB pages, which needs 10 ms a frame where others need
//! microseconds, gets by with fewer of them: a smaller guest of the same proportions, in a part of the rounds (`plan`).

mod plan;

pub(crate) use plan::{Allowance, Plan};

use crate::candidates::{Candidate, Moves};
use crate::error::{BenchError, SizeError};
use crate::guest::{Moved, ask, fill_pool, grow, measure, shrink, touch_and_free};
use crate::interrupt;
use crate::progress::{Progress, Show};
use crate::room;
use crate::series::{Row, Series};
use crate::turns::takes_part;
use cli::workload::DEFAULT_ORDER;
use llfree_base::units::Bytes;
use llfree_control::protocol::{BurstTouch, GuestRequest};
use llfree_monitor::memory::{Backing, GuestRam};
use plan::{GUEST_OWN, Share};
use shared_layout::{FRAME_SIZE, HUGE_SIZE, HugeEntry, HugeId, HugeRange};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vm_memory::{Bytes as _, GuestAddress};
use vmm::vm::Vm;

/// The candidate of the bare system calls.
const RAW: &str = "raw";

/// A VM under measurement.
struct Subject {
    candidate: &'static Candidate,
    share: Share,
    vm: Vm,
}

/// Times by candidate and op, in the order in which they were first measured.
#[derive(Default)]
struct Book(Vec<Entry>);

struct Entry {
    candidate: &'static str,
    op: &'static str,
    /// The raw op that it is compared with.
    limit: &'static str,
    /// Frames in each round.
    frames: Series,
    series: Series,
}

impl Book {
    fn add(
        &mut self,
        (candidate, op, limit): (&'static str, &'static str, &'static str),
        time: Duration,
        frames: u32,
    ) -> Result<(), BenchError> {
        if frames == 0 {
            return Err(BenchError::Guest(format!("'{op}' of {candidate} moved nothing")));
        }
        let known = self.0.iter().position(|entry| (entry.candidate, entry.op) == (candidate, op));
        let index = known.unwrap_or_else(|| {
            self.0.push(Entry { candidate, op, limit, frames: Series::default(), series: Series::default() });
            self.0.len() - 1
        });
        let entry = &mut self.0[index];
        entry.frames.push(frames.into());
        entry.series.add(time, frames);
        Ok(())
    }

    fn raw(
        &mut self,
        op: &'static str,
        limit: &'static str,
        frames: u32,
        call: impl FnOnce() -> Result<(), BenchError>,
    ) -> Result<(), BenchError> {
        let start = Instant::now();
        call()?;
        self.add((RAW, op, limit), start.elapsed(), frames)
    }

    /// Forgets the round to warm up.
    fn clear(&mut self) {
        for entry in &mut self.0 {
            entry.frames.clear();
            entry.series.clear();
        }
    }

    /// The rows, guests' first.
    fn rows(&self) -> Vec<Row> {
        let row = |entry: &Entry| {
            let limit = self.0.iter().find(|limit| (limit.candidate, limit.op) == (RAW, entry.limit));
            // Every op names one that each round has.
            let limit = limit.map_or(&entry.series, |limit| &limit.series);
            entry.series.row(entry.candidate, entry.op, entry.frames.median() as u32, limit)
        };
        let (raw, guests): (Vec<_>, Vec<_>) = self.0.iter().partition(|entry| entry.candidate == RAW);
        guests.into_iter().chain(raw).map(row).collect()
    }
}

/// What a round takes for each frame of the memory that moves.
const fn usual(moves: Moves) -> Duration {
    match moves {
        Moves::Frames => Duration::from_millis(2),
        Moves::Pages => Duration::from_millis(35),
    }
}
/// The same of the raw calls.
const USUAL_RAW: Duration = Duration::from_millis(1);

/// Measures `plan.iterations` rounds after one to warm up; candidates that move single pages take part in some.
pub(crate) fn run(plan: &Plan, show: Show) -> Result<Vec<Row>, BenchError> {
    let (mem, to) = (plan.mem, plan.to);
    if to.0 < 2 * GUEST_OWN || to.0 >= mem.0 {
        return Err(SizeError::Target { to, least: Bytes(2 * GUEST_OWN), mem }.into());
    }
    let frames = u32::try_from((mem.0 - to.0) / HUGE_SIZE).map_err(|_| SizeError::TooManyFrames(mem))?;
    // One guest has all of its memory, the others are at their limit.
    let bytes = mem.0.saturating_add(to.0.saturating_mul(plan.candidates.len() as u64));
    if plan.backing != Backing::Hugetlb {
        room::check(room::of_guests(plan.candidates.len() + 1, bytes))?;
    }
    let mut subjects = Vec::new();
    for candidate in &plan.candidates {
        let share = Share::of(plan, candidate.moves);
        let vm = Vm::launch(candidate.config(share.mem, 1, plan.backing))?;
        subjects.push(Subject { candidate, share, vm });
    }
    let raw = GuestRam::new(mem.0 - to.0, plan.backing)?;
    let mut book = Book::default();
    let steps = subjects.iter().map(|subject| {
        let Share { mem, to, rounds, .. } = subject.share;
        // Frames have 32-bit numbers.
        let frames = ((mem.0 - to.0) / HUGE_SIZE) as u32;
        (subject.candidate.name, rounds.1 + 1, usual(subject.candidate.moves) * frames)
    });
    let mut progress = Progress::new(show, "inflate", steps.chain([(RAW, plan.iterations + 1, USUAL_RAW * frames)]));
    for round in 0..=plan.iterations {
        let taking_part = subjects.iter().filter(|subject| takes_part(subject.share.rounds, round));
        for subject in taking_part.take_while(|_| !interrupt::requested()) {
            progress.step(subject.candidate.name, "", || {
                guest_round(subject, &mut book)?;
                fresh_round(subject, plan.backing, &mut book)
            })?;
        }
        let interrupted = interrupt::requested();
        if !interrupted {
            progress.step(RAW, "", || raw_round(&raw, frames, &mut book))?;
        }
        if round == 0 {
            book.clear();
        }
        if interrupted {
            break;
        }
    }
    Ok(book.rows())
}

fn guest_round(subject: &Subject, book: &mut Book) -> Result<(), BenchError> {
    let (vm, name) = (&subject.vm, subject.candidate.name);
    let (mem, to) = (subject.share.mem.0, subject.share.to.0);
    grow(vm, mem)?;
    // Everything that the guest can have is touched and free.
    touch_and_free(vm, mem - GUEST_OWN)?;
    // The raw calls have no other thread beside them either.
    fill_pool(vm.monitor().supply());
    let Moved { duration, frames } = shrink(vm, to)?;
    book.add((name, "reclaim_touched", "discard_touched_bulk"), duration, frames)?;
    let Moved { duration, frames } = grow(vm, mem)?;
    book.add((name, "return", "discard_untouched_bulk"), duration, frames)?;

    // The guest uses what comes back.
    let (time, frames) = burst(vm, mem - GUEST_OWN, BurstTouch::Frames)?;
    // After a balloon of single pages the kernel gives one page per touch, not a frame.
    if u64::from(frames) * HUGE_SIZE * 2 >= mem - to {
        book.add((name, "install", "populate_per_frame"), time, frames)?;
    }
    shrink(vm, to)?;
    let returned = grow(vm, mem)?.duration;
    let (time, frames) = burst(vm, mem - GUEST_OWN, BurstTouch::Pages)?;
    book.add((name, "return_install_touch", "populate_touch_per_frame"), returned + time, frames)?;

    if name == "llfree" {
        evictions(vm, subject.share, book)?;
    }
    // The others need the host's memory.
    shrink(vm, to)?;
    Ok(())
}

/// A VM of which nothing was touched.
fn fresh_round(subject: &Subject, backing: Backing, book: &mut Book) -> Result<(), BenchError> {
    let Subject { candidate, share: Share { mem, to, .. }, .. } = subject;
    let vm = Vm::launch(candidate.config(*mem, 1, backing))?;
    ask(&vm, &GuestRequest::Stats)?;
    for op in ["reclaim_untouched_first", "reclaim_untouched_repeated"] {
        let Moved { duration, frames } = shrink(&vm, to.0)?;
        book.add((candidate.name, op, "discard_untouched_bulk"), duration, frames)?;
        grow(&vm, mem.0)?;
    }
    Ok(())
}

/// Allocates and touches; the time for that, and the frames that got memory. All is free afterwards.
fn burst(vm: &Vm, bytes: u64, touch: BurstTouch) -> Result<(Duration, u32), BenchError> {
    let resident = || Ok::<_, BenchError>(vm.monitor().ram().residency()?.resident_bytes);
    let before = resident()?;
    let (_, samples) = measure(vm, &GuestRequest::Burst { bytes, touch, keep: false, single: false })?;
    let frames = resident()?.saturating_sub(before) / HUGE_SIZE;
    ask(vm, &GuestRequest::Idle)?;
    let nanos = samples.mean.saturating_mul(samples.count).saturating_add(samples.beside_ns);
    Ok((Duration::from_nanos(nanos), u32::try_from(frames).unwrap_or(u32::MAX)))
}

/// Soft reclaim, which no device has.
fn evictions(vm: &Vm, share: Share, book: &mut Book) -> Result<(), BenchError> {
    let (mem, to) = (share.mem.0, share.to.0);
    let evict = || vm.monitor().evict(u32::MAX).map_err(vmm::vm::VmError::from);
    evict()?;
    // Half of it is free, here and there.
    ask(vm, &GuestRequest::Alloc { bytes: mem - to, order: DEFAULT_ORDER })?;
    ask(vm, &GuestRequest::Free { bytes: Some((mem - to) / 2), random: true })?;
    ask(vm, &GuestRequest::Idle)?;
    let start = Instant::now();
    let pass = evict()?;
    book.add(("llfree", "reclaim_scattered", "discard_scattered_per_run"), start.elapsed(), pass.discarded)?;
    ask(vm, &GuestRequest::Free { bytes: None, random: false })?;

    // What the guest has mapped costs the kernel more: KVM lets go of it first. One call per run, after
    // the monitor's back, whose books the eviction of nothing then sets right.
    touch_and_free(vm, mem - GUEST_OWN)?;
    fill_pool(vm.monitor().supply());
    let runs = free_runs(vm);
    let frames = runs.iter().map(|run| run.count()).sum();
    book.raw("discard_mapped_bulk", "discard_touched_bulk", frames, || {
        Ok(runs.iter().try_for_each(|run| vm.monitor().ram().discard(*run))?)
    })?;
    evict()?;
    Ok(())
}

/// The runs of frames that are free and backed by memory.
fn free_runs(vm: &Vm) -> Vec<HugeRange> {
    let mut runs: Vec<HugeRange> = Vec::new();
    for (word, huge) in vm.platform().table().entries().iter().zip((0..).map(HugeId)) {
        let is_free = word.load(Ordering::Relaxed) == HugeEntry::FREE_INSTALLED.bits();
        if is_free && !runs.last_mut().is_some_and(|run| run.append(huge)) {
            runs.push(huge.into());
        }
    }
    runs
}

fn raw_round(raw: &GuestRam, frames: u32, book: &mut Book) -> Result<(), BenchError> {
    let all = HugeRange::up_to(frames);
    let each = || all.iter();
    let populate = || Ok::<_, BenchError>(raw.populate(all)?);
    let discard = || Ok::<_, BenchError>(raw.discard(all)?);

    book.raw("populate_bulk", "populate_bulk", frames, populate)?;
    book.raw("discard_touched_bulk", "discard_touched_bulk", frames, discard)?;
    book.raw("discard_untouched_bulk", "discard_untouched_bulk", frames, discard)?;
    book.raw("discard_untouched_per_frame", "discard_untouched_bulk", frames, || {
        Ok(each().try_for_each(|huge| raw.discard(huge))?)
    })?;
    book.raw("populate_per_frame", "populate_bulk", frames, || Ok(each().try_for_each(|huge| raw.populate(huge))?))?;
    book.raw("discard_touched_per_frame", "discard_touched_bulk", frames, || {
        Ok(each().try_for_each(|huge| raw.discard(huge))?)
    })?;

    let scattered: Vec<HugeRange> = each().step_by(2).map(HugeRange::from).collect();
    let half = scattered.len() as u32;
    populate()?;
    book.raw("discard_scattered_together", "discard_scattered_per_run", half, || {
        let mut failed = None;
        raw.discard_runs(&scattered, |_, result| failed = failed.take().or(result.err()));
        failed.map_or(Ok(()), |error| Err(error.into()))
    })?;
    populate()?;
    book.raw("discard_scattered_per_run", "discard_scattered_per_run", half, || {
        Ok(scattered.iter().try_for_each(|run| raw.discard(*run))?)
    })?;
    discard()?;

    book.raw("populate_touch_per_frame", "populate_touch_per_frame", frames, || {
        each().try_for_each(|huge| {
            raw.populate(huge)?;
            touch(raw, huge)
        })
    })?;
    discard()
}

/// Writes a word to every page, as the guest does.
fn touch(raw: &GuestRam, huge: HugeId) -> Result<(), BenchError> {
    for page in (huge.byte_offset()..huge.byte_offset() + HUGE_SIZE).step_by(FRAME_SIZE as usize) {
        raw.guest_memory().write_obj(page, GuestAddress(page)).map_err(|error| BenchError::Guest(error.to_string()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
