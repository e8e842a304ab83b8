//! The device by its calls, with memory that is no area's: what it takes, and when it lets go.

use crate::row::Outcome;
use crate::system::{areas, attached};
use crate::tenant::Tenant;
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::os::fd::{AsRawFd, OwnedFd};

pub(crate) const ATTACH: u64 = 0x4038_4c80;
pub(crate) const STATUS: u64 = 0x8080_4c81;
pub(crate) const RECLAIM: u64 = 0xc008_4c82;
pub(crate) const DETACH: u64 = 0x4c83;

const FRAMES: u64 = 4;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A memory file and a page for its table, in which all is in use.
struct Memory {
    file: OwnedFd,
    table: *mut c_void,
}

impl Memory {
    fn new(seals: SealFlags, behind: u64) -> Result<Self, String> {
        let bytes = FRAMES << 21;
        let file = rustix::fs::memfd_create("memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(text)?;
        rustix::fs::ftruncate(&file, bytes).map_err(text)?;
        if behind > 0 {
            rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, bytes, behind).map_err(text)?;
        }
        rustix::fs::fcntl_add_seals(&file, seals).map_err(text)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, over nothing.
        let table = unsafe { mmap_anonymous(std::ptr::null_mut(), 4096, access, MapFlags::PRIVATE) }.map_err(text)?;
        Ok(Self { file, table })
    }

    fn attach(&self, device: &OwnedFd) -> Result<(), Errno> {
        let table = self.table as u64;
        let mut words = [1 | (self.file.as_raw_fd() as u64) << 32, FRAMES, table, 0, table + 2048, 0, 0];
        call(device, ATTACH, &mut words)
    }

    fn blocks(&self) -> Result<i64, String> {
        Ok(rustix::fs::fstat(&self.file).map_err(text)?.st_blocks)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: ours, and no device has it any more, or has its own reference.
        let _ = unsafe { munmap(self.table, 4096) };
    }
}

pub(crate) fn open() -> Result<OwnedFd, String> {
    rustix::fs::open("/dev/llfree", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(text)
}

pub(crate) fn call(device: &OwnedFd, number: u64, words: &mut [u64]) -> Result<(), Errno> {
    // SAFETY: the words are as many as the call has, or more.
    match unsafe { libc::ioctl(device.as_raw_fd(), number, words.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

fn expect<T: PartialEq + std::fmt::Debug>(what: &str, is: &T, should: &T) -> Result<(), String> {
    if is == should { Ok(()) } else { Err(format!("{what}: {is:?}, not {should:?}")) }
}

/// Memory has one area at a time, a file one for good, and nothing lies behind the end.
pub(crate) fn takes() -> Outcome {
    let sized = SealFlags::SHRINK | SealFlags::GROW;
    let (device, second) = (open()?, open()?);
    let loose = Memory::new(SealFlags::SHRINK, 0)?;
    expect("with a size that changes", &loose.attach(&device), &Err(Errno::PERM))?;
    let read_only = Memory::new(sized | SealFlags::FUTURE_WRITE, 0)?;
    expect("to be read only", &read_only.attach(&device), &Err(Errno::PERM))?;
    let memory = Memory::new(sized | SealFlags::SEAL, 4 << 21)?;
    let before = memory.blocks()?;
    expect("attached", &memory.attach(&device), &Ok(()))?;
    let blocks = (before > 0, memory.blocks()?);
    expect("blocks behind the end, before and after", &blocks, &(true, 0))?;
    expect("a second area of it", &memory.attach(&second), &Err(Errno::BUSY))?;
    expect("a second area in the file", &memory.attach(&device), &Err(Errno::BUSY))?;
    let mut words = [u64::MAX; 16];
    expect("status", &call(&device, STATUS, &mut words), &Ok(()))?;
    expect("frames", &words[0], &FRAMES)?;
    for _ in 0..2 {
        expect("detached", &call(&device, DETACH, &mut words), &Ok(()))?;
    }
    for number in [STATUS, RECLAIM] {
        expect("what is gone", &call(&device, number, &mut words), &Err(Errno::INVAL))?;
    }
    expect("the file's second", &memory.attach(&device), &Err(Errno::BUSY))?;
    expect("the memory's next", &memory.attach(&second), &Ok(()))?;
    Ok(String::new())
}

/// `limited`: what a process without privileges may pin, in pages: those of the table and that of the return epoch, each by
/// itself.
pub(crate) fn limited() -> Outcome {
    let sized = SealFlags::SHRINK | SealFlags::GROW;
    let (first, second) = (open()?, open()?);
    let (memory, other) = (Memory::new(sized, 0)?, Memory::new(sized, 0)?);
    let lockable = |pages: u64| {
        let limit = libc::rlimit { rlim_cur: pages * 4096, rlim_max: 64 << 10 };
        // SAFETY: numbers, read by the kernel.
        let done = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) };
        expect("setrlimit", &done, &0)
    };
    lockable(1)?;
    // SAFETY: a number. A process that is not root lacks CAP_IPC_LOCK.
    expect("setuid", &unsafe { libc::setuid(65534) }, &0)?;
    expect("more than may be locked", &memory.attach(&first), &Err(Errno::NOMEM))?;
    lockable(2)?;
    expect("as much", &memory.attach(&first), &Ok(()))?;
    expect("a second area beside it", &other.attach(&second), &Err(Errno::NOMEM))?;
    expect("the first is gone", &call(&first, DETACH, &mut [0]), &Ok(()))?;
    expect("the second instead", &other.attach(&second), &Ok(()))?;
    Ok(String::new())
}

/// A forked child has the device open for as long as it lives, and keeps no area alive by that.
pub(crate) fn ends_below_a_child() -> Outcome {
    let before = attached();
    let mut tenant = Tenant::new(64, true)?;
    tenant.take_all()?;
    tenant.free_most(4)?;
    // SAFETY: the child calls nothing but what a signal handler may.
    let child = unsafe { libc::fork() };
    if child == 0 {
        loop {
            // SAFETY: no memory.
            unsafe { libc::pause() };
        }
    }
    if child < 0 {
        return Err(std::io::Error::last_os_error().to_string());
    }
    let outcome = (|| {
        // By this process, which has it back from the kernel for that, and gives it away again.
        tenant.area.shrink_to(32 << 20).map_err(text)?;
        expect("areas after a shrink", &attached(), &(before + 1))?;
        tenant.verify()?;
        tenant.area.grow_to(64 << 20).map_err(text)?;
        tenant.take_all()?;
        tenant.verify()?;
        drop(tenant);
        if attached() == before { Ok(String::new()) } else { Err(areas()) }
    })();
    // SAFETY: a child of ours, which nobody has waited for.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, std::ptr::null_mut(), 0);
    }
    outcome
}
