//! Atomics that know which processor has their cache line, and count how often one has to fetch it from another.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::atomic;
pub(crate) use std::sync::atomic::Ordering;

thread_local! {
    /// The processor that is at work.
    static CORE: Cell<u32> = const { Cell::new(0) };
    static LINES: RefCell<HashMap<usize, Line>> = RefCell::default();
}

const LINE_BYTES: usize = 64;

/// A line, as in any protocol of coherent caches: many have a copy of it to read, or one has it to write.
#[derive(Clone, Copy)]
struct Line {
    /// The processors that have it, a bit each.
    holders: u32,
    fetched: u64,
}

/// Goes on as another processor.
pub(crate) fn on_core(core: u32) {
    CORE.set(core);
}

/// How often each line was fetched so far, by its address; then counts anew.
pub(crate) fn take_fetched() -> Vec<(usize, u64)> {
    LINES.with_borrow_mut(|lines| {
        let fetched = |(line, state): (&usize, &mut Line)| (line * LINE_BYTES, std::mem::take(&mut state.fetched));
        lines.iter_mut().map(fetched).filter(|(_, fetched)| *fetched > 0).collect()
    })
}

fn touch(address: usize, is_change: bool) {
    let core = 1 << CORE.get();
    LINES.with_borrow_mut(|lines| {
        let line = lines.entry(address / LINE_BYTES).or_insert(Line { holders: core, fetched: 0 });
        let is_here = if is_change { line.holders == core } else { line.holders & core != 0 };
        line.fetched += u64::from(!is_here);
        line.holders = if is_change { core } else { line.holders | core };
    });
}

macro_rules! counted {
    ($name:ident, $value:ty) => {
        #[derive(Debug, Default)]
        #[repr(transparent)]
        pub struct $name(atomic::$name);

        impl $name {
            pub(crate) const fn new(value: $value) -> Self {
                Self(atomic::$name::new(value))
            }

            fn changing(&self) -> &atomic::$name {
                touch(std::ptr::from_ref(self).addr(), true);
                &self.0
            }

            pub(crate) fn load(&self, order: Ordering) -> $value {
                touch(std::ptr::from_ref(self).addr(), false);
                self.0.load(order)
            }

            pub(crate) fn store(&self, value: $value, order: Ordering) {
                self.changing().store(value, order);
            }

            pub(crate) fn compare_exchange(
                &self,
                old: $value,
                new: $value,
                done: Ordering,
                failed: Ordering,
            ) -> Result<$value, $value> {
                self.changing().compare_exchange(old, new, done, failed)
            }

            pub(crate) fn fetch_add(&self, value: $value, order: Ordering) -> $value {
                self.changing().fetch_add(value, order)
            }

            pub(crate) fn fetch_or(&self, value: $value, order: Ordering) -> $value {
                self.changing().fetch_or(value, order)
            }

            pub(crate) fn fetch_and(&self, value: $value, order: Ordering) -> $value {
                self.changing().fetch_and(value, order)
            }

            pub(crate) fn swap(&self, value: $value, order: Ordering) -> $value {
                self.changing().swap(value, order)
            }

            pub(crate) fn get_mut(&mut self) -> &mut $value {
                self.0.get_mut()
            }
        }
    };
}

counted!(AtomicU8, u8);
counted!(AtomicU16, u16);
counted!(AtomicU64, u64);
