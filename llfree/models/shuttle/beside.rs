//! Pairs whose halves come free while the host has one of them in hand, which it gives back without a word, or in an epoch in which
//! it says that this may be.
//!
//! Order 10 is refused wrongly afterwards if what somebody saw of one half and what another one saw of the other are put together
//! badly; nothing else would ever mend that. Each run has another history of promises and refusals.

use super::shared::Shared;
use super::{ask, histories, nothing_free_is_refused, order};
use crate::host::{Reclaim, Reclaimed, Residency};
use crate::sync::Ordering;
use crate::tenant::Tenant;
use shared_layout::table::next_epoch;
use shared_layout::{FrameId, HugeEntry, HugeId, Order};
use std::sync::Arc;

fn frame(huge: usize) -> FrameId {
    FrameId(huge as u64 * Order::HUGE.frames())
}

/// Two pairs.
const HALVES: usize = 4;

/// What the host says of what it holds, if anything.
struct Voice<'a> {
    shared: &'a Shared,
    speaks: bool,
}

impl Voice<'_> {
    /// Another epoch.
    fn say(&self, held_stays: bool) {
        if self.speaks {
            let epoch = next_epoch(self.shared.epoch.load(Ordering::Relaxed), held_stays);
            self.shared.epoch.store(epoch, Ordering::Release);
        }
    }

    /// No discard goes well: the frame is as it was.
    fn undo(&self, reclaimed: Reclaimed<'_>) {
        self.say(false);
        drop(reclaimed);
        self.say(true);
    }
}

fn ask_for_any(tenant: &Tenant<'_>, rng: &mut fastrand::Rng) {
    ask(tenant, order([3, 9, 10][rng.usize(..3)]));
}

fn run(speaks: bool, seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let frames = [(HugeEntry::FREE_INSTALLED, Residency::Installed); HALVES];
    let shared = Arc::new(Shared::new(&frames, |_| 0).listed(rng.bool()));
    let voice = Voice { shared: &shared, speaks };
    // If not yet, the host before it was another one.
    if rng.bool() {
        voice.say(true);
    }
    let tenant = shared.tenant();
    let mut used = [true; HALVES];
    for half in 0..HALVES {
        let _ = tenant.alloc_at(frame(half), Order::HUGE).expect("free");
    }
    for _ in 0..rng.u8(..4) {
        let half = rng.usize(..HALVES);
        if used[half] {
            tenant.free(frame(half), Order::HUGE).expect("ours");
        } else {
            let _ = tenant.alloc_at(frame(half), Order::HUGE).expect("free");
        }
        used[half] = !used[half];
        ask_for_any(&tenant, &mut rng);
    }
    ask_for_any(&tenant, &mut rng);
    let mut threads = Vec::new();
    for (half, is_used) in used.into_iter().enumerate() {
        if !is_used || rng.u8(..4) == 0 {
            continue;
        }
        let (shared, again) = (shared.clone(), rng.u8(..3) == 0);
        threads.push(shuttle::thread::spawn(move || {
            let tenant = shared.tenant();
            tenant.free(frame(half), Order::HUGE).expect("ours");
            if again && tenant.alloc_at(frame(half), Order::HUGE).is_ok() {
                tenant.free(frame(half), Order::HUGE).expect("ours");
            }
        }));
    }
    if rng.bool() {
        let (shared, order) = (shared.clone(), order([3, 9, 10, 10][rng.usize(..4)]));
        threads.push(shuttle::thread::spawn(move || _ = ask(&shared.tenant(), order)));
    }
    let host = shared.host();
    let mut held = Vec::new();
    for _ in 0..rng.usize(1..10) {
        if let Some(claim) = host.claim(HugeId(rng.u32(..HALVES as u32)))
            && let Ok(reclaimed) = claim.reclaim(Reclaim::Hard)
        {
            held.push(reclaimed);
            if rng.u8(..4) == 0 {
                voice.undo(held.swap_remove(rng.usize(..held.len())));
            }
        }
        shuttle::thread::yield_now();
    }
    threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    for _ in 0..rng.u8(..3) {
        ask_for_any(&tenant, &mut rng);
    }
    if rng.bool() {
        held.into_iter().for_each(|reclaimed| voice.undo(reclaimed));
    } else {
        voice.say(false);
        drop(held);
        if rng.bool() {
            voice.say(true);
        }
    }
    nothing_free_is_refused(&tenant, order([0, 3, 9, 10, 10, 10][rng.usize(..6)]), seed);
}

#[test]
fn what_the_host_gives_back_without_a_word_is_not_refused_for_good() {
    histories(100_000, |seed| run(false, seed));
}

#[test]
fn what_the_host_says_that_it_gives_back_is_not_refused_for_good() {
    histories(100_000, |seed| run(true, seed));
}

/// The tenant is at work while a host that gave something back in silence is followed by one that says when it does.
#[test]
fn what_came_back_before_the_host_spoke_is_not_refused_for_good() {
    histories(20_000, |seed| {
        let frames = [(HugeEntry::FREE_INSTALLED, Residency::Installed); 2];
        let shared = Arc::new(Shared::new(&frames, |_| 0));
        let tenant = shared.tenant();
        let _ = tenant.alloc_at(frame(0), Order::HUGE).expect("free");
        assert!(!ask(&tenant, order(10)));
        let freer = {
            let shared = shared.clone();
            shuttle::thread::spawn(move || shared.tenant().free(frame(0), Order::HUGE).expect("ours"))
        };
        let host = shared.host();
        let reclaimed = host.claim(HugeId(1)).map(|claim| claim.reclaim(Reclaim::Hard));
        shuttle::thread::yield_now();
        drop(reclaimed);
        shared.epoch.store(next_epoch(0, true), Ordering::Release);
        freer.join().expect("no panic");
        nothing_free_is_refused(&tenant, order(10), seed);
    });
}
