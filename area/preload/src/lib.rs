//! `malloc` and its like for a program that knows nothing of us: `LD_PRELOAD=libllfree_preload.so program`.
//!
//! Blocks of 512 KiB and more, or of as many bytes as `LLFREE_AREA_THRESHOLD` says and more, lie in an area of private memory,
//! whose free part goes back to the system by itself; all others are glibc's, by the names under which it exports its own functions. A block's size is in a table beside the area,
//! for `free` is not told it. What is wrong with a `free` of a block of ours ends the program with one line, as glibc does.
//!
//! This crate is its exports: each is what the C standard or POSIX says of that name.

use llfree_area::Tier;
use llfree_area::once::Once;
use llfree_area::tier::{self, large_block};
use std::alloc::{GlobalAlloc, Layout};
use std::ffi::{CStr, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

/// `max_align_t`.
const ALIGN: usize = 16;
/// Blocks of the area begin at a multiple of this, and none is smaller.
const GRAIN: usize = 64 << 10;
/// Names the size from which on blocks lie in the area.
const THRESHOLD: &CStr = c"LLFREE_AREA_THRESHOLD";

unsafe extern "C" {
    fn __libc_malloc(size: usize) -> *mut c_void;
    fn __libc_calloc(count: usize, size: usize) -> *mut c_void;
    fn __libc_realloc(start: *mut c_void, size: usize) -> *mut c_void;
    fn __libc_free(start: *mut c_void);
    fn __libc_memalign(align: usize, size: usize) -> *mut c_void;
}

/// glibc's functions, past the names that we export.
struct Glibc;

// SAFETY: blocks of glibc's are as large and as aligned as asked for, and its own until they are freed.
unsafe impl GlobalAlloc for Glibc {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: no more than numbers are passed on.
        let start = unsafe {
            match layout.align() {
                0..=ALIGN => __libc_malloc(layout.size()),
                align => __libc_memalign(align, layout.size()),
            }
        };
        start.cast()
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.align() <= ALIGN {
            // SAFETY: numbers only. What glibc has from the kernel just now it does not clear.
            return unsafe { __libc_calloc(1, layout.size()) }.cast();
        }
        // SAFETY: passed on.
        let start = unsafe { self.alloc(layout) };
        if !start.is_null() {
            // SAFETY: the block is ours since a moment ago, and this large.
            unsafe { start.write_bytes(0, layout.size()) };
        }
        start
    }

    unsafe fn dealloc(&self, start: *mut u8, _: Layout) {
        // SAFETY: the caller's block, which is glibc's.
        unsafe { __libc_free(start.cast()) };
    }
}

/// Blocks from this size on lie in the area.
fn threshold() -> usize {
    // Zero before the first who needs it has looked; whoever else looks meanwhile finds the same.
    static FOUND: AtomicUsize = AtomicUsize::new(0);
    match FOUND.load(Ordering::Relaxed) {
        0 => {
            let chosen = tier::chosen(THRESHOLD).and_then(|bytes| usize::try_from(bytes).ok());
            let found = chosen.unwrap_or(tier::THRESHOLD).max(GRAIN);
            FOUND.store(found, Ordering::Relaxed);
            found
        }
        found => found,
    }
}

/// Ours is the global allocator's, so that this library and its program share one area.
fn allocator() -> Tier<Glibc> {
    Tier::with_threshold(Glibc, threshold())
}

/// The sizes of blocks in the area, one a grain; zero where none begins. `None` also while they are made, for that asks for
/// memory itself.
fn sizes() -> Option<&'static [AtomicUsize]> {
    static SIZES: Once<Option<&'static [AtomicUsize]>> = Once::new();
    let make = || {
        let grains = tier::large_objects()?.area().bytes() as usize / GRAIN;
        // SAFETY: numbers only; what is zero costs nothing before it is touched.
        let start = unsafe { __libc_calloc(grains, size_of::<AtomicUsize>()) }.cast::<AtomicUsize>();
        // SAFETY: that many, zero, aligned, and never freed.
        (!start.is_null()).then(|| unsafe { std::slice::from_raw_parts(start, grains) })
    };
    *SIZES.get_or_make(make)?
}

/// Whose an address is.
enum Owner {
    Glibc,
    /// Where a block of ours can begin; the word has its size, if one does.
    Ours(&'static AtomicUsize),
    /// In our area, and no place where a block begins.
    Nobody,
}

fn owner(start: *mut c_void) -> Owner {
    let Some(offset) = large_block(start.cast()) else { return Owner::Glibc };
    let word = sizes().and_then(|sizes| sizes.get(offset / GRAIN));
    word.filter(|_| offset.is_multiple_of(GRAIN)).map_or(Owner::Nobody, Owner::Ours)
}

/// Notes the size of a block, if it is one of ours.
fn note(start: *mut c_void, size: usize, align: usize) {
    if let Owner::Ours(word) = owner(start) {
        // The alignment decides the class, too: kept with it, as a power of two.
        word.store(size << 6 | align.trailing_zeros() as usize, Ordering::Relaxed);
    }
}

fn layout(size: usize, align: usize) -> Option<Layout> {
    Layout::from_size_align(size, align).ok()
}

/// A large block, noted; null if it is to come from glibc.
fn large(size: usize, align: usize, zeroed: bool) -> *mut c_void {
    if size < GRAIN || size < threshold() || sizes().is_none() {
        return ptr::null_mut();
    }
    let Some(layout) = layout(size, align) else { return ptr::null_mut() };
    // SAFETY: the layout has a size.
    let start = unsafe { if zeroed { allocator().alloc_zeroed(layout) } else { allocator().alloc(layout) } }.cast();
    note(start, size, align);
    start
}

fn noted(word: usize) -> Option<Layout> {
    layout(word >> 6, 1 << (word & 63))
}

fn out_of_memory() -> *mut c_void {
    // SAFETY: the calling thread's own.
    unsafe { *libc::__errno_location() = libc::ENOMEM };
    ptr::null_mut()
}

/// Ends the program: its heap is not what it thinks.
fn abort(words: &[u8]) -> ! {
    // SAFETY: a plain write of our own bytes; then the end.
    unsafe {
        libc::write(2, words.as_ptr().cast(), words.len());
        libc::abort()
    }
}

/// C: a block of `size` bytes.
#[unsafe(no_mangle)]
pub extern "C" fn malloc(size: usize) -> *mut c_void {
    match large(size, ALIGN, false) {
        // SAFETY: numbers only.
        null if null.is_null() => unsafe { __libc_malloc(size) },
        start => start,
    }
}

/// C: a block of zeroes.
#[unsafe(no_mangle)]
pub extern "C" fn calloc(count: usize, size: usize) -> *mut c_void {
    let Some(bytes) = count.checked_mul(size) else { return out_of_memory() };
    match large(bytes, ALIGN, true) {
        // SAFETY: numbers only.
        null if null.is_null() => unsafe { __libc_calloc(count, size) },
        start => start,
    }
}

/// C: frees a block.
///
/// # Safety
/// The caller's own block, or null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn free(start: *mut c_void) {
    let block = match owner(start) {
        // SAFETY: passed on.
        Owner::Glibc => return unsafe { __libc_free(start) },
        Owner::Ours(word) => noted(word.swap(0, Ordering::Relaxed)).filter(|layout| layout.size() > 0),
        Owner::Nobody => None,
    };
    match block {
        // SAFETY: the block that was noted under this address.
        Some(layout) => unsafe { allocator().dealloc(start.cast(), layout) },
        None => abort(b"llfree-preload: free of a block that is not allocated\n"),
    }
}

/// C: a block with another size.
///
/// # Safety
/// The caller's own block, or null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn realloc(start: *mut c_void, size: usize) -> *mut c_void {
    if start.is_null() {
        return malloc(size);
    }
    let block = match owner(start) {
        // SAFETY: the caller's own block.
        Owner::Glibc => return unsafe { realloc_of_glibcs(start, size) },
        Owner::Ours(word) => noted(word.swap(0, Ordering::Relaxed)).filter(|layout| layout.size() > 0),
        Owner::Nobody => None,
    };
    let Some(old) = block else {
        abort(b"llfree-preload: realloc of a block that is not allocated\n");
    };
    if size == 0 {
        // SAFETY: the block that was noted under this address.
        unsafe { allocator().dealloc(start.cast(), old) };
        return ptr::null_mut();
    }
    // SAFETY: as above, and a size that is not zero.
    let new = unsafe { allocator().realloc(start.cast(), old, size) }.cast::<c_void>();
    let (kept, bytes) = if new.is_null() { (start, old.size()) } else { (new, size) };
    note(kept, bytes, old.align());
    if new.is_null() { out_of_memory() } else { new }
}

/// A small block that becomes a large one moves to the area, while there is room. Large ones stay glibc's, which moves their
/// pages and copies nothing.
///
/// # Safety
/// The caller's own block, which is glibc's.
unsafe fn realloc_of_glibcs(start: *mut c_void, size: usize) -> *mut c_void {
    // SAFETY: the caller's own block.
    let old = if size < threshold() { None } else { unsafe { usable_of_glibcs(start) } };
    let small = old.filter(|old| *old < threshold());
    let new = small.map_or(ptr::null_mut(), |_| large(size, ALIGN, false));
    let (Some(old), false) = (small, new.is_null()) else {
        // SAFETY: passed on.
        return unsafe { __libc_realloc(start, size) };
    };
    // SAFETY: two distinct blocks that have as many bytes; the old one is the caller's.
    unsafe {
        ptr::copy_nonoverlapping(start.cast::<u8>(), new.cast(), old.min(size));
        __libc_free(start);
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
    if start.is_null() {
        return libc::ENOMEM;
    }
    // SAFETY: the caller's place.
    unsafe { *to = start };
    0
}

/// C11: a block at an alignment.
#[unsafe(no_mangle)]
pub extern "C" fn aligned_alloc(align: usize, size: usize) -> *mut c_void {
    memalign(align, size)
}

/// The same, as it was called before.
#[unsafe(no_mangle)]
pub extern "C" fn memalign(align: usize, size: usize) -> *mut c_void {
    match large(size, align.max(ALIGN), false) {
        // SAFETY: numbers only.
        null if null.is_null() => unsafe { __libc_memalign(align, size) },
        start => start,
    }
}

/// GNU: the bytes that a block has.
///
/// # Safety
/// The caller's own block, or null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn malloc_usable_size(start: *mut c_void) -> usize {
    match owner(start) {
        // SAFETY: the caller's own block.
        Owner::Glibc => unsafe { usable_of_glibcs(start) }.unwrap_or(0),
        Owner::Ours(word) => word.load(Ordering::Relaxed) >> 6,
        Owner::Nobody => 0,
    }
}

/// The bytes that a block of glibc's has; `None` if its function cannot be found.
///
/// # Safety
/// The caller's own block, which is glibc's, or null.
unsafe fn usable_of_glibcs(start: *mut c_void) -> Option<usize> {
    type Usable = unsafe extern "C" fn(*mut c_void) -> usize;
    // Found by each who needs it before the first has: nobody waits for a thread that a forked child does not have.
    static FOUND: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
    let mut found = FOUND.load(Ordering::Relaxed);
    if found.is_null() {
        // SAFETY: the name has its zero.
        found = unsafe { libc::dlsym(libc::RTLD_NEXT, c"malloc_usable_size".as_ptr()) };
        FOUND.store(found, Ordering::Relaxed);
    }
    if found.is_null() {
        return None;
    }
    // SAFETY: glibc's function of this name has this type.
    let usable = unsafe { std::mem::transmute::<*mut c_void, Usable>(found) };
    // SAFETY: passed on.
    Some(unsafe { usable(start) })
}
