//! What it costs, against the same work by hand.

use crate::child::Other;
use crate::row::Outcome;
use crate::system::{Group, available_mib, hog, module_number, set_timing, shrink_all};
use crate::tenant::{HUGE, Tenant};
use rustix::fs::{FallocateFlags, fallocate};
use std::time::Instant;

/// A quarter of the steps took no longer: whatever else the outer machine does disturbs some of them.
fn quartile(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 4).copied().unwrap_or(f64::NAN)
}

/// Microseconds a frame, of steps of 16 frames of a free area: by the module, and by holes punched into the same file, one
/// a frame and one a step.
pub(crate) fn against_punching(rounds: usize, most_mib: u64) -> Outcome {
    const STEP: u64 = 16;
    let mib = (available_mib() * 7 / 10).min(most_mib) / 32 * 32;
    let mut tenant = Tenant::new(mib, true)?;
    let (steps, frames) = (mib / 32, mib / 2);
    let mut times = [Vec::new(), Vec::new(), Vec::new()];
    for round in 0..rounds {
        for turn in 0..3 {
            let what = (turn + round) % 3;
            tenant.take_all()?;
            tenant.free_most(0)?;
            for step in 0..steps {
                let start = Instant::now();
                match what {
                    0 => by_module(&tenant, STEP)?,
                    1 => (0..STEP).try_for_each(|frame| punch(&tenant, step * STEP + frame, 1))?,
                    _ => punch(&tenant, step * STEP, STEP)?,
                }
                times[what].push(start.elapsed().as_secs_f64() * 1e6 / STEP as f64);
            }
        }
    }
    let [by_module, single, batched] = times.map(quartile);
    let ratio = by_module / single;
    let what = format!(
        "{frames} frames: {by_module:.1} us a frame by the module, punched one by one {single:.1} (ratio {ratio:.2}), {STEP} \
         at once {batched:.1} (ratio {:.2})",
        by_module / batched
    );
    if ratio <= 1.2 || by_module - single <= 10.0 { Ok(what) } else { Err(what) }
}

fn by_module(tenant: &Tenant, frames: u64) -> Result<(), String> {
    let pass = tenant.area.reclaim(frames * HUGE).map_err(|error| error.to_string())?;
    if u64::from(pass.frames) == frames { Ok(()) } else { Err(format!("{} of {frames} frames", pass.frames)) }
}

fn punch(tenant: &Tenant, frame: u64, frames: u64) -> Result<(), String> {
    // SAFETY: all of it is free, and nobody else is at work.
    let shared = unsafe { tenant.area.shared() }.ok_or("no file")?;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(shared.memory, flags, frame * HUGE, frames * HUGE).map_err(|error| error.to_string())
}

/// The same in the way of an allocation that is short of memory.
pub(crate) fn under_pressure() -> Outcome {
    let all = available_mib();
    let mib = all * 7 / 10 / 16 * 16;
    let mut tenant = Tenant::new(mib, true)?;
    tenant.take_all()?;
    tenant.free_most(0)?;
    set_timing(true);
    let had = hog(all * 7 / 10, None)?;
    set_timing(false);
    let kernel = tenant.kernel();
    if !had || kernel.evicted == 0 {
        return Err(format!("had: {had}, {} frames", kernel.evicted));
    }
    let a_frame = kernel.discard_ns as f64 / 1e3 / kernel.evicted as f64;
    Ok(format!("{} of {} frames, {a_frame:.1} us each, {} batches", kernel.evicted, mib / 2, kernel.batches))
}

/// Nanoseconds of a count: 64 GiB of area of which some is in use and nothing free, so that each call looks for more.
pub(crate) fn of_a_count(areas: u64) -> Outcome {
    let mut tenants = Vec::new();
    for _ in 0..areas {
        let mut tenant = Tenant::new((64 << 10) / areas, true)?;
        tenant.take()?;
        tenants.push(tenant);
    }
    shrink_all();
    let before = (module_number("counts"), module_number("count_ns"));
    set_timing(true);
    for _ in 0..200 {
        shrink_all();
    }
    set_timing(false);
    let calls = module_number("counts") - before.0;
    if calls == 0 {
        return Err("nobody counted".to_owned());
    }
    let ns = (module_number("count_ns") - before.1) / calls;
    // The least of some: reads of it are warm in a count.
    let clock = (0..50).map(|_| module_number("clock_ns")).min().unwrap_or(0);
    Ok(format!("{ns} ns a call, of which {clock} are the clock's; {calls} calls"))
}

/// A cgroup with `memory.max` at half of what a program of phases wants at its peak.
pub(crate) fn at_half_the_peak(by: &str) -> Result<bool, String> {
    let group = Group::new("half", &[("memory.max", 150), ("memory.swap.max", 0)])?;
    phases(by, 3, &group)
}

/// A program of phases: each takes what it needs, frees it, and a part of it that is no area's follows.
fn phases(by: &str, rounds: u32, group: &Group) -> Result<bool, String> {
    let mut tenant = Other::start(128, "all", by, Some(group))?;
    for _ in 0..rounds {
        let done = (|| {
            tenant.ask("free 12")?;
            let had = hog(120, Some(group))?;
            tenant.ask("verify")?;
            tenant.ask("take 58")?;
            Ok::<_, String>(had)
        })();
        if done != Ok(true) {
            return Ok(false);
        }
    }
    Ok(true)
}
