//! [`Table`]: everything an allocator needs in one region of memory, from one number and one pointer.
//!
//! The front door. It lays out the region, brings it into a chosen [`Initial`] state and rebuilds the
//! hints; the result is a [`Tenant`] that can allocate at once and, for the side that takes memory
//! back, a [`Host`]. The parts of a region become slices of atomics here and nowhere else.

use crate::error::{Part, TableError};
use crate::host::Host;
use crate::rows::ROWS;
use crate::sync::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use crate::tenant::Tenant;
use core::fmt;
use shared_layout::table::TABLE_ALIGN;
use shared_layout::{HugeEntry, TableLayout};

/// The state that a table begins in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Initial {
    /// All frames are free and backed by memory: a kernel's RAM.
    Free,
    /// All frames are free, and none is backed until a host [installs](Host) it.
    Evicted,
    /// All memory is allocated, as backed blocks of order 9: free what may be used.
    Allocated,
    /// Entries and bitfields as a previous user, gone by now, left them. Only the
    /// hints are rebuilt. After a crash [`recover`](crate::recover()) comes first.
    Kept,
    /// The table as others left it, and may still be using it. Nothing is written.
    Joined,
}

/// One table in one region of memory.
///
/// ```
/// use llfree::{FrameId, Initial, Order, Table};
///
/// // 256 MiB of memory, of which the last 3 MiB do not exist.
/// const HUGE_FRAMES: u32 = 128;
/// const BYTES: usize = Table::bytes_for(HUGE_FRAMES).unwrap();
/// #[repr(align(64))]
/// struct Region([u8; BYTES]);
/// let mut region = Region([0; BYTES]);
/// let tenant = Table::new(&mut region.0, HUGE_FRAMES, Initial::Free)?.tenant();
/// tenant.reserve(FrameId(128 * 512 - 768), 768)?;
/// assert_eq!(tenant.stats().free_frames, 128 * 512 - 768);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy)]
pub struct Table<'a> {
    tenant: Tenant<'a>,
    entries: &'a [AtomicU16],
}

impl<'a> Table<'a> {
    /// The alignment of a region: a cache line.
    pub const ALIGN: usize = TABLE_ALIGN as usize;

    /// Bytes of a region for `huge_frames` of 2 MiB, some 33 KiB a GiB; `None` for zero or more than
    /// [`MAX_HUGE_FRAMES`](shared_layout::table::MAX_HUGE_FRAMES). [`TableLayout`] says what is where.
    #[must_use]
    pub const fn bytes_for(huge_frames: u32) -> Option<usize> {
        match TableLayout::new(huge_frames) {
            Some(layout) => Some(layout.total as usize),
            None => None,
        }
    }

    /// A table in the first [`bytes_for`](Self::bytes_for) bytes of `region`, which begins at a
    /// multiple of [`ALIGN`](Self::ALIGN). Its old contents count for [`Initial::Kept`] and
    /// [`Initial::Joined`] only.
    ///
    /// # Errors
    /// The mismatch; the region is unchanged.
    pub fn new(region: &'a mut [u8], huge_frames: u32, initial: Initial) -> Result<Self, TableError> {
        // SAFETY: exclusively borrowed for as long as the table lives, and of this length.
        unsafe { Self::from_raw(region.as_mut_ptr(), region.len(), huge_frames, initial) }
    }

    /// The same in memory that is shared with others: another process, a guest, a device.
    ///
    /// # Safety
    /// For as long as `'a`, `base` points to `bytes` bytes that stay mapped, and every party accesses
    /// them as the atomics of [`TableLayout::new`] only, or as a `Table`. Unless it is
    /// [joined](Initial::Joined), no other party is at work before this returns.
    pub unsafe fn from_raw(
        base: *mut u8,
        bytes: usize,
        huge_frames: u32,
        initial: Initial,
    ) -> Result<Self, TableError> {
        let layout = TableLayout::new(huge_frames).ok_or(TableError::HugeFrames { found: huge_frames as usize })?;
        // SAFETY: passed on; the layout is unchanged.
        unsafe { Self::from_layout(base, bytes, &layout, initial) }
    }

    /// The same where somebody's own header comes [before the table](TableLayout::after) in a region.
    ///
    /// # Safety
    /// As [`from_raw`](Self::from_raw), with a `layout` as [`TableLayout`] made it.
    pub unsafe fn from_layout(
        base: *mut u8,
        bytes: usize,
        layout: &TableLayout,
        initial: Initial,
    ) -> Result<Self, TableError> {
        let address = base.addr();
        if !address.is_multiple_of(Self::ALIGN) {
            return Err(TableError::Misaligned { address, align: Self::ALIGN });
        }
        let needed = layout.total as usize;
        if bytes < needed {
            return Err(TableError::Length { part: Part::Region, found: bytes, needed });
        }
        // SAFETY: the region is aligned and as long as the layout says, the rest is the caller's.
        let parts = unsafe { Parts::of(base, layout) };
        let table = Self { tenant: parts.tenant()?, entries: parts.entries };
        parts.begin(initial);
        if initial != Initial::Joined {
            table.tenant.forget();
            table.tenant.classify();
        }
        Ok(table)
    }

    /// The side that allocates.
    #[must_use]
    pub fn tenant(&self) -> Tenant<'a> {
        self.tenant
    }

    /// The side that takes memory back and installs it. What it knows lies in `residency`, a byte a huge frame
    /// that no tenant should reach: [`Residency::Installed`](crate::Residency) for each after
    /// [`Initial::Free`] and [`Initial::Allocated`], zero after [`Initial::Evicted`].
    ///
    /// # Errors
    /// That `residency` has not one element a huge frame.
    pub fn host(&self, residency: &'a [AtomicU8]) -> Result<Host<'a>, TableError> {
        Host::new(self.entries, residency)
    }

    /// The word for a host to raise after it [released](crate::Claim::release) frames, so that handles
    /// look for them before memory is short. With the bit [`HELD_STAYS`](crate::HELD_STAYS), whose rules are more strict,
    /// "out of memory" is remembered beside held frames as well.
    #[must_use]
    pub fn return_epoch(&self) -> &'a AtomicU64 {
        self.tenant.return_epoch
    }
}

impl fmt::Debug for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("huge_frames", &self.entries.len()).finish_non_exhaustive()
    }
}

impl<'a> Tenant<'a> {
    /// A tenant over a shared region that begins with a VMM's header, for a guest. It joins whatever
    /// is there: one of the guest's CPUs [recounts](Self::recount) before the first allocation.
    ///
    /// # Safety
    /// `layout` must be as [`TableLayout`] made it, or a VMM's checked header, unchanged, and
    /// `base` must be page aligned and point to `layout.total` bytes that stay mapped for `'a` and
    /// that every party (this one, other CPUs, the host) accesses as atomics only.
    #[must_use]
    pub unsafe fn from_raw(base: *mut u8, layout: &TableLayout) -> Self {
        // SAFETY: by the caller's contract.
        let tenant = unsafe { Parts::of(base, layout) }.tenant();
        tenant.expect("all lengths were computed from one number, at most MAX_HUGE_FRAMES")
    }
}

/// A region, cut up.
struct Parts<'a> {
    entries: &'a [AtomicU16],
    rows: &'a [AtomicU64],
    hints: &'a [AtomicU16],
    summary: &'a [AtomicU64],
    return_epoch: &'a AtomicU64,
}

impl<'a> Parts<'a> {
    /// # Safety
    /// As [`Table::from_layout`], whose checks succeeded.
    unsafe fn of(base: *mut u8, layout: &TableLayout) -> Self {
        let huge = layout.huge_frames;
        // SAFETY: by the caller's contract; the layout keeps the parts inside `total`, aligned and
        // disjoint, and all bit patterns are valid atomics.
        unsafe {
            let at = |offset: u64| base.add(offset as usize);
            Self {
                entries: core::slice::from_raw_parts(at(layout.entries).cast(), huge as usize),
                rows: core::slice::from_raw_parts(at(layout.bitfields).cast(), huge as usize * ROWS),
                hints: core::slice::from_raw_parts(at(layout.hints()).cast(), Tenant::hint_len(huge)),
                summary: core::slice::from_raw_parts(at(layout.tenant).cast(), Tenant::summary_len(huge)),
                return_epoch: &*at(layout.return_epoch).cast(),
            }
        }
    }

    fn tenant(&self) -> Result<Tenant<'a>, TableError> {
        Tenant::new(self.entries, self.rows, self.hints, self.summary, self.return_epoch)
    }

    /// Writes the first state of entries and bitfields.
    fn begin(&self, initial: Initial) {
        let entry = match initial {
            Initial::Free => HugeEntry::FREE_INSTALLED,
            Initial::Evicted => HugeEntry::FREE_EVICTED,
            Initial::Allocated => HugeEntry::HUGE_INSTALLED,
            Initial::Kept | Initial::Joined => return,
        };
        self.entries.iter().for_each(|word| word.store(entry.bits(), Ordering::Relaxed));
        self.rows.iter().for_each(|row| row.store(0, Ordering::Relaxed));
        self.return_epoch.store(0, Ordering::Relaxed);
    }
}
