//! Tables by hand, without an area's allocator: what a look finds and what it must be given, and whose the memory is.

use crate::device::{ATTACH, DETACH, RECLAIM, call, open};
use crate::ring::Ring;
use crate::row::Outcome;
use crate::sparse::{EVICTED, FREE, Sparse, USED, private};
use crate::system::{pass_awake, shrink_all};
use crate::tenant::HUGE;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::mpsc;
use std::time::{Duration, Instant};

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// What is free longest goes first, wherever it lies: here nearly 3 TiB behind where a scan begins.
pub(crate) fn oldest_of_a_large_one() -> Outcome {
    const FRAMES: usize = 3 << 19;
    const FREED: usize = 8;
    let area = Sparse::new(FRAMES)?;
    let free = |first: usize| {
        (first..first + FREED).try_for_each(|frame| {
            rustix::io::pwrite(&area.file, &[1; 4096], frame as u64 * HUGE).map_err(text)?;
            area.entries[frame].store(FREE, SeqCst);
            Ok::<_, String>(())
        })
    };
    let gone = |first: usize| (first..first + FREED).filter(|at| area.entries[*at].load(SeqCst) == EVICTED).count();
    let mut seen = Vec::new();
    // When it is looked at is up to the kernel, and how busy that is.
    for seconds in [5, 10, 20] {
        area.entries.iter().for_each(|entry| entry.store(USED, SeqCst));
        free(FRAMES - FREED)?;
        pass_awake(Duration::from_secs(seconds));
        free(0)?;
        call(&area.device, RECLAIM, &mut [FREED as u64]).map_err(text)?;
        seen.push((gone(FRAMES - FREED), gone(0)));
        if seen.last() == Some(&(FREED, 0)) {
            return Ok(format!("after {seconds} s"));
        }
    }
    Err(format!("old and young ones that went, after 5, 10 and 20 s: {seen:?}"))
}

/// A frame that was kept is tried again after the next look, and that comes though others take from the area all the time.
pub(crate) fn looked_at_though_busy() -> Outcome {
    const FRAMES: usize = 1 << 18;
    let area = Sparse::new(FRAMES)?;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, over nothing.
    let memory = unsafe { mmap(std::ptr::null_mut(), 4096, access, MapFlags::SHARED, &area.file, 0) }.map_err(text)?;
    let ring = Ring::new()?;
    ring.register(memory.cast(), 4096)?;
    area.entries[0].store(FREE, SeqCst);
    let reclaim = || call(&area.device, RECLAIM, &mut [u64::MAX]).map_err(text);
    reclaim()?;
    let is = (area.entries[0].load(SeqCst), area.taken()?);
    if is != (FREE, (0, 1)) {
        return Err(format!("entry, taken and kept of what a ring has: {is:x?}"));
    }
    let (over, start) = (AtomicBool::new(false), Instant::now());
    std::thread::scope(|scope| {
        let busy = || {
            while !over.load(Relaxed) {
                if reclaim().is_err() {
                    break;
                }
            }
        };
        let threads = [scope.spawn(busy), scope.spawn(busy)];
        std::thread::sleep(Duration::from_millis(500));
        drop(ring);
        while area.entries[0].load(SeqCst) == FREE && start.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(20));
        }
        over.store(true, Relaxed);
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a thread panicked".to_owned()))
    })?;
    // SAFETY: ours, and nobody has references into it.
    unsafe { munmap(memory, 4096) }.map_err(text)?;
    match area.entries[0].load(SeqCst) {
        EVICTED => Ok(format!("after {:.1} s", start.elapsed().as_secs_f64() - 0.5)),
        other => Err(format!("the entry is {other:#x} after a minute")),
    }
}

/// Huge frames of the memory that two tables have in turns: as many as the module holds at once.
const FRAMES: usize = 16;

/// One of two tables of the same memory.
struct Table(&'static [AtomicU16]);

impl Table {
    fn new() -> Result<Self, String> {
        let table = private(4096)?;
        // SAFETY: fresh memory that stays, aligned, and reached by atomics alone.
        Ok(Self(unsafe { std::slice::from_raw_parts(table.cast::<AtomicU16>(), FRAMES) }))
    }

    fn attach(&self, file: &OwnedFd) -> Result<OwnedFd, Errno> {
        let device = open().map_err(|_| Errno::NODEV)?;
        let table = self.0.as_ptr() as u64;
        let mut words = [1 | (file.as_raw_fd() as u64) << 32, FRAMES as u64, table, 0, table + 2048, 0, 0];
        call(&device, ATTACH, &mut words)?;
        Ok(device)
    }

    fn fill(&self, value: u16) {
        self.0.iter().for_each(|entry| entry.store(value, SeqCst));
    }

    fn words(&self) -> Vec<u16> {
        self.0.iter().map(|entry| entry.load(SeqCst)).collect()
    }
}

/// Whoever has memory by a second table has it alone: the first one, which ends in the middle of a reclaim, has nothing in
/// hand then, and nothing of it changes any more.
pub(crate) fn one_memory_in_turns(rounds: u32) -> Outcome {
    let file = rustix::fs::memfd_create("turns", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(text)?;
    rustix::fs::ftruncate(&file, FRAMES as u64 * HUGE).map_err(text)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).map_err(text)?;
    let (first, second, over) = (Table::new()?, Table::new()?, AtomicBool::new(false));
    let (ends, ended) = mpsc::channel::<()>();
    let (tell, told) = mpsc::channel::<Result<u64, String>>();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Relaxed) {
                shrink_all();
            }
        });
        let (first, second, file) = (&first, &second, &file);
        scope.spawn(move || {
            for () in ended {
                if tell.send(takes_over(first, second, file)).is_err() {
                    break;
                }
            }
        });
        let outcome = (0..rounds).try_fold((0, 0), |(amid, refused), round| {
            // Pages of 4 KiB: what goes takes its time.
            fallocate(file, FallocateFlags::empty(), 0, FRAMES as u64 * HUGE).map_err(text)?;
            first.fill(FREE);
            let device = first.attach(file).map_err(text)?;
            let start = Instant::now();
            while first.words() == [FREE; FRAMES] && start.elapsed() < Duration::from_secs(1) {
                std::hint::spin_loop();
            }
            let is_amid = first.words().iter().any(|word| word >> 15 != 0);
            ends.send(()).map_err(text)?;
            if round % 2 == 0 {
                call(&device, DETACH, &mut [0]).map_err(text)?;
            }
            drop(device);
            Ok::<_, String>((amid + u32::from(is_amid), refused + told.recv().map_err(text)??))
        });
        over.store(true, Relaxed);
        drop(ends);
        match outcome? {
            (0, _) => Err(format!("{rounds} times, and none of them in the middle of a reclaim")),
            (amid, refused) => {
                Ok(format!("{rounds} times, {amid} of them in the middle of a reclaim; {refused} times refused"))
            }
        }
    })
}

/// Attaches the second table as soon as may be, and has a look at the first one. Returns how often that was refused.
fn takes_over(first: &Table, second: &Table, file: &OwnedFd) -> Result<u64, String> {
    let mut refused = 0;
    second.fill(USED);
    let device = loop {
        match second.attach(file) {
            Ok(device) => break device,
            Err(Errno::BUSY) => refused += 1,
            Err(error) => return Err(error.to_string()),
        }
        std::thread::yield_now();
    };
    let before = first.words();
    std::thread::sleep(Duration::from_millis(2));
    let after = first.words();
    drop(device);
    let is_still = before == after && before.iter().all(|word| word >> 15 == 0);
    if is_still {
        Ok(refused)
    } else {
        Err(format!("the first table with the second attached: {before:x?}, {after:x?}"))
    }
}
