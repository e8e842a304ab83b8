//! jemalloc with an area under it: what jemalloc asks the system for, it gets from an [`Area`], and gives back there.
//!
//! jemalloc keeps what was freed for ten seconds by default, or gives it back at once at the cost of a system call and a page
//! fault each time. Here it gives everything back at once (see [`CONF`]) without a call: the area's monitor decides what goes
//! to the system, and what is taken again before that costs nothing.
//!
//! What jemalloc had before [`install`], and what the area has no room for, is the system's as before.

use llfree_area::Area;
use std::alloc::Layout;
use std::ffi::{CStr, c_uint, c_void};
use std::ptr::{self, NonNull};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};
use tikv_jemalloc_sys::{extent_hooks_t, mallctl};

/// What `malloc_conf` must say: one arena, also for the largest blocks, so that the first is all there is; nothing kept that was
/// freed; and what another thread is about to give back fits exactly or is not taken ([`WHOLE`]). A program exports it under the
/// name that its jemalloc looks for.
pub const CONF: &[u8] =
    b"narenas:1,oversize_threshold:0,retain:false,dirty_decay_ms:0,muzzy_decay_ms:0,lg_extent_max_active_fit:0\0";

/// From this size on (jemalloc's smallest large one) an extent goes back in the call that frees it. Smaller ones wait for a
/// moment in a list where another thread may take them, and would cut a larger one than it needs; an area's are not cut (jemalloc
/// then loses the whole), so that only those of one size may be taken: of up to three pages each length is a class of its own,
/// of more it is not.
const WHOLE: usize = 16 << 10;

/// Why jemalloc goes on as before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InstallError {
    /// It has an area already.
    Twice,
    /// A child that a process forks must have its heap.
    NotPrivate,
    /// It runs with other options than [`CONF`]; this one differs.
    Conf(&'static str),
    /// jemalloc refused, with this error number.
    Refused(i32),
}

impl std::fmt::Display for InstallError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Twice => f.write_str("jemalloc has an area already"),
            Self::NotPrivate => f.write_str("only private memory can be a heap: a forked child has no other"),
            Self::Conf(option) => write!(f, "jemalloc runs with another {option} than malloc_conf must say"),
            Self::Refused(number) => write!(f, "jemalloc refused its hooks with error {number}"),
        }
    }
}

impl std::error::Error for InstallError {}

/// Up to here an area gives as many pages as are asked for, however they are aligned.
const MOST_ALIGN: usize = 1 << 20;

static AREA: OnceLock<Area> = OnceLock::new();
/// The hooks that there were before.
static BEFORE: AtomicPtr<extent_hooks_t> = AtomicPtr::new(ptr::null_mut());

static HOOKS: Hooks = Hooks(extent_hooks_t {
    alloc: Some(alloc),
    dalloc: Some(dalloc),
    destroy: Some(destroy),
    // Memory is there when it is touched, and the monitor sees when it is free.
    commit: None,
    decommit: None,
    purge_lazy: None,
    purge_forced: None,
    // What was taken whole is given back whole: see `WHOLE`.
    split: None,
    merge: None,
});

struct Hooks(extent_hooks_t);

// SAFETY: nobody writes to it.
unsafe impl Sync for Hooks {}

/// From now on jemalloc takes its memory from the area, which stays for as long as the process.
///
/// # Errors
/// [`InstallError`].
pub fn install(area: Area) -> Result<(), InstallError> {
    if !area.is_private() {
        return Err(InstallError::NotPrivate);
    }
    let differs = [
        ("narenas", get(c"opt.narenas", 0u32)? != 1),
        ("oversize_threshold", get(c"opt.oversize_threshold", 0usize)? != 0),
        ("retain", get(c"opt.retain", false)?),
        ("dirty_decay_ms", get(c"opt.dirty_decay_ms", 0isize)? != 0),
        ("lg_extent_max_active_fit", get(c"opt.lg_extent_max_active_fit", 0usize)? != 0),
    ];
    if let Some((option, _)) = differs.into_iter().find(|(_, differs)| *differs) {
        return Err(InstallError::Conf(option));
    }
    AREA.set(area).map_err(|_| InstallError::Twice)?;
    set(c"arena.0.oversize_threshold", WHOLE)?;
    let hooks = c"arena.0.extent_hooks";
    // First only asked for, so that the new ones find them from their first call on.
    BEFORE.store(get(hooks, ptr::null_mut())?, Ordering::Release);
    set(hooks, (&raw const HOOKS.0).cast_mut())
}

/// What stands under a name.
fn get<T: Copy>(name: &CStr, mut value: T) -> Result<T, InstallError> {
    let mut bytes = size_of::<T>();
    // SAFETY: a place of this type, and its size, which jemalloc checks.
    let failed = unsafe { mallctl(name.as_ptr(), (&raw mut value).cast(), &raw mut bytes, ptr::null_mut(), 0) };
    if failed == 0 { Ok(value) } else { Err(InstallError::Refused(failed)) }
}

/// Sets what stands under a name. A pointer among it must be one that jemalloc may keep.
fn set<T: Copy>(name: &CStr, mut value: T) -> Result<(), InstallError> {
    // SAFETY: a value of this type, and its size, which jemalloc checks; the hooks are the only pointer, and live for ever.
    let failed =
        unsafe { mallctl(name.as_ptr(), ptr::null_mut(), ptr::null_mut(), (&raw mut value).cast(), size_of::<T>()) };
    if failed == 0 { Ok(()) } else { Err(InstallError::Refused(failed)) }
}

/// The area, if there is one.
pub fn area() -> Option<&'static Area> {
    AREA.get()
}

fn before() -> Option<&'static extent_hooks_t> {
    // SAFETY: null, or jemalloc's own, which live for ever.
    unsafe { BEFORE.load(Ordering::Acquire).as_ref() }
}

unsafe extern "C" fn alloc(
    _: *mut extent_hooks_t,
    at: *mut c_void,
    size: usize,
    alignment: usize,
    zero: *mut bool,
    commit: *mut bool,
    arena: c_uint,
) -> *mut c_void {
    // Its free is told the size alone: what would be more for its alignment is not taken here.
    let is_plain = at.is_null() && (alignment <= MOST_ALIGN || size > MOST_ALIGN);
    let taken = Layout::from_size_align(size, alignment).ok().filter(|_| is_plain);
    if let Some((start, is_zeroed)) = taken.and_then(|layout| AREA.get()?.take(layout).ok()) {
        // SAFETY: jemalloc's own places; the memory is ours since a moment ago, and this large.
        unsafe {
            if *zero && !is_zeroed {
                start.write_bytes(0, size);
            }
            *zero |= is_zeroed;
            *commit = true;
        }
        return start.as_ptr().cast();
    }
    let Some(hooks) = before() else { return ptr::null_mut() };
    // SAFETY: passed on.
    hooks.alloc.map_or(ptr::null_mut(), |alloc| unsafe {
        alloc(BEFORE.load(Ordering::Acquire), at, size, alignment, zero, commit, arena)
    })
}

/// Whether it was the area's.
///
/// # Safety
/// What `alloc` gave for this size; nobody uses it any more.
unsafe fn give(start: *mut c_void, size: usize) -> bool {
    let (Some(area), Some(start)) = (AREA.get(), NonNull::new(start.cast::<u8>())) else { return false };
    if !area.contains(start) {
        return false;
    }
    if let Ok(layout) = Layout::from_size_align(size, 1) {
        // SAFETY: the caller's word. A table that somebody wrote to may refuse it: then it is lost, and nothing else.
        let _ = unsafe { area.give(start, layout) };
    }
    true
}

unsafe extern "C" fn dalloc(
    _: *mut extent_hooks_t,
    start: *mut c_void,
    size: usize,
    committed: bool,
    arena: c_uint,
) -> bool {
    // SAFETY: jemalloc's word.
    if unsafe { give(start, size) } {
        return false;
    }
    // SAFETY: passed on.
    before()
        .and_then(|hooks| hooks.dalloc)
        .is_none_or(|dalloc| unsafe { dalloc(BEFORE.load(Ordering::Acquire), start, size, committed, arena) })
}

unsafe extern "C" fn destroy(_: *mut extent_hooks_t, start: *mut c_void, size: usize, committed: bool, arena: c_uint) {
    // SAFETY: jemalloc's word.
    if unsafe { give(start, size) } {
        return;
    }
    if let Some(destroy) = before().and_then(|hooks| hooks.destroy) {
        // SAFETY: passed on.
        unsafe { destroy(BEFORE.load(Ordering::Acquire), start, size, committed, arena) };
    }
}
