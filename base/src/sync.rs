//! Locking without poison: every lock in this workspace guards data that is whole at each unlock.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, also after a thread panicked while it held it.
///
/// A panic ends a binary of ours ([`panics`](crate::panics)), so a poisoned mutex is seen in tests only; there, one
/// failure is enough to read.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
