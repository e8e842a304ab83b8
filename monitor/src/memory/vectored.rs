//! [`Vectored`]: many runs of this process's memory advised with one system call.

use llfree_base::identity;
use rustix::fd::OwnedFd;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use shared_layout::FRAME_SIZE;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::OnceLock;

/// Ranges in one system call; the kernel takes 1024. No batch of the monitor has more runs.
pub(super) const RANGES: usize = 64;

/// The right to advise many ranges of this process with one call.
#[derive(Debug)]
pub(super) struct Vectored {
    this_process: OwnedFd,
}

impl Vectored {
    /// `None` where the kernel, or a filter of system calls, does not allow it.
    pub(super) fn detect() -> Option<Self> {
        static SAID: OnceLock<()> = OnceLock::new();
        let this_process = pidfd_open(Pid::from_raw(identity::this_process())?, PidfdFlags::empty()).ok()?;
        let vectored = Self { this_process };
        let works = vectored.works_on_a_scratch_page();
        if !works {
            SAID.get_or_init(|| {
                log::info!("scattered memory goes back one call a run: process_madvise needs Linux 6.13");
            });
        }
        works.then_some(vectored)
    }

    /// Tries it, and believes only a page that is really gone: zero when it is read again.
    fn works_on_a_scratch_page(&self) -> bool {
        let len = FRAME_SIZE as usize;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nobody uses.
        let Ok(page) = (unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len, prot, MapFlags::PRIVATE) }) else {
            return false;
        };
        let word = page.cast::<u64>();
        // SAFETY: the page was just mapped, readable and writable, for us alone.
        unsafe { word.write_volatile(u64::MAX) };
        let range = [libc::iovec { iov_base: page, iov_len: len }];
        let advised = self.discard(&range);
        // SAFETY: still mapped.
        let gone = unsafe { word.read_volatile() } == 0;
        // SAFETY: mapped above, and nobody else knows it. Failing, it would leak one page.
        let _ = unsafe { rustix::mm::munmap(page, len) };
        advised == len && gone
    }

    /// Discards ranges in order; the bytes that were, 0 after an error. The range after them may be
    /// gone in part.
    pub(super) fn discard(&self, ranges: &[libc::iovec]) -> usize {
        loop {
            // SAFETY: callers pass ranges of memory that they own and that may change at any time;
            // the kernel only reads the array.
            let bytes = unsafe {
                libc::syscall(
                    libc::SYS_process_madvise,
                    self.this_process.as_raw_fd(),
                    ranges.as_ptr(),
                    ranges.len(),
                    libc::MADV_DONTNEED,
                    0,
                )
            };
            match usize::try_from(bytes) {
                Ok(bytes) => return bytes,
                Err(_) if std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted => {}
                // Whoever needs the reason gets it from the call for a single run that follows.
                Err(_) => return 0,
            }
        }
    }
}
