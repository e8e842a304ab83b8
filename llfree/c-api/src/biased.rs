//! Handles that others drain while their CPU sleeps, and the fence that the caller provides for it.

use crate::cpu::class;
use crate::slot::{Kind, Slot, checked, put};
use crate::status::Status;
use crate::table::{TableSlot, order};
use core::ffi::{c_int, c_void};
use core::sync::atomic::{Ordering, compiler_fence};
use llfree::{Allocation, Biased, Class, Cpu, Fence, FrameId, FullFence, Order, Table};

/// The contents of a `llfree_biased`.
pub type BiasedSlot = Slot<Drainable>;

/// A handle, and the table for calls that others keep from it.
pub struct Drainable {
    cpu: Biased<Cpu<'static>, CFence>,
    table: Table<'static>,
}

impl Kind for Drainable {
    const MAGIC: u64 = u64::from_le_bytes(*b"LLF-bias");
    const WORDS: usize = 320;
}

/// `llfree_fence_fn`, which may be null.
pub type FenceFn = Option<unsafe extern "C" fn(context: *mut c_void) -> c_int>;

/// The caller's fence, or a full one on both sides.
struct CFence {
    heavy: FenceFn,
    context: *mut c_void,
}

impl PartialEq for CFence {
    fn eq(&self, other: &Self) -> bool {
        // Two functions at one address do the same.
        let address = |fence: &Self| fence.heavy.map(|heavy| heavy as usize);
        address(self) == address(other) && self.context == other.context
    }
}

// SAFETY: by the contract of `llfree_biased_init`, for this function with this context.
unsafe impl Fence for CFence {
    #[inline]
    fn light(&self) {
        match self.heavy {
            Some(_) => compiler_fence(Ordering::SeqCst),
            None => FullFence.light(),
        }
    }

    fn heavy(&self) -> bool {
        // Also on this CPU, whatever the function does there.
        let here = FullFence.heavy();
        // SAFETY: as above.
        here && self.heavy.is_none_or(|heavy| unsafe { heavy(self.context) } == 0)
    }
}

/// Makes a handle that others may drain.
///
/// # Safety
/// Unless null or misaligned, `biased` is valid for a write and `table` readable. `heavy`, unless null, may be called with `context`
/// from any thread as long as the handle is used; and when it returned 0 every other thread or CPU that uses a handle made with the
/// same two has passed a full memory fence since it was called.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_biased_init(
    biased: *mut BiasedSlot,
    table: *const TableSlot,
    heavy: FenceFn,
    context: *mut c_void,
) -> Status {
    let init = || {
        // SAFETY: by the caller's contract.
        let table = *unsafe { Slot::get(table) }?;
        let cpu = Biased::new(table.tenant().cpu(), CFence { heavy, context });
        // SAFETY: as above.
        unsafe { Slot::fill(biased, Drainable { cpu, table }) }
    };
    Status::of(init().map(|()| Status::Ok))
}

/// Allocates a block in the class of its order.
///
/// # Safety
/// Unless null or misaligned, `biased` is readable and the caller is its owner, at work in no other call for it; `frame` is valid for a
/// write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_biased_alloc(biased: *mut BiasedSlot, order: u32, frame: *mut u64) -> Status {
    // SAFETY: passed on.
    Status::of(self::order(order).and_then(|order| unsafe { alloc(biased, order, Class::of(order), frame) }))
}

/// Allocates a block in a class.
///
/// # Safety
/// As [`llfree_biased_alloc`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_biased_alloc_class(
    biased: *mut BiasedSlot,
    order: u32,
    class_number: u32,
    frame: *mut u64,
) -> Status {
    // SAFETY: passed on.
    let alloc = || unsafe { alloc(biased, self::order(order)?, class(class_number)?, frame) };
    Status::of(alloc())
}

/// # Safety
/// As [`llfree_biased_alloc`].
#[inline]
unsafe fn alloc(biased: *mut BiasedSlot, order: Order, class: Class, frame: *mut u64) -> Result<Status, Status> {
    checked(frame)?;
    // SAFETY: by the caller's contract.
    let Drainable { cpu, table } = unsafe { Slot::get(biased) }?;
    // SAFETY: its owner, in one call at a time.
    let allocation = unsafe { cpu.with(|cpu| cpu.alloc_class(order, class)) };
    let allocation: Allocation = allocation.unwrap_or_else(|| table.tenant().alloc(order))?;
    // SAFETY: by the caller's contract.
    unsafe { put(frame, allocation.position().0.0) }?;
    Ok(Status::of_allocation(&allocation))
}

/// Frees a block.
///
/// # Safety
/// Unless null or misaligned, `biased` is readable and the caller is its owner, at work in no other call for it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_biased_free(biased: *mut BiasedSlot, frame: u64, order: u32) -> Status {
    let free = || {
        let (frame, order) = (FrameId(frame), self::order(order)?);
        // SAFETY: by the caller's contract.
        let Drainable { cpu, table } = unsafe { Slot::get(biased) }?;
        // SAFETY: its owner, in one call at a time.
        let freed = unsafe { cpu.with(|cpu| cpu.free(frame, order)) };
        freed.unwrap_or_else(|| table.tenant().free(frame, order))?;
        Ok(Status::Ok)
    };
    Status::of(free())
}

/// Gives back what handles of others cache.
///
/// # Safety
/// Unless null or misaligned, `handles` points to `count` pointers, each of which, unless null or misaligned, to readable memory
/// where nobody destroys a handle meanwhile; `drained`, unless null or misaligned, is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_biased_drain(
    handles: *const *mut BiasedSlot,
    count: usize,
    only_idle: c_int,
    drained: *mut usize,
) -> Status {
    let drain = || {
        checked(handles)?;
        // SAFETY: not null, and by the caller's contract.
        let handles = unsafe { core::slice::from_raw_parts(handles, count) };
        // All of them are looked at before one is changed.
        for handle in handles {
            // SAFETY: as above.
            unsafe { Slot::get(*handle) }?;
        }
        if !drained.is_null() {
            checked(drained)?;
        }
        // SAFETY: as above.
        let all = handles.iter().filter_map(|handle| unsafe { Slot::get(*handle) }.ok()).map(|handle| &handle.cpu);
        let done = if only_idle == 0 { Biased::drain_all(all) } else { Biased::drain_all_idle(all) };
        if !drained.is_null() {
            // SAFETY: as above.
            unsafe { put(drained, done) }?;
        }
        Ok(Status::Ok)
    };
    Status::of(drain())
}

/// Ends a handle.
///
/// # Safety
/// Unless null or misaligned, `biased` is the caller's alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_biased_destroy(biased: *mut BiasedSlot) -> Status {
    // SAFETY: by the caller's contract. Dropped, the handle drains itself.
    Status::of(unsafe { Slot::take(biased) }.map(|_drained| Status::Ok))
}
