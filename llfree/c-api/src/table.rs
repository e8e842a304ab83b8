//! Tables: their region, allocations and frees without a handle, and what a monitor asks.

use crate::slot::{Kind, Slot, put};
use crate::status::Status;
use core::ffi::c_void;
use llfree::{FrameId, HugeId, HugeRange, Initial, Order, Stats, Table};

/// The contents of a `llfree_table`. Its region lives as long as the program says.
pub type TableSlot = Slot<Table<'static>>;

impl Kind for Table<'static> {
    const MAGIC: u64 = u64::from_le_bytes(*b"LLF-tabl");
    const WORDS: usize = 32;
}

/// `llfree_stats_t`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
#[expect(missing_docs, reason = "`llfree.h` is their documentation")]
pub struct CStats {
    pub frames: u64,
    pub free_frames: u64,
    pub free_huge: u64,
    pub free_evicted_huge: u64,
    pub allocated_huge: u64,
    pub partial_huge: u64,
    pub evicted_huge: u64,
    pub held_huge: u64,
}

impl From<Stats> for CStats {
    fn from(stats: Stats) -> Self {
        let Stats {
            frames,
            free_frames,
            free_huge,
            free_evicted_huge,
            allocated_huge,
            partial_huge,
            evicted_huge,
            held_huge,
        } = stats;
        Self {
            frames,
            free_frames,
            free_huge,
            free_evicted_huge,
            allocated_huge,
            partial_huge,
            evicted_huge,
            held_huge,
        }
    }
}

/// `LLFREE_INIT_*`, in the order of their numbers.
pub const INITIAL: [Initial; 5] = [Initial::Free, Initial::Evicted, Initial::Allocated, Initial::Kept, Initial::Joined];

pub(crate) fn order(order: u32) -> Result<Order, Status> {
    u8::try_from(order).ok().and_then(Order::new).ok_or(Status::Argument)
}

/// Bytes of a region; 0 if the number of huge frames is out of range.
#[unsafe(no_mangle)]
pub extern "C" fn llfree_region_bytes(huge_frames: u32) -> usize {
    Table::bytes_for(huge_frames).unwrap_or(0)
}

/// Lays a table out in a region.
///
/// # Safety
/// Unless null or misaligned, `table` is valid for a write, and `region` points to `bytes` bytes that
/// live as long as the table is used and that nobody accesses but by this library, or not before this
/// returns unless the table is joined.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_init(
    table: *mut TableSlot,
    region: *mut c_void,
    bytes: usize,
    huge_frames: u32,
    initial: u32,
) -> Status {
    let init = || {
        let initial = *INITIAL.get(initial as usize).ok_or(Status::Argument)?;
        if region.is_null() {
            return Err(Status::Null);
        }
        // A bad pointer must not leave a region changed.
        crate::slot::checked(table)?;
        // SAFETY: by the caller's contract.
        let made = unsafe { Table::from_raw(region.cast(), bytes, huge_frames, initial) }?;
        // SAFETY: as above.
        unsafe { Slot::fill(table, made) }.map(|()| Status::Ok)
    };
    Status::of(init())
}

/// Allocates a block without a handle.
///
/// # Safety
/// Unless null or misaligned, `table` is readable and `frame` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_alloc(table: *const TableSlot, order: u32, frame: *mut u64) -> Status {
    let alloc = || {
        // SAFETY: by the caller's contract.
        let table = unsafe { Slot::get(table) }?;
        crate::slot::checked(frame)?;
        let allocation = table.tenant().alloc(self::order(order)?)?;
        // SAFETY: as above.
        unsafe { put(frame, allocation.position().0.0) }.map(|()| Status::of_allocation(&allocation))
    };
    Status::of(alloc())
}

/// Allocates the block at a frame.
///
/// # Safety
/// Unless null or misaligned, `table` is readable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_alloc_at(table: *const TableSlot, frame: u64, order: u32) -> Status {
    let alloc = || {
        // SAFETY: by the caller's contract.
        let table = unsafe { Slot::get(table) }?;
        let allocation = table.tenant().alloc_at(FrameId(frame), self::order(order)?)?;
        Ok(Status::of_allocation(&allocation))
    };
    Status::of(alloc())
}

/// Allocates some frames exactly, or none.
///
/// # Safety
/// Unless null or misaligned, `table` is readable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_reserve(table: *const TableSlot, first: u64, frames: u64) -> Status {
    // SAFETY: by the caller's contract.
    let reserve = || Ok(unsafe { Slot::get(table) }?.tenant().reserve(FrameId(first), frames)?);
    Status::of(reserve().map(|()| Status::Ok))
}

/// Frees a block without a handle.
///
/// # Safety
/// Unless null or misaligned, `table` is readable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_free(table: *const TableSlot, frame: u64, order: u32) -> Status {
    // SAFETY: by the caller's contract.
    let free = || Ok(unsafe { Slot::get(table) }?.tenant().free(FrameId(frame), self::order(order)?)?);
    Status::of(free().map(|()| Status::Ok))
}

/// Whether a block is backed by memory.
///
/// # Safety
/// Unless null or misaligned, `table` is readable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_confirm(table: *const TableSlot, frame: u64, order: u32) -> Status {
    let confirm = || {
        // SAFETY: by the caller's contract.
        let tenant = unsafe { Slot::get(table) }?.tenant();
        let (frame, order) = (FrameId(frame), self::order(order)?);
        if !frame.is_aligned(order) {
            return Err(Status::Alignment);
        }
        let range = frame.huge().and_then(|first| HugeRange::new(first, order.huge_frames()));
        let range = range.filter(|range| range.end() <= HugeId(tenant.huge_frames())).ok_or(Status::Range)?;
        Ok(if tenant.is_installed(range) { Status::Ok } else { Status::Evicted })
    };
    Status::of(confirm())
}

/// Adds a table up.
///
/// # Safety
/// Unless null or misaligned, `table` is readable and `stats` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_stats(table: *const TableSlot, stats: *mut CStats) -> Status {
    // SAFETY: by the caller's contract.
    let add = || unsafe { put(stats, Slot::get(table)?.tenant().stats().into()) };
    Status::of(add().map(|()| Status::Ok))
}

/// Checks a table.
///
/// # Safety
/// Unless null or misaligned, `table` is readable and `huge` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_validate(table: *const TableSlot, huge: *mut u32) -> Status {
    let validate = || {
        // SAFETY: by the caller's contract.
        let table = unsafe { Slot::get(table) }?;
        let Err(violation) = table.tenant().validate() else { return Ok(Status::Ok) };
        if !huge.is_null() {
            // SAFETY: as above.
            unsafe { put(huge, violation.huge.0) }?;
        }
        Ok(Status::Corrupt)
    };
    Status::of(validate())
}
