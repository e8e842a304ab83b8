//! What it costs, against the same work by hand.

use crate::child::Other;
use crate::row::Outcome;
use crate::system::{Group, available_mib, hog, module_number, set_timing, shrink_all};
use crate::tenant::{HUGE, Tenant};
use llfree_area::Block;
use rustix::fs::{FallocateFlags, fallocate};
use std::time::Instant;

/// What times a frame, in microseconds, were seen.
struct Times(Vec<f64>);

impl Times {
    fn of(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        Self(times)
    }

    fn at(&self, part: f64) -> f64 {
        let last = self.0.len().saturating_sub(1);
        self.0.get((last as f64 * part) as usize).copied().unwrap_or(f64::NAN)
    }

    fn median(&self) -> f64 {
        self.at(0.5)
    }
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [least, median, most] = [0.0, 0.5, 1.0].map(|part| self.at(part));
        write!(f, "{least:.1}/{median:.1}/{most:.1} us")
    }
}

/// Frames that go at once: a batch of the module's.
const STEP: usize = 16;

/// By the module, and by holes in the same file, one a frame and one a step; by the medians, whatever else the outer machine
/// does.
fn compare(mib: u64, times: [Vec<f64>; 3]) -> Outcome {
    let steps = times[0].len();
    let [by_module, single, batched] = times.map(Times::of);
    let ratio = by_module.median() / single.median();
    let what = format!(
        "area of {mib} MiB, {steps} steps, least/median/most a frame: {by_module} by the module, punched one by one {single} \
         (ratio {ratio:.2}), {STEP} at once {batched} (ratio {:.2})",
        by_module.median() / batched.median()
    );
    let is_cheap = ratio <= 1.2 && by_module.median() - single.median() <= 10.0;
    if steps > 0 && is_cheap { Ok(what) } else { Err(what) }
}

/// Microseconds that it takes, for each of the frames.
fn timed(frames: usize, work: impl FnOnce() -> Result<(), String>) -> Result<f64, String> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64() * 1e6 / frames as f64)
}

/// Blocks by their frames in the area, of which all are taken: groups of [`STEP`] neighbours each.
fn groups(tenant: &mut Tenant) -> Vec<(u64, Vec<(Block, u64)>)> {
    let mut blocks = std::mem::take(&mut tenant.blocks);
    blocks.sort_by_key(|(block, _)| block.as_ptr().as_ptr().addr());
    let mut groups = Vec::new();
    while !blocks.is_empty() {
        let rest = blocks.split_off(STEP.min(blocks.len()));
        groups.push(((groups.len() * STEP) as u64, std::mem::replace(&mut blocks, rest)));
    }
    groups
}

fn free(tenant: &mut Tenant, blocks: Vec<(Block, u64)>) -> Result<(), String> {
    blocks.into_iter().try_for_each(|(block, _)| tenant.handle.free(block)).map_err(|error| error.to_string())?;
    tenant.handle.drain();
    Ok(())
}

/// Steps of 16 frames when the process asks: by the module what was freed a moment ago, by holes what is still in use, in
/// turns.
pub(crate) fn against_punching(rounds: usize, most_mib: u64) -> Outcome {
    let mib = (available_mib() * 7 / 10).min(most_mib) / 96 * 96;
    let mut tenant = Tenant::new(mib, true)?;
    let mut times = [Vec::new(), Vec::new(), Vec::new()];
    for round in 0..rounds {
        tenant.take_all()?;
        let mut punched = Vec::new();
        for (step, (first, blocks)) in groups(&mut tenant).into_iter().enumerate() {
            let what = (step + round) % 3;
            times[what].push(match what {
                0 => {
                    free(&mut tenant, blocks)?;
                    timed(STEP, || by_module(&tenant))?
                }
                1 => {
                    punched.extend(blocks);
                    timed(STEP, || (first..).take(STEP).try_for_each(|frame| punch(&tenant, frame, 1)))?
                }
                _ => {
                    punched.extend(blocks);
                    timed(STEP, || punch(&tenant, first, STEP as u64))?
                }
            });
        }
        free(&mut tenant, punched)?;
    }
    compare(mib, times)
}

fn by_module(tenant: &Tenant) -> Result<(), String> {
    let pass = tenant.area.reclaim(STEP as u64 * HUGE).map_err(|error| error.to_string())?;
    if pass.frames as usize == STEP { Ok(()) } else { Err(format!("{} of {STEP} frames", pass.frames)) }
}

fn punch(tenant: &Tenant, frame: u64, frames: u64) -> Result<(), String> {
    // SAFETY: the frames are ours or free, and nobody else is at work.
    let shared = unsafe { tenant.area.shared() }.ok_or("no file")?;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(shared.memory, flags, frame * HUGE, frames * HUGE).map_err(|error| error.to_string())
}

/// In the way of an allocation that is short of memory. Three quarters of the area are free, and go while another process grows;
/// between its steps frames of the last quarter are punched, which are in use. The module's time is that of all its scans; it
/// takes half of what is free at once, so there are few steps in a round.
pub(crate) fn under_pressure(rounds: usize, most_mib: u64) -> Outcome {
    let mib = (available_mib() * 7 / 10).min(most_mib) / 128 * 128;
    let mut tenant = Tenant::new(mib, true)?;
    let mut times = [Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..rounds {
        tenant.take_all()?;
        let mut held = Vec::new();
        for (index, group) in groups(&mut tenant).into_iter().enumerate() {
            if index % 4 == 3 { held.push(group) } else { free(&mut tenant, group.1)? }
        }
        let mut other = Other::start(2, "all", "nobody", None)?;
        set_timing(true);
        let outcome = press(&tenant, &mut other, &held, &mut times);
        set_timing(false);
        outcome?;
        // What was punched is zero, and nobody reads it.
        held.into_iter().try_for_each(|(_, blocks)| free(&mut tenant, blocks))?;
    }
    let evicted = tenant.kernel().evicted;
    Ok(format!("{evicted} frames; {}", compare(mib, times)?))
}

fn press(
    tenant: &Tenant,
    other: &mut Other,
    held: &[(u64, Vec<(Block, u64)>)],
    times: &mut [Vec<f64>; 3],
) -> Result<(), String> {
    const GROWTH: &str = "grow 96";
    let seen = || (tenant.kernel().evicted, module_number("scan_ns"));
    let mut before = seen();
    let mut sample = |times: &mut Vec<f64>| {
        let after = seen();
        let evicted = after.0 - before.0;
        if evicted > 0 {
            times.push((after.1 - before.1) as f64 / 1e3 / evicted as f64);
        }
        before = after;
        evicted > 0
    };
    while !sample(&mut times[0]) {
        other.ask(GROWTH)?;
    }
    for (step, (first, _)) in held.iter().enumerate() {
        other.ask(GROWTH)?;
        sample(&mut times[0]);
        if step % 2 == 0 {
            let single = || (*first..).take(STEP).try_for_each(|frame| punch(tenant, frame, 1));
            times[1].push(timed(STEP, single)?);
        } else {
            times[2].push(timed(STEP, || punch(tenant, *first, STEP as u64))?);
        }
    }
    Ok(())
}

/// Nanoseconds of a count: 64 GiB of area of which some is in use and nothing free, so that each call looks for more; and of
/// a system call that does nothing, for the clock of an emulated machine says little by itself. With one that counts
/// instructions these are the nanoseconds, and what it may take is known: 1 us at one instruction a nanosecond.
pub(crate) fn of_a_count(areas: u64, most: Option<u64>) -> Outcome {
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
    // The least of some: reads of it are warm in a count.
    let clock = (0..50).map(|_| module_number("clock_ns")).min().unwrap_or(0);
    let ns = ((module_number("count_ns") - before.1) / calls).saturating_sub(clock);
    let system_call = 1e3 * timed(10_000, || (0..10_000).try_for_each(|_| nothing()))?;
    let what = format!(
        "{ns} ns a call without the clock's own {clock}; {calls} calls; a getppid takes {system_call:.0} ns: {:.1} times",
        ns as f64 / system_call
    );
    if most.is_none_or(|most| ns <= most) { Ok(what) } else { Err(what) }
}

/// A system call, and hardly anything else.
fn nothing() -> Result<(), String> {
    // SAFETY: it has no arguments.
    if unsafe { libc::syscall(libc::SYS_getppid) } > 0 { Ok(()) } else { Err("no parent".to_owned()) }
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
