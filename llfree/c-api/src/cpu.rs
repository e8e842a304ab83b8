//! Handles: one CPU's, in memory that the caller provides.

use crate::slot::{Kind, Slot, checked, put};
use crate::status::Status;
use crate::table::{TableSlot, order};
use llfree::{Class, Cpu, FrameId, Order};

/// The contents of a `llfree_cpu`.
pub type CpuSlot = Slot<Cpu<'static>>;

impl Kind for Cpu<'static> {
    const MAGIC: u64 = u64::from_le_bytes(*b"LLF-cpu!");
    const WORDS: usize = 256;
}

/// Makes a handle.
///
/// # Safety
/// Unless null or misaligned, `cpu` is valid for a write and `table` readable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_cpu_init(cpu: *mut CpuSlot, table: *const TableSlot) -> Status {
    // SAFETY: by the caller's contract.
    let init = || unsafe { Slot::fill(cpu, Slot::get(table)?.tenant().cpu()) };
    Status::of(init().map(|()| Status::Ok))
}

/// Allocates a block in the class of its order.
///
/// # Safety
/// Unless null or misaligned, `cpu` is the caller's alone and `frame` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_cpu_alloc(cpu: *mut CpuSlot, order: u32, frame: *mut u64) -> Status {
    // SAFETY: passed on.
    Status::of(crate::table::order(order).and_then(|order| unsafe { alloc(cpu, order, Class::of(order), frame) }))
}

/// Allocates a block in a class.
///
/// # Safety
/// As [`llfree_cpu_alloc`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_cpu_alloc_class(
    cpu: *mut CpuSlot,
    order: u32,
    class_number: u32,
    frame: *mut u64,
) -> Status {
    // SAFETY: passed on.
    let alloc = || unsafe { alloc(cpu, crate::table::order(order)?, class(class_number)?, frame) };
    Status::of(alloc())
}

pub(crate) fn class(number: u32) -> Result<Class, Status> {
    u8::try_from(number).ok().and_then(Class::new).ok_or(Status::Argument)
}

/// # Safety
/// As [`llfree_cpu_alloc`].
#[inline]
unsafe fn alloc(cpu: *mut CpuSlot, order: Order, class: Class, frame: *mut u64) -> Result<Status, Status> {
    checked(frame)?;
    // SAFETY: by the caller's contract.
    let allocation = unsafe { Slot::get_mut(cpu) }?.alloc_class(order, class)?;
    // SAFETY: as above.
    unsafe { put(frame, allocation.position().0.0) }?;
    Ok(Status::of_allocation(&allocation))
}

/// Frees a block.
///
/// # Safety
/// Unless null or misaligned, `cpu` is the caller's alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_cpu_free(cpu: *mut CpuSlot, frame: u64, order: u32) -> Status {
    // SAFETY: by the caller's contract.
    let free = || Ok(unsafe { Slot::get_mut(cpu) }?.free(FrameId(frame), self::order(order)?)?);
    Status::of(free().map(|()| Status::Ok))
}

/// Gives back what a handle caches.
///
/// # Safety
/// Unless null or misaligned, `cpu` is the caller's alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_cpu_drain(cpu: *mut CpuSlot) -> Status {
    // SAFETY: by the caller's contract.
    Status::of(unsafe { Slot::get_mut(cpu) }.map(|cpu| {
        cpu.drain();
        Status::Ok
    }))
}

/// Ends a handle.
///
/// # Safety
/// Unless null or misaligned, `cpu` is the caller's alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_cpu_destroy(cpu: *mut CpuSlot) -> Status {
    // SAFETY: by the caller's contract. Dropped, the handle drains itself.
    Status::of(unsafe { Slot::take(cpu) }.map(|_drained| Status::Ok))
}
