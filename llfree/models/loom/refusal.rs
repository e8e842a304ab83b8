//! What is remembered of a refusal: looks for two orders, and a block that comes free meanwhile.

use super::order;
use super::walk::walk;
use crate::refusal::Refusal;
use crate::sync::{AtomicU64, Ordering, change_before_looks};
use loom::sync::Arc;
use loom::thread;

struct Shared {
    word: AtomicU64,
    /// The order of a block that came free, plus one.
    free: AtomicU64,
}

impl Shared {
    fn new() -> Arc<Self> {
        Arc::new(Self { word: AtomicU64::new(0), free: AtomicU64::new(0) })
    }

    fn refusal(&self) -> Refusal<'_> {
        Refusal::new(&self.word)
    }

    /// As a search does: it looks for a block between both steps, and ends without the second where it finds one.
    fn look(&self, wanted: u8) -> bool {
        let looking = self.refusal().begin(order(wanted), 0);
        self.free.load(Ordering::Acquire) <= u64::from(wanted) && self.refusal().conclude(looking)
    }

    /// As a free does: first what is free, then the refusal.
    fn free(&self, freed: u8) {
        let _ = self.free.compare_exchange(0, u64::from(freed) + 1, Ordering::AcqRel, Ordering::Relaxed);
        change_before_looks();
        self.refusal().withdraw(order(freed));
    }

    fn stands(&self, wanted: u8) -> bool {
        self.refusal().stands(order(wanted), 0)
    }
}

/// Whatever the order of a free and looks for a smaller and a larger block: what is free is not refused afterwards, and
/// what was refused in the end is remembered.
fn check(freed: u8) {
    let mut model = loom::model::Builder::new();
    // Of three threads all interleavings would take hours.
    model.preemption_bound = Some(2);
    walk(&model, move || {
        let shared = Shared::new();
        let [small, large] = [2, 5].map(|wanted| {
            let shared = shared.clone();
            thread::spawn(move || shared.look(wanted))
        });
        shared.free(freed);
        let small = small.join().expect("no panic");
        let large = large.join().expect("no panic");
        assert!((0..=freed).all(|wanted| !shared.stands(wanted)), "refused: {small} {large}");
        assert!(shared.look(freed + 1) && shared.stands(freed + 1));
    });
}

#[test]
fn a_smaller_block_than_both_looks_are_for() {
    check(1);
}

#[test]
fn a_block_for_one_of_both_looks() {
    check(3);
}

#[test]
fn a_block_for_both_looks() {
    check(6);
}

/// A look that found its block ends without a word: what comes of another one is remembered all the same.
#[test]
fn a_look_that_found_something_is_in_nobodys_way() {
    walk(&loom::model::Builder::new(), || {
        let shared = Shared::new();
        let other = shared.clone();
        let found = thread::spawn(move || _ = other.refusal().begin(order(2), 0));
        let refused = shared.look(5);
        found.join().expect("no panic");
        assert!(shared.stands(5) || !refused || shared.look(5) && shared.stands(5));
    });
}

/// Two blocks of which one is free at any moment: one comes free, then the other is taken. A look at one after the
/// other finds neither, and does not say that there was none, whether it would be remembered or not.
#[test]
fn a_block_that_is_free_behind_a_look_is_not_refused() {
    walk(&loom::model::Builder::new(), || {
        let shared = Arc::new((AtomicU64::new(0), [AtomicU64::new(0), AtomicU64::new(1)]));
        let other = shared.clone();
        let moves = thread::spawn(move || {
            let (word, free) = &*other;
            let _ = free[0].compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed);
            change_before_looks();
            Refusal::new(word).withdraw(order(2));
            let _ = free[1].compare_exchange(1, 0, Ordering::AcqRel, Ordering::Relaxed);
        });
        let (word, free) = &*shared;
        let looking = Refusal::new(word).begin(order(2), 0);
        let found = free.iter().any(|block| block.load(Ordering::Acquire) == 1);
        assert!(found || !Refusal::new(word).is_undisturbed(looking));
        assert!(found || !Refusal::new(word).conclude(looking));
        moves.join().expect("no panic");
    });
}
