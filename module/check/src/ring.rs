//! An io_uring, one transfer at a time, by its calls.

use std::ffi::c_void;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{
    AtomicU32,
    Ordering::{AcqRel, Acquire, Release},
};

/// `IORING_OP_*`.
pub(crate) const READ_FIXED: u8 = 4;
pub(crate) const READ: u8 = 22;
pub(crate) const WRITE: u8 = 23;

const ENTRIES: u32 = 4;
/// `IORING_OFF_SQES`.
const SQES: i64 = 0x1000_0000;
const RING_BYTES: usize = 4096;

fn last_error() -> String {
    format!("io_uring: {}", std::io::Error::last_os_error())
}

/// `struct io_uring_params`: the offsets of what lies in the ring that is mapped.
#[repr(C)]
#[derive(Default)]
struct Parameters {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    rest: [u32; 7],
    sq: [u32; 10],
    cq: [u32; 10],
}

pub(crate) struct Ring {
    fd: i32,
    parameters: Parameters,
    ring: *mut c_void,
    sqes: *mut c_void,
}

impl Ring {
    pub(crate) fn new() -> Result<Self, String> {
        let mut parameters = Parameters::default();
        // SAFETY: the kernel fills the structure, which has its size.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, ENTRIES, &raw mut parameters) } as i32;
        if fd < 0 {
            return Err(last_error());
        }
        let map = |offset| {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: a new mapping, over nothing.
            unsafe { libc::mmap(std::ptr::null_mut(), RING_BYTES, access, libc::MAP_SHARED, fd, offset) }
        };
        let (ring, sqes) = (map(0), map(SQES));
        let ends = [parameters.sq[6] + 4 * ENTRIES, parameters.cq[5] + 16 * parameters.cq_entries];
        if ring == libc::MAP_FAILED || sqes == libc::MAP_FAILED || ends.iter().any(|end| *end as usize > RING_BYTES) {
            return Err(last_error());
        }
        Ok(Self { fd, parameters, ring, sqes })
    }

    /// Has the kernel keep the pages of a buffer, for `READ_FIXED`.
    pub(crate) fn register(&self, start: *mut u8, bytes: usize) -> Result<(), String> {
        let buffer = libc::iovec { iov_base: start.cast(), iov_len: bytes };
        // SAFETY: IORING_REGISTER_BUFFERS, one buffer of the caller's.
        match unsafe { libc::syscall(libc::SYS_io_uring_register, self.fd, 0, &raw const buffer, 1) } {
            0 => Ok(()),
            _ => Err(last_error()),
        }
    }

    fn word(&self, offset: u32) -> &AtomicU32 {
        // SAFETY: an aligned word in the mapping, which the kernel uses as an atomic, too.
        unsafe { &*self.ring.cast::<u8>().add(offset as usize).cast::<AtomicU32>() }
    }

    /// One transfer of all of these bytes, which are the caller's.
    pub(crate) fn transfer(&self, what: u8, file: BorrowedFd<'_>, bytes: *mut [u8], at: u64) -> Result<(), String> {
        let (tail, head) = (self.word(self.parameters.sq[1]), self.word(self.parameters.cq[0]));
        let file = u64::from(file.as_raw_fd() as u32);
        let entry = [u64::from(what) | file << 32, at, bytes.cast::<u8>() as u64, bytes.len() as u64, 1, 0, 0, 0];
        // SAFETY: the first entry, of 64 bytes; the kernel has none at the moment.
        unsafe { self.sqes.cast::<[u64; 8]>().write_volatile(entry) };
        let slot = tail.load(Acquire) % ENTRIES;
        self.word(self.parameters.sq[6] + 4 * slot).store(0, Release);
        tail.fetch_add(1, Release);
        // SAFETY: numbers: one to submit, one to wait for, IORING_ENTER_GETEVENTS.
        let done = unsafe { libc::syscall(libc::SYS_io_uring_enter, self.fd, 1, 1, 1, 0, 0) };
        if done != 1 {
            return Err(last_error());
        }
        let slot = head.fetch_add(1, AcqRel) % self.parameters.cq_entries;
        let result = self.word(self.parameters.cq[5] + 16 * slot + 8).load(Acquire) as i32;
        if result as usize == bytes.len() { Ok(()) } else { Err(format!("io_uring: a transfer ended with {result}")) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: ours, and nobody has references into them.
        unsafe {
            libc::munmap(self.ring, RING_BYTES);
            libc::munmap(self.sqes, RING_BYTES);
            libc::close(self.fd);
        }
    }
}
