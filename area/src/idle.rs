//! [`Idle`]: a thread that calls somebody now and then, until it is dropped.

use crate::fork::Maker;
use crate::roles;
use llfree_base::lock;
use llfree_base::thread::Spawner;
use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

pub(crate) struct Idle {
    over: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
    maker: Maker,
}

impl Idle {
    pub(crate) fn start(interval: Duration, work: impl Fn() + Send + 'static) -> io::Result<Self> {
        let over = Arc::new((Mutex::new(false), Condvar::new()));
        let of_thread = over.clone();
        let body = move || {
            let (is_over, changed) = &*of_thread;
            // A poisoned lock is nobody's: the flag is all there is.
            while changed.wait_timeout_while(lock(is_over), interval, |over| !*over).is_ok_and(|(over, _)| !*over) {
                work();
            }
        };
        let thread = Spawner::default().spawn("area-idle", roles::IDLE, body)?;
        Ok(Self { over, thread: Some(thread), maker: Maker::new() })
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        let thread = self.thread.take();
        if self.maker.is_gone() {
            // It stayed with the parent.
            std::mem::forget(thread);
            return;
        }
        *lock(&self.over.0) = true;
        self.over.1.notify_all();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn it_calls_until_it_is_dropped() {
        let calls = Arc::new(AtomicU32::new(0));
        let counted = calls.clone();
        let idle = Idle::start(Duration::from_millis(1), move || _ = counted.fetch_add(1, Ordering::Relaxed));
        let idle = idle.expect("a thread");
        while calls.load(Ordering::Relaxed) < 3 {
            std::thread::yield_now();
        }
        drop(idle);
        let after = calls.load(Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(calls.load(Ordering::Relaxed), after);
    }
}
