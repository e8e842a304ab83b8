//! Discards of scattered runs, as few system calls as the kernel allows.
//!
//! On anonymous memory many runs go back with one `process_madvise` on ourselves, which flushes
//! TLBs once for all of them; where the kernel has no such call (before Linux 6.13 it refuses
//! `MADV_DONTNEED`, also on oneself), and on memory files, each run is a call of its own. Knows
//! nothing of a frame's owner. Invariant: of each run the caller hears, once and in order, which
//! of its frames went back and which did not; no frame is left out and none is told twice.

use super::vectored::RANGES;
use super::{GuestRam, MemoryError};
use llfree_base::faults;
use shared_layout::HugeRange;
use std::ptr;

impl GuestRam {
    /// Whether scattered runs of this RAM go back together.
    #[must_use]
    pub fn discards_runs_together(&self) -> bool {
        self.vectored.is_some()
    }

    /// Discards several runs, as [`discard`](Self::discard) does one. `settled` hears of each run, in
    /// order: `Ok` when all of it is gone. Where the kernel refuses a run, its frames are tried one
    /// by one, and `settled` hears of each.
    pub fn discard_runs(&self, runs: &[HugeRange], mut settled: impl FnMut(HugeRange, Result<(), MemoryError>)) {
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
    fn discard_together(&self, runs: &[HugeRange]) -> usize {
        let Some(vectored) = &self.vectored else { return 0 };
        if runs.len() < 2 || faults::point(faults::DISCARD).is_err() {
            return 0;
        }
        let mut ranges = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; RANGES];
        let mut known = 0;
        for (range, run) in ranges.iter_mut().zip(runs) {
            // A run outside the RAM is refused when its turn comes.
            let Ok(bytes) = self.range(*run) else { break };
            *range = libc::iovec { iov_base: self.mapping.pointer(bytes.start), iov_len: bytes.end - bytes.start };
            known += 1;
        }
        let mut bytes = vectored.discard(&ranges[..known]) as u64;
        runs[..known]
            .iter()
            .take_while(|run| {
                let whole = bytes.checked_sub(run.bytes());
                bytes = whole.unwrap_or(0);
                whole.is_some()
            })
            .count()
    }

    fn discard_alone(&self, run: HugeRange, settled: &mut impl FnMut(HugeRange, Result<(), MemoryError>)) {
        match self.discard(run) {
            Err(MemoryError::Discard { .. }) if run.count() > 1 => {
                run.iter().for_each(|huge| settled(huge.into(), self.discard(huge)));
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
    use shared_layout::{FRAME_SIZE, HUGE_SIZE, HugeId};
    use test_support::skipped;
    use vm_memory::{Bytes as _, GuestAddress};

    fn dirty(huge_frames: u32, backing: Backing) -> GuestRam {
        let ram = GuestRam::new(u64::from(huge_frames) * HUGE_SIZE, backing).expect("only address space");
        for page in 0..u64::from(huge_frames) * 512 {
            ram.guest_memory().write_obj(!page, GuestAddress(page * FRAME_SIZE)).expect("inside the RAM");
        }
        ram
    }

    fn runs(list: &[(u32, u32)]) -> Vec<HugeRange> {
        list.iter().map(|(first, count)| HugeRange::saturating(HugeId(*first), *count)).collect()
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
                told.push((run.first().0, run.count(), result.is_ok()));
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
