//! The allocator and its host against a model that is obviously right: a set of owned frames and
//! one state a huge frame. Random operations on both sides, one after the other.

mod common;

use common::Table;
use llfree::{AllocError, Allocation, FreeError, Reclaim, Residency};
use proptest::prelude::*;
use shared_layout::{FRAMES_PER_HUGE, FrameId, HugeId, Order};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

const HUGE: usize = 20;

#[derive(Clone, Debug)]
enum Op {
    Alloc { cpu: usize, order: u8 },
    AllocAt { frame: u64, order: u8 },
    Free { cpu: usize, pick: usize },
    FreeRaw { frame: u64, order: u8 },
    Drain { cpu: usize },
    Reclaim { huge: u32, hard: bool },
    Release { huge: u32 },
    Install { huge: u32 },
}

fn op() -> impl Strategy<Value = Op> {
    let frame = 0..(HUGE as u64 + 1) * FRAMES_PER_HUGE;
    let order = prop_oneof![4 => 0u8..=10, 2 => Just(0u8), 1 => 9u8..=10];
    let huge = 0..HUGE as u32 + 1;
    prop_oneof![
        8 => (0..2usize, order.clone()).prop_map(|(cpu, order)| Op::Alloc { cpu, order }),
        2 => (frame.clone(), order.clone()).prop_map(|(frame, order)| Op::AllocAt { frame, order }),
        7 => (0..2usize, any::<usize>()).prop_map(|(cpu, pick)| Op::Free { cpu, pick }),
        1 => (frame, order).prop_map(|(frame, order)| Op::FreeRaw { frame, order }),
        1 => (0..2usize).prop_map(|cpu| Op::Drain { cpu }),
        3 => (huge.clone(), any::<bool>()).prop_map(|(huge, hard)| Op::Reclaim { huge, hard }),
        2 => huge.clone().prop_map(|huge| Op::Release { huge }),
        2 => huge.prop_map(|huge| Op::Install { huge }),
    ]
}

#[derive(Default)]
struct Model {
    blocks: BTreeMap<u64, Order>,
    owned: BTreeSet<u64>,
    state: BTreeMap<u32, Residency>,
}

impl Model {
    fn state(&self, huge: u32) -> Residency {
        self.state.get(&huge).copied().unwrap_or(Residency::Evicted)
    }

    fn add(&mut self, allocation: &Allocation) {
        let (frame, order) = allocation.position();
        assert!(frame.is_aligned(order));
        let mut evicted = false;
        for f in frame.0..frame.0 + order.frames() {
            assert!(self.owned.insert(f), "frame {f} has two owners");
            let huge = FrameId(f).huge().expect("in the table").0;
            assert!((huge as usize) < HUGE, "frame {f} lies beyond the table");
            assert_ne!(self.state(huge), Residency::Held, "frame {f} is held");
            evicted |= self.state(huge) == Residency::Evicted;
        }
        assert_eq!(matches!(allocation, Allocation::Evicted(_)), evicted, "R and the entry disagree");
        self.blocks.insert(frame.0, order);
    }

    fn remove(&mut self, frame: u64) -> Order {
        let order = self.blocks.remove(&frame).expect("owned");
        for f in frame..frame + order.frames() {
            assert!(self.owned.remove(&f));
        }
        order
    }

    fn used_in(&self, huge: u32) -> usize {
        let first = u64::from(huge) * FRAMES_PER_HUGE;
        self.owned.range(first..first + FRAMES_PER_HUGE).count()
    }
}

fn order(order: u8) -> Order {
    Order::new(order).expect("in range")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn both_sides_agree_with_the_model(ops in prop::collection::vec(op(), 1..400)) {
        let table = Table::evicted(HUGE);
        let (tenant, host) = (table.tenant(), table.host());
        let mut cpus = [tenant.cpu(), tenant.cpu()];
        let mut model = Model::default();
        for op in ops {
            match op {
                Op::Alloc { cpu, order: o } => match cpus[cpu].alloc(order(o)) {
                    Ok(allocation) => model.add(&allocation),
                    Err(e) => prop_assert_eq!(e, AllocError::OutOfMemory(order(o))),
                },
                Op::AllocAt { frame, order: o } => match tenant.alloc_at(FrameId(frame), order(o)) {
                    Ok(allocation) => {
                        prop_assert_eq!(allocation.position(), (FrameId(frame), order(o)));
                        model.add(&allocation);
                    }
                    Err(AllocError::OutOfRange(..)) => {
                        prop_assert!(frame + order(o).frames() > HUGE as u64 * FRAMES_PER_HUGE);
                    }
                    Err(AllocError::Misaligned(..)) => prop_assert!(!FrameId(frame).is_aligned(order(o))),
                    // Owned, held, or in the row cache of a handle.
                    Err(AllocError::NotFree(..)) => {}
                    Err(e) => prop_assert!(false, "{e}"),
                },
                Op::Free { cpu, pick } => {
                    let Some(frame) = model.blocks.keys().nth(pick % model.blocks.len().max(1)).copied() else { continue };
                    let order = model.remove(frame);
                    prop_assert_eq!(cpus[cpu].free(FrameId(frame), order), Ok(()));
                }
                Op::FreeRaw { frame, order: o } => {
                    // A block that nobody owns in this shape; a free of a part of one is legal below order 9.
                    let inside = (frame..frame + order(o).frames()).any(|f| model.owned.contains(&f));
                    if !inside {
                        // Frames in row caches are owned by handles, not by us: `tenant.free` would take them.
                        cpus.iter_mut().for_each(llfree::Cpu::drain);
                        let refused = tenant.free(FrameId(frame), order(o)).expect_err("nobody owns it");
                        prop_assert!(!matches!(refused, FreeError::Corrupt(_)));
                    }
                }
                Op::Drain { cpu } => cpus[cpu].drain(),
                Op::Reclaim { huge, hard } => {
                    let how = if hard { Reclaim::Hard } else { Reclaim::Soft };
                    let Some(claim) = host.claim(HugeId(huge)) else {
                        prop_assert_eq!(huge as usize, HUGE);
                        continue;
                    };
                    if let Ok(reclaimed) = claim.reclaim(how) {
                        prop_assert_eq!(model.used_in(huge), 0, "the host took an owned frame");
                        prop_assert_eq!(reclaimed.has_memory(), model.state(huge) == Residency::Installed);
                        reclaimed.done();
                        model.state.insert(huge, if hard { Residency::Held } else { Residency::Evicted });
                    }
                }
                Op::Release { huge } => {
                    let Some(claim) = host.claim(HugeId(huge)) else { continue };
                    let held = model.state(huge) == Residency::Held;
                    prop_assert_eq!(claim.release().ok(), held.then_some(true));
                    if held {
                        model.state.insert(huge, Residency::Evicted);
                        table.epoch.fetch_add(1, Ordering::Release);
                    }
                }
                Op::Install { huge } => {
                    let Some(claim) = host.claim(HugeId(huge)) else { continue };
                    let state = model.state(huge);
                    match claim.install() {
                        Ok(installing) => {
                            prop_assert_eq!(installing.needs_memory(), state == Residency::Evicted);
                            installing.done();
                            model.state.insert(huge, Residency::Installed);
                        }
                        Err(_) => prop_assert_eq!(state, Residency::Held),
                    }
                }
            }
            for huge in 0..HUGE as u32 {
                prop_assert_eq!(host.residency(HugeId(huge)), Some(model.state(huge)));
                let evicted = tenant.entry(HugeId(huge)).expect("in range").is_evicted();
                prop_assert_eq!(evicted, model.state(huge) != Residency::Installed);
            }
        }
        // Nothing is lost: without the caches, the table holds exactly what the model does.
        cpus.iter_mut().for_each(llfree::Cpu::drain);
        let held = model.state.values().filter(|s| **s == Residency::Held).count() as u64;
        let free = (HUGE as u64 - held) * FRAMES_PER_HUGE - model.owned.len() as u64;
        prop_assert_eq!(tenant.stats().free_frames, free);
        prop_assert_eq!(tenant.validate(), Ok(()));
        prop_assert_eq!(host.census().corrupt, 0);
        // And the last frame of it can be had.
        let mut cpu = tenant.cpu();
        for _ in 0..free {
            let allocation = cpu.alloc(Order::BASE).expect("the table says that it is free");
            model.add(&allocation);
        }
        prop_assert_eq!(cpu.alloc(Order::BASE).err(), Some(AllocError::OutOfMemory(Order::BASE)));
    }

    #[test]
    fn the_host_is_total_on_any_bytes(
        entries in prop::collection::vec(any::<u16>(), 1..64),
        residency in prop::collection::vec(0u8..3, 64),
    ) {
        let table = Table::evicted(entries.len());
        for (word, bits) in table.entries.iter().zip(&entries) {
            word.store(*bits, Ordering::Relaxed);
        }
        for (word, r) in table.residency.iter().zip(&residency) {
            word.store(*r, Ordering::Relaxed);
        }
        let host = table.host();
        let _ = host.census();
        for huge in (0..entries.len() as u32 + 2).map(HugeId) {
            let before = host.residency(huge);
            for how in [Reclaim::Soft, Reclaim::Hard] {
                if let Some(claim) = host.claim(huge) {
                    let _ = claim.reclaim(how).map(llfree::Reclaimed::done);
                }
            }
            if let Some(claim) = host.claim(huge) {
                let _ = claim.release();
            }
            if let Some(claim) = host.claim(huge) {
                let _ = claim.install().map(llfree::Installing::done);
            }
            // Whatever the guest wrote, an install or a return of a frame that R allows goes through.
            if before.is_some() {
                prop_assert_eq!(host.residency(huge), Some(Residency::Installed));
            }
        }
    }
}
