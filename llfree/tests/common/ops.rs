//! The allocator and its host against a model that is obviously right: a set of owned frames and
//! one state a huge frame. Operations of both sides, one after the other.

use crate::common::Table;
use llfree::{AllocError, Allocation, Class, Cpu, FreeError, HANDLE_FRAMES, Reclaim, Residency, Tenant};
use shared_layout::{FRAMES_PER_HUGE, FrameId, HugeId, Order};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

/// Handles at work.
pub(crate) const CPUS: usize = 3;
/// Sizes around a tree, a pair, and what fits in none.
pub(crate) const SIZES: [usize; 12] = [1, 2, 3, 7, 15, 16, 17, 20, 31, 32, 33, 50];

/// One call; `cpu` beyond [`CPUS`] means without a handle, numbers beyond the table are meant to be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    Alloc { cpu: usize, order: Order, class: Class },
    AllocAt { frame: u64, order: Order },
    Free { cpu: usize, pick: usize },
    FreeRaw { cpu: usize, frame: u64, order: Order },
    Drain { cpu: usize },
    Reclaim { huge: u32, hard: bool, fails: bool },
    Release { huge: u32, epoch: bool },
    Install { huge: u32, fails: bool },
    Recount,
    Scribble { word: usize, bits: u64 },
}

struct Model {
    huge_frames: u64,
    blocks: BTreeMap<u64, Order>,
    owned: Vec<bool>,
    state: Vec<Residency>,
}

impl Model {
    fn state(&self, huge: u32) -> Option<Residency> {
        self.state.get(huge as usize).copied()
    }

    fn add(&mut self, tenant: &Tenant<'_>, allocation: Allocation) {
        let (frame, order) = allocation.position();
        assert!(frame.is_aligned(order));
        let mut evicted = false;
        assert!(frame.0 + order.frames() <= self.owned.len() as u64, "{frame:?} lies beyond the table");
        for owned in &mut self.owned[range(frame.0, order)] {
            assert!(!std::mem::replace(owned, true), "{frame:?} has two owners");
        }
        for huge in 0..order.huge_frames() {
            let state = self.state[(frame.0 / FRAMES_PER_HUGE) as usize + huge as usize];
            assert_ne!(state, Residency::Held, "{frame:?} is held");
            evicted |= state == Residency::Evicted;
        }
        match allocation {
            Allocation::Ready(block) => assert!(!evicted, "{block:?} was given out as ready without memory"),
            Allocation::Evicted(block) => {
                assert!(evicted, "{block:?} has memory behind it");
                assert!(block.confirm(tenant).is_err(), "nobody installed it");
            }
        }
        self.blocks.insert(frame.0, order);
    }

    fn remove(&mut self, pick: usize) -> Option<(FrameId, Order)> {
        let frame = *self.blocks.keys().nth(pick % self.blocks.len().max(1))?;
        let order = self.blocks.remove(&frame)?;
        self.owned[range(frame, order)].fill(false);
        Some((FrameId(frame), order))
    }

    /// Whether somebody owns a frame of a block; beyond the table nobody does.
    fn owns_part_of(&self, frame: u64, order: Order) -> bool {
        self.owned.iter().skip(frame as usize).take(order.frames() as usize).any(|owned| *owned)
    }

    /// Frames that nobody owns and the host does not hold; handles may cache some of them.
    fn free(&self) -> u64 {
        let held = self.state.iter().filter(|state| **state == Residency::Held).count() as u64;
        let owned = self.blocks.values().map(|order| order.frames()).sum::<u64>();
        (self.huge_frames - held) * FRAMES_PER_HUGE - owned
    }
}

fn range(frame: u64, order: Order) -> std::ops::Range<usize> {
    frame as usize..(frame + order.frames()) as usize
}

/// Runs operations over a table of its own; panics where the two sides and the model disagree.
pub(crate) fn run(huge_frames: usize, ops: impl IntoIterator<Item = Op>) {
    let table = Table::evicted(huge_frames);
    let tenant = table.tenant();
    let mut cpus: [Cpu<'_>; CPUS] = core::array::from_fn(|_| tenant.cpu());
    let mut model = Model {
        huge_frames: huge_frames as u64,
        blocks: BTreeMap::new(),
        owned: vec![false; huge_frames * 512],
        state: vec![Residency::Evicted; huge_frames],
    };
    for op in ops {
        step(&table, &mut cpus, &mut model, op);
        for (huge, state) in model.state.iter().enumerate() {
            let huge = HugeId(huge as u32);
            assert_eq!(table.host().residency(huge), Some(*state));
            let evicted = tenant.entry(huge).expect("in range").is_evicted();
            assert_eq!(evicted, *state != Residency::Installed, "{huge:?}");
        }
        let cached = model.free() - tenant.stats().free_frames;
        assert!(cached <= CPUS as u64 * HANDLE_FRAMES, "handles hold {cached} frames back");
    }
    // Nothing is lost: without the caches, the table holds exactly what the model does.
    cpus.iter_mut().for_each(Cpu::drain);
    assert_eq!(tenant.stats().free_frames, model.free());
    assert_eq!((tenant.validate(), table.host().validate()), (Ok(()), Ok(())));
    assert_eq!(table.host().census().corrupt, 0);
    // And its last frame can be allocated.
    let [cpu, ..] = &mut cpus;
    let free = model.free();
    for _ in 0..free {
        model.add(&tenant, cpu.alloc(Order::BASE).expect("the table says that it is free"));
    }
    assert_eq!(cpu.alloc(Order::BASE), Err(AllocError::OutOfMemory(Order::BASE)));
}

fn step(table: &Table, cpus: &mut [Cpu<'_>; CPUS], model: &mut Model, op: Op) {
    let (tenant, host) = (table.tenant(), table.host());
    match op {
        Op::Alloc { cpu, order, class } => {
            let got = cpus.get_mut(cpu).map_or_else(|| tenant.alloc(order), |cpu| cpu.alloc_class(order, class));
            match got {
                Ok(allocation) => model.add(&tenant, allocation),
                Err(e) => {
                    assert_eq!(e, AllocError::OutOfMemory(order));
                    // Exact for every order: what other handles cache is taken in the table, and its
                    // own must be in the table by now.
                    if let Some(cpu) = cpus.get_mut(cpu) {
                        cpu.drain();
                    }
                    assert!(!table.has_free_block(order), "order {} is free", order.get());
                    let others = CPUS as u64 * HANDLE_FRAMES;
                    assert!(order != Order::BASE || model.free() <= others, "frames were lost");
                }
            }
        }
        Op::AllocAt { frame, order } => match tenant.alloc_at(FrameId(frame), order) {
            Ok(allocation) => {
                assert_eq!(allocation.position(), (FrameId(frame), order));
                model.add(&tenant, allocation);
            }
            Err(AllocError::OutOfRange(..)) => {
                assert!(frame + order.frames() > model.huge_frames * FRAMES_PER_HUGE);
            }
            Err(AllocError::Misaligned(..)) => assert!(!FrameId(frame).is_aligned(order)),
            Err(e) => {
                assert_eq!(e, AllocError::NotFree(FrameId(frame), order));
                // If nobody owns a frame of it and the host holds none, a handle caches some.
                let owned = model.owns_part_of(frame, order);
                let first = (frame / FRAMES_PER_HUGE) as u32;
                let held = (first..first + order.huge_frames()).any(|h| model.state(h) == Some(Residency::Held));
                assert!(owned || held || tenant.stats().free_frames < model.free(), "frame {frame} is free");
            }
        },
        Op::Free { cpu, pick } => {
            let Some((frame, order)) = model.remove(pick) else { return };
            let freed = cpus.get_mut(cpu).map_or_else(|| tenant.free(frame, order), |cpu| cpu.free(frame, order));
            assert_eq!(freed, Ok(()));
        }
        Op::FreeRaw { cpu, frame, order } => {
            // A part of one's own block below order 9 may be freed; here, only what nobody owns.
            if model.owns_part_of(frame, order) {
                return;
            }
            // Frames in caches are owned by handles, not by us: the table would take them.
            cpus.iter_mut().for_each(Cpu::drain);
            let frame = FrameId(frame);
            let refused = cpus.get_mut(cpu).map_or_else(|| tenant.free(frame, order), |cpu| cpu.free(frame, order));
            assert!(!matches!(refused.expect_err("nobody owns it"), FreeError::Corrupt(_)));
        }
        Op::Drain { cpu } => {
            if let Some(cpu) = cpus.get_mut(cpu) {
                cpu.drain();
            }
        }
        Op::Reclaim { huge, hard, fails } => {
            let how = if hard { Reclaim::Hard } else { Reclaim::Soft };
            let Some(claim) = host.claim(HugeId(huge)) else {
                assert_eq!(model.state(huge), None, "one party only: nobody else has a claim");
                return;
            };
            let free = tenant.entry(HugeId(huge)).is_some_and(|e| e.is_all_free());
            match claim.reclaim(how) {
                Ok(reclaimed) => {
                    let first = HugeId(huge).first_frame().0;
                    assert!(!model.owns_part_of(first, Order::HUGE), "the host took an owned frame");
                    assert_eq!(reclaimed.has_memory(), model.state(huge) == Some(Residency::Installed));
                    if !fails {
                        reclaimed.done();
                        model.state[huge as usize] = if hard { Residency::Held } else { Residency::Evicted };
                    }
                }
                Err(_) => assert!(!free || (!hard && model.state(huge) != Some(Residency::Installed))),
            }
        }
        Op::Release { huge, epoch } => {
            let Some(claim) = host.claim(HugeId(huge)) else { return };
            let held = model.state(huge) == Some(Residency::Held);
            assert_eq!(claim.release().ok(), held.then_some(true));
            if held {
                model.state[huge as usize] = Residency::Evicted;
                // A tenant finds the frame even if nobody tells it.
                table.epoch.fetch_add(u64::from(epoch), Ordering::Release);
            }
        }
        Op::Install { huge, fails } => {
            let Some(claim) = host.claim(HugeId(huge)) else { return };
            let state = model.state(huge);
            match claim.install() {
                Ok(installing) => {
                    assert_eq!(installing.needs_memory(), state == Some(Residency::Evicted));
                    if !fails {
                        installing.done();
                        model.state[huge as usize] = Residency::Installed;
                    }
                }
                Err(_) => assert_eq!(state, Some(Residency::Held)),
            }
        }
        Op::Recount => tenant.recount(),
        Op::Scribble { word, bits } => {
            // Hints may say anything at any time.
            let hints = table.hints.len();
            if word < hints {
                table.hints[word].store(bits as u16, Ordering::Relaxed);
            } else {
                table.summary[word % table.summary.len()].store(bits, Ordering::Relaxed);
            }
        }
    }
}
