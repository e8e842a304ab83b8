//! How a model is walked: in a process of its own, and no more of them at once than there are processors.
//!
//! For each interleaving loom maps a stack a thread and unmaps it again. Two tests that do so in one process wait for
//! each other's mappings, and the walk takes longer than one test after the other. Nor does a walk ever wait for
//! anything else, so that more of them than processors only push each other out of the caches.

use loom::model::Builder;
use std::sync::{Condvar, Mutex};

/// Walks that go on.
static WALKS: Mutex<usize> = Mutex::new(0);
static ONE_ENDED: Condvar = Condvar::new();

/// A walk's place among them, until it is dropped.
struct Place;

impl Place {
    fn wait() -> Self {
        let most = std::thread::available_parallelism().map_or(1, usize::from);
        let walks = WALKS.lock().expect("nobody panics with it");
        *ONE_ENDED.wait_while(walks, |walks| *walks >= most).expect("nobody panics with it") += 1;
        Self
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *WALKS.lock().expect("nobody panics with it") -= 1;
        ONE_ENDED.notify_one();
    }
}

/// Walks every interleaving of `body` that the bounds of `model` allow.
#[track_caller]
pub(super) fn walk(model: &Builder, body: impl Fn() + Send + Sync + 'static) {
    let _place = Place::wait();
    test_support::in_own_process(|| model.check(body));
}
