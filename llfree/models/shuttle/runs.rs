//! Runs of a few frames that come and go in one row, while others look for longer ones and lower the bound of the huge frame
//! on its runs.
//!
//! What nobody has in the end is granted, whatever was refused before. A bound that is not raised again, for a run that came
//! free within the look, is found once in a hundred thousand schedules or two.

use super::shared::Shared;
use super::{ask, histories, nothing_free_is_refused, order};
use crate::host::Residency;
use crate::row::longest_run;
use shared_layout::{FrameId, HugeEntry, Order, Run};
use std::sync::Arc;

/// The first frames of the first row: some are free at first, the others are there to be freed. All beyond are in use for good.
const FRAMES: u64 = 8;

fn run(seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let free = (rng.u64(..1 << FRAMES) & rng.u64(..1 << FRAMES)).max(1);
    // Never less than there is, and more where a run was cut up.
    let bound = longest_run(!free).max(Run::from_bits(rng.u16(..=4)));
    let entry = HugeEntry::FREE_INSTALLED.take(512 - free.count_ones() as u16).expect("in range");
    let entry = entry.lower(bound).expect("a huge frame with room begins with any");
    let used = move |row: usize| if row == 0 { !free } else { u64::MAX };
    let shared = Arc::new(Shared::new(&[(entry, Residency::Installed)], used).listed(rng.bool()));
    let tenant = shared.tenant();
    for _ in 0..rng.u8(..3) {
        ask(&tenant, order(rng.u8(1..=3)));
    }
    let mut threads = Vec::new();
    let mut ours: Vec<u64> = (0..FRAMES).filter(|frame| free >> frame & 1 == 0).collect();
    rng.shuffle(&mut ours);
    for frame in ours.into_iter().take(rng.usize(1..=4)) {
        let shared = shared.clone();
        threads.push(shuttle::thread::spawn(move || {
            shared.tenant().free(FrameId(frame), Order::BASE).expect("ours");
        }));
    }
    for _ in 0..rng.u8(1..=2) {
        let (shared, order, keeps) = (shared.clone(), order(rng.u8(..=3)), rng.bool());
        threads.push(shuttle::thread::spawn(move || {
            let tenant = shared.tenant();
            if keeps { _ = tenant.alloc(order) } else { _ = ask(&tenant, order) }
        }));
    }
    threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    (0..=3).rev().for_each(|wanted| nothing_free_is_refused(&tenant, order(wanted), seed));
}

#[test]
fn a_run_that_nobody_has_is_not_refused_for_good() {
    histories(200_000, run);
}
