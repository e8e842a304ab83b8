//! What else the kernel does with an area's memory: mappings, locks, transfers, faults, splits.

use crate::ring::{self, Ring};
use crate::row::Outcome;
use crate::system::areas;
use crate::tenant::{HUGE, Tenant, words, words_mut};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::ffi::c_void;
use std::os::fd::{AsFd, OwnedFd};

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A mapping of the memory beside the area's own.
pub(crate) struct Second(pub(crate) *mut c_void, pub(crate) usize);

impl Second {
    pub(crate) fn of(tenant: &Tenant) -> Result<Self, String> {
        // SAFETY: nobody but this check is at work.
        let shared = unsafe { tenant.area.shared() }.ok_or("no file")?;
        let bytes = tenant.area.bytes() as usize;
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, over nothing.
        let start = unsafe { mmap(std::ptr::null_mut(), bytes, flags, MapFlags::SHARED, shared.memory, 0) };
        Ok(Self(start.map_err(text)?, bytes))
    }

    /// One with all that is there mapped.
    pub(crate) fn full(tenant: &Tenant) -> Result<Self, String> {
        let second = Self::of(tenant)?;
        // SAFETY: our mapping, which is only read.
        let done = unsafe { libc::madvise(second.0, second.1, libc::MADV_POPULATE_READ) };
        if done == 0 { Ok(second) } else { Err(std::io::Error::last_os_error().to_string()) }
    }

    pub(crate) fn word(&self, offset: usize) -> u64 {
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

pub(crate) fn mappings(rounds: u32) -> Outcome {
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

pub(crate) fn locked_stays(lock: bool) -> Outcome {
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

/// A frame whose pages an io_uring has for good, and transfers between frames and a device, by calls and by the ring.
pub(crate) fn direct(device: &str, rounds: u64) -> Outcome {
    let mut tenant = Tenant::new(64, true)?;
    tenant.take_all()?;
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::DIRECT;
    let disk = rustix::fs::open(device, flags, rustix::fs::Mode::empty()).map_err(text)?;
    let ring = Ring::new()?;
    registered_stays(&mut tenant, &ring, &disk)?;
    let by_ring = Ring::new()?;
    drop(ring);
    for round in 0..rounds {
        tenant.take_all()?;
        for (index, (block, tag)) in tenant.blocks.iter().enumerate().step_by(8) {
            words_mut(block)[..8192].fill(*tag ^ round);
            let at = (index as u64) << 16;
            let transfer = |reads: bool| {
                let bytes = start_of(block);
                match (round % 2, reads) {
                    (0, false) => rustix::io::pwrite(&disk, bytes, at).map(drop).map_err(text),
                    (0, true) => rustix::io::pread(&disk, bytes, at).map(drop).map_err(text),
                    (_, false) => by_ring.transfer(ring::WRITE, disk.as_fd(), bytes, at),
                    (_, true) => by_ring.transfer(ring::READ, disk.as_fd(), bytes, at),
                }
            };
            transfer(false)?;
            words_mut(block)[..8192].fill(0);
            std::thread::scope(|scope| {
                let area = &tenant.area;
                scope.spawn(move || drop(area.reclaim(u64::MAX)));
                transfer(true)
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

/// The first 64 KiB of a block.
#[expect(clippy::mut_from_ref, reason = "the block's owner calls this, and has no other reference at that moment")]
fn start_of(block: &llfree_area::Block) -> &mut [u8] {
    // SAFETY: the block is ours, and larger.
    unsafe { std::slice::from_raw_parts_mut(block.as_ptr().as_ptr(), 64 << 10) }
}

/// The one frame of which the ring has the pages keeps them when all is free; who takes it next sees what the ring reads there.
fn registered_stays(tenant: &mut Tenant, ring: &Ring, disk: &OwnedFd) -> Result<(), String> {
    let (block, _) = &tenant.blocks[0];
    let pinned = block.as_ptr().as_ptr();
    ring.register(pinned, HUGE as usize)?;
    words_mut(block)[..8192].fill(0x5eed);
    rustix::io::pwrite(disk, start_of(block), 0).map_err(text)?;
    tenant.free_most(0)?;
    tenant.area.reclaim(u64::MAX).map_err(text)?;
    let (kernel, resident) = (tenant.kernel(), tenant.resident_mib());
    if resident != 2 || kernel.kept == 0 {
        return Err(format!("{resident} MiB resident; {kernel:?}"));
    }
    tenant.take_all()?;
    let again = tenant.blocks.iter().find(|(block, _)| block.as_ptr().as_ptr() == pinned);
    let (block, tag) = again.ok_or("nobody has the frame again")?;
    ring.transfer(ring::READ_FIXED, disk.as_fd(), start_of(block), 0)?;
    if words(block)[..8192].iter().any(|word| *word != 0x5eed) {
        return Err("what the ring read is in other pages".to_owned());
    }
    words_mut(block)[..8192].fill(*tag);
    tenant.verify()?;
    tenant.free_most(0)
}

/// A second mapping under a userfaultfd: what was taken back is missing there, and comes as the listener says.
pub(crate) fn faults() -> Outcome {
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

pub(crate) fn split(rounds: u64) -> Outcome {
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
