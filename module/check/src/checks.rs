//! The list of checks, and those of a process's life and of what else the kernel does with memory.

use crate::child::Other;
use crate::log::{clean_log, lockdep_is_on};
use crate::row::{Outcome, check, read_the_log};
use crate::system::{areas, attached, load, pass_awake, shrink_all, unload};
use crate::tenant::{HUGE, Tenant};
use crate::uses::{self, Second};
use crate::{device, headroom, keeper, measure, memory, races, sparse, tables};
use llfree_area::Order;
use rustix::mm::{MapFlags, ProtFlags, mmap};
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// How much of it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Form {
    /// A minute and a half: what a change of the module would break first.
    Quick,
    /// All checks, minutes.
    Short,
    /// The same in a kernel that checks itself, where time says nothing.
    Debug,
    /// With as many rounds as it takes.
    Long,
}

pub(crate) fn run(failures: &mut u32, form: Form, module: &str, disks: [&str; 2]) {
    let (long, quick) = (form == Form::Long, form == Form::Quick);
    check(failures, "without the module an area looks after itself", || {
        let tenant = Tenant::new(16, false)?;
        drop(tenant.area.auto_reclaim(llfree_area::Switch(Some(llfree_area::area::Builder::AUTO_RECLAIM))));
        let kernel = tenant.area.status().map_err(|error| error.to_string())?.kernel;
        if kernel.is_none() { Ok(String::new()) } else { Err(format!("{kernel:?}")) }
    });
    if form == Form::Debug {
        read_the_log();
        check(failures, "the kernel has KASAN and lockdep", checks_itself);
    }
    if !is_loaded(failures, module) {
        return;
    }
    check(failures, "an area is with the kernel, and free memory goes when asked", basics);
    check(failures, "the device takes memory once, with nothing behind its end", device::takes);
    check(failures, "what is pinned counts as locked memory", || as_child(&["limited"]));
    check(failures, "an area ends though a forked child has the device open", device::ends_below_a_child);
    check(failures, "what is free longest goes first", oldest_first);
    by_tables(failures, if long { 400 } else { 40 });
    memory::without_swap(failures, !quick);
    headroom::checks(failures, disks[1], !quick);
    check(failures, sparse::NAME, sparse::free_in_one_of_many);
    check(failures, "fork, a second mapping, mremap, munmap", || uses::mappings(if long { 100 } else { 8 }));
    check(failures, "exec and exit leave no area behind", ends);
    check(failures, "locked memory stays", || uses::locked_stays(true));
    check(failures, "an io_uring's own pages, and transfers past the cache", || {
        uses::direct(disks[1], if long { 100 } else { 8 })
    });
    check(failures, "userfaultfd hears of the next touch", uses::faults);
    check(failures, "huge pages that were split, and frames with holes", || uses::split(if long { 40 } else { 4 }));
    check(failures, "a process that scribbles harms itself alone", || {
        as_child(&["scribble", if long { "30" } else { "4" }])
    });
    check(failures, "rmmod is refused while there is an area, and goes then", || {
        reload(module, if long { 30 } else { 3 })
    });
    keeper::checks(failures, module);
    let rounds = match form {
        Form::Quick => 5_000,
        Form::Short | Form::Debug => 20_000,
        Form::Long => 1_000_000,
    };
    race(failures, rounds);
    if quick {
        leave(failures);
        return;
    }
    check(failures, "64 areas: each gives what it has", || many(64));
    check(failures, "kill -9 in the middle of it", || kills(if long { 60 } else { 8 }));
    check(failures, "no system call in alloc, touch and free", || as_child(&["calls"]));
    if form != Form::Debug {
        costs(failures, if long { 8192 } else { 768 });
    }
    check(failures, "a count of 64 GiB in one area", || measure::of_a_count(1, None));
    check(failures, "a count of 64 GiB in 64 areas", || measure::of_a_count(64, None));
    check(
        failures,
        "swap is on",
        || if swap(disks, true) { Ok(String::new()) } else { Err("swapon failed".to_owned()) },
    );
    memory::with_swap(failures);
    check(failures, "swap is off", || {
        if swap(disks, false) { Ok(String::new()) } else { Err("swapoff failed".to_owned()) }
    });
    check(failures, "phases at half their peak: killed without the module", || at_half("nobody", false));
    check(failures, "phases at half their peak: complete with it", || at_half("kernel", true));
    leave(failures);
}

fn is_loaded(failures: &mut u32, module: &str) -> bool {
    let before = *failures;
    check(
        failures,
        "the module loads",
        || if load(module) { Ok(String::new()) } else { Err("insmod failed".to_owned()) },
    );
    *failures == before
}

pub(crate) fn leave(failures: &mut u32) {
    check(failures, "the module unloads, and no warning is in the log", || {
        if attached() > 0 || !unload() {
            return Err(format!("{} areas left", attached()));
        }
        clean_log()
    });
}

fn costs(failures: &mut u32, most_mib: u64) {
    // Of gigabytes one round has steps enough, and each byte is written.
    let rounds = if most_mib > 1024 { 1 } else { 3 };
    check(failures, "a frame costs at most 1.2 of punching it, and 10 us more", || {
        measure::against_punching(rounds, most_mib)
    });
    check(failures, "the same in the way of allocations short of memory", || {
        measure::under_pressure(2 * rounds, most_mib)
    });
}

fn race(failures: &mut u32, steps: u64) {
    check(failures, "races of two threads and the shrinker lose no byte", || races::against_the_shrinker(steps));
}

/// So many steps of the races, and nothing else.
pub(crate) fn races(failures: &mut u32, module: &str, steps: u64) {
    if is_loaded(failures, module) {
        race(failures, steps);
        leave(failures);
    }
}

/// What a frame costs, in an area of so much at most.
pub(crate) fn cost(failures: &mut u32, module: &str, most_mib: u64) {
    if is_loaded(failures, module) {
        costs(failures, most_mib);
        leave(failures);
    }
}

/// What one of many areas has freed, and nothing else.
pub(crate) fn many_large(failures: &mut u32, module: &str) {
    if is_loaded(failures, module) {
        check(failures, sparse::NAME, sparse::free_in_one_of_many);
        leave(failures);
    }
}

/// What is done with tables by hand, and nothing else.
pub(crate) fn by_hand(failures: &mut u32, module: &str) {
    if is_loaded(failures, module) {
        by_tables(failures, 100);
        leave(failures);
    }
}

fn by_tables(failures: &mut u32, turns: u32) {
    check(failures, "memory is a second table's once the first takes no more", || tables::one_memory_in_turns(turns));
    check(failures, "what is free longest goes first in an area of 3 TiB", tables::oldest_of_a_large_one);
    check(failures, "an area is looked at though others take from it", tables::looked_at_though_busy);
}

/// Pressure on the whole machine, so often.
pub(crate) fn global(failures: &mut u32, module: &str, times: u32) {
    if is_loaded(failures, module) {
        for _ in 0..times {
            check(failures, "global pressure: nobody is killed", memory::global);
        }
        leave(failures);
    }
}

/// What one area has freed behind another, and what goes slowly, so often.
pub(crate) fn behind(failures: &mut u32, module: &str, times: u32) {
    if is_loaded(failures, module) {
        for _ in 0..times {
            check(failures, "free behind another area that is all in use", memory::behind_another);
            check(failures, "two want at once what goes slowly: nobody is killed", memory::slowly);
            check(failures, "the same while the process asks for it: nobody is killed", memory::asked_slowly);
        }
        leave(failures);
    }
}

/// The module beside a keeper, and nothing else.
pub(crate) fn beside(failures: &mut u32, module: &str) {
    if is_loaded(failures, module) {
        keeper::checks(failures, module);
        leave(failures);
    }
}

/// What stays of what is free, and when it goes, and nothing else.
pub(crate) fn headroom_alone(failures: &mut u32, module: &str, disk: &str) {
    if is_loaded(failures, module) {
        headroom::checks(failures, disk, true);
        leave(failures);
    }
}

/// What keeps headroom and what has it go, in a cgroup, so often.
pub(crate) fn headroom_often(failures: &mut u32, module: &str, disk: &str, times: u32) {
    if is_loaded(failures, module) {
        for _ in 0..times {
            headroom::checks(failures, disk, false);
        }
        leave(failures);
    }
}

/// Each kind of pressure without swap, and nothing else.
pub(crate) fn pressure(failures: &mut u32, module: &str) {
    if is_loaded(failures, module) {
        memory::without_swap(failures, false);
        leave(failures);
    }
}

/// What a count costs, in a machine whose clock counts instructions.
pub(crate) fn count(failures: &mut u32, module: &str) {
    if is_loaded(failures, module) {
        check(failures, "a count of 64 GiB in one area: 1000 instructions", || measure::of_a_count(1, Some(1000)));
        check(failures, "a count of 64 GiB in 64 areas: 10,000 instructions", || measure::of_a_count(64, Some(10_000)));
        check(failures, "a count of 64 GiB in 128 areas: 12,000 instructions", || {
            measure::of_a_count(128, Some(12_000))
        });
        leave(failures);
    }
}

fn checks_itself() -> Outcome {
    let symbols = std::fs::read_to_string("/proc/kallsyms").map_err(text)?;
    let kasan = symbols.lines().any(|line| line.ends_with(" kasan_report"));
    match (kasan, lockdep_is_on()) {
        (true, Some(true)) => Ok("and each check below reads its log".to_owned()),
        (kasan, lockdep) => Err(format!("KASAN: {kasan}, lockdep at work: {lockdep:?}")),
    }
}

/// In a process of its own, of which nothing is left afterwards.
fn as_child(words: &[&str]) -> Outcome {
    let child = crate::system::start(words, None)?.wait_with_output().map_err(text)?;
    let said = String::from_utf8_lossy(&child.stdout).trim().to_owned();
    if child.status.success() { Ok(said) } else { Err(said) }
}

/// The first disk is for swap.
fn swap(disks: [&str; 2], on: bool) -> bool {
    let program = if on { "swapon" } else { "swapoff" };
    std::process::Command::new(program).arg(disks[0]).status().is_ok_and(|status| status.success())
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn basics() -> Outcome {
    let mut tenant = Tenant::new(64, true)?;
    tenant.take_all()?;
    tenant.free_most(8)?;
    let pass = tenant.area.reclaim(u64::MAX).map_err(text)?;
    let resident = tenant.resident_mib();
    if (pass.frames, resident) != (28, 8) {
        return Err(format!("{} frames, {resident} MiB resident", pass.frames));
    }
    // Shrunk and grown by this process, which has it back for that.
    tenant.area.shrink_to(32 << 20).map_err(text)?;
    tenant.area.grow_to(64 << 20).map_err(text)?;
    tenant.verify()?;
    tenant.take_all()?;
    tenant.verify()?;
    let validation = tenant.area.validate().map_err(text)?;
    tenant.free_most(0)?;
    shrink_all();
    let kernel = tenant.kernel();
    let is_clean = validation.findings.is_empty();
    if kernel.evicted < 32 || !is_clean { Err(format!("{validation:?}; {}", areas())) } else { Ok(String::new()) }
}

/// With little to take, what was free for seconds is taken and what has just been freed is not.
fn oldest_first() -> Outcome {
    let mut tenant = Tenant::new(128, true)?;
    tenant.take_all()?;
    let young = tenant.blocks.split_off(32);
    tenant.free_most(0)?;
    pass_awake(Duration::from_millis(4500));
    let places: Vec<usize> = young.iter().map(|(block, _)| block.as_ptr().as_ptr().addr()).collect();
    tenant.blocks = young;
    tenant.free_most(0)?;
    tenant.area.reclaim(32 * HUGE).map_err(text)?;
    let evicted = tenant.kernel().evicted;
    let mut again = 0;
    // What was evicted is taken last: these are the young ones.
    for _ in 0..32 {
        let block = tenant.handle.alloc(Order::HUGE).map_err(text)?;
        again += u32::from(!block.is_zeroed() && places.contains(&block.as_ptr().as_ptr().addr()));
    }
    if (evicted, again) == (32, 32) {
        Ok(String::new())
    } else {
        Err(format!("{evicted} taken back, {again} young ones left"))
    }
}

fn ends() -> Outcome {
    let before = attached();
    for _ in 0..10 {
        let mut other = Other::start(16, "2", "kernel", None)?;
        if attached() != before + 1 {
            return Err(areas());
        }
        other.ask("verify")?;
        drop(other);
    }
    // The device is not inherited.
    let tenant = Tenant::new(16, true)?;
    let mut other = std::process::Command::new("sleep").arg("3").spawn().map_err(text)?;
    drop(tenant);
    let left = attached();
    drop(other.kill());
    drop(other.wait());
    if left == before { Ok(String::new()) } else { Err(areas()) }
}

/// Writes nonsense over the table of an area of its own, while all shrink; one of a neighbour is whole.
pub(crate) fn scribble(seconds: u64) -> Outcome {
    let mut neighbour = Tenant::new(64, true)?;
    neighbour.take_all()?;
    neighbour.free_most(2)?;
    let mut tenant = Tenant::new(64, true)?;
    tenant.take_all()?;
    // SAFETY: nobody uses what is in this area any more.
    let shared = unsafe { tenant.area.shared() }.ok_or("no file")?;
    let bytes = rustix::fs::fstat(shared.table).map_err(text)?.st_size as usize;
    let flags = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, over nothing.
    let table = unsafe { mmap(std::ptr::null_mut(), bytes, flags, MapFlags::SHARED, shared.table, 0) }.map_err(text)?;
    // SAFETY: aligned, as long as the file, reached by atomics alone.
    let table = unsafe { std::slice::from_raw_parts(table.cast::<AtomicU16>(), bytes / 2) };
    let memory = Second::of(&tenant)?;
    let end = Instant::now() + Duration::from_secs(seconds);
    let passes = std::thread::scope(|scope| {
        for seed in 0..2 {
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                while Instant::now() < end {
                    for _ in 0..1000 {
                        let value = match random.u8(..4) {
                            0 => random.u16(..),
                            1 => 0x4200,
                            _ => 0x0200,
                        };
                        table[random.usize(..table.len())].store(value, Relaxed);
                    }
                }
            });
        }
        // Touches what is being taken.
        let memory = (memory.0 as usize, memory.1);
        scope.spawn(move || {
            let mut random = fastrand::Rng::with_seed(9);
            while Instant::now() < end {
                let offset = random.usize(..memory.1) & !7;
                // SAFETY: in the mapping, which outlives the scope.
                unsafe { std::ptr::with_exposed_provenance_mut::<u64>(memory.0 + offset).write_volatile(1) };
            }
        });
        let mut passes = 0;
        while Instant::now() < end {
            shrink_all();
            neighbour.take_all()?;
            neighbour.free_most(2)?;
            neighbour.verify()?;
            passes += 1;
        }
        Ok::<u64, String>(passes)
    })?;
    let kernel = tenant.kernel();
    // Its table means nothing any more, and would be taken over.
    std::mem::forget(tenant);
    Ok(format!("{passes} passes; of the other {} frames taken back, {} overwritten", kernel.evicted, kernel.broken))
}

fn many(count: u64) -> Outcome {
    let mut tenants = Vec::new();
    for _ in 0..count {
        let mut tenant = Tenant::new(8, true)?;
        tenant.take_all()?;
        tenant.free_most(4)?;
        tenants.push(tenant);
    }
    for _ in 0..3 {
        shrink_all();
    }
    for tenant in &tenants {
        tenant.verify()?;
        let resident = tenant.resident_mib();
        if resident != 2 {
            return Err(format!("{resident} MiB of 2 resident; {}", areas()));
        }
    }
    Ok(String::new())
}

fn reload(module: &str, times: u32) -> Outcome {
    let left = attached();
    for _ in 0..times {
        let mut other = Other::start(16, "2", "kernel", None)?;
        if unload() {
            return Err("unloaded below an area".to_owned());
        }
        other.ask("reclaim 16")?;
        other.ask("verify")?;
        drop(other);
        if left == 0 && (!unload() || !load(module)) {
            return Err("not unloaded or not loaded again".to_owned());
        }
    }
    if left == 0 { Ok(format!("{times} times")) } else { Err(areas()) }
}

fn kills(times: u64) -> Outcome {
    let before = attached();
    let mut evicted = 0;
    for round in 0..times {
        let mut other = Other::start(64, "8", "kernel", None)?;
        let pressure = std::thread::spawn(|| {
            for _ in 0..4 {
                shrink_all();
            }
        });
        std::thread::sleep(Duration::from_millis(round % 8 * 3));
        other.kill();
        drop(other);
        pressure.join().map_err(|_| "a thread panicked")?;
        evicted += 1;
    }
    if attached() == before { Ok(format!("{evicted} times")) } else { Err(areas()) }
}

fn at_half(by: &str, completes: bool) -> Outcome {
    let done = measure::at_half_the_peak(by)?;
    if done == completes { Ok(String::new()) } else { Err(format!("it completes: {done}")) }
}
