//! What is remembered of a refusal: looks for two orders, and a block that comes free meanwhile.

use super::order;
use super::walk::walk;
use crate::refusal::{Refusal, Unsure};
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
        self.free.load(Ordering::Acquire) <= u64::from(wanted) && self.refusal().conclude(looking, Unsure::NONE)
    }

    /// As a free does: first what is free, then the refusal.
    fn free(&self, freed: u8) {
        let _ = self.free.compare_exchange(0, u64::from(freed) + 1, Ordering::AcqRel, Ordering::Relaxed);
        change_before_looks();
        self.refusal().withdraw(0, order(freed));
    }

    fn stands(&self, wanted: u8) -> bool {
        self.refusal().unsure(order(wanted), 0).is_none()
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
        let unsure = shared.refusal().unsure(order(freed), 0).expect("not refused");
        assert!(unsure.has(0), "its tree is looked at: {unsure:?}");
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
            Refusal::new(word).withdraw(0, order(2));
            let _ = free[1].compare_exchange(1, 0, Ordering::AcqRel, Ordering::Relaxed);
        });
        let (word, free) = &*shared;
        let looking = Refusal::new(word).begin(order(2), 0);
        let found = free.iter().any(|block| block.load(Ordering::Acquire) == 1);
        assert!(found || !Refusal::new(word).conclude(looking, Unsure::NONE.with(0)));
        assert!(found || !Refusal::new(word).conclude(looking, Unsure::NONE));
        moves.join().expect("no panic");
    });
}

/// Trees with a hint each, and a place for one block, as the search and the frees of a tenant change them.
struct Trees {
    word: AtomicU64,
    /// The order that a tree promises, plus one.
    hints: [AtomicU64; 2],
    /// The order of a block that is free in it, plus one.
    blocks: [AtomicU64; 2],
}

impl Trees {
    fn new() -> Arc<Self> {
        let zeroes = || [AtomicU64::new(0), AtomicU64::new(0)];
        Arc::new(Self { word: AtomicU64::new(0), hints: zeroes(), blocks: zeroes() })
    }

    fn refusal(&self) -> Refusal<'_> {
        Refusal::new(&self.word)
    }

    /// Frees a block. If its tree promises it already, nobody hears of it.
    fn free(&self, tree: usize, freed: u8) {
        let _ = self.blocks[tree].compare_exchange(0, u64::from(freed) + 1, Ordering::AcqRel, Ordering::Relaxed);
        change_before_looks();
        self.promise(tree, freed);
    }

    fn promise(&self, tree: usize, freed: u8) {
        let promised = u64::from(freed) + 1;
        let mut old = self.hints[tree].load(Ordering::Acquire);
        if old >= promised {
            return;
        }
        loop {
            self.refusal().withdraw(tree as u32, order(freed));
            match self.hints[tree].compare_exchange(old, promised, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break,
                Err(seen) if seen >= promised => break,
                Err(seen) => old = seen,
            }
        }
        change_before_looks();
        self.refusal().withdraw(tree as u32, order(freed));
    }

    /// Takes the block of a tree, whatever its hint says.
    fn take(&self, tree: usize) -> bool {
        let seen = self.blocks[tree].load(Ordering::Relaxed);
        seen != 0 && self.blocks[tree].compare_exchange(seen, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// A look at every tree that is unsure, and what is said of it: whether there was a block. Promises that are not true are
    /// taken back.
    fn look(&self, wanted: u8) -> Option<bool> {
        let looking = self.refusal().begin(order(wanted), 0);
        let mut unsure = Unsure::NONE;
        for tree in (0..2).filter(|tree| looking.unsure.has(*tree as u32)) {
            let promised = self.hints[tree].load(Ordering::Acquire);
            let seen = self.blocks[tree].load(Ordering::Acquire);
            if seen > u64::from(wanted) {
                return Some(true);
            }
            if promised > u64::from(wanted) {
                let _ = self.hints[tree].compare_exchange(promised, seen, Ordering::AcqRel, Ordering::Acquire);
                change_before_looks();
                if let Some(freed) = self.blocks[tree].load(Ordering::Acquire).checked_sub(1) {
                    self.promise(tree, freed as u8);
                }
            }
            if self.hints[tree].load(Ordering::Acquire) > u64::from(wanted) {
                unsure = unsure.with(tree as u32);
            }
        }
        self.refusal().conclude(looking, unsure).then_some(false)
    }

    /// Whether a search for a block goes to a tree.
    fn may_have(&self, tree: u32, wanted: u8) -> bool {
        self.refusal().unsure(order(wanted), 0).is_some_and(|unsure| unsure.has(tree))
    }
}

/// Somebody frees a block, another one takes it and frees one in the same tree, which promises it by now or does not; and a look
/// goes on meanwhile. Afterwards a search goes there.
#[test]
fn a_promise_that_somebody_relies_on_is_not_contradicted_by_a_refusal() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    walk(&model, || {
        let trees = Trees::new();
        let one = trees.clone();
        let frees = thread::spawn(move || one.free(0, 3));
        let two = trees.clone();
        let takes = thread::spawn(move || {
            if two.take(0) {
                two.free(0, 3);
            }
        });
        let looked = trees.look(2);
        frees.join().expect("no panic");
        takes.join().expect("no panic");
        assert!(trees.may_have(0, 2) && trees.look(2) == Some(true), "{looked:?}");
    });
}

/// Both trees are known to have nothing. A block comes free in one of them, and looks go where something may be.
#[test]
fn a_look_at_few_trees_misses_none_that_something_came_free_in() {
    for taken_back in [false, true] {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(2);
        walk(&model, move || {
            let trees = Trees::new();
            assert_eq!(trees.look(2), Some(false));
            if taken_back {
                // It came free in the other one before, and is gone.
                trees.free(1, 2);
                assert!(trees.take(1));
            }
            let other = trees.clone();
            let frees = thread::spawn(move || other.free(0, 3));
            let other = trees.clone();
            let looks = thread::spawn(move || other.look(3));
            let looked = trees.look(2);
            frees.join().expect("no panic");
            let larger = looks.join().expect("no panic");
            assert!(trees.may_have(0, 2) && trees.may_have(0, 3), "{looked:?} {larger:?}");
            assert_eq!((trees.look(2), trees.look(3)), (Some(true), Some(true)));
            assert!(trees.take(0));
            assert_eq!((trees.look(3), trees.may_have(0, 3)), (Some(false), false));
        });
    }
}
