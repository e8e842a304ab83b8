//! What came free while nobody was told is not refused for good: a look was within the tree, the host gave it back, or its
//! owner died.

use super::{Parts, refuse};
use crate::class::Class;
use crate::host::Reclaim;
use crate::ledger::{LEDGER_WORDS, Ledger};
use crate::query::Query;
use crate::refusal::{Refusal, Unsure};
use crate::spot::Spot;
use crate::sync::AtomicU64;
use crate::vicinity::Vicinity;
use shared_layout::{FrameId, HugeId, Order};
use std::vec::Vec;

/// While a look for a block of `order` is within a tree something comes free under a promise that stands, which the host
/// holds, or half of it; in the end it gives that back, for its reclaim failed, without a new epoch unless it is one of those
/// that say when they do.
fn is_refused_after_a_failed_reclaim(order: Order, is_steady: bool) -> bool {
    let parts = if is_steady { Parts::free(4).steady() } else { Parts::free(4) };
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
    // The discard failed: the frame is as it was.
    assert_eq!(tenant.is_refused(order), is_steady, "it holds what is missing");
    if is_steady {
        parts.raise(false);
    }
    drop(held.into_inner().expect("held meanwhile"));
    let is_free = |huge: u32| tenant.is_free(HugeId(huge));
    assert!(is_free(2) && (order == Order::HUGE || is_free(3)));
    tenant.alloc(order).is_err()
}

#[test]
fn a_pair_that_came_free_within_a_look_is_not_refused_for_good() {
    for is_steady in [false, true] {
        assert!(!is_refused_after_a_failed_reclaim(Order::MAX, is_steady), "{is_steady}");
    }
}

#[test]
fn a_huge_frame_that_came_free_within_a_look_is_not_refused_for_good() {
    for is_steady in [false, true] {
        assert!(!is_refused_after_a_failed_reclaim(Order::HUGE, is_steady), "{is_steady}");
    }
}

/// A VM that was shrunk to its limit: the host holds huge frames of each tree, for good, and the rest is in use. If it says that
/// they stay held, nobody looks at all trees for each block that is not there.
#[test]
fn a_refusal_beside_what_stays_held_is_remembered() {
    let orders = [0, 3, 8, 9, 10].map(|order| Order::new(order).expect("in range"));
    for (parts, is_steady) in [(Parts::free(128), false), (Parts::free(128).steady(), true)] {
        let (tenant, host) = (parts.tenant(), parts.host());
        for huge in (1..128).step_by(2).map(HugeId) {
            host.claim(huge).expect("idle").reclaim(Reclaim::Hard).expect("free").done();
        }
        tenant.recount();
        while tenant.alloc(Order::HUGE).is_ok() {}
        for order in orders {
            assert!(tenant.alloc(order).is_err());
            assert_eq!(tenant.is_refused(order), is_steady, "{order:?}");
        }
        // What comes free is found, and no more than that: its other half is the host's.
        tenant.free(FrameId(64 * 512), Order::HUGE).expect("somebody's");
        assert!(!tenant.is_refused(Order::HUGE) && tenant.alloc(Order::MAX).is_err());
        assert_eq!(tenant.is_refused(Order::MAX), is_steady);
        // With the other half come larger blocks, before the host is through with its returns.
        parts.raise(false);
        assert!(!tenant.is_refused(Order::MAX) && tenant.alloc(Order::MAX).is_err());
        assert!(host.claim(HugeId(65)).expect("idle").release().expect("held"));
        assert!(!tenant.is_refused(Order::MAX) && tenant.alloc(Order::MAX).is_ok(), "{is_steady}");
    }
}

/// A free beside what stays held leaves order 10 refused.
#[test]
fn half_a_pair_is_no_news_beside_what_stays_held() {
    let parts = Parts::free(2).steady();
    let tenant = parts.tenant();
    parts.host().claim(HugeId(1)).expect("idle").reclaim(Reclaim::Hard).expect("free").done();
    tenant.recount();
    let block = tenant.alloc(Order::HUGE).expect("free").position().0;
    assert!(tenant.alloc(Order::MAX).is_err() && tenant.is_refused(Order::MAX));
    tenant.free(block, Order::HUGE).expect("ours");
    assert!(tenant.is_refused(Order::MAX) && !tenant.is_refused(Order::HUGE));
}

/// A quarter of a TiB comes back frame by frame, each with an epoch of its own, and nobody asks meanwhile.
#[test]
fn as_many_returns_as_an_epoch_has_room_for_are_not_taken_for_none() {
    for returns in (10..24).map(|bits| 1u64 << bits) {
        let word = AtomicU64::new(0);
        let refusal = Refusal::new(&word);
        refuse(refusal, 9);
        assert!(
            refusal.unsure(Order::HUGE, 0).is_none() && refusal.unsure(Order::HUGE, returns).is_some(),
            "{returns}"
        );
    }
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
