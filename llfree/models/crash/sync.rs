//! Atomics that count each change of memory and can end the run before the next one; and a cache
//! that loses, when power fails, what was not written back.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
pub(crate) use std::sync::atomic::Ordering;

thread_local! {
    /// Changes until the run ends.
    static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
    static CACHE: RefCell<Option<Cache>> = const { RefCell::new(None) };
}

/// The end of a run.
struct Stopped;

/// Runs `f` up to its change number `stop`; whether it came to its end.
pub(crate) fn run_until(stop: u64, f: impl FnOnce()) -> bool {
    LEFT.set(stop);
    // Whatever `f` was in the middle of is looked at on purpose.
    let result = catch_unwind(AssertUnwindSafe(f));
    LEFT.set(u64::MAX);
    match result {
        Ok(()) => true,
        Err(payload) if payload.is::<Stopped>() => false,
        Err(payload) => resume_unwind(payload),
    }
}

/// Before a change.
pub(crate) fn step() {
    match LEFT.get() {
        0 => resume_unwind(Box::new(Stopped)),
        u64::MAX => {}
        left => LEFT.set(left - 1),
    }
}

/// The contents of memory beneath the caches.
struct Cache {
    base: usize,
    image: Vec<u8>,
    /// Lines on their way.
    pending: Vec<usize>,
    random: fastrand::Rng,
    /// Changes in 256 that push their line out at once.
    chance: u16,
}

impl Cache {
    fn write_out(&mut self, line: usize) {
        let Some(slot) = self.image.get_mut(line * 64..line * 64 + 64) else { return };
        let source = std::ptr::with_exposed_provenance::<u8>(self.base + line * 64);
        for (i, byte) in slot.iter_mut().enumerate() {
            // SAFETY: inside the region that `power_on` was given, on the thread that works on it.
            *byte = unsafe { source.add(i).read_volatile() };
        }
    }
}

/// From now on `region` is persistent memory behind a cache.
pub(crate) fn power_on(region: &mut [u8], seed: u64, chance: u16) {
    let base = region.as_mut_ptr().expose_provenance();
    let random = fastrand::Rng::with_seed(seed);
    CACHE.set(Some(Cache { base, image: region.to_vec(), pending: Vec::new(), random, chance }));
}

/// The contents that survive a power loss.
pub(crate) fn power_off() -> Vec<u8> {
    CACHE.take().expect("on").image
}

/// After a change.
fn changed(address: usize) {
    CACHE.with_borrow_mut(|cache| {
        if let Some(cache) = cache
            && let Some(offset) = address.checked_sub(cache.base)
            && cache.random.u16(..256) < cache.chance
        {
            cache.write_out(offset / 64);
        }
    });
}

/// A line begins its way out.
pub(crate) fn write_back(address: usize) {
    step();
    CACHE.with_borrow_mut(|cache| {
        if let Some(cache) = cache {
            cache.pending.push((address - cache.base) / 64);
        }
    });
}

/// All lines that began are out.
pub(crate) fn fence() {
    step();
    CACHE.with_borrow_mut(|cache| {
        if let Some(cache) = cache {
            for line in std::mem::take(&mut cache.pending) {
                cache.write_out(line);
            }
        }
    });
}

macro_rules! stepping {
    ($name:ident, $int:ty) => {
        #[repr(transparent)]
        /// As core has it.
        pub struct $name(std::sync::atomic::$name);

        impl $name {
            pub(crate) const fn new(value: $int) -> Self {
                Self(std::sync::atomic::$name::new(value))
            }

            pub(crate) fn load(&self, order: Ordering) -> $int {
                self.0.load(order)
            }

            pub(crate) fn get_mut(&mut self) -> &mut $int {
                self.0.get_mut()
            }

            pub(crate) fn store(&self, value: $int, order: Ordering) {
                step();
                self.0.store(value, order);
                changed(std::ptr::from_ref(self).addr());
            }

            pub(crate) fn compare_exchange(
                &self,
                old: $int,
                new: $int,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$int, $int> {
                if self.0.load(failure) == old {
                    step();
                }
                let result = self.0.compare_exchange(old, new, success, failure);
                changed(std::ptr::from_ref(self).addr());
                result
            }

            pub(crate) fn fetch_and(&self, value: $int, order: Ordering) -> $int {
                step();
                let old = self.0.fetch_and(value, order);
                changed(std::ptr::from_ref(self).addr());
                old
            }

            pub(crate) fn fetch_add(&self, value: $int, order: Ordering) -> $int {
                step();
                let old = self.0.fetch_add(value, order);
                changed(std::ptr::from_ref(self).addr());
                old
            }

            pub(crate) fn fetch_or(&self, value: $int, order: Ordering) -> $int {
                step();
                let old = self.0.fetch_or(value, order);
                changed(std::ptr::from_ref(self).addr());
                old
            }
        }
    };
}

stepping!(AtomicU8, u8);
stepping!(AtomicU16, u16);
stepping!(AtomicU64, u64);
