//! [`Once`]: a value that is made once, and that nobody waits for.
//!
//! For allocators, which are asked for memory while they make what they give memory out of, by the thread that makes it,
//! by others, and by a child that was forked in between and in which nobody makes it any more. Each of these goes without.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// A value that is made by the first who asks for it.
#[derive(Debug)]
pub struct Once<T> {
    made: OnceLock<T>,
    /// Somebody makes it, or did, here or in the process that this one was forked from.
    is_begun: AtomicBool,
}

impl<T> Once<T> {
    /// Nobody has asked for it.
    #[must_use]
    pub const fn new() -> Self {
        Self { made: OnceLock::new(), is_begun: AtomicBool::new(false) }
    }

    /// The value, if it is there.
    #[inline]
    pub fn get(&self) -> Option<&T> {
        self.made.get()
    }

    /// The value; made now if nobody has begun to. `None` while another thread makes it.
    #[inline]
    pub fn get_or_make(&self, make: impl FnOnce() -> T) -> Option<&T> {
        match self.get() {
            Some(made) => Some(made),
            None => self.make(make),
        }
    }

    #[cold]
    fn make(&self, make: impl FnOnce() -> T) -> Option<&T> {
        if self.is_begun.swap(true, Ordering::Relaxed) {
            return None;
        }
        // Nobody else gets here, so that this never waits.
        let _ = self.made.set(make());
        self.get()
    }
}

impl<T> Default for Once<T> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_who_makes_it_not_even_a_forked_child() {
        let once = Once::new();
        let made = once.get_or_make(|| {
            assert_eq!(once.get_or_make(|| unreachable!("it is being made")), None, "the thread that makes it");
            std::thread::scope(|scope| {
                let other = scope.spawn(|| once.get_or_make(|| unreachable!("it is being made")).is_none());
                assert!(other.join().expect("no panic"), "another thread");
            });
            // SAFETY: the child looks at two atomics and ends.
            let child = unsafe { libc::fork() };
            if child == 0 {
                // SAFETY: ends a child that waits, by a signal.
                unsafe { libc::alarm(20) };
                let code = i32::from(once.get_or_make(|| 8).is_some());
                // SAFETY: ends the child at once.
                unsafe { libc::_exit(code) };
            }
            let mut status = -1;
            // SAFETY: our child, and a place for its status.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            assert_eq!(status, 0, "a child in which nobody makes it any more");
            7
        });
        assert_eq!((made, once.get_or_make(|| 9)), (Some(&7), Some(&7)));
    }
}
