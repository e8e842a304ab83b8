//! The list of checks, and those of a process's life and of what else the kernel does with memory.

use crate::child::Other;
use crate::row::{Outcome, check};
use crate::system::{areas, attached, load, shrink_all, unload};
use crate::tenant::{HUGE, Tenant, words, words_mut};
use crate::{device, measure, memory, races};
use llfree_area::Order;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::ffi::c_void;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// How much of it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Form {
    /// A minute and a half: what a change of the module would break first.
    Quick,
    /// All checks, minutes.
    Short,
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
    let before = *failures;
    check(
        failures,
        "the module loads",
        || if load(module) { Ok(String::new()) } else { Err("insmod failed".to_owned()) },
    );
    if *failures > before {
        return;
    }
    check(failures, "an area is with the kernel, and free memory goes when asked", basics);
    check(failures, "the device takes memory once, with nothing behind its end", device::takes);
    check(failures, "an area ends though a forked child has the device open", device::ends_below_a_child);
    check(failures, "what is free longest goes first", oldest_first);
    memory::without_swap(failures, !quick);
    check(failures, "fork, a second mapping, mremap, munmap", || mappings(if long { 100 } else { 8 }));
    check(failures, "exec and exit leave no area behind", ends);
    check(failures, "locked memory stays", || locked_stays(true));
    check(failures, "pages in an io_uring, and reads and writes past the cache", || {
        direct(disks[1], if long { 100 } else { 8 })
    });
    check(failures, "userfaultfd hears of the next touch", faults);
    check(failures, "huge pages that were split, and frames with holes", || split(if long { 40 } else { 4 }));
    check(failures, "a process that scribbles harms itself alone", || {
        as_child(&["scribble", if long { "30" } else { "4" }])
    });
    check(failures, "rmmod is refused while there is an area, and goes then", || {
        reload(module, if long { 30 } else { 3 })
    });
    let rounds = match form {
        Form::Quick => 5_000,
        Form::Short => 20_000,
        Form::Long => 1_000_000,
    };
    check(failures, "races of two threads and the shrinker lose no byte", || races::against_the_shrinker(rounds));
    if quick {
        check(failures, "the module unloads, and no warning is in the log", leaves);
        return;
    }
    check(failures, "64 areas: each gives what it has", || many(64));
    check(failures, "kill -9 in the middle of it", || kills(if long { 60 } else { 8 }));
    check(failures, "no system call in alloc, touch and free", || as_child(&["calls"]));
    check(failures, "a frame costs no more than 1.2 of punching it, or 10 us", || {
        measure::against_punching(3, if long { 8192 } else { 256 })
    });
    if long {
        check(failures, "the same under pressure", measure::under_pressure);
    }
    check(failures, "a count of 64 GiB in one area", || measure::of_a_count(1));
    check(failures, "a count of 64 GiB in 64 areas", || measure::of_a_count(64));
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
    check(failures, "the module unloads, and no warning is in the log", leaves);
}

fn leaves() -> Outcome {
    if attached() > 0 || !unload() {
        return Err(format!("{} areas left", attached()));
    }
    clean_log()
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

/// What the module itself taints the kernel with: it is none of the kernel's own, and nobody signed it.
const OUT_OF_TREE: u64 = 1 << 12 | 1 << 13;

/// No complaint of the kernel.
fn clean_log() -> Outcome {
    let log = std::process::Command::new("dmesg").output().map_err(text)?;
    let log = String::from_utf8_lossy(&log.stdout).into_owned();
    let bad = [
        "BUG:",
        "WARNING:",
        "KASAN",
        "INFO: task",
        "general protection",
        "Oops",
        "possible circular",
        "possible recursive",
        "possible irq",
        "inconsistent lock",
        "rcu: INFO",
        "detected stalls",
        "bad page",
        "Bad page",
    ];
    let found: Vec<_> = log.lines().filter(|line| bad.iter().any(|word| line.contains(word))).collect();
    let tainted = std::fs::read_to_string("/proc/sys/kernel/tainted").map_err(text)?;
    let tainted = tainted.trim().parse::<u64>().map_err(text)? & !OUT_OF_TREE;
    if found.is_empty() && tainted == 0 {
        Ok(String::new())
    } else {
        Err(format!("tainted: {tainted:#x}; {}", found.join("\n    ")))
    }
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
    std::thread::sleep(Duration::from_millis(4500));
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

/// A mapping of the memory beside the area's own.
struct Second(*mut c_void, usize);

impl Second {
    fn of(tenant: &Tenant) -> Result<Self, String> {
        // SAFETY: nobody but this check is at work.
        let shared = unsafe { tenant.area.shared() }.ok_or("no file")?;
        let bytes = tenant.area.bytes() as usize;
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, over nothing.
        let start = unsafe { mmap(std::ptr::null_mut(), bytes, flags, MapFlags::SHARED, shared.memory, 0) };
        Ok(Self(start.map_err(text)?, bytes))
    }

    fn word(&self, offset: usize) -> u64 {
        // SAFETY: in the mapping, aligned; another process or thread may write, hence volatile.
        unsafe { self.0.cast::<u8>().add(offset).cast::<u64>().read_volatile() }
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        // SAFETY: ours, and nobody has references into it.
        let _ = unsafe { munmap(self.0, self.1) };
    }
}

fn mappings(rounds: u32) -> Outcome {
    let mut tenant = Tenant::new(64, true)?;
    tenant.take_all()?;
    let mut second = Second::of(&tenant)?;
    let base = tenant.blocks.iter().map(|(block, _)| block.as_ptr().as_ptr().addr()).min().unwrap_or(0);
    let sees = |second: &Second| (0..32).map(|frame| u64::from(second.word(frame << 21) != 0)).sum::<u64>();
    if sees(&second) != 32 {
        return Err("the second mapping sees nothing".to_owned());
    }
    // SAFETY: the mapping goes elsewhere as a whole, and only its owner knows where it is.
    let moved = unsafe { rustix::mm::mremap(second.0, second.1, second.1, rustix::mm::MremapFlags::MAYMOVE) };
    second.0 = moved.map_err(text)?;
    tenant.free_most(4)?;
    // A child that has a copy of all that is private, and lives meanwhile.
    let mut other = std::process::Command::new("sleep").arg("1").spawn().map_err(text)?;
    tenant.area.reclaim(u64::MAX).map_err(text)?;
    let left = sees(&second);
    tenant.verify()?;
    for (block, tag) in &tenant.blocks {
        let offset = block.as_ptr().as_ptr().addr() - base;
        if second.word(offset) != *tag {
            return Err("the second mapping sees something else".to_owned());
        }
    }
    // Mapped and unmapped while frames go.
    for _ in 0..rounds {
        tenant.take_all()?;
        let third = Second::of(&tenant)?;
        third.word(0);
        tenant.free_most(4)?;
        tenant.area.reclaim(u64::MAX).map_err(text)?;
    }
    tenant.verify()?;
    drop(other.wait());
    if left == 8 { Ok(String::new()) } else { Err(format!("{left} of 8 frames are seen")) }
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

fn locked_stays(lock: bool) -> Outcome {
    let mut tenant = Tenant::new(64, true)?;
    tenant.take_all()?;
    let first = tenant.blocks[0].0.as_ptr().as_ptr();
    if lock {
        // SAFETY: memory of ours.
        let done = unsafe { libc::mlock(first.cast(), HUGE as usize) };
        if done != 0 {
            return Err(std::io::Error::last_os_error().to_string());
        }
    }
    tenant.free_most(0)?;
    tenant.area.reclaim(u64::MAX).map_err(text)?;
    let (kernel, resident) = (tenant.kernel(), tenant.resident_mib());
    if kernel.kept >= 1 && resident == 2 {
        Ok(String::new())
    } else {
        Err(format!("{resident} MiB resident; {kernel:?}"))
    }
}

/// A frame whose pages an io_uring has for good, and transfers between frames and a device.
fn direct(device: &str, rounds: u64) -> Outcome {
    let mut tenant = Tenant::new(64, true)?;
    tenant.take_all()?;
    let pinned = tenant.blocks[0].0.as_ptr().as_ptr();
    let mut parameters = [0u8; 120];
    // SAFETY: the kernel fills 120 bytes.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) };
    let buffer = libc::iovec { iov_base: pinned.cast(), iov_len: HUGE as usize };
    // SAFETY: IORING_REGISTER_BUFFERS, one buffer of ours.
    let registered = unsafe { libc::syscall(libc::SYS_io_uring_register, ring, 0, &raw const buffer, 1) };
    if ring < 0 || registered != 0 {
        return Err(format!("io_uring: {}", std::io::Error::last_os_error()));
    }
    tenant.free_most(0)?;
    tenant.area.reclaim(u64::MAX).map_err(text)?;
    let (kernel, resident) = (tenant.kernel(), tenant.resident_mib());
    if resident != 2 || kernel.kept == 0 {
        return Err(format!("{resident} MiB resident; {kernel:?}"));
    }
    // SAFETY: ours, and used no more.
    unsafe { libc::close(ring as i32) };
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::DIRECT;
    let disk = rustix::fs::open(device, flags, rustix::fs::Mode::empty()).map_err(text)?;
    for round in 0..rounds {
        tenant.take_all()?;
        for (index, (block, tag)) in tenant.blocks.iter().enumerate().step_by(8) {
            words_mut(block)[..8192].fill(*tag ^ round);
            let bytes = |block: &llfree_area::Block| {
                // SAFETY: the first 64 KiB of a block of ours.
                unsafe { std::slice::from_raw_parts_mut(block.as_ptr().as_ptr(), 64 << 10) }
            };
            let at = (index as u64) << 16;
            rustix::io::pwrite(&disk, bytes(block), at).map_err(text)?;
            words_mut(block)[..8192].fill(0);
            std::thread::scope(|scope| {
                let area = &tenant.area;
                scope.spawn(move || drop(area.reclaim(u64::MAX)));
                rustix::io::pread(&disk, bytes(block), at).map_err(text)
            })?;
            if words(block)[..8192].iter().any(|word| *word != *tag ^ round) {
                return Err("what was read is not what was written".to_owned());
            }
            words_mut(block)[..8192].fill(*tag);
        }
        tenant.verify()?;
        tenant.free_most(2)?;
    }
    Ok(format!("{} frames taken back", tenant.kernel().evicted))
}

/// A second mapping under a userfaultfd: what was taken back is missing there, and comes as whoever listens says.
fn faults() -> Outcome {
    let mut tenant = Tenant::new(16, true)?;
    tenant.take_all()?;
    let second = Second::of(&tenant)?;
    second.word(0);
    // SAFETY: a number.
    let uffd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) } as i32;
    let call = |number: u64, words: &mut [u64]| {
        // SAFETY: each of the structures has at most the size of the array.
        match unsafe { libc::ioctl(uffd, number, words.as_mut_ptr()) } {
            0 => Ok(()),
            _ => Err(format!("userfaultfd: {}", std::io::Error::last_os_error())),
        }
    };
    call(0xc018_aa3f, &mut [0xaa, 0, 0])?;
    call(0xc020_aa00, &mut [second.0 as u64, second.1 as u64, 1, 0])?;
    tenant.free_most(0)?;
    tenant.area.reclaim(u64::MAX).map_err(text)?;
    std::thread::scope(|scope| {
        let (second, call) = (&second, &call);
        let address = second.0 as usize;
        let word = scope.spawn(move || {
            // SAFETY: in the mapping, which outlives the scope.
            unsafe { std::ptr::with_exposed_provenance::<u64>(address + 8192).read_volatile() }
        });
        let mut message = [0u64; 4];
        // SAFETY: 32 bytes, a message's size.
        let got = unsafe { libc::read(uffd, message.as_mut_ptr().cast(), 32) };
        let of = (message[0] & 0xff, message[2]);
        let page = vec![7u64; 512 * 2];
        let source = page.as_ptr().addr().next_multiple_of(4096) as u64;
        // UFFDIO_COPY.
        call(0xc028_aa03, &mut [address as u64 + 8192, source, 4096, 0, 0])?;
        let word = word.join().map_err(|_| "a thread panicked")?;
        // SAFETY: ours.
        unsafe { libc::close(uffd) };
        let _ = second;
        if got == 32 && of == (0x12, address as u64 + 8192) && word == 7 {
            Ok(String::new())
        } else {
            Err(format!("{got} bytes, event {of:x?}, then {word:#x}"))
        }
    })
}

fn split(rounds: u64) -> Outcome {
    let mut tenant = Tenant::new(64, true)?;
    for round in 0..rounds {
        tenant.take_all()?;
        // SAFETY: the holes lie in frames that are freed next.
        let shared = unsafe { tenant.area.shared() }.ok_or("no file")?;
        let base = tenant.blocks.iter().map(|(block, _)| block.as_ptr().as_ptr().addr()).min().unwrap_or(0);
        for (index, (block, _)) in tenant.blocks.iter().enumerate() {
            if index % 4 > 0 {
                let offset = (block.as_ptr().as_ptr().addr() - base) as u64 + (round % 500 + 1) * 4096;
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(shared.memory, flags, offset, 4096).map_err(text)?;
            }
        }
        // All that is there as huge pages, as far as the kernel offers it.
        drop(std::fs::write(
            "/sys/kernel/debug/split_huge_pages",
            format!("{},{:#x},{:#x}", std::process::id(), base, base + (64 << 20)),
        ));
        tenant.free_most(4)?;
        tenant.area.reclaim(u64::MAX).map_err(text)?;
        tenant.verify()?;
        let resident = tenant.resident_mib();
        if resident > 16 {
            return Err(format!("{resident} MiB of 16 resident; {}", areas()));
        }
    }
    Ok(String::new())
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
