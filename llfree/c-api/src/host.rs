//! The host's side: each step of the protocol as one call, the memory's part of it as a callback.

use crate::slot::{Kind, Slot, checked};
use crate::status::Status;
use crate::table::TableSlot;
use core::ffi::{c_int, c_void};
use core::sync::atomic::{AtomicU8, Ordering};
use llfree::{Claim, Host, HugeId, Reclaim, Table};

/// The contents of a `llfree_host`.
pub type HostSlot = Slot<Side>;

/// A table and what its host knows.
pub struct Side {
    table: Table<'static>,
    residency: &'static [AtomicU8],
}

impl Kind for Side {
    const MAGIC: u64 = u64::from_le_bytes(*b"LLF-host");
    const WORDS: usize = HOST_WORDS;
}

const HOST_WORDS: usize = 32;

impl Side {
    fn host(&self) -> Result<Host<'static>, Status> {
        Ok(self.table.host(self.residency)?)
    }

    fn claim(&self, huge: u32) -> Result<Claim<'static>, Status> {
        let host = self.host()?;
        if huge >= host.huge_frames() {
            return Err(Status::Range);
        }
        host.claim(HugeId(huge)).ok_or(Status::Busy)
    }
}

/// `llfree_memory_fn`, which may be null.
pub type MemoryFn = Option<unsafe extern "C" fn(context: *mut c_void, huge: u32) -> c_int>;

/// Whether a callback, if there is one, did its work.
///
/// # Safety
/// It is a function of this type that may be called with this context.
unsafe fn call(callback: MemoryFn, context: *mut c_void, huge: u32) -> Result<(), Status> {
    // SAFETY: by the caller's contract.
    match callback.map_or(0, |callback| unsafe { callback(context, huge) }) {
        0 => Ok(()),
        _ => Err(Status::Callback),
    }
}

/// Makes a host's side.
///
/// # Safety
/// Unless null or misaligned, `host` is valid for a write and `table` readable; `residency` points to
/// `bytes` bytes that live as long as the host is used and that only this library accesses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_host_init(
    host: *mut HostSlot,
    table: *const TableSlot,
    residency: *mut u8,
    bytes: usize,
) -> Status {
    let init = || {
        // SAFETY: by the caller's contract.
        let table = *unsafe { Slot::get(table) }?;
        checked(residency)?;
        let huge_frames = table.tenant().huge_frames() as usize;
        if bytes < huge_frames {
            return Err(Status::Length);
        }
        // SAFETY: not null, long enough, and as above; any byte is a valid atomic one.
        let residency = unsafe { core::slice::from_raw_parts(residency.cast::<AtomicU8>(), huge_frames) };
        // SAFETY: as above.
        unsafe { Slot::fill(host, Side { table, residency }) }.map(|()| Status::Ok)
    };
    Status::of(init())
}

/// Takes a free huge frame's memory.
///
/// # Safety
/// Unless null or misaligned, `host` is readable; `discard` may be called with `context`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_host_reclaim(
    host: *const HostSlot,
    huge: u32,
    hold: c_int,
    discard: MemoryFn,
    context: *mut c_void,
) -> Status {
    let reclaim = || {
        let how = if hold == 0 { Reclaim::Soft } else { Reclaim::Hard };
        // SAFETY: by the caller's contract.
        let reclaimed = unsafe { Slot::get(host) }?.claim(huge)?.reclaim(how)?;
        if reclaimed.has_memory() {
            // Failing gives the frame back, as it was.
            // SAFETY: by the caller's contract.
            unsafe { call(discard, context, huge) }?;
        }
        reclaimed.done();
        Ok(Status::Ok)
    };
    Status::of(reclaim())
}

/// Gives a held huge frame back to the tenant.
///
/// # Safety
/// Unless null or misaligned, `host` is readable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_host_release(host: *const HostSlot, huge: u32) -> Status {
    let release = || {
        // SAFETY: by the caller's contract.
        let side = unsafe { Slot::get(host) }?;
        // What the tenant wrote over the entry meanwhile is its own business.
        let _ = side.claim(huge)?.release()?;
        side.table.return_epoch().fetch_add(1, Ordering::Release);
        Ok(Status::Ok)
    };
    Status::of(release())
}

/// Backs a huge frame with memory.
///
/// # Safety
/// Unless null or misaligned, `host` is readable; `populate` may be called with `context`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn llfree_host_install(
    host: *const HostSlot,
    huge: u32,
    populate: MemoryFn,
    context: *mut c_void,
) -> Status {
    let install = || {
        // SAFETY: by the caller's contract.
        let installing = unsafe { Slot::get(host) }?.claim(huge)?.install()?;
        if installing.needs_memory() {
            // SAFETY: as above.
            unsafe { call(populate, context, huge) }?;
        }
        installing.done();
        Ok(Status::Ok)
    };
    Status::of(install())
}
