//! A thread's way to its caches: one of each [`Source`] that it ever used.
//!
//! The last one used is found with a comparison. The others are in a list, which ends with the thread: then what it keeps
//! goes back and its caches are for others.

use super::cache::Cache;
use super::source::Source;
use crate::hand::Grip;
use std::cell::{Cell, RefCell};
use std::ptr;
use std::sync::{Arc, Weak};

/// What a thread has of a source; it does not keep it, for a thread may do nothing more for ever.
struct Local {
    /// In the list of `source`, and owned by this thread.
    cache: *const Cache,
    // Nobody else gets its address as long as this is here.
    source: Weak<Source>,
}

impl Local {
    fn new(source: &Arc<Source>) -> Self {
        Self { cache: source.caches.own(), source: Arc::downgrade(source) }
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        // No `Cell` is reached from another thread: this one ends, or has no use for the source any more.
        LAST.set((ptr::null(), ptr::null()));
        if let Some(source) = self.source.upgrade() {
            // SAFETY: the source keeps its caches.
            let cache = unsafe { &*self.cache };
            source.empty(cache, |_| true);
            cache.disown(&source.space);
        }
    }
}

thread_local! {
    /// The source that was used last, and this thread's cache of it, which `LOCALS` keeps.
    static LAST: Cell<(*const Source, *const Cache)> = const { Cell::new((ptr::null(), ptr::null())) };
    static LOCALS: RefCell<Vec<Local>> = const { RefCell::new(Vec::new()) };
}

/// Of so many allocations past the cache one is timed: two looks at the clock take as long as the rest.
const TIMED: u32 = 16;

/// Whether this one is.
pub(super) fn is_timed() -> bool {
    thread_local!(static COUNT: Cell<u32> = const { Cell::new(0) });
    let count = COUNT.get();
    COUNT.set(count.wrapping_add(1));
    count.is_multiple_of(TIMED)
}

/// Calls `work` with this thread's cache; `None` if it has none any more, or not yet again.
#[inline]
pub(super) fn with_cache<T>(source: &Arc<Source>, work: impl FnOnce(&Cache) -> T) -> Option<T> {
    let (last, cache) = LAST.get();
    if ptr::eq(last, Arc::as_ptr(source)) {
        // SAFETY: `LAST` names a cache of a source only while `LOCALS` keeps others from its address, so that it is this very
        // one, which is there and keeps its caches.
        return Some(work(unsafe { &*cache }));
    }
    with_local(source, |cache, _| work(cache))
}

/// Calls `work` with what this thread has of a source; `None` at the thread's end, or from within itself.
#[cold]
pub(super) fn with_local<T>(source: &Arc<Source>, work: impl FnOnce(&Cache, &mut Grip) -> T) -> Option<T> {
    LOCALS
        .try_with(|locals| {
            let mut locals = locals.try_borrow_mut().ok()?;
            let known = locals.iter().position(|local| ptr::eq(local.source.as_ptr(), Arc::as_ptr(source)));
            let index = match known {
                Some(index) => index,
                None => {
                    // Objects that are gone.
                    locals.retain(|local| local.source.strong_count() > 0);
                    locals.push(Local::new(source));
                    locals.len() - 1
                }
            };
            let cache = locals[index].cache;
            LAST.set((Arc::as_ptr(source), cache));
            // SAFETY: the source is there and keeps its caches.
            let cache = unsafe { &*cache };
            cache.with_grip(&source.space, |grip| work(cache, grip))
        })
        .ok()?
}
