//! lgalloc as `malloc` of a program that knows nothing of it: what `llfree-preload` is compared with.
//!
//! Blocks of 2 MiB and more, its smallest size, are lgalloc's; all others are glibc's. lgalloc frees by handles, not by
//! addresses, so that those are kept in a map. With `LGALLOC_EAGER=1` it gives memory back at once, else its background worker does, 32
//! MiB a second, as its users have it.

use lgalloc::{BackgroundWorkerConfig, Handle, LgAlloc, allocate, deallocate, lgalloc_set_config};
use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

const LEAST: usize = 2 << 20;
const PAGE: usize = 4096;

unsafe extern "C" {
    fn __libc_malloc(size: usize) -> *mut c_void;
    fn __libc_calloc(count: usize, size: usize) -> *mut c_void;
    fn __libc_realloc(start: *mut c_void, size: usize) -> *mut c_void;
    fn __libc_free(start: *mut c_void);
    fn __libc_memalign(align: usize, size: usize) -> *mut c_void;
}

/// Handles and sizes by address. What it allocates itself is small, and so glibc's.
fn blocks() -> MutexGuard<'static, BTreeMap<usize, (Handle, usize)>> {
    static BLOCKS: Mutex<BTreeMap<usize, (Handle, usize)>> = Mutex::new(BTreeMap::new());
    BLOCKS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn large(size: usize, align: usize) -> Option<*mut c_void> {
    static CONFIGURED: Once = Once::new();
    if size < LEAST || align > PAGE {
        return None;
    }
    CONFIGURED.call_once(|| {
        let mut config = LgAlloc::new();
        config.enable();
        if std::env::var_os("LGALLOC_EAGER").is_some() {
            config.eager_return(true);
        }
        let worker = BackgroundWorkerConfig { interval: Duration::from_secs(1), clear_bytes: 32 << 20 };
        lgalloc_set_config(config.with_background_config(worker));
    });
    let (start, bytes, handle) = allocate::<u8>(size).ok()?;
    blocks().insert(start.as_ptr().addr(), (handle, bytes));
    Some(start.as_ptr().cast())
}

/// Its size, if it is lgalloc's.
fn size_of_large(start: *mut c_void) -> Option<usize> {
    start.addr().is_multiple_of(PAGE).then(|| blocks().get(&start.addr()).map(|block| block.1)).flatten()
}

/// C: a block of `size` bytes.
#[unsafe(no_mangle)]
pub extern "C" fn malloc(size: usize) -> *mut c_void {
    // SAFETY: numbers only.
    large(size, 1).unwrap_or_else(|| unsafe { __libc_malloc(size) })
}

/// C: a block of zeroes.
#[unsafe(no_mangle)]
pub extern "C" fn calloc(count: usize, size: usize) -> *mut c_void {
    match count.checked_mul(size).and_then(|bytes| Some((large(bytes, 1)?, bytes))) {
        Some((start, bytes)) => {
            // SAFETY: ours since a moment ago, and this large. lgalloc does not say what is zero.
            unsafe { start.cast::<u8>().write_bytes(0, bytes) };
            start
        }
        // SAFETY: numbers only.
        None => unsafe { __libc_calloc(count, size) },
    }
}

/// C: frees a block.
///
/// # Safety
/// The caller's own block, or null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn free(start: *mut c_void) {
    let block = start.addr().is_multiple_of(PAGE).then(|| blocks().remove(&start.addr())).flatten();
    match block {
        Some((handle, _)) => deallocate(handle),
        // SAFETY: passed on.
        None => unsafe { __libc_free(start) },
    }
}

/// C: a block with another size.
///
/// # Safety
/// The caller's own block, or null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn realloc(start: *mut c_void, size: usize) -> *mut c_void {
    let Some(old) = size_of_large(start) else {
        // SAFETY: passed on.
        return unsafe { __libc_realloc(start, size) };
    };
    if (LEAST..=old).contains(&size) {
        return start;
    }
    let new = malloc(size);
    if !new.is_null() {
        // SAFETY: two distinct blocks that have as many bytes; the old one is the caller's.
        unsafe {
            ptr::copy_nonoverlapping(start.cast::<u8>(), new.cast(), old.min(size));
            free(start);
        }
    }
    new
}

/// POSIX: a block at an alignment.
///
/// # Safety
/// `to` is a place for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_memalign(to: *mut *mut c_void, align: usize, size: usize) -> c_int {
    if !align.is_power_of_two() || !align.is_multiple_of(size_of::<*mut c_void>()) {
        return libc::EINVAL;
    }
    let start = memalign(align, size);
    // SAFETY: the caller's place.
    unsafe { *to = start };
    if start.is_null() { libc::ENOMEM } else { 0 }
}

/// C11: a block at an alignment.
#[unsafe(no_mangle)]
pub extern "C" fn aligned_alloc(align: usize, size: usize) -> *mut c_void {
    memalign(align, size)
}

/// The same, as it was called before.
#[unsafe(no_mangle)]
pub extern "C" fn memalign(align: usize, size: usize) -> *mut c_void {
    // SAFETY: numbers only.
    large(size, align).unwrap_or_else(|| unsafe { __libc_memalign(align, size) })
}

/// GNU: the bytes that a block has.
///
/// # Safety
/// The caller's own block, or null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn malloc_usable_size(start: *mut c_void) -> usize {
    type Usable = unsafe extern "C" fn(*mut c_void) -> usize;
    size_of_large(start).unwrap_or_else(|| {
        // SAFETY: glibc's function of this name has this type, and the block is glibc's.
        unsafe {
            let found = libc::dlsym(libc::RTLD_NEXT, c"malloc_usable_size".as_ptr());
            if found.is_null() { 0 } else { std::mem::transmute::<*mut c_void, Usable>(found)(start) }
        }
    })
}
