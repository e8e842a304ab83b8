//! [`WriteBack`] as `src/durable.rs` has it, into the cache of `stepping.rs`.

use crate::sync;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct WriteBack(bool);

pub(crate) const LINE: usize = 64;

impl WriteBack {
    pub(crate) const NONE: Self = Self(false);
    pub(crate) const SIMULATED: Self = Self(true);

    pub(crate) fn is_needed(self) -> bool {
        self.0
    }

    pub(crate) fn lines<T>(self, words: &[T]) {
        if self.0 {
            let start = words.as_ptr().addr() & !(LINE - 1);
            (start..words.as_ptr().addr() + size_of_val(words)).step_by(LINE).for_each(sync::write_back);
        }
    }

    pub(crate) fn fence(self) {
        if self.0 {
            sync::fence();
        }
    }
}
