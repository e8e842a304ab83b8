//! How a model is walked: in a process of its own.
//!
//! For each interleaving loom maps a stack a thread and unmaps it again. Two tests that do so in one process wait for
//! each other's mappings, and the walk takes longer than one test after the other.

use loom::model::Builder;

/// Walks every interleaving of `body` that the bounds of `model` allow.
#[track_caller]
pub(super) fn walk(model: &Builder, body: impl Fn() + Send + Sync + 'static) {
    test_support::in_own_process(|| model.check(body));
}
