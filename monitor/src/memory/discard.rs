//! Discards of scattered runs, as few system calls as the kernel allows.
//!
//! On anonymous memory many runs go back with one `process_madvise` on ourselves, which flushes
//! TLBs once for all of them; where the kernel has no such call (before Linux 6.13 it refuses
//! `MADV_DONTNEED`, also on oneself), and on memory files, each run is a call of its own. Knows
//! nothing of who owns a frame. Invariant: of each run the caller hears, once and in order, which
//! of its frames went back and which did not; no frame is left out and none is told twice.

use super::{GuestRam, MemoryError};
use llfree_base::faults;
use rustix::fd::OwnedFd;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use shared_layout::{FRAME_SIZE, HUGE_SIZE, HugeId};
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::OnceLock;

/// Ranges in one system call; the kernel takes 1024. No batch of the monitor has more runs.
const RANGES: usize = 64;

/// Neighbouring huge frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// The first of them.
    pub first: HugeId,
    /// How many.
    pub count: u32,
}

impl Run {
    /// Whether `huge` is the frame behind the last one.
    #[must_use]
    pub fn ends_before(&self, huge: HugeId) -> bool {
        self.first.0.checked_add(self.count) == Some(huge.0)
    }
}

/// The right to advise many ranges of this process with one call.
#[derive(Debug)]
pub(super) struct Vectored {
    this_process: OwnedFd,
}

impl Vectored {
    /// `None` where the kernel, or a filter of system calls, does not allow it.
    pub(super) fn detect() -> Option<Self> {
        static SAID: OnceLock<()> = OnceLock::new();
        let this_process = pidfd_open(getpid(), PidfdFlags::empty()).ok()?;
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

    /// Discards ranges in order; the bytes that were, 0 after an error. The range behind them may be
    /// gone in part.
    fn discard(&self, ranges: &[libc::iovec]) -> usize {
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

impl GuestRam {
    /// Whether scattered runs of this RAM go back together.
    #[must_use]
    pub fn discards_runs_together(&self) -> bool {
        self.vectored.is_some()
    }

    /// Discards several runs, as [`discard`](Self::discard) does one. `settled` hears of each run, in
    /// order: `Ok` when all of it is gone. Where the kernel refuses a run, its frames are tried one
    /// by one, and `settled` hears of each.
    pub fn discard_runs(&self, runs: &[Run], mut settled: impl FnMut(Run, Result<(), MemoryError>)) {
        let mut rest = runs;
        while !rest.is_empty() {
            let gone = self.discard_together(rest);
            for run in &rest[..gone] {
                settled(*run, Ok(()));
            }
            rest = &rest[gone..];
            // No call took it along, or the call stopped there: now for the reason.
            if gone < RANGES
                && let Some((run, behind)) = rest.split_first()
            {
                self.discard_alone(*run, &mut settled);
                rest = behind;
            }
        }
    }

    /// How many runs from the first on went back with one call; 0 where that is no gain.
    fn discard_together(&self, runs: &[Run]) -> usize {
        let Some(vectored) = &self.vectored else { return 0 };
        if runs.len() < 2 || faults::point(faults::DISCARD).is_err() {
            return 0;
        }
        let mut ranges = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; RANGES];
        let mut known = 0;
        for (range, run) in ranges.iter_mut().zip(runs) {
            // A run outside the RAM is refused when its turn comes.
            let Ok(bytes) = self.range(run.first, run.count) else { break };
            *range = libc::iovec { iov_base: self.mapping.pointer(bytes.start), iov_len: bytes.end - bytes.start };
            known += 1;
        }
        let mut bytes = vectored.discard(&ranges[..known]) as u64;
        runs[..known]
            .iter()
            .take_while(|run| {
                let whole = bytes.checked_sub(u64::from(run.count) * HUGE_SIZE);
                bytes = whole.unwrap_or(0);
                whole.is_some()
            })
            .count()
    }

    fn discard_alone(&self, run: Run, settled: &mut impl FnMut(Run, Result<(), MemoryError>)) {
        match self.discard(run.first, run.count) {
            Err(MemoryError::Discard { .. }) if run.count > 1 => {
                for first in (run.first.0..run.first.0 + run.count).map(HugeId) {
                    settled(Run { first, count: 1 }, self.discard(first, 1));
                }
            }
            result => settled(run, result),
        }
    }
}

/// Whether a kernel lets go of memory for a process that asks about itself is tried, not assumed.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backing;
    use rustix::mm::{mlock, munlock};
    use test_support::skipped;
    use vm_memory::{Bytes as _, GuestAddress};

    fn dirty(huge_frames: u32, backing: Backing) -> GuestRam {
        let ram = GuestRam::new(u64::from(huge_frames) * HUGE_SIZE, backing).expect("only address space");
        for page in 0..u64::from(huge_frames) * 512 {
            ram.guest_memory().write_obj(!page, GuestAddress(page * FRAME_SIZE)).expect("inside the RAM");
        }
        ram
    }

    fn runs(list: &[(u32, u32)]) -> Vec<Run> {
        list.iter().map(|(first, count)| Run { first: HugeId(*first), count: *count }).collect()
    }

    fn resident_frames(ram: &GuestRam) -> Vec<u64> {
        let mut frames = Vec::new();
        ram.for_each_resident(|range| frames.extend(range.start / HUGE_SIZE..range.end.div_ceil(HUGE_SIZE)))
            .expect("/proc is mounted");
        frames
    }

    /// RAM of each backing, and anonymous RAM on a kernel that cannot discard runs together.
    fn all_ways(huge_frames: u32) -> Vec<GuestRam> {
        let mut old_kernel = dirty(huge_frames, Backing::Anon);
        old_kernel.vectored = None;
        vec![dirty(huge_frames, Backing::Anon), dirty(huge_frames, Backing::Memfd), old_kernel]
    }

    #[test]
    fn scattered_runs_go_back_and_nothing_else() {
        for ram in all_ways(16) {
            let mut told = Vec::new();
            ram.discard_runs(&runs(&[(0, 1), (3, 2), (7, 1), (15, 1)]), |run, result| {
                result.expect("nothing is locked");
                told.push(run);
            });
            assert_eq!(told, runs(&[(0, 1), (3, 2), (7, 1), (15, 1)]));
            assert_eq!(resident_frames(&ram), [1, 2, 5, 6, 8, 9, 10, 11, 12, 13, 14], "{ram:?}");
            for page in (0..16 * 512).filter(|page| resident_frames(&ram).contains(&(page / 512))) {
                let word: u64 = ram.guest_memory().read_obj(GuestAddress(page * FRAME_SIZE)).expect("inside");
                assert_eq!(word, !page);
            }
        }
    }

    #[test]
    fn more_runs_than_fit_into_a_call_all_go_back() {
        for ram in all_ways(8 * RANGES as u32) {
            let scattered: Vec<_> = (0..4 * RANGES as u32).map(|i| (2 * i, 1)).collect();
            let mut told = 0;
            ram.discard_runs(&runs(&scattered), |_, result| {
                result.expect("nothing is locked");
                told += 1;
            });
            assert_eq!(told, 4 * RANGES);
            assert_eq!(resident_frames(&ram), (0..4 * RANGES as u64).map(|i| 2 * i + 1).collect::<Vec<_>>()[..],);
        }
    }

    #[test]
    fn what_the_kernel_refuses_is_told_frame_by_frame_and_the_rest_goes_back() {
        for ram in all_ways(16) {
            if ram.backing() == Backing::Memfd {
                // The kernel punches holes into locked files all the same.
                continue;
            }
            let locked = ram.mapping.pointer(9 * HUGE_SIZE as usize);
            // SAFETY: inside our mapping; what it holds does not change.
            if let Err(error) = unsafe { mlock(locked, HUGE_SIZE as usize) } {
                return skipped(format_args!("no memory may be locked here: {error}"));
            }
            let mut told = Vec::new();
            ram.discard_runs(&runs(&[(0, 2), (4, 1), (8, 3), (13, 1), (15, 9)]), |run, result| {
                told.push((run.first.0, run.count, result.is_ok()));
            });
            assert_eq!(
                told,
                [(0, 2, true), (4, 1, true), (8, 1, true), (9, 1, false), (10, 1, true), (13, 1, true), (15, 9, false)]
            );
            assert_eq!(resident_frames(&ram), [2, 3, 5, 6, 7, 9, 11, 12, 14, 15]);
            // SAFETY: as above.
            unsafe { munlock(locked, HUGE_SIZE as usize) }.expect("it was locked");
        }
    }

    #[test]
    fn a_kernel_that_can_is_made_use_of() {
        let ram = dirty(8, Backing::Anon);
        if !ram.discards_runs_together() {
            return skipped("process_madvise does not discard here: a kernel before 6.13, or a filter");
        }
        assert_eq!(ram.discard_together(&runs(&[(0, 1), (2, 1), (4, 3)])), 3);
        assert_eq!(resident_frames(&ram), [1, 3, 7]);
        assert_eq!(ram.discard_together(&runs(&[(1, 1)])), 0, "one run is one madvise");
        assert!(!dirty(1, Backing::Memfd).discards_runs_together());
    }
}
