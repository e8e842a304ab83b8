//! Reclaim, return and install, per 2 MiB frame, and the raw system calls that limit them.
//!
//! One guest is shrunk and grown again and again; beside it lies memory of the same kind and size
//! that no guest uses, on which the bare system calls are made in the same round:
//!
//! | op | what is timed | its limit |
//! |---|---|---|
//! | `reclaim_touched` | shrink while all free frames have memory behind them | `discard_touched_bulk` |
//! | | and of the same memory, mapped by the guest | `discard_mapped_bulk` |
//! | `reclaim_untouched` | shrink while none has | `discard_untouched_bulk` |
//! | `reclaim_scattered` | soft reclaim after the guest freed a random half | `discard_scattered_per_run` |
//! | `return` | grow | `discard_untouched_bulk`: the cheapest call for a frame |
//! | `return_install_touch` | grow, then the guest allocates each frame, has it installed, and writes to every page | `populate_touch_per_frame` |

use crate::BenchError;
use crate::progress;
use crate::series::{Row, Series};
use shared_layout::{FRAME_SIZE, HUGE_SIZE, HugeEntry, HugeId};
use std::sync::atomic::Ordering;
use std::time::Instant;
use vm_memory::{Bytes as _, GuestAddress};
use vmm::control::protocol::GuestRequest;
use vmm::control::report::GuestOutcome;
use vmm::memory::{Backing, GuestRam, Run};
use vmm::service;
use vmm::units::Bytes;
use vmm::vm::{Vm, VmConfig};
use vmm::workload::DEFAULT_ORDER;

/// What the guest needs for itself: its image, the first frame that stays unused, its records.
const GUEST_OWN: u64 = 8 << 20;

#[derive(Default)]
struct Ops {
    reclaim_touched: Series,
    reclaim_untouched: Series,
    reclaim_scattered: Series,
    give_back: Series,
    give_back_install_touch: Series,
    discard_mapped_bulk: Series,
    discard_touched_bulk: Series,
    discard_touched_per_frame: Series,
    discard_scattered_together: Series,
    discard_scattered_per_run: Series,
    discard_untouched_bulk: Series,
    discard_untouched_per_frame: Series,
    populate_bulk: Series,
    populate_per_frame: Series,
    populate_touch_per_frame: Series,
}

impl Ops {
    fn all(&mut self) -> [&mut Series; 15] {
        [
            &mut self.reclaim_touched,
            &mut self.reclaim_untouched,
            &mut self.reclaim_scattered,
            &mut self.give_back,
            &mut self.give_back_install_touch,
            &mut self.discard_mapped_bulk,
            &mut self.discard_touched_bulk,
            &mut self.discard_touched_per_frame,
            &mut self.discard_scattered_together,
            &mut self.discard_scattered_per_run,
            &mut self.discard_untouched_bulk,
            &mut self.discard_untouched_per_frame,
            &mut self.populate_bulk,
            &mut self.populate_per_frame,
            &mut self.populate_touch_per_frame,
        ]
    }
}

/// Measures `iterations` rounds after one to warm up.
pub(crate) fn run(mem: Bytes, to: Bytes, backing: Backing, iterations: u32) -> Result<Vec<Row>, BenchError> {
    if to.0 < GUEST_OWN || to.0 >= mem.0 {
        let message = format!("--to {to} is out of range; use {} up to less than --mem {mem}", Bytes(GUEST_OWN));
        return Err(BenchError::Size(message));
    }
    let frames = u32::try_from((mem.0 - to.0) / HUGE_SIZE)
        .map_err(|_| BenchError::Size(format!("--mem {mem} has more huge frames than can be counted")))?;
    let vm = Vm::launch(VmConfig::new(mem, 1, backing))?;
    let raw = GuestRam::new(mem.0 - to.0, backing)?;
    let mut ops = Ops::default();
    let rounds = iterations + 1;
    for round in 0..rounds {
        progress(round, rounds, "guest");
        guest_round(&vm, mem, to, frames, &mut ops)?;
        progress(round, rounds, "raw system calls");
        raw_round(&raw, frames, &mut ops)?;
        if round == 0 {
            ops.all().into_iter().for_each(Series::clear);
        }
    }
    progress(rounds, rounds, "");
    Ok(vec![
        ops.reclaim_touched.row("llfree", "reclaim_touched", frames, &ops.discard_touched_bulk),
        ops.reclaim_untouched.row("llfree", "reclaim_untouched", frames, &ops.discard_untouched_bulk),
        ops.reclaim_scattered.row("llfree", "reclaim_scattered", frames / 2, &ops.discard_scattered_per_run),
        ops.give_back.row("llfree", "return", frames, &ops.discard_untouched_bulk),
        ops.give_back_install_touch.row("llfree", "return_install_touch", frames, &ops.populate_touch_per_frame),
        ops.discard_mapped_bulk.row("raw", "discard_mapped_bulk", frames, &ops.discard_touched_bulk),
        ops.discard_touched_bulk.row("raw", "discard_touched_bulk", frames, &ops.discard_touched_bulk),
        ops.discard_touched_per_frame.row("raw", "discard_touched_per_frame", frames, &ops.discard_touched_bulk),
        ops.discard_scattered_together.row(
            "raw",
            "discard_scattered_together",
            frames / 2,
            &ops.discard_scattered_per_run,
        ),
        ops.discard_scattered_per_run.row(
            "raw",
            "discard_scattered_per_run",
            frames / 2,
            &ops.discard_scattered_per_run,
        ),
        ops.discard_untouched_bulk.row("raw", "discard_untouched_bulk", frames, &ops.discard_untouched_bulk),
        ops.discard_untouched_per_frame.row("raw", "discard_untouched_per_frame", frames, &ops.discard_untouched_bulk),
        ops.populate_bulk.row("raw", "populate_bulk", frames, &ops.populate_bulk),
        ops.populate_per_frame.row("raw", "populate_per_frame", frames, &ops.populate_bulk),
        ops.populate_touch_per_frame.row("raw", "populate_touch_per_frame", frames, &ops.populate_touch_per_frame),
    ])
}

fn guest_round(vm: &Vm, mem: Bytes, to: Bytes, frames: u32, ops: &mut Ops) -> Result<(), BenchError> {
    // Everything that the guest can have is touched and free.
    alloc(vm, mem.0 - GUEST_OWN)?;
    free_all(vm)?;
    ops.reclaim_touched.add(shrink(vm, to, frames)?, frames);
    ops.give_back.add(grow(vm, mem)?, frames);

    // Nothing that is free has memory behind it.
    vm.monitor().evict(u32::MAX).map_err(vmm::vm::VmError::from)?;
    ops.reclaim_untouched.add(shrink(vm, to, frames)?, frames);

    // The guest uses what comes back.
    let start = Instant::now();
    grow(vm, mem)?;
    alloc(vm, mem.0 - to.0)?;
    ops.give_back_install_touch.add(start.elapsed(), frames);

    // Half of it is free, here and there.
    let half = GuestRequest::Free { bytes: Some((mem.0 - to.0) / 2), random: true };
    service::guest(vm, &half)?;
    service::guest(vm, &GuestRequest::Idle)?;
    let start = Instant::now();
    let pass = vm.monitor().evict(u32::MAX).map_err(vmm::vm::VmError::from)?;
    ops.reclaim_scattered.add(start.elapsed(), pass.discarded);
    free_all(vm)?;

    // What the guest has mapped costs the kernel more: KVM lets go of it first. One call a run, behind
    // the monitor's back, whose books the eviction of nothing then sets right.
    alloc(vm, mem.0 - GUEST_OWN)?;
    free_all(vm)?;
    let runs = free_runs(vm);
    let start = Instant::now();
    runs.iter().try_for_each(|run| vm.monitor().ram().discard(run.first, run.count))?;
    ops.discard_mapped_bulk.add(start.elapsed(), runs.iter().map(|run| run.count).sum());
    vm.monitor().evict(u32::MAX).map_err(vmm::vm::VmError::from)?;
    Ok(())
}

/// The runs of frames that are free with memory behind them.
fn free_runs(vm: &Vm) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (word, huge) in vm.platform().entries().iter().zip((0..).map(HugeId)) {
        match runs.last_mut() {
            _ if word.load(Ordering::Relaxed) != HugeEntry::FREE_INSTALLED.bits() => {}
            Some(run) if run.ends_before(huge) => run.count += 1,
            _ => runs.push(Run { first: huge, count: 1 }),
        }
    }
    runs
}

fn raw_round(raw: &GuestRam, frames: u32, ops: &mut Ops) -> Result<(), BenchError> {
    let first = HugeId(0);
    let each = || (0..frames).map(HugeId);

    let start = Instant::now();
    raw.populate(first, frames)?;
    ops.populate_bulk.add(start.elapsed(), frames);

    let start = Instant::now();
    raw.discard(first, frames)?;
    ops.discard_touched_bulk.add(start.elapsed(), frames);

    let start = Instant::now();
    raw.discard(first, frames)?;
    ops.discard_untouched_bulk.add(start.elapsed(), frames);

    let start = Instant::now();
    each().try_for_each(|huge| raw.discard(huge, 1))?;
    ops.discard_untouched_per_frame.add(start.elapsed(), frames);

    let start = Instant::now();
    each().try_for_each(|huge| raw.populate(huge, 1))?;
    ops.populate_per_frame.add(start.elapsed(), frames);

    let start = Instant::now();
    each().try_for_each(|huge| raw.discard(huge, 1))?;
    ops.discard_touched_per_frame.add(start.elapsed(), frames);

    let scattered: Vec<Run> = each().step_by(2).map(|first| Run { first, count: 1 }).collect();
    raw.populate(first, frames)?;
    let mut failed = None;
    let start = Instant::now();
    raw.discard_runs(&scattered, |_, result| failed = failed.take().or(result.err()));
    ops.discard_scattered_together.add(start.elapsed(), scattered.len() as u32);
    if let Some(error) = failed {
        return Err(error.into());
    }

    raw.populate(first, frames)?;
    let start = Instant::now();
    scattered.iter().try_for_each(|run| raw.discard(run.first, run.count))?;
    ops.discard_scattered_per_run.add(start.elapsed(), scattered.len() as u32);
    raw.discard(first, frames)?;

    let start = Instant::now();
    for huge in each() {
        raw.populate(huge, 1)?;
        touch(raw, huge)?;
    }
    ops.populate_touch_per_frame.add(start.elapsed(), frames);
    raw.discard(first, frames)?;
    Ok(())
}

/// Writes four words to every page, as the guest does.
fn touch(raw: &GuestRam, huge: HugeId) -> Result<(), BenchError> {
    for page in (huge.byte_offset()..huge.byte_offset() + HUGE_SIZE).step_by(FRAME_SIZE as usize) {
        for word in (0..FRAME_SIZE).step_by(FRAME_SIZE as usize / 4) {
            raw.guest_memory()
                .write_obj(page ^ word, GuestAddress(page + word))
                .map_err(|error| BenchError::Guest(error.to_string()))?;
        }
    }
    Ok(())
}

fn alloc(vm: &Vm, bytes: u64) -> Result<(), BenchError> {
    let report = service::guest(vm, &GuestRequest::Alloc { bytes, order: DEFAULT_ORDER })?;
    if report.outcome != GuestOutcome::Ok {
        let got = Bytes(report.bytes);
        return Err(BenchError::Guest(format!("it allocated {got} of {} ({:?})", Bytes(bytes), report.outcome)));
    }
    Ok(())
}

fn free_all(vm: &Vm) -> Result<(), BenchError> {
    service::guest(vm, &GuestRequest::Free { bytes: None, random: false })?;
    service::guest(vm, &GuestRequest::Idle)?;
    Ok(())
}

fn shrink(vm: &Vm, to: Bytes, frames: u32) -> Result<std::time::Duration, BenchError> {
    let resize = vm.shrink(to.0, |_| false)?;
    if resize.actual == to.0 && resize.pass.frames == frames {
        Ok(resize.duration)
    } else {
        Err(BenchError::Guest(format!("it still uses what {} leaves it: the limit is {}", to, Bytes(resize.actual))))
    }
}

fn grow(vm: &Vm, to: Bytes) -> Result<std::time::Duration, BenchError> {
    Ok(vm.grow(to.0)?.duration)
}
