//! Areas of which little has memory: whether a count finds what one of many has just freed, wherever it lies.

use crate::device::{ATTACH, STATUS, call, open};
use crate::row::Outcome;
use crate::system::{self, Group, MIB};
use crate::tenant::HUGE;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU16, Ordering::SeqCst};

pub(crate) const NAME: &str = "the same in the last chunk of one of 64 large areas";

/// As many as one call of the shrinker looks at.
const AREAS: usize = 64;
/// Huge frames of each, of 4 GiB: 16 chunks of a count.
const FRAMES: usize = 2048;
/// Of them, those that are freed, the last ones; the limit of the group, and what is wanted when it is reached, in MiB.
const FREED: usize = 8;
const LIMIT: u64 = 128;
const WANTED: usize = 12;

pub(crate) const USED: u16 = 0;
pub(crate) const FREE: u16 = 0x0200;
pub(crate) const EVICTED: u16 = 0x4200;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// One that the kernel has, by its calls: a file, and a table in memory of this process, in which all is in use.
pub(crate) struct Sparse {
    pub(crate) file: OwnedFd,
    pub(crate) entries: &'static [AtomicU16],
    pub(crate) device: OwnedFd,
}

impl Sparse {
    pub(crate) fn new(frames: usize) -> Result<Self, String> {
        Self::keeping(frames, 0)
    }

    /// The same with so many frames of headroom.
    pub(crate) fn keeping(frames: usize, headroom: u64) -> Result<Self, String> {
        let file = rustix::fs::memfd_create("sparse", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(text)?;
        rustix::fs::ftruncate(&file, frames as u64 * HUGE).map_err(text)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).map_err(text)?;
        let table = private(2 * frames + 4096)?;
        // SAFETY: fresh memory that stays, aligned, and reached by atomics alone.
        let entries = unsafe { std::slice::from_raw_parts(table.cast::<AtomicU16>(), frames) };
        // Something is in use: a count has a reason to look.
        rustix::io::pwrite(&file, &[1; 4096], 0).map_err(text)?;
        let device = open()?;
        let epoch = table as u64 + (2 * frames as u64).next_multiple_of(8);
        let mut words = [1 | (file.as_raw_fd() as u64) << 32, frames as u64, table as u64, 0, epoch, headroom, 0];
        call(&device, ATTACH, &mut words).map_err(text)?;
        Ok(Self { file, entries, device })
    }

    /// So many frames taken back, and kept.
    pub(crate) fn taken(&self) -> Result<(u64, u64), String> {
        let mut words = [0; 16];
        call(&self.device, STATUS, &mut words).map_err(text)?;
        Ok((words[2], words[4]))
    }

    /// Of those taken, so many of the headroom.
    pub(crate) fn yielded(&self) -> Result<u64, String> {
        let mut words = [0; 16];
        call(&self.device, STATUS, &mut words).map_err(text)?;
        Ok(words[11])
    }

    fn evicted(&self) -> Result<u64, String> {
        self.taken().map(|(evicted, _)| evicted)
    }

    /// So many of its frames from this one on, in use and full of a number.
    pub(crate) fn filled(&self, first: usize, frames: usize, value: u8) -> Result<*mut c_void, String> {
        let (first, bytes) = (first as u64 * HUGE, frames * HUGE as usize);
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, over nothing.
        let memory = unsafe { mmap(std::ptr::null_mut(), bytes, access, MapFlags::SHARED, &self.file, first) };
        let memory = memory.map_err(text)?;
        // SAFETY: the mapping is whole, and stays.
        unsafe { madvise(memory, bytes, Advice::LinuxHugepage) }.map_err(text)?;
        fill(memory, bytes, value);
        Ok(memory)
    }

    /// Of such frames, which were free since: each is as it was, or was taken and reads zeroes. They are in use again.
    pub(crate) fn are_whole(&self, first: usize, memory: *const c_void, value: u8) -> Result<(), String> {
        for (frame, entry) in self.entries[first..].iter().enumerate() {
            let should = match entry.swap(USED, SeqCst) {
                FREE => value,
                EVICTED => 0,
                other => return Err(format!("an entry is {other:#x}")),
            };
            // SAFETY: in the mapping, and nobody writes to it; volatile, for the kernel took the memory.
            let byte = unsafe { memory.cast::<u8>().add(frame * HUGE as usize).read_volatile() };
            if byte != should {
                return Err(format!("byte {byte} where there should be {should}"));
            }
        }
        Ok(())
    }

    /// Its last frames have memory, and are free when the limit is reached, at that moment. Returns how many went.
    fn frees_at_the_limit(&self, current: impl Fn() -> u64) -> Result<u64, String> {
        let (first, bytes) = ((FRAMES - FREED) as u64 * HUGE, FREED * HUGE as usize);
        let memory = self.filled(FRAMES - FREED, FREED, 7)?;
        let mut taken = Vec::new();
        let mut grow = |mib: usize| {
            let bytes = mib * MIB as usize;
            let more = private(bytes)?;
            fill(more, bytes, 1);
            taken.push((more, bytes));
            Ok::<_, String>(())
        };
        while current() + 2 <= LIMIT {
            grow(1)?;
        }
        let before = self.evicted()?;
        let last = &self.entries[FRAMES - FREED..];
        last.iter().for_each(|entry| entry.store(FREE, SeqCst));
        grow(WANTED)?;
        let evicted = self.evicted()? - before;
        // Reading what was taken brings it in again, and by now there is nothing free: not at the limit.
        if let Some((start, bytes)) = taken.pop() {
            // SAFETY: ours, and nobody has references into it.
            unsafe { munmap(start, bytes) }.map_err(text)?;
        }
        self.are_whole(FRAMES - FREED, memory, 7)?;
        for (start, bytes) in taken.into_iter().chain([(memory, bytes)]) {
            // SAFETY: ours, and nobody has references into it.
            unsafe { munmap(start, bytes) }.map_err(text)?;
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.file, flags, first, bytes as u64).map_err(text)?;
        Ok(evicted)
    }
}

/// Memory of this process, a page at a time.
pub(crate) fn private(bytes: usize) -> Result<*mut c_void, String> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, over nothing.
    let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, access, MapFlags::PRIVATE) }.map_err(text)?;
    // SAFETY: the mapping is whole, and stays.
    unsafe { madvise(start, bytes, Advice::LinuxNoHugepage) }.map_err(text)?;
    Ok(start)
}

pub(crate) fn fill(start: *mut c_void, bytes: usize, value: u8) {
    for at in (0..bytes).step_by(4096) {
        // SAFETY: in the mapping, to which nobody has references.
        unsafe { start.cast::<u8>().add(at).write_volatile(value) };
    }
}

/// `sparse GROUP`: frees and wants at once, in one area after another, the last first. It is killed if that is not found.
pub(crate) fn child(group: &str) -> ExitCode {
    // As a program is: what starts it is spared.
    if std::fs::write("/proc/self/oom_score_adj", "0").is_err() {
        return ExitCode::from(2);
    }
    let current = || system::number_of(Path::new(group), "memory.current").map_or(u64::MAX / 2, |bytes| bytes / MIB);
    let work = || {
        let areas = (0..AREAS).map(|_| Sparse::new(FRAMES)).collect::<Result<Vec<_>, _>>()?;
        let mut frames = 0;
        for index in [AREAS - 1, 0, AREAS / 2, 1, AREAS - 2, AREAS / 3] {
            println!("area {index}");
            drop(std::io::stdout().flush());
            let evicted = areas[index].frees_at_the_limit(current)?;
            if evicted == 0 {
                return Err(format!("there was room without area {index}"));
            }
            frames += evicted;
        }
        Ok::<_, String>(frames)
    };
    let outcome = work();
    match &outcome {
        Ok(frames) => println!("{frames} frames taken back"),
        Err(why) => println!("{why}"),
    }
    if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

pub(crate) fn free_in_one_of_many() -> Outcome {
    let group = Group::new("sparse", &[("memory.max", LIMIT), ("memory.swap.max", 0)])?;
    let last = system::last_line(&["sparse", &group.path()], &group)?;
    Ok(format!("{AREAS} areas of 4 GiB: {last}, at the limit {} times", group.number("memory.events", "max")))
}
