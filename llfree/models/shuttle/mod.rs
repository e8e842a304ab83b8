//! Long random schedules of CPUs with handles and a host that reclaims, returns and installs.
//!
//! With `cfg(shuttle)` the crate's atomics are shuttle's: each of their operations may be where another
//! thread goes on. What is checked lies in ordinary memory, which only one thread at a time can
//! reach: who owns a frame, and whether it is backed.
//!
//! `cargo test -p llfree-shuttle` runs them.

mod beside;
mod runs;
#[path = "../shared.rs"]
mod shared;

use crate::block::{Allocation, EvictedBlock};
use crate::class::Class;
use crate::cpu::Cpu;
use crate::host::{Reclaim, Residency};
use crate::run::Behind;
use crate::sync::Ordering;
use crate::tenant::Tenant;
use crate::vicinity::Vicinity;
use shared::Shared;
use shared_layout::{FrameId, HugeEntry, HugeId, Order};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use std::sync::{Arc, Mutex};

/// The truth: only the checks look here.
struct Truth {
    /// The owner of each base frame, 0 for nobody.
    owner: Vec<u8>,
    /// Whether each huge frame is backed by memory.
    memory: Vec<bool>,
    /// Blocks that one CPU allocated for another one to free.
    handed_over: Vec<(FrameId, Order)>,
}

struct Machine {
    shared: Shared,
    truth: Mutex<Truth>,
}

impl Machine {
    /// All free; every other huge frame is backed.
    fn new(huge_frames: u32, listed: bool) -> Self {
        let installed = |huge: u32| huge.is_multiple_of(2);
        let state = |huge| match installed(huge) {
            true => (HugeEntry::FREE_INSTALLED, Residency::Installed),
            false => (HugeEntry::FREE_EVICTED, Residency::Evicted),
        };
        Self {
            shared: Shared::new(&(0..huge_frames).map(state).collect::<Vec<_>>(), |_| 0).listed(listed),
            truth: Mutex::new(Truth {
                owner: vec![0; huge_frames as usize * 512],
                memory: (0..huge_frames).map(installed).collect(),
                handed_over: Vec::new(),
            }),
        }
    }

    fn truth(&self) -> std::sync::MutexGuard<'_, Truth> {
        self.truth.lock().expect("no panic")
    }

    /// Fills the table but for a few frames, all over it, so that everybody wants the same ones.
    fn squeeze(&self, rng: &mut fastrand::Rng) {
        let tenant = self.shared.tenant();
        for huge in 0..self.shared.entries.len() as u64 {
            // A third of the huge frames stays whole.
            if rng.u8(..3) == 0 {
                continue;
            }
            for row in 0..8 {
                let first = huge * 512 + row * 64;
                let _ = tenant.alloc_at(FrameId(first), Order::ROW).expect("free").position();
                for _ in 0..[0, 0, 0, 2, 6, 24][rng.usize(..6)] {
                    let _ = tenant.free(FrameId(first + rng.u64(..64)), Order::BASE);
                }
            }
        }
        let mut truth = self.truth();
        for (frame, owner) in truth.owner.iter_mut().enumerate() {
            if self.shared.rows[frame / 64].load(Ordering::Relaxed) >> (frame % 64) & 1 != 0 {
                *owner = u8::MAX;
            }
        }
    }

    fn install(&self, block: &EvictedBlock) {
        for huge in (0..block.huge_frames()).map(|i| HugeId(block.first_huge().0 + i)) {
            let claim = loop {
                match self.shared.host().claim(huge) {
                    Some(claim) => break claim,
                    None => shuttle::thread::yield_now(),
                }
            };
            let installing = claim.install().expect("a huge frame with an owner inside is not held");
            if installing.needs_memory() {
                let was = std::mem::replace(&mut self.truth().memory[huge.index()], true);
                assert!(!was, "memory is put behind a frame once");
            }
            installing.done();
        }
    }

    /// Becomes the owner of a block. `None` if it was given back without being used.
    fn own(&self, me: u8, allocation: Allocation, cpu: &mut Cpu<'_>, use_it: bool) -> Option<(FrameId, Order)> {
        let (frame, order) = allocation.position();
        assert!(frame.is_aligned(order));
        for owner in &mut self.truth().owner[frame.0 as usize..(frame.0 + order.frames()) as usize] {
            assert_eq!(std::mem::replace(owner, me), 0, "{frame:?} has two owners");
        }
        if let Allocation::Evicted(block) = allocation {
            if !use_it {
                let (frame, order) = block.release();
                self.disown(me, frame, order);
                cpu.free(frame, order).expect("ours");
                return None;
            }
            self.install(&block);
            assert!(block.confirm(&self.shared.tenant()).is_ok(), "an install that returned left it evicted");
        }
        let truth = self.truth();
        let first = (frame.0 / 512) as usize;
        let behind = &truth.memory[first..first + order.huge_frames() as usize];
        assert!(behind.iter().all(|memory| *memory), "{frame:?} was given out as ready without memory");
        Some((frame, order))
    }

    fn disown(&self, me: u8, frame: FrameId, order: Order) {
        for owner in &mut self.truth().owner[frame.0 as usize..(frame.0 + order.frames()) as usize] {
            assert_eq!(std::mem::replace(owner, 0), me, "{frame:?} changed its owner");
        }
    }

    fn work(&self, me: u8, steps: usize, mut rng: fastrand::Rng) {
        const SHARED: u8 = 100;
        let tenant = self.shared.tenant();
        let mut cpu = tenant.cpu();
        let mut mine = Vec::new();
        for _ in 0..steps {
            match rng.u8(..16) {
                0..8 => {
                    let order =
                        Order::new([0, 0, 0, 0, 0, 1, 2, 3, 5, 6, 7, 8, 9, 9, 10][rng.usize(..15)]).expect("in range");
                    let allocation = match rng.u8(..8) {
                        0 => tenant.alloc(order),
                        1 => cpu.alloc_class(order, Class::IMMOVABLE),
                        _ => cpu.alloc(order),
                    };
                    if let Some(block) = allocation.ok().and_then(|a| self.own(me, a, &mut cpu, rng.u8(..4) > 0)) {
                        mine.push(block);
                    }
                }
                8..12 if !mine.is_empty() => {
                    let (frame, order) = mine.swap_remove(rng.usize(..mine.len()));
                    self.disown(me, frame, order);
                    if rng.u8(..4) == 0 { tenant.free(frame, order) } else { cpu.free(frame, order) }.expect("ours");
                }
                12 if !mine.is_empty() => {
                    let (frame, order) = mine.swap_remove(rng.usize(..mine.len()));
                    self.disown(me, frame, order);
                    let mut truth = self.truth();
                    truth.owner[frame.0 as usize..(frame.0 + order.frames()) as usize].fill(SHARED);
                    truth.handed_over.push((frame, order));
                }
                13 | 14 => {
                    let block = self.truth().handed_over.pop();
                    if let Some((frame, order)) = block {
                        self.disown(SHARED, frame, order);
                        cpu.free(frame, order).expect("handed over to us");
                    }
                }
                _ => cpu.drain(),
            }
        }
        for (frame, order) in mine {
            self.disown(me, frame, order);
            cpu.free(frame, order).expect("ours");
        }
    }

    fn reclaim(&self, steps: usize, mut rng: fastrand::Rng) {
        let host = self.shared.host();
        for _ in 0..steps {
            let huge = HugeId(rng.u32(..self.shared.entries.len() as u32));
            let Some(claim) = host.claim(huge) else { continue };
            if claim.residency() == Residency::Held {
                assert!(claim.release().expect("held"), "nobody but the host changes a held entry");
                self.shared.epoch.fetch_add(1, Ordering::Release);
                continue;
            }
            let how = if rng.bool() { Reclaim::Hard } else { Reclaim::Soft };
            if let Ok(reclaimed) = claim.reclaim(how) {
                let mut truth = self.truth();
                assert_eq!(reclaimed.has_memory(), truth.memory[huge.index()], "R is the truth");
                if how == Reclaim::Hard || rng.u8(..4) > 0 {
                    let first = huge.index() * 512;
                    // An evicted frame may have been allocated since, but not yet be in use.
                    let owners = truth.owner[first..first + 512].iter().filter(|owner| **owner != 0).count();
                    assert!(how == Reclaim::Soft || owners == 0, "the host holds a frame with an owner");
                    truth.memory[huge.index()] = false;
                    drop(truth);
                    reclaimed.done();
                } else {
                    // The discard failed.
                    drop(truth);
                    drop(reclaimed);
                }
            }
        }
        for huge in (0..self.shared.entries.len() as u32).map(HugeId) {
            while let Some(held) = host.residency(huge).filter(|r| *r == Residency::Held) {
                if let Some(claim) = host.claim(huge) {
                    assert_eq!(claim.residency(), held);
                    assert!(claim.release().expect("held"));
                }
            }
        }
    }
}

fn run(cpus: u8, huge_frames: u32, squeeze: bool) {
    use shuttle::rand::Rng;
    // The scheduler's randomness, so that a printed schedule replays.
    let seed: u64 = shuttle::rand::thread_rng().r#gen();
    let mut rng = fastrand::Rng::with_seed(seed);
    let machine = Arc::new(Machine::new(huge_frames, rng.bool()));
    if squeeze {
        machine.squeeze(&mut rng);
    }
    let mut threads: Vec<_> = (1..=cpus)
        .map(|id| {
            let (machine, rng) = (machine.clone(), rng.fork());
            shuttle::thread::spawn(move || machine.work(id, 14, rng))
        })
        .collect();
    let (host, rng) = (machine.clone(), rng.fork());
    threads.push(shuttle::thread::spawn(move || host.reclaim(12, rng)));
    threads.into_iter().for_each(|thread| thread.join().expect("no panic"));

    let tenant = machine.shared.tenant();
    let handed_over = std::mem::take(&mut machine.truth().handed_over);
    for (frame, order) in handed_over {
        machine.disown(100, frame, order);
        tenant.free(frame, order).expect("nobody's any more");
    }
    let owned = machine.truth().owner.iter().filter(|owner| **owner != 0).count() as u64;
    let stats = tenant.stats();
    assert_eq!(stats.free_frames, stats.frames - owned, "frames were lost");
    tenant.validate().expect("counters fit the bits");
    machine.shared.host().validate().expect("entries fit R");
    nothing_free_is_refused(&tenant, order((seed % 11) as u8), seed);
    for (huge, memory) in machine.truth().memory.iter().enumerate() {
        let r = machine.shared.host().residency(HugeId(huge as u32)).expect("in the table");
        assert_eq!(*memory, r == Residency::Installed);
    }
}

/// A block of `order` is granted if one is free, whatever the hints and the last refusal say by now. The first order that is
/// asked for says most: what is given back makes news.
fn nothing_free_is_refused(tenant: &Tenant<'_>, order: Order, seed: u64) {
    let (free, number) = (tenant.free_blocks(), order.get());
    let has_one = free[usize::from(number)..].iter().any(|blocks| *blocks > 0);
    assert!(!has_one || ask(tenant, order), "seed {seed}: order {number} is refused, but {free:?} are free");
}

fn explore(scheduler: impl Scheduler + 'static, program: impl Fn() + Send + Sync + 'static) {
    let mut config = shuttle::Config::new();
    config.stack_size = 1 << 18;
    shuttle::Runner::new(scheduler, config).run(program);
}

fn check(scheduler: impl Scheduler + 'static, cpus: u8, huge_frames: u32, squeeze: bool) {
    explore(scheduler, move || run(cpus, huge_frames, squeeze));
}

/// Runs a program in `count` schedules, each with another seed.
fn histories(count: usize, run: impl Fn(u64) + Send + Sync + 'static) {
    explore(RandomScheduler::new(count), move || run(shuttle::rand::Rng::r#gen(&mut shuttle::rand::thread_rng())));
}

fn order(order: u8) -> Order {
    Order::new(order).expect("in range")
}

/// Asks for a block and gives it back.
fn ask(tenant: &Tenant<'_>, order: Order) -> bool {
    let Ok(block) = tenant.alloc(order) else { return false };
    let (frame, order) = block.position();
    tenant.free(frame, order).expect("ours");
    true
}

#[test]
fn random_schedules_of_two_cpus_and_a_host() {
    check(RandomScheduler::new(1500), 2, 2, true);
    check(RandomScheduler::new(600), 2, 3, false);
}

#[test]
fn random_schedules_of_three_cpus_and_a_host_over_two_trees() {
    check(RandomScheduler::new(300), 3, 18, true);
}

#[test]
fn schedules_with_few_but_unlucky_switches() {
    for depth in 1..=4 {
        check(PctScheduler::new(depth, 500), 2, 2, true);
    }
    check(PctScheduler::new(3, 400), 3, 3, true);
}

/// `count` random schedules of parties that each end by themselves, however long that takes.
fn schedules(count: usize, parties: impl Fn() + Send + Sync + 'static) {
    let mut config = shuttle::Config::new();
    config.max_steps = shuttle::MaxSteps::None;
    shuttle::Runner::new(RandomScheduler::new(count), config).run(parties);
}

/// Huge frames with memory, none of them in use.
fn all_free(huge_frames: usize) -> Arc<Shared> {
    let frames = vec![(HugeEntry::FREE_INSTALLED, Residency::Installed); huge_frames];
    Arc::new(Shared::new(&frames, |_| 0))
}

/// Handles that look for a tree at the same moment do not take the same one, nor follow each other from there.
#[test]
fn those_who_search_at_once_end_in_different_trees() {
    for order in [0, 3, 9, 10].map(|order| Order::new(order).expect("in range")) {
        schedules(200, move || {
            let shared = all_free(160);
            let parties: Vec<_> = (0..3)
                .map(|_| {
                    let shared = shared.clone();
                    shuttle::thread::spawn(move || {
                        let tenant = shared.tenant();
                        // The same start, as those have that left the same tree.
                        let mut cpu = Cpu::new(tenant, Vicinity::all(0));
                        let block = cpu.alloc(order).expect("free").position().0;
                        std::mem::forget(cpu);
                        block.0 / 512 / 32
                    })
                })
                .collect();
            let trees: Vec<_> = parties.into_iter().map(|party| party.join().expect("no panic")).collect();
            assert!(trees[0] != trees[1] && trees[1] != trees[2] && trees[0] != trees[2], "{order:?}: {trees:?}");
            assert_eq!((0..5).filter(|tree| shared.tenant().trees.get(*tree).is_reserved()).count(), 3);
        });
    }
}

/// However often others take what a search for a run has just found: while there is room it finds another one.
#[test]
fn a_run_is_found_although_others_are_faster() {
    schedules(3000, || {
        let shared = all_free(24);
        let other = shared.clone();
        let faster = shuttle::thread::spawn(move || {
            (0..23).filter(|huge| other.tenant().alloc_run_at(HugeId(*huge).into()).is_ok()).count()
        });
        let run = shared.tenant().alloc_run(1, Behind::Any, &mut HugeId(0)).expect("there is room for it");
        let taken = faster.join().expect("no panic");
        assert_eq!(taken, if run.range.first() < HugeId(23) { 22 } else { 23 });
    });
}

/// One huge frame is free at any moment, now in one tree and now in the other: a search finds it.
#[test]
fn what_is_free_at_any_moment_is_found() {
    schedules(3000, || {
        let shared = all_free(34);
        let tenant = shared.tenant();
        let take = |tenant: &Tenant<'_>, huge: u32| tenant.alloc_at(HugeId(huge).first_frame(), Order::HUGE).is_ok();
        assert!((0..34).all(|huge| huge == 1 || take(&tenant, huge)));
        let other = shared.clone();
        let mover = shuttle::thread::spawn(move || {
            let tenant = other.tenant();
            for (next, last) in [(33, 1), (2, 33), (32, 2), (3, 32), (33, 3)] {
                tenant.free(HugeId(next).first_frame(), Order::HUGE).expect("ours");
                if !take(&tenant, last) {
                    return;
                }
            }
        });
        drop(tenant.alloc(Order::HUGE).expect("one is free at any moment"));
        mover.join().expect("no panic");
    });
}
