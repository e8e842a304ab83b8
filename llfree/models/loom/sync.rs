//! loom's atomics, in a shape that lets loom see every race.
//!
//! Of each object loom remembers only the last access. A thread that loads a word and then swaps it
//! covers up another thread's load before it, and loom takes that load and the swap for independent:
//! the order that it skips is the one in which a compare-and-swap loop goes wrong. So each operation
//! first touches a second object beside the word, with an access that depends on all others. It
//! orders nothing (relaxed, never read), and the word itself keeps all its stale values.

pub(crate) use loom::sync::atomic::Ordering;

macro_rules! atomic {
    ($name:ident, $value:ty) => {
        /// As core has it.
        pub struct $name {
            word: loom::sync::atomic::$name,
            touched: loom::sync::atomic::AtomicBool,
        }

        impl $name {
            pub(crate) fn new(value: $value) -> Self {
                Self {
                    word: loom::sync::atomic::$name::new(value),
                    touched: loom::sync::atomic::AtomicBool::new(false),
                }
            }

            fn word(&self) -> &loom::sync::atomic::$name {
                self.touched.fetch_or(true, Ordering::Relaxed);
                &self.word
            }

            pub(crate) fn load(&self, order: Ordering) -> $value {
                self.word().load(order)
            }

            pub(crate) fn store(&self, value: $value, order: Ordering) {
                self.word().store(value, order);
            }

            pub(crate) fn compare_exchange(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                self.word().compare_exchange(current, new, success, failure)
            }

            pub(crate) fn fetch_or(&self, bits: $value, order: Ordering) -> $value {
                self.word().fetch_or(bits, order)
            }

            pub(crate) fn fetch_add(&self, count: $value, order: Ordering) -> $value {
                self.word().fetch_add(count, order)
            }

            pub(crate) fn fetch_and(&self, bits: $value, order: Ordering) -> $value {
                self.word().fetch_and(bits, order)
            }
        }
    };
}

atomic!(AtomicU8, u8);
atomic!(AtomicU16, u16);
atomic!(AtomicU64, u64);
