//! [`WriteBack`] as `src/durable.rs` has it, into the simulated cache of `sync.rs`.

use crate::sync;

/// Whether changes are written back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WriteBack(bool);

pub(crate) const LINE: usize = 64;

impl WriteBack {
    /// Nothing.
    pub const NONE: Self = Self(false);
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
