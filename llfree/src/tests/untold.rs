//! What came free while nobody was told is not refused for good: a look was within the tree, the host gave it back, or its
//! owner died.

use super::Parts;
use crate::class::Class;
use crate::host::Reclaim;
use crate::ledger::{LEDGER_WORDS, Ledger};
use crate::query::Query;
use crate::refusal::Unsure;
use crate::spot::Spot;
use crate::sync::AtomicU64;
use crate::vicinity::Vicinity;
use shared_layout::{FrameId, HugeId, Order};
use std::vec::Vec;

/// While a look for a block of `order` is within a tree something comes free under a promise that stands, which the host
/// holds, or half of it; in the end it gives that back, for its reclaim failed, without a new epoch.
fn is_refused_after_a_failed_reclaim(order: Order) -> bool {
    let parts = Parts::free(4);
    let (tenant, host) = (parts.tenant(), parts.host());
    tenant.recount();
    // 2 is somebody's; 0 and 1 are free, 3 is only where a pair is what is wanted.
    _ = tenant.alloc_at(FrameId(2 * 512), Order::HUGE).expect("free");
    if order == Order::HUGE {
        _ = tenant.alloc_at(FrameId(3 * 512), Order::HUGE).expect("free");
        _ = tenant.alloc_at(FrameId(512), Order::HUGE).expect("free");
    }
    let held = core::cell::RefCell::new(None);
    let (mut spot, mut calls) = (Spot::at(Vicinity::all(0), None), 0);
    let grab = |huge: HugeId| -> Option<()> {
        assert_eq!(huge, HugeId(0));
        calls += 1;
        if calls == 1 {
            // Somebody else has it for a moment: takes it and frees it again.
            return None;
        }
        // Others, while we look: one takes the block,
        _ = tenant.lower.take(HugeId(0), order).expect("free");
        let (freed, reclaimed) = if order == Order::MAX { (2, 3) } else { (2, 2) };
        let hold = || {
            let claim = host.claim(HugeId(reclaimed)).expect("idle");
            *held.borrow_mut() = Some(claim.reclaim(Reclaim::Hard).expect("free"));
        };
        let free = || tenant.free(FrameId(freed * 512), Order::HUGE).expect("ours");
        // the host holds a huge frame, and another one frees one.
        if order == Order::MAX {
            hold();
            free();
        } else {
            free();
            hold();
        }
        None
    };
    let found = tenant.search(&mut spot, Query::reserving(order, Class::HUGE), grab);
    assert!(found.is_none());
    // The discard failed: the frame is as it was, without a new epoch.
    drop(held.into_inner().expect("held meanwhile"));
    let is_free = |huge: u32| tenant.is_free(HugeId(huge));
    assert!(is_free(2) && (order == Order::HUGE || is_free(3)));
    tenant.alloc(order).is_err()
}

#[test]
fn a_pair_that_came_free_within_a_look_is_not_refused_for_good() {
    assert!(!is_refused_after_a_failed_reclaim(Order::MAX));
}

#[test]
fn a_huge_frame_that_came_free_within_a_look_is_not_refused_for_good() {
    assert!(!is_refused_after_a_failed_reclaim(Order::HUGE));
}

/// A look for order 10 is not disturbed by others who take and free one half beside what the host holds.
#[test]
fn a_look_is_not_disturbed_by_who_frees_within_a_look_beside_what_is_held() {
    let parts = Parts::free(2);
    let tenant = parts.tenant();
    parts.host().claim(HugeId(1)).expect("idle").reclaim(Reclaim::Hard).expect("free").done();
    tenant.recount();
    let looking = tenant.refusal.begin(Order::MAX, 0);
    _ = tenant.lower.take(HugeId(0), Order::HUGE).expect("free");
    tenant.free(FrameId(0), Order::HUGE).expect("ours");
    assert!(tenant.refusal.conclude(looking, Unsure::NONE.with(0)), "nothing that fits came free");
}

/// Its process was killed between the change of an entry and the look at the hint.
#[test]
fn what_a_dead_handle_freed_without_a_word_is_not_refused_for_good() {
    let parts = Parts::free(1);
    let tenant = parts.tenant();
    tenant.recount();
    let order = Order::new(3).expect("in range");
    let blocks: Vec<_> = core::iter::from_fn(|| tenant.alloc(order).ok()).collect();
    let words = [const { AtomicU64::new(0) }; LEDGER_WORDS];
    core::mem::forget(tenant.recorded_cpu(Ledger::new(&words)).expect("nobody has it"));
    _ = tenant.lower.give(blocks[0].position().0, order).expect("ours");
    // Of a newcomer, who knows no place.
    let mut cpu = tenant.cpu();
    assert!(cpu.alloc(order).is_err(), "nobody told");
    assert_eq!(tenant.give_back(Ledger::new(&words)), 0);
    assert!(cpu.alloc(order).is_ok());
}
