//! Which pages of a stretch of memory are resident: three ways to ask the kernel.
//!
//! A [`Pagemap`] reads the page tables (`PAGEMAP_SCAN`, Linux 6.7+), [`mincore`] does so on older
//! kernels, [`file_data`] asks a file and so sees pages that no page table maps. All of them only
//! read, never fault a page in, and report byte ranges that count from the start of the stretch,
//! in ascending order. What they say may be old news when they return.

use rustix::fd::OwnedFd;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use shared_layout::FRAME_SIZE;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;

/// `_IOWR('f', 16, struct pm_scan_arg)` of `linux/fs.h`.
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
const PAGE_IS_HUGE: u64 = 1 << 6;
/// The kernel fills at most this many before it copies them out; more would buy nothing.
const REGIONS: usize = 512;

/// `struct page_region`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[derive(Default)]
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<ScanArg>() == 0x60);

/// How a range of pages is backed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct State {
    /// In memory; otherwise swapped out.
    pub(super) present: bool,
    /// Mapped by one huge page-table entry.
    pub(super) huge: bool,
    /// Mapped, but to the page of zeroes that all share: a mere read of untouched memory has that, and
    /// so have zeroed pages of a huge page that the kernel took apart to save memory (Linux 6.12+).
    pub(super) zero: bool,
}

impl State {
    /// Whether it costs the host memory, or swap.
    pub(super) fn is_resident(self) -> bool {
        !self.zero
    }
}

/// The page tables of this process.
#[derive(Debug)]
pub(super) struct Pagemap(File);

impl Pagemap {
    /// Needs `/proc`.
    pub(super) fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Self)
    }

    /// Reports what the page tables hold for `len` bytes from address `start`: memory, swap, or the
    /// shared zero page.
    ///
    /// `ENOTTY` before Linux 6.7.
    pub(super) fn scan(&self, start: usize, len: usize, visit: impl FnMut(Range<u64>, State)) -> io::Result<()> {
        self.scan_with(&mut vec![PageRegion::default(); REGIONS], start, len, visit)
    }

    /// Bytes of it that are in memory: not missing, swapped out, or the shared zero page. Allocates nothing.
    pub(super) fn resident_bytes(&self, start: usize, len: usize) -> io::Result<u64> {
        // Of what is whole there is one region, or a few where huge pages and small ones meet.
        let mut regions = [PageRegion::default(); 8];
        let mut resident = 0;
        let add = |range: Range<u64>, state: State| {
            resident += if state.present && !state.zero { range.end - range.start } else { 0 };
        };
        self.scan_with(&mut regions, start, len, add)?;
        Ok(resident)
    }

    fn scan_with(
        &self,
        regions: &mut [PageRegion],
        start: usize,
        len: usize,
        mut visit: impl FnMut(Range<u64>, State),
    ) -> io::Result<()> {
        let base = start as u64;
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            start: base,
            end: base + len as u64,
            vec: regions.as_mut_ptr().expose_provenance() as u64,
            vec_len: regions.len() as u64,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_PRESENT | PAGE_IS_HUGE | PAGE_IS_PFNZERO,
            ..ScanArg::default()
        };
        while arg.start < arg.end {
            // SAFETY: `arg` is the structure that this request takes, and `vec` and `vec_len` name a
            // live buffer that the kernel alone writes during the call. Without flags nothing changes.
            let found = unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
            let Ok(found) = usize::try_from(found) else {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            };
            for region in &regions[..found.min(regions.len())] {
                let state = State {
                    present: region.categories & PAGE_IS_PRESENT != 0,
                    huge: region.categories & PAGE_IS_HUGE != 0,
                    zero: region.categories & PAGE_IS_PFNZERO != 0,
                };
                visit(region.start.saturating_sub(base)..region.end.saturating_sub(base), state);
            }
            if arg.walk_end <= arg.start {
                return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
            }
            arg.start = arg.walk_end;
        }
        Ok(())
    }
}

/// Reports resident pages the old way. Sees no swapped pages, and takes the zero page for memory.
pub(super) fn mincore(start: usize, len: usize, mut visit: impl FnMut(Range<u64>)) -> io::Result<()> {
    /// One GiB a call: a state of 256 KiB, and a memory map that is not locked for long.
    const CHUNK: usize = 1 << 30;
    const FRAME: usize = FRAME_SIZE as usize;
    let mut states = vec![0u8; CHUNK.min(len).div_ceil(FRAME)];
    for offset in (0..len).step_by(CHUNK) {
        let chunk = CHUNK.min(len - offset);
        let address = ptr::with_exposed_provenance_mut(start + offset);
        // SAFETY: the kernel writes one byte for each page of the chunk, and `states` has that many.
        if unsafe { libc::mincore(address, chunk, states.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut page = 0;
        for run in states[..chunk.div_ceil(FRAME)].chunk_by(|a, b| a & 1 == b & 1) {
            if run[0] & 1 != 0 {
                visit((offset + page * FRAME) as u64..(offset + (page + run.len()) * FRAME) as u64);
            }
            page += run.len();
        }
    }
    Ok(())
}

/// Reports the pages that a stretch of a file holds, mapped or not, swapped or not, counted from its start.
///
/// Not for hugetlb: it calls the whole file data.
pub(super) fn file_data(file: &OwnedFd, stretch: Range<u64>, mut visit: impl FnMut(Range<u64>)) -> io::Result<()> {
    let mut offset = stretch.start;
    while offset < stretch.end {
        let start = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            // No data behind `offset`.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(stretch.end);
        if start < end {
            visit(start - stretch.start..end - stretch.start);
        }
        // The page at `start` may have vanished in between: go on behind it all the same.
        offset = end.max(start.saturating_add(FRAME_SIZE));
    }
    Ok(())
}

/// Joins ranges that touch before it passes them on.
pub(super) struct Joined<F> {
    pending: Range<u64>,
    visit: F,
}

impl<F: FnMut(Range<u64>)> Joined<F> {
    pub(super) fn new(visit: F) -> Self {
        Self { pending: 0..0, visit }
    }

    /// Takes the next range, at or behind the end of the last.
    pub(super) fn push(&mut self, range: Range<u64>) {
        if range.start == self.pending.end {
            self.pending.end = range.end;
        } else {
            let done = std::mem::replace(&mut self.pending, range);
            self.pass(done);
        }
    }

    /// Passes on what is left.
    pub(super) fn finish(mut self) {
        let last = std::mem::take(&mut self.pending);
        self.pass(last);
    }

    fn pass(&mut self, range: Range<u64>) {
        if !range.is_empty() {
            (self.visit)(range);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touching_ranges_are_joined() {
        let mut seen = Vec::new();
        let mut joined = Joined::new(|range| seen.push(range));
        for range in [0..4, 4..8, 12..16, 16..20, 40..44] {
            joined.push(range);
        }
        joined.finish();
        assert_eq!(seen, [0..8, 12..20, 40..44]);

        let mut none = 0;
        Joined::new(|_| none += 1).finish();
        assert_eq!(none, 0);
    }
}
