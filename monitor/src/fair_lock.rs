//! [`FairLock`]: a waiter gets it before its last holder can retake it.

use llfree_base::lock;
use std::sync::{Mutex, MutexGuard, TryLockError, TryLockResult};

/// A fair lock: a waiter gets it before its last holder can retake it.
#[derive(Default)]
pub(crate) struct FairLock {
    next: Mutex<()>,
    now: Mutex<()>,
}

impl FairLock {
    pub(crate) fn lock(&self) -> MutexGuard<'_, ()> {
        // A waiter for `now` holds `next`, and the last holder has to queue there.
        let _next = lock(&self.next);
        lock(&self.now)
    }

    /// Takes it if nobody has it or waits for it.
    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, ()>> {
        let _next = taken(self.next.try_lock())?;
        taken(self.now.try_lock())
    }
}

fn taken<'a>(result: TryLockResult<MutexGuard<'a, ()>>) -> Option<MutexGuard<'a, ()>> {
    match result {
        Ok(guard) => Some(guard),
        // There is nothing in it that a panic could tear.
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn a_waiter_gets_it_before_its_last_holder_can_retake_it() {
        let fair = FairLock::default();
        let second_had_it = AtomicBool::new(false);
        let first = fair.lock();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _held = fair.lock();
                second_had_it.store(true, Ordering::Relaxed);
            });
            while fair.next.try_lock().is_ok() {
                std::thread::yield_now();
            }
            drop(first);
            let _again = fair.lock();
            assert!(second_had_it.load(Ordering::Relaxed));
        });
    }
}
