//! [`Tier`]: a global allocator that puts large blocks into an area, and leaves all others to another allocator.
//!
//! Two allocators that never meet: whose a block is, its address says. Large blocks fall back on the other one where there
//! is no area, or no room in it; so a program never fails for the sake of the area.

use crate::area::Area;
use crate::objects::Objects;
use crate::once::Once;
use crate::space::MemoryKind;
use llfree_base::choices::Switch;
use std::alloc::{GlobalAlloc, Layout};
use std::ffi::CStr;
use std::ptr::{self, NonNull};

/// Blocks from this size on go to the area by default.
pub const THRESHOLD: usize = 512 << 10;

/// Names the size of the area, in bytes, instead of as much as the machine has memory.
const SIZE: &CStr = c"LLFREE_AREA_BYTES";

/// If it is not 0, the area is a memory file, from which the [kernel module](crate::device) can take what is free. A forked child
/// does not have it: for programs that call `exec` after `fork`, and nothing else.
const SHARED: &CStr = c"LLFREE_AREA_MEMFD";

/// If it is 0, what is free stays, and nobody looks for it: for a program that has the memory to itself, or to see what giving it back costs.
const RECLAIM: &CStr = c"LLFREE_AREA_AUTO_RECLAIM";

/// Made when the first large block is asked for; `None` if it could not be. What is asked for meanwhile, the making's own
/// memory included, comes from the other allocator.
static LARGE: Once<Option<Objects>> = Once::new();

/// A global allocator in two tiers.
///
/// ```
/// #[global_allocator]
/// static ALLOCATOR: llfree_area::Tier<std::alloc::System> = llfree_area::Tier::new(std::alloc::System);
///
/// let rows: Vec<u64> = (0..1 << 20).collect();
/// assert_eq!(rows.last(), Some(&((1 << 20) - 1)));
/// ```
#[derive(Debug)]
pub struct Tier<A> {
    inner: A,
    threshold: usize,
}

impl<A> Tier<A> {
    /// Blocks of [`THRESHOLD`] bytes and more in an area, the rest in `inner`.
    #[must_use]
    pub const fn new(inner: A) -> Self {
        Self::with_threshold(inner, THRESHOLD)
    }

    /// The same from another size on.
    #[must_use]
    pub const fn with_threshold(inner: A, threshold: usize) -> Self {
        Self { inner, threshold }
    }
}

/// The objects that large blocks are; `None` also while another thread makes them.
pub fn large_objects() -> Option<&'static Objects> {
    let make = || {
        // Private memory, unless somebody knows better: a forked child must have its heap. It is address space alone.
        let kind = if chosen(SHARED).unwrap_or(0) == 0 { MemoryKind::Private } else { MemoryKind::MemoryFile };
        let builder = Area::builder().size(size()).memory(kind);
        let builder = if chosen(RECLAIM) == Some(0) { builder.auto_reclaim(Switch(None)) } else { builder };
        let area = builder.build().ok()?;
        Some(Objects::new(area, Objects::LOCAL_BYTES))
    };
    LARGE.get_or_make(make)?.as_ref()
}

fn size() -> u64 {
    let chosen = chosen(SIZE);
    chosen.or_else(|| llfree_base::kernel_stats::meminfo_bytes("MemTotal").ok()).unwrap_or(16 << 30)
}

/// A number of bytes that the environment has under a name. Allocates nothing.
#[must_use]
pub fn chosen(name: &CStr) -> Option<u64> {
    // SAFETY: the name has its zero, and changing the environment while others read it is the changer's fault.
    let text = unsafe { libc::getenv(name.as_ptr()) };
    // SAFETY: null, or a string of the environment.
    let text = (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) });
    text.and_then(|text| text.to_str().ok()?.parse().ok())
}

/// How far behind the start of the area an address lies, if it lies in it: that of a block begins at a multiple of 64 KiB.
#[must_use]
pub fn large_block(start: *mut u8) -> Option<usize> {
    owner(start).map(|(objects, start)| objects.offset(start))
}

fn owner(start: *mut u8) -> Option<(&'static Objects, NonNull<u8>)> {
    let objects = LARGE.get()?.as_ref()?;
    let start = NonNull::new(start)?;
    objects.contains(start).then_some((objects, start))
}

// SAFETY: blocks of the area are whole objects of at least the size and alignment asked for, which nobody else has until
// they are given back; all others are the inner allocator's. `realloc` keeps the class of an object in step with the size
// of the layout that the caller holds.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Tier<A> {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() >= self.threshold
            && let Some(raw) = large_objects().and_then(|large| large.take(layout.size(), layout.align()).ok())
        {
            return raw.start.as_ptr();
        }
        // SAFETY: passed on.
        unsafe { self.inner.alloc(layout) }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.size() >= self.threshold
            && let Some(raw) = large_objects().and_then(|large| large.take_zeroed(layout.size(), layout.align()).ok())
        {
            return raw.start.as_ptr();
        }
        // SAFETY: passed on.
        unsafe { self.inner.alloc_zeroed(layout) }
    }

    #[inline]
    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        match owner(start) {
            Some((large, start)) => {
                // A table that refuses it was written by somebody else: then it is lost, and nothing else.
                let _ = large.give_sized(start, layout.size(), layout.align());
            }
            // SAFETY: passed on.
            None => unsafe { self.inner.dealloc(start, layout) },
        }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        match owner(start) {
            Some((large, at)) if size >= self.threshold => {
                let kept = if size >= layout.size() {
                    large.grow(at, layout.size(), size, layout.align()).is_ok()
                } else {
                    large.shrink(at, layout.size(), size, layout.align()).is_some()
                };
                if kept {
                    return start;
                }
            }
            None if size < self.threshold || layout.size() >= self.threshold => {
                // SAFETY: passed on.
                return unsafe { self.inner.realloc(start, layout, size) };
            }
            _ => {}
        }
        // From one tier to the other, or to where there is room.
        // SAFETY: the caller's size is one that this alignment can have.
        let new = unsafe { self.alloc(Layout::from_size_align_unchecked(size, layout.align())) };
        if !new.is_null() {
            // SAFETY: both blocks are as large as what is copied, and distinct.
            unsafe {
                ptr::copy_nonoverlapping(start, new, layout.size().min(size));
                self.dealloc(start, layout);
            }
        }
        new
    }
}
