//! [`GuestRam`]: the memory that a guest sees as its RAM, and the calls that give and take it.
//!
//! This is the only place that maps guest RAM, backs it with memory or returns memory to the
//! kernel. It keeps no record of which frames are resident: callers do, and can compare theirs
//! with the kernel's own ([`GuestRam::residency`], [`GuestRam::for_each_resident`]). [`Supply`] puts
//! memory behind frames the fast way, and under a [`Userfault`] the only one. Invariants:
//! every range is checked against the RAM before a system call sees it, and memory that was
//! discarded has really gone back and reads as zero when it returns.

mod account;
mod address_map;
mod byte_range;
mod discard;
mod foreign;
mod mapping;
mod pages;
mod pool;
mod pressure;
mod supply;
mod userfault;
mod vectored;

pub use address_map::{AddressMap, HOLE_END, HOLE_START, Part};
pub use foreign::lies_in_tmpfs;
pub use llfree_base::choices::Backing;
pub use pool::{Fill, PoolConfig, PoolStatus};
pub(crate) use pressure::Pressure;
pub use supply::{Shortfall, Supply, UseUserfaultfd};
pub use userfault::{Fault, Userfault, UserfaultError};

use llfree_base::{faults, kernel_stats};
use mapping::{Mapping, User};
use pages::{Joined, Pagemap};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::mm::{Advice, MapFlags};
use serde::{Deserialize, Serialize};
use shared_layout::table::MAX_HUGE_FRAMES;
use shared_layout::{HUGE_SIZE, HugeRange};
use std::io;
use std::ops::Range;
use thiserror::Error;
use vectored::Vectored;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// Why guest RAM could not be made, given, taken or inspected.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// A size that no guest RAM can have.
    #[error(
        "guest RAM of {bytes} bytes: it must be a non-zero multiple of {HUGE_SIZE} (2 MiB) and at most {max} bytes",
        max = u64::from(MAX_HUGE_FRAMES) * HUGE_SIZE
    )]
    BadSize {
        /// The size asked for.
        bytes: u64,
    },
    /// A map of other RAM than this.
    #[error("guest RAM of {bytes} bytes cannot be seen through a map of {mapped} bytes: both must be the same")]
    WrongMap {
        /// Bytes of the RAM.
        bytes: u64,
        /// Bytes of the map.
        mapped: u64,
    },
    /// What another process called its memory is none that we can take from.
    #[error("this is no memory file of {bytes} bytes: {why}")]
    NotAMemoryFile {
        /// The size that it was to have.
        bytes: u64,
        /// What is wrong with it.
        why: String,
    },
    /// A range that is not inside the RAM.
    #[error("{count} huge frames from huge frame {first} on are not all in this guest's RAM of {huge_frames}")]
    OutOfRange {
        /// First huge frame of the range.
        first: u32,
        /// Huge frames in the range.
        count: u32,
        /// Huge frames of the RAM.
        huge_frames: u32,
    },
    /// The kernel has no such memory file.
    #[error("cannot create a {backing} file of {bytes} bytes for guest RAM: try another backing, such as anon")]
    CreateFile {
        /// The kind of file.
        backing: Backing,
        /// Its size.
        bytes: u64,
        /// Why.
        source: io::Error,
    },
    /// Address space, or what the kernel is willing to promise, is exhausted.
    #[error(
        "cannot map {bytes} bytes of {backing} guest RAM: ask for less, lift the limit on address space \
         (`ulimit -v`), or let the kernel promise more than it has (`sysctl vm.overcommit_memory=0`)"
    )]
    Map {
        /// The kind of memory.
        backing: Backing,
        /// Its size.
        bytes: u64,
        /// Why.
        source: io::Error,
    },
    /// The hugetlb pool is too small to reserve all of the RAM.
    #[error(
        "hugetlb guest RAM needs {needed} huge pages of 2 MiB, and {available} of the pool's {total} are free: \
         enlarge the pool with `echo {enough} > {dir}/nr_hugepages`, or use another backing",
        enough = total + needed.saturating_sub(*available),
        dir = kernel_stats::POOL_DIR
    )]
    PoolTooSmall {
        /// Pages that the RAM needs.
        needed: u64,
        /// Pages that are free and promised to nobody.
        available: u64,
        /// Pages in the pool.
        total: u64,
    },
    /// The RAM is mapped but cannot be presented as a region.
    #[error("cannot present the mapping as guest memory")]
    Region(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Memory did not go back.
    #[error("cannot discard {count} huge frames of {backing} guest RAM from huge frame {first} on")]
    Discard {
        /// First huge frame of the range.
        first: u32,
        /// Huge frames in the range.
        count: u32,
        /// The kind of memory.
        backing: Backing,
        /// Why.
        source: io::Error,
    },
    /// A range of bytes that is no run of pages of the RAM.
    #[error("bytes {start:#x} to {end:#x} are no run of whole 4 KiB pages in this guest's RAM of {ram} bytes")]
    BadBytes {
        /// First byte.
        start: u64,
        /// First byte past the range.
        end: u64,
        /// Bytes of the RAM.
        ram: u64,
    },
    /// Pages did not go back.
    #[error("cannot discard {bytes} bytes of {backing} guest RAM from byte {start:#x} on")]
    DiscardBytes {
        /// First byte.
        start: u64,
        /// Bytes.
        bytes: u64,
        /// The kind of memory.
        backing: Backing,
        /// Why.
        source: io::Error,
    },
    /// Memory did not come; the first frames of the range may have theirs.
    #[error("cannot install memory for {count} huge frames of {backing} guest RAM from huge frame {first} on")]
    Populate {
        /// First huge frame of the range.
        first: u32,
        /// Huge frames in the range.
        count: u32,
        /// The kind of memory.
        backing: Backing,
        /// Why.
        source: io::Error,
    },
    /// Memory was there, but did not get to where it belongs.
    #[error("cannot move a huge page to huge frame {frame} of guest RAM")]
    Move {
        /// The frame.
        frame: u32,
        /// Why.
        source: io::Error,
    },
    /// The pool of ready memory could not be made.
    #[error("cannot make an install pool of {huge_frames} huge frames")]
    Pool {
        /// Its size.
        huge_frames: u32,
        /// Why.
        source: io::Error,
    },
    /// A frame table for RAM of another size.
    #[error("the frame table describes {table} huge frames, but the RAM has {ram}")]
    Table {
        /// Huge frames of the table.
        table: u32,
        /// Huge frames of the RAM.
        ram: u32,
    },
    /// A userfaultfd was required but is unavailable.
    #[error("userfaultfd was required but is unavailable")]
    Userfault(#[source] UserfaultError),
    /// A userfaultfd was required, and is of no use for this kind of memory.
    #[error("userfaultfd was required, but pages of {0} memory cannot be moved")]
    UserfaultBacking(Backing),
    /// The kernel's account of resident pages is unavailable.
    #[error("cannot read the kernel's account of resident guest RAM")]
    Residency(#[source] io::Error),
}

impl MemoryError {
    /// Whether the host lacks memory, address space or huge pages: the same call may succeed later
    /// or for less.
    #[must_use]
    pub fn is_out_of_memory(&self) -> bool {
        let (backing, source) = match self {
            Self::PoolTooSmall { .. } => return true,
            Self::Map { backing, source, .. } | Self::Populate { backing, source, .. } => (*backing, source),
            // The kernel moves pages without new ones, but page tables it may need.
            Self::Move { source, .. } => (Backing::Anon, source),
            _ => return false,
        };
        match source.raw_os_error() {
            Some(libc::ENOMEM) => true,
            // A file that finds no page to grow by answers a touch with SIGBUS; MADV_POPULATE_WRITE
            // reports that SIGBUS as EFAULT. A page that is poisoned is one page less.
            Some(libc::EFAULT | libc::EHWPOISON) => backing != Backing::Anon,
            _ => false,
        }
    }
}

/// How much of the RAM is really there, by the kernel's account.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct RamResidency {
    /// Bytes of host memory that back guest RAM. For memory files swapped pages count too.
    pub resident_bytes: u64,
    /// Bytes of those that are mapped as whole huge pages.
    pub huge_bytes: u64,
}

/// A guest's RAM: mapped once, seen by the guest where its [`AddressMap`] says, unmapped when dropped.
///
/// Nothing is resident at first. Host code may touch a frame through [`GuestRam::guest_memory`]
/// only while it is populated: on [`Backing::Hugetlb`] a touch of a discarded frame is a SIGBUS
/// when the pool has run dry, on the others it silently brings the frame back.
#[derive(Debug)]
pub struct GuestRam {
    // Dropped before the mapping, which checks that no view of it is left.
    memory: GuestMemoryMmap<()>,
    mapping: Mapping,
    file: Option<OwnedFd>,
    /// Where it begins in that file.
    file_start: u64,
    /// What the kernel maps; `None` without `/proc`.
    pagemap: Option<Pagemap>,
    /// How scattered runs go back, where the kernel takes them together.
    vectored: Option<Vectored>,
    huge_frames: u32,
    backing: Backing,
    map: AddressMap,
}

impl GuestRam {
    /// Maps `bytes` of guest RAM, a non-zero multiple of 2 MiB, at a multiple of 2 MiB. The guest sees
    /// it from address 0 on.
    ///
    /// For [`Backing::Anon`] and [`Backing::Memfd`] this promises nothing and costs nothing:
    /// memory comes when it is touched or populated. [`Backing::Hugetlb`] reserves every page now.
    ///
    /// # Errors
    /// [`MemoryError::BadSize`], [`MemoryError::CreateFile`], [`MemoryError::Map`], and
    /// [`MemoryError::PoolTooSmall`] with what to do about it.
    pub fn new(bytes: u64, backing: Backing) -> Result<Self, MemoryError> {
        Self::with_map(bytes, backing, AddressMap::flat(bytes))
    }

    /// Memory of this very process, which allocates from it. A child that it forks has a copy of [`Backing::Anon`], as of
    /// any of its memory; the others it does not have at all, for it would share them.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of_process(bytes: u64, backing: Backing) -> Result<Self, MemoryError> {
        let user = if backing == Backing::Anon { User::ThisProcess } else { User::Guest };
        Self::with_user(bytes, backing, AddressMap::flat(bytes), user)
    }

    /// The same for a guest that sees its RAM where `map` says, which is a map of as many bytes. For
    /// the host it is one mapping all the same.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`MemoryError::WrongMap`].
    pub fn with_map(bytes: u64, backing: Backing, map: AddressMap) -> Result<Self, MemoryError> {
        Self::with_user(bytes, backing, map, User::Guest)
    }

    fn with_user(bytes: u64, backing: Backing, map: AddressMap, user: User) -> Result<Self, MemoryError> {
        if map.bytes() != bytes {
            return Err(MemoryError::WrongMap { bytes, mapped: map.bytes() });
        }
        let huge_frames = huge_frames(bytes)?;
        // At most 64 TiB, and usize has 64 bits.
        let len = bytes as usize;
        let map_error = |error: Errno| MemoryError::Map { backing, bytes, source: error.into() };
        let (mapping, file, flags) = match backing {
            Backing::Anon => {
                let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
                (Mapping::anonymous(len, user).map_err(map_error)?, None, flags)
            }
            Backing::Memfd => {
                let file = create_file(bytes, backing, MemfdFlags::empty())?;
                (Mapping::shared(len, &file, 0).map_err(map_error)?, Some(file), MapFlags::SHARED | MapFlags::NORESERVE)
            }
            Backing::Hugetlb => {
                let file = create_file(bytes, backing, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?;
                let mapping = Mapping::hugetlb(len, &file)
                    .map_err(|error| pool_shortage(huge_frames).unwrap_or_else(|| map_error(error)))?;
                (mapping, Some(file), MapFlags::SHARED)
            }
        };
        Self::over(mapping, (file, 0), flags, backing, map)
    }

    /// Memory of this very process in a file of its own that may outlive it, from byte `start` on, a multiple of 2 MiB. What the
    /// file holds there stays.
    ///
    /// # Errors
    /// [`MemoryError::BadSize`], [`MemoryError::Map`].
    pub fn in_file(bytes: u64, file: OwnedFd, start: u64) -> Result<Self, MemoryError> {
        huge_frames(bytes)?;
        let backing = Backing::Memfd;
        let map_error = |error: Errno| MemoryError::Map { backing, bytes, source: error.into() };
        let mapping = Mapping::shared(bytes as usize, &file, start).map_err(map_error)?;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        Self::over(mapping, (Some(file), start), flags, backing, AddressMap::flat(bytes))
    }

    fn over(
        mut mapping: Mapping,
        (file, file_start): (Option<OwnedFd>, u64),
        flags: MapFlags,
        backing: Backing,
        map: AddressMap,
    ) -> Result<Self, MemoryError> {
        let bytes = mapping.len() as u64;
        let huge_frames = huge_frames(bytes)?;
        let region = |part: Part| {
            let view = mapping
                .view(part.offset as usize, part.bytes as usize, flags)
                .map_err(|error| MemoryError::Region(error.into()))?;
            // RAM ends at 64 TiB and a hole at most, far below where adding its length could overflow.
            GuestRegionMmap::with_arc(view, GuestAddress(part.gpa)).ok_or(MemoryError::BadSize { bytes })
        };
        let regions = map.parts().map(region).collect::<Result<Vec<_>, _>>()?;
        let memory = GuestMemoryMmap::from_regions(regions).map_err(|error| MemoryError::Region(error.into()))?;
        let vectored = if backing == Backing::Anon { Vectored::detect() } else { None };
        let pagemap = Pagemap::open().inspect_err(|error| log::debug!("no account of memory: {error}")).ok();
        Ok(Self { memory, mapping, file, file_start, pagemap, vectored, huge_frames, backing, map })
    }

    /// The RAM as bounds-checked guest memory, a region for each part of [its map](Self::map).
    ///
    /// Clones keep the RAM mapped even when this value is gone: drop them first.
    #[must_use]
    pub fn guest_memory(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }

    /// Where the guest sees the RAM. All else here counts in offsets.
    #[must_use]
    pub fn map(&self) -> &AddressMap {
        &self.map
    }

    /// Where the RAM lies in this process, a multiple of 2 MiB: for a KVM memslot or a userfaultfd.
    #[must_use]
    pub fn host_address(&self) -> u64 {
        self.mapping.start() as u64
    }

    /// Size of the RAM in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// Size of the RAM in huge frames.
    #[must_use]
    pub fn huge_frames(&self) -> u32 {
        self.huge_frames
    }

    /// The file that it lies in, if it does: whoever has it can take memory from it.
    #[must_use]
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// What the RAM is made of.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// Returns the memory of huge frames to the kernel, with one system call. What they
    /// held is lost; they read as zero when they are next touched or populated.
    ///
    /// On [`Backing::Hugetlb`] the pages go back to the pool, where anyone may take them.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], or [`MemoryError::Discard`] if the kernel refuses, as it does
    /// for locked memory.
    pub fn discard(&self, frames: impl Into<HugeRange>) -> Result<(), MemoryError> {
        let frames = frames.into();
        let Range { start, end } = self.range(frames)?;
        if start == end {
            return Ok(());
        }
        let refused = |source| MemoryError::Discard {
            first: frames.first().0,
            count: frames.count(),
            backing: self.backing,
            source,
        };
        faults::point(faults::DISCARD).map_err(refused)?;
        match &self.file {
            // On a shared mapping MADV_DONTNEED would succeed and free nothing.
            Some(file) => {
                let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let offset = self.file_start + start as u64;
                retry_on_intr(|| rustix::fs::fallocate(file, punch, offset, (end - start) as u64))
            }
            // SAFETY: the range is inside our mapping. What it holds is guest memory, which is only
            // ever accessed as volatile bytes and may change at any time.
            None => retry_on_intr(|| unsafe {
                rustix::mm::madvise(self.mapping.pointer(start), end - start, Advice::LinuxDontNeed)
            }),
        }
        .map_err(|error| refused(error.into()))
    }

    /// Backs huge frames with memory: zeroed where there was none, unchanged where there
    /// was. Never raises a signal.
    ///
    /// **Not for missing frames of a range that is registered with a userfaultfd:** the kernel asks
    /// the handler for each page, and until it answers the calling thread sleeps, deaf to all
    /// signals but SIGKILL. There, populate another mapping and move its pages (`UFFDIO_MOVE`).
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], or [`MemoryError::Populate`]; the latter says by
    /// [`MemoryError::is_out_of_memory`] whether the host has run out. Needs Linux 5.14.
    pub fn populate(&self, frames: impl Into<HugeRange>) -> Result<(), MemoryError> {
        let frames = frames.into();
        let Range { start, end } = self.range(frames)?;
        if start == end {
            return Ok(());
        }
        let refused = |source| MemoryError::Populate {
            first: frames.first().0,
            count: frames.count(),
            backing: self.backing,
            source,
        };
        faults::point(faults::POPULATE).map_err(refused)?;
        if !self.mapping.is_here() {
            return Err(refused(io::ErrorKind::Unsupported.into()));
        }
        // SAFETY: the range is inside our mapping, and what it holds does not change.
        retry_on_intr(|| unsafe {
            rustix::mm::madvise(self.mapping.pointer(start), end - start, Advice::LinuxPopulateWrite)
        })
        .map_err(|error| refused(error.into()))?;
        faults::point(faults::POPULATE_LATE).map_err(refused)
    }

    /// How much host memory backs the RAM, by the kernel's own account.
    ///
    /// # Errors
    /// [`MemoryError::Residency`], for instance without `/proc`.
    pub fn residency(&self) -> Result<RamResidency, MemoryError> {
        self.read_residency().map_err(MemoryError::Residency)
    }

    /// Calls `visit` with the byte ranges of the RAM that are backed by host memory or swap: in
    /// ascending order, page aligned, never touching each other.
    ///
    /// # Errors
    /// [`MemoryError::Residency`], for instance without `/proc`.
    pub fn for_each_resident(&self, visit: impl FnMut(Range<u64>)) -> Result<(), MemoryError> {
        let mut joined = Joined::new(visit);
        let resident = |range, is_resident| {
            if is_resident {
                joined.push(range);
            }
        };
        self.walk_mapped(resident)
            .and_then(|()| faults::point(faults::RESIDENCY_LATE))
            .map_err(MemoryError::Residency)?;
        joined.finish();
        Ok(())
    }

    /// Calls `visit` with the byte ranges of the RAM that the kernel maps, in ascending order, and with
    /// whether they cost memory or swap: the page of zeroes that all share does not, and the kernel
    /// may put it in the place of any page that holds nothing but zeroes.
    ///
    /// # Errors
    /// As above.
    pub fn for_each_mapped(&self, visit: impl FnMut(Range<u64>, bool)) -> Result<(), MemoryError> {
        self.walk_mapped(visit).map_err(MemoryError::Residency)
    }

    /// Bytes of host memory behind these runs, which are in ascending order; `None` where the kernel does
    /// not say without a walk over all of its books.
    pub(crate) fn resident_in(&self, runs: &[HugeRange]) -> Option<u64> {
        // Files have pages that no page table maps.
        if self.file.is_some() {
            return None;
        }
        let pagemap = self.pagemap.as_ref()?;
        let mut bytes = 0;
        for run in runs {
            let Range { start, end } = self.range(*run).ok()?;
            bytes += pagemap.resident_bytes(self.mapping.start() + start, end - start).ok()?;
        }
        Some(bytes)
    }

    /// The bytes of a range of huge frames, if all of them are in the RAM.
    fn range(&self, frames: HugeRange) -> Result<Range<usize>, MemoryError> {
        if frames.end().0 > self.huge_frames {
            let (first, count) = (frames.first().0, frames.count());
            return Err(MemoryError::OutOfRange { first, count, huge_frames: self.huge_frames });
        }
        let start = frames.byte_offset() as usize;
        Ok(start..start + frames.bytes() as usize)
    }
}

/// Bytes in huge frames, if RAM can have so many.
fn huge_frames(bytes: u64) -> Result<u32, MemoryError> {
    let huge_frames = u32::try_from(bytes / HUGE_SIZE).unwrap_or(u32::MAX);
    if huge_frames == 0 || huge_frames > MAX_HUGE_FRAMES || !bytes.is_multiple_of(HUGE_SIZE) {
        return Err(MemoryError::BadSize { bytes });
    }
    Ok(huge_frames)
}

/// A file whose size nobody can change: no access to it is ever past its end, and a kernel module that takes memory from
/// it relies on that. Nor can anybody who has it seal it against those who write to it and punch holes.
fn create_file(bytes: u64, backing: Backing, kind: MemfdFlags) -> Result<OwnedFd, MemoryError> {
    rustix::fs::memfd_create("guest-ram", kind | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .and_then(|file| {
            rustix::fs::ftruncate(&file, bytes)?;
            rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
            Ok(file)
        })
        .map_err(|error| MemoryError::CreateFile { backing, bytes, source: error.into() })
}

/// Explains a hugetlb mapping that failed, if the pool is the reason.
fn pool_shortage(huge_frames: u32) -> Option<MemoryError> {
    let pool = kernel_stats::huge_page_pool().ok()?;
    let needed = u64::from(huge_frames);
    let available = pool.available();
    (available < needed).then_some(MemoryError::PoolTooSmall { needed, available, total: pool.total })
}

#[cfg(test)]
mod tests;
