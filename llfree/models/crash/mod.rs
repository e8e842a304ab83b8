//! A run that is stopped at every single step, and what `open` makes of what it left.
//!
//! With `cfg(stepping)` the crate's atomics count each change of memory and end the run before a
//! chosen one. After every one of these crashes the region is recovered and held against a list of
//! owners. The same runs again lose power: then only cache lines that were written back survive for
//! sure, and others if chance has it.
//!
//! `cargo test -p llfree-crash` runs them.

mod ledger;
#[path = "../../tests/common/memory.rs"]
mod memory;

use crate::block::Allocation;
use crate::cpu::{Cpu, HANDLE_FRAMES};
use crate::durable::WriteBack;
use crate::error::{AllocError, FreeError};
use crate::lower::Lower;
use crate::persist::{Persistent, region_bytes};
use crate::recorded::Recorded;
use crate::recover::{Recovery, recover};
use crate::region_error::OpenError;
use crate::rows::ROWS;
use crate::sync::{self, AtomicU16, AtomicU64, Ordering};
use crate::tenant::Tenant;
use memory::Memory;
use shared_layout::{FRAMES_PER_HUGE, FrameId, HugeEntry, HugeId, Order, Run};
use std::collections::BTreeMap;
use std::mem::ManuallyDrop;

const HUGE: u32 = 5;
const FRAMES: u64 = HUGE as u64 * FRAMES_PER_HUGE;
const BYTES: usize = region_bytes(HUGE).expect("in range");
/// Entries and bitfields in the region: header and the host's words before, hints after.
const TABLE: std::ops::Range<usize> = 192..256 + HUGE as usize * 64;
const CPUS: usize = 2;

fn order(order: u8) -> Order {
    Order::new(order).expect("in range")
}

/// The knowledge of the owners. Like any owner's records, they are changed after an allocation and before
/// a free.
#[derive(Clone, Default)]
struct Owners {
    blocks: BTreeMap<u64, Order>,
    /// Frames of the block that is being taken or given.
    in_flight: u64,
}

impl Owners {
    fn add(&mut self, frame: FrameId, order: Order) {
        for f in frame.0..frame.0 + order.frames() {
            assert!(!self.owns(FrameId(f)), "frame {f} has two owners");
        }
        self.blocks.insert(frame.0, order);
        self.in_flight = 0;
    }

    fn remove(&mut self, pick: usize) -> Option<(FrameId, Order)> {
        let frame = *self.blocks.keys().nth(pick % self.blocks.len().max(1))?;
        let order = self.blocks.remove(&frame)?;
        self.in_flight = order.frames();
        Some((FrameId(frame), order))
    }

    fn owns(&self, frame: FrameId) -> bool {
        self.blocks.range(..=frame.0).next_back().is_some_and(|(first, order)| frame.0 < first + order.frames())
    }

    fn frames(&self) -> u64 {
        self.blocks.values().map(|order| order.frames()).sum()
    }
}

#[derive(Clone, Copy, Debug)]
enum Op {
    /// By a handle.
    Alloc(usize, u8),
    /// By nobody's handle.
    AllocBare(u8),
    AllocAt(u64, u8),
    /// Of a block that somebody owns: by a handle, or bare.
    Free(Option<usize>, usize),
    Drain(usize),
}

/// A handle, recorded or not.
trait Handle {
    fn alloc(&mut self, order: Order) -> Result<Allocation, AllocError>;
    fn free(&mut self, frame: FrameId, order: Order) -> Result<(), FreeError>;
    fn drain(&mut self);
}

macro_rules! handle {
    ($name:ident) => {
        impl Handle for $name<'_> {
            fn alloc(&mut self, order: Order) -> Result<Allocation, AllocError> {
                self.alloc(order)
            }

            fn free(&mut self, frame: FrameId, order: Order) -> Result<(), FreeError> {
                self.free(frame, order)
            }

            fn drain(&mut self) {
                self.drain();
            }
        }
    };
}
handle!(Cpu);
handle!(Recorded);

/// What the owners do, by the handles and without one.
fn work<H: Handle>(tenant: &Tenant<'_>, cpus: &mut [ManuallyDrop<H>; CPUS], script: &[Op], owners: &mut Owners) {
    for op in script {
        let allocated = match *op {
            Op::Alloc(cpu, o) => {
                owners.in_flight = order(o).frames();
                cpus[cpu].alloc(order(o))
            }
            Op::AllocBare(o) => {
                owners.in_flight = order(o).frames();
                tenant.alloc(order(o))
            }
            Op::AllocAt(frame, o) => {
                owners.in_flight = order(o).frames();
                tenant.alloc_at(FrameId(frame), order(o))
            }
            Op::Free(cpu, pick) => {
                if let Some((frame, order)) = owners.remove(pick) {
                    match cpu {
                        Some(cpu) => cpus[cpu].free(frame, order),
                        None => tenant.free(frame, order),
                    }
                    .expect("an owner frees its block");
                    owners.in_flight = 0;
                }
                continue;
            }
            Op::Drain(cpu) => {
                cpus[cpu].drain();
                continue;
            }
        };
        owners.in_flight = 0;
        if let Ok(allocation) = allocated {
            let (frame, order) = allocation.position();
            owners.add(frame, order);
        }
    }
}

/// All of a life: open, work, the handles die, their frames are freed, close.
fn live(region: &mut [u8], script: &[Op], write_back: WriteBack, owners: &mut Owners) {
    let mut instance = Persistent::open(region, write_back).expect("a region");
    let tenant = instance.tenant();
    // A process that dies runs no destructors.
    let mut cpus: [ManuallyDrop<Cpu<'_>>; CPUS] = std::array::from_fn(|_| ManuallyDrop::new(tenant.cpu()));
    work(&tenant, &mut cpus, script, owners);
    instance.recover_leaks(|frame, _| owners.owns(frame));
    instance.close().expect("alone");
}

/// A region after a crash, against its owners. Returns how many frames were lost.
fn check(region: &mut [u8], owners: &Owners) -> u64 {
    let mut instance = Persistent::open(region, WriteBack::NONE).expect("a region after all");
    let tenant = instance.tenant();
    assert_eq!(tenant.validate(), Ok(()));
    for (frame, order) in &owners.blocks {
        let step = if order.is_huge() { Order::HUGE } else { Order::BASE };
        for f in (*frame..frame + order.frames()).step_by(step.frames() as usize) {
            let entry = tenant.entry(HugeId((f / 512) as u32)).expect("in the table");
            assert_eq!(entry.is_huge(), order.is_huge(), "{entry:?} of an owned block of order {}", order.get());
            assert!(tenant.alloc_at(FrameId(f), step).is_err(), "frame {f} is owned and free");
        }
    }
    let lost = FRAMES - owners.frames() - tenant.stats().free_frames;
    let bound = CPUS as u64 * HANDLE_FRAMES + owners.in_flight;
    assert!(lost <= bound, "{lost} frames are lost, {} of them in flight", owners.in_flight);

    // Everything free can be allocated, and has no owner.
    let mut cpu = tenant.cpu();
    let mut taken = Vec::new();
    while let Ok(allocation) = cpu.alloc(Order::BASE) {
        taken.push(allocation.position().0);
    }
    assert_eq!(taken.len() as u64 + lost + owners.frames(), FRAMES);
    assert!(!taken.iter().any(|frame| owners.owns(*frame)), "a frame with two owners");
    taken.into_iter().for_each(|frame| cpu.free(frame, Order::BASE).expect("ours"));
    drop(cpu);

    // What was lost can be found.
    assert_eq!(instance.recover_leaks(|frame, _| owners.owns(frame)).total_frames(), lost);
    let tenant = instance.tenant();
    assert_eq!(tenant.validate(), Ok(()));
    for (frame, order) in &owners.blocks {
        tenant.free(FrameId(*frame), *order).expect("an owner frees its block");
    }
    assert_eq!(tenant.stats().free_huge, u64::from(HUGE));
    lost
}

/// A region that was created and closed.
fn fresh() -> Memory {
    let mut memory = Memory::new(BYTES);
    let instance = Persistent::create(memory.bytes(BYTES), HUGE, WriteBack::NONE).expect("fresh");
    instance.close().expect("alone");
    memory
}

/// Every path once, on purpose: rows, rests, runs over several rows, halves of order 10, exhaustion.
fn directed() -> Vec<Op> {
    use Op::{Alloc, AllocAt, AllocBare, Drain, Free};
    // Huge frame 1 keeps 32 frames in each of two rows: a rest to take, in a tree of small blocks.
    let mut script = vec![Alloc(0, 0), Drain(0)];
    script.extend([(512, 8), (768, 7), (896, 5), (960, 5)].map(|(frame, o)| AllocAt(frame, o)));
    script.extend([Alloc(0, 0), Alloc(0, 0), Alloc(0, 3), Alloc(0, 6), Alloc(0, 7), Alloc(0, 8)]);
    script.extend([Alloc(1, 0), Alloc(1, 4), Alloc(1, 9), Alloc(1, 10), AllocBare(7), AllocBare(2)]);
    // Frees of all kinds, in rows that a handle has and in others.
    script.extend((0..10).flat_map(|i| [Free(Some(0), 7 * i), Free(None, 5 * i)]));
    script.extend([AllocAt(1536, 9), AllocAt(1024, 10), AllocAt(0, 10), AllocBare(9), AllocBare(10)]);
    script.extend([Drain(0), Alloc(0, 8), Alloc(0, 8), Alloc(1, 5), Alloc(1, 1), Drain(1)]);
    // Until nothing is left, and a little back.
    script.extend([Alloc(0, 9), Alloc(0, 9), Alloc(0, 9), Alloc(0, 8), Alloc(1, 8), Alloc(0, 8), Alloc(1, 7)]);
    script.extend([Alloc(0, 6), Alloc(0, 6), Alloc(1, 5), Alloc(0, 0), Free(Some(1), 3), Free(Some(1), 1)]);
    script.extend([Free(None, 9), Alloc(1, 0), Free(Some(0), 2), Alloc(0, 0)]);
    script
}

fn random(seed: u64) -> Vec<Op> {
    let mut random = fastrand::Rng::with_seed(seed);
    let pick_order = |random: &mut fastrand::Rng| if random.u8(..3) == 0 { 0 } else { random.u8(..=10) };
    (0..150)
        .map(|_| match random.u8(..12) {
            0..=5 => Op::Alloc(random.usize(..CPUS), pick_order(&mut random)),
            6 => Op::AllocBare(pick_order(&mut random)),
            7 => Op::AllocAt(random.u64(..FRAMES), random.u8(..=3)),
            8..=9 => Op::Free(Some(random.usize(..CPUS)), random.usize(..100)),
            10 => Op::Free(None, random.usize(..100)),
            _ => Op::Drain(random.usize(..CPUS)),
        })
        .collect()
}

fn scripts() -> impl Iterator<Item = Vec<Op>> {
    std::iter::once(directed()).chain((1..=5).map(random))
}

#[test]
fn the_directed_script_takes_rests() {
    let (mut memory, mut owners) = (fresh(), Owners::default());
    live(memory.bytes(BYTES), &directed()[..6], WriteBack::NONE, &mut owners);
    let instance = Persistent::open(memory.bytes(BYTES), WriteBack::NONE).expect("closed");
    let tenant = instance.tenant();
    assert_eq!(tenant.entry(HugeId(1)).map(HugeEntry::free), Some(64));
    let mut cpu = tenant.cpu();
    assert!(cpu.alloc(Order::BASE).is_ok());
    assert_eq!(tenant.entry(HugeId(1)).map(HugeEntry::free), Some(0), "both rows at once");
}

#[test]
fn no_step_of_a_life_can_be_stopped_to_harm() {
    let (mut crashes, mut worst) = (0u64, 0);
    for script in scripts() {
        for stop in 0.. {
            let (mut memory, mut owners) = (fresh(), Owners::default());
            let done = sync::run_until(stop, || live(memory.bytes(BYTES), &script, WriteBack::NONE, &mut owners));
            crashes += 1;
            worst = worst.max(check(memory.bytes(BYTES), &owners));
            if done {
                break;
            }
        }
    }
    eprintln!("{crashes} crashes, at most {worst} frames lost");
    assert!(crashes > 1000);
}

/// Entries and bitfields without the bounds on free runs: a recovery forgets those that a clean end keeps.
fn unbounded(table: &[u8]) -> Vec<u8> {
    let (entries, rest) = table.split_at(HUGE as usize * 2);
    let entries = entries.as_chunks::<2>().0.iter().map(|bytes| HugeEntry::from_bits(u16::from_le_bytes(*bytes)));
    let raised = entries.map(|entry| entry.raise(Run::ANY).unwrap_or(entry).bits().to_le_bytes());
    raised.flatten().chain(rest.iter().copied()).collect()
}

#[test]
fn a_crash_in_recover_is_mended_by_recover() {
    let mut crashes = 0u64;
    for script in scripts() {
        for stop in 0.. {
            let (mut memory, mut owners) = (fresh(), Owners::default());
            let done = sync::run_until(stop, || live(memory.bytes(BYTES), &script, WriteBack::NONE, &mut owners));
            let mut whole = memory.clone();
            Persistent::open(whole.bytes(BYTES), WriteBack::NONE).expect("a region");
            for stop in 0.. {
                let mut memory = memory.clone();
                let opens = || {
                    Persistent::open(memory.bytes(BYTES), WriteBack::NONE).expect("a region");
                };
                let done = sync::run_until(stop, opens);
                crashes += 1;
                Persistent::open(memory.bytes(BYTES), WriteBack::NONE).expect("still a region");
                let (again, once) = (&memory.bytes(BYTES)[TABLE], &whole.bytes(BYTES)[TABLE]);
                assert_eq!(unbounded(again), unbounded(once), "another end than in one go");
                if done {
                    break;
                }
            }
            if done {
                break;
            }
        }
    }
    eprintln!("{crashes} crashes in recover");
}

#[test]
fn a_crash_in_create_leaves_a_region_or_none() {
    for stop in 0.. {
        let mut memory = Memory::new(BYTES);
        let creates = || {
            Persistent::create(memory.bytes(BYTES), HUGE, WriteBack::NONE).expect("fresh");
        };
        let done = sync::run_until(stop, creates);
        match Persistent::open(memory.bytes(BYTES), WriteBack::NONE) {
            Ok(instance) => assert_eq!(instance.tenant().stats().free_huge, u64::from(HUGE)),
            Err(error) => {
                assert_eq!(error, OpenError::Magic { found: 0 });
                Persistent::create(memory.bytes(BYTES), HUGE, WriteBack::NONE).expect("formatted again");
            }
        }
        if done {
            assert!(stop > u64::from(HUGE) * 9);
            break;
        }
    }
}

#[test]
fn what_was_written_back_survives_a_power_failure() {
    let (mut failures, mut worst) = (0u64, 0);
    // How many in 256 changes push their line out of the cache: none, some, most, and all.
    for (seed, chance) in [(1, 0), (2, 30), (3, 60), (4, 220), (5, 256)] {
        for script in scripts() {
            for stop in 0.. {
                let (mut memory, mut owners) = (fresh(), Owners::default());
                sync::power_on(memory.bytes(BYTES), seed + stop, chance);
                let done =
                    sync::run_until(stop, || live(memory.bytes(BYTES), &script, WriteBack::SIMULATED, &mut owners));
                let survived = sync::power_off();
                memory.bytes(BYTES).copy_from_slice(&survived);
                failures += 1;
                worst = worst.max(check(memory.bytes(BYTES), &owners));
                if done {
                    break;
                }
            }
        }
    }
    eprintln!("{failures} power failures, at most {worst} frames lost");
}

/// A point at which a party can be stopped: a step of the lower level.
#[derive(Clone, Copy, Debug)]
enum Step {
    Take(u32, u8),
    TakeAt(u64, u8),
    Give(u64, u8),
    TakeRow(u32),
    TakeRest(u32),
    TakeOne(u32),
    GiveRow(u64, u64),
}

/// Two huge frames with something of everything, and two more for order 10.
fn two_parties() -> (Vec<AtomicU16>, Vec<AtomicU64>) {
    let entries: Vec<_> = (0..6).map(|_| AtomicU16::new(HugeEntry::FREE_INSTALLED.bits())).collect();
    let rows: Vec<_> = (0..6 * ROWS).map(|_| AtomicU64::new(0)).collect();
    let lower = Lower::new(&entries, &rows).expect("lengths fit");
    // Owned by the parties, for them to give back.
    for (frame, o) in [(0, 7), (128, 6), (192, 0), (512, 8), (1024, 9), (2048, 10)] {
        assert!(lower.take_at(FrameId(frame), order(o)).is_ok());
    }
    // Owned by somebody else for good; huge frame 0 has 59 frames left.
    for (frame, o) in [(256, 7), (384, 6), (448, 5), (480, 4), (496, 3), (504, 2)] {
        assert!(lower.take_at(FrameId(frame), order(o)).is_ok());
    }
    (entries, rows)
}

/// The blocks above that nobody gives back.
const OTHERS: [(u64, u64); 1] = [(256, 508)];

#[test]
fn two_parties_that_stop_at_any_two_steps_harm_nobody() {
    let steps = [
        Step::Take(0, 0),
        Step::Take(0, 2),
        Step::Take(1, 7),
        Step::Take(1, 8),
        Step::Take(3, 9),
        Step::Take(4, 10),
        Step::TakeAt(768, 6),
        Step::TakeAt(768, 7),
        Step::Give(0, 7),
        Step::Give(128, 6),
        Step::Give(192, 0),
        Step::Give(512, 8),
        Step::Give(1024, 9),
        Step::Give(2048, 10),
        Step::TakeRow(0),
        Step::TakeRest(0),
        Step::TakeOne(0),
        Step::GiveRow(128, !0),
    ];
    let mut crashes = 0u64;
    for a in steps {
        for b in steps {
            'stop_a: for stop_a in 0.. {
                for stop_b in 0.. {
                    let (mut entries, mut rows) = two_parties();
                    let lower = Lower::new(&entries, &rows).expect("lengths fit");
                    let mut parties = [Party::new(a), Party::new(b)];
                    let done_a = sync::run_until(stop_a, || parties[0].go(&lower));
                    let done_b = sync::run_until(stop_b, || parties[1].go(&lower));
                    crashes += 1;
                    let _: Recovery = recover(&mut entries, &mut rows).expect("lengths fit");
                    agree(&entries, &rows, &parties, [a, b]);
                    if done_b && done_a {
                        break 'stop_a;
                    }
                    if done_b {
                        break;
                    }
                }
            }
        }
    }
    eprintln!("{crashes} pairs of stops");
}

/// One party, what it may have to itself, and what it knows as its own.
struct Party {
    step: Step,
    /// Bits of frames that it owns after what it did, by row.
    owned: BTreeMap<usize, u64>,
    huge: Vec<u32>,
    /// Frames that it may have lost on the way.
    in_flight: u64,
}

impl Party {
    fn new(step: Step) -> Self {
        let in_flight = match step {
            Step::Take(_, o) | Step::TakeAt(_, o) | Step::Give(_, o) => order(o).frames(),
            Step::TakeOne(_) => 1,
            Step::TakeRow(_) | Step::TakeRest(_) | Step::GiveRow(..) => 64,
        };
        Self { step, owned: BTreeMap::new(), huge: Vec::new(), in_flight }
    }

    fn own(&mut self, frame: FrameId, order: Order) {
        if order.is_huge() {
            self.huge.extend((0..order.huge_frames()).map(|i| (frame.0 / 512) as u32 + i));
        } else {
            for f in frame.0..frame.0 + order.frames() {
                *self.owned.entry((f / 64) as usize).or_default() |= 1 << (f % 64);
            }
        }
        self.in_flight = 0;
    }

    fn go(&mut self, lower: &Lower<'_>) {
        match self.step {
            Step::Take(huge, o) => {
                if let Ok(taken) = lower.take(HugeId(huge), order(o)) {
                    self.own(taken.frame, order(o));
                }
            }
            Step::TakeAt(frame, o) => {
                if let Ok(taken) = lower.take_at(FrameId(frame), order(o)) {
                    self.own(taken.frame, order(o));
                }
            }
            // The same block may be given twice here, by both parties: the second time is refused.
            Step::Give(frame, o) => drop(lower.give(FrameId(frame), order(o))),
            Step::TakeRow(huge) => {
                if let Ok(row) = lower.take_row(HugeId(huge), Order::BASE, 64) {
                    self.owned.insert((row.first.0 / 64) as usize, row.bits);
                }
            }
            Step::TakeRest(huge) => {
                let mut bits = [0; ROWS];
                if lower.take_rest(HugeId(huge), 64, |row, taken| bits[row] |= taken).is_ok() {
                    self.owned.extend(bits.into_iter().enumerate().map(|(i, bits)| (huge as usize * ROWS + i, bits)));
                }
            }
            Step::TakeOne(huge) => {
                if let Ok((taken, _)) = lower.take_one(HugeId(huge)) {
                    self.own(taken.frame, Order::BASE);
                }
            }
            Step::GiveRow(first, bits) => drop(lower.give_row(FrameId(first), bits)),
        }
        self.in_flight = 0;
    }
}

fn agree(entries: &[AtomicU16], rows: &[AtomicU64], parties: &[Party; 2], steps: [Step; 2]) {
    let lower = Lower::new(entries, rows).expect("lengths fit");
    for huge in 0..entries.len() as u32 {
        assert!(lower.is_consistent(HugeId(huge)), "{steps:?}");
    }
    let bits = |row: usize| rows[row].load(Ordering::Relaxed);
    for party in parties {
        for (row, owned) in &party.owned {
            assert_eq!(bits(*row) & owned, *owned, "{steps:?}: an owned frame of row {row} is free");
        }
        for huge in &party.huge {
            assert!(lower.entry(HugeId(*huge)).is_some_and(HugeEntry::is_huge), "{steps:?}");
        }
    }
    for (row, owned) in &parties[0].owned {
        assert_eq!(parties[1].owned.get(row).copied().unwrap_or(0) & owned, 0, "{steps:?}: a frame with two owners");
    }
    assert!(!parties[0].huge.iter().any(|huge| parties[1].huge.contains(huge)), "{steps:?}: two owners");
    for frame in OTHERS.iter().flat_map(|(first, end)| *first..*end) {
        assert!(bits((frame / 64) as usize) >> (frame % 64) & 1 != 0, "{steps:?}: frame {frame} was somebody's");
    }
}
