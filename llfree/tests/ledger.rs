//! A process with recorded handles is killed repeatedly, while threads of this one allocate and free in the same table; each time
//! what its handles held comes back, with nobody stopping for it.
//!
//! The file holds the table's region and, after it, the child's ledgers and its record of what it owns: one word a
//! thread, for a thread has one block at a time.

use crate::common::{order, ready};
use llfree::{Cpu, Initial, LEDGER_WORDS, Ledger, Table, Tenant};
use memmap2::MmapMut;
use shared_layout::{FRAMES_PER_HUGE, FrameId, Order};
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const HUGE: u32 = 128;
const FRAMES: u64 = HUGE as u64 * FRAMES_PER_HUGE;
const REGION: usize = Table::bytes_for(HUGE).expect("in range").next_multiple_of(4096);
const THREADS: usize = 2;
/// Ledger and record of a thread, on cache lines of their own.
const WORDS: usize = (LEDGER_WORDS + 1).next_multiple_of(8);
const BYTES: usize = REGION + THREADS * WORDS * 8;
const KILLS: u64 = 40;
const LARGEST: u8 = 6;
/// Tells the child where the file is.
const FILE: &str = "LLFREE_LEDGER_TEST_FILE";

struct Shared {
    map: MmapMut,
}

impl Shared {
    fn new(path: &Path) -> Self {
        let file = OpenOptions::new().read(true).write(true).open(path).expect("the file");
        // SAFETY: no other program knows the file, and what both processes reach in it they reach as atomics.
        Self { map: unsafe { MmapMut::map_mut(&file) }.expect("mapped") }
    }

    fn tenant(&self, initial: Initial) -> Tenant<'_> {
        let base = self.map.as_ptr().cast_mut();
        // SAFETY: the mapping is page aligned, of this length, and lives as long as we do.
        unsafe { Table::from_raw(base, REGION, HUGE, initial) }.expect("it fits").tenant()
    }

    fn words(&self, thread: usize) -> &[AtomicU64] {
        // SAFETY: aligned, inside the mapping, and used as atomics alone.
        let all = unsafe { self.map[REGION..].align_to::<AtomicU64>() }.1;
        &all[thread * WORDS..][..WORDS]
    }

    fn ledger(&self, thread: usize) -> Ledger<'_> {
        Ledger::new(self.words(thread).first_chunk().expect("so many"))
    }

    fn record(&self, thread: usize) -> &AtomicU64 {
        &self.words(thread)[LEDGER_WORDS]
    }
}

/// A block at a time, until it is killed.
fn work(tenant: &Tenant<'_>, ledger: Ledger<'_>, record: &AtomicU64, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut cpu = tenant.recorded_cpu(ledger).expect("the parent gave back what was there");
    loop {
        let order = order(if random.bool() { 0 } else { random.u8(..=LARGEST) });
        let Ok(allocation) = cpu.alloc(order) else { continue };
        let frame = ready(allocation);
        record.store(frame.0 << 8 | u64::from(order.get()) << 1 | 1, Ordering::Release);
        std::hint::black_box(frame);
        record.store(0, Ordering::Release);
        // A kill cuts between two instructions.
        std::sync::atomic::compiler_fence(Ordering::SeqCst);
        cpu.free(frame, order).expect("ours");
    }
}

/// Not a test on its own: the child that the parent starts and kills.
#[test]
fn child() {
    let Some(path) = std::env::var_os(FILE) else { return };
    let shared = Shared::new(path.as_ref());
    let tenant = shared.tenant(Initial::Joined);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (shared, tenant) = (&shared, &tenant);
            let seed = u64::from(std::process::id()) * 7 + thread as u64;
            scope.spawn(move || work(tenant, shared.ledger(thread), shared.record(thread), seed));
        }
        // The parent waits for this byte; any other is a panic's.
        std::io::stderr().write_all(b"!").expect("the parent listens");
    });
}

fn run_and_kill(path: &Path, after: Duration) {
    let mut child = Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", "ledger::child", "--nocapture", "--test-threads=1"])
        .env(FILE, path)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    let mut stderr = child.stderr.take().expect("piped");
    let mut byte = [0];
    stderr.read_exact(&mut byte).expect("the child began");
    assert_eq!(byte, *b"!");
    std::thread::sleep(after);
    child.kill().expect("still there");
    child.wait().expect("ours");
    let mut said = String::new();
    stderr.read_to_string(&mut said).expect("text");
    assert_eq!(said, "", "a thread of the child panicked");
}

/// Another tenant, at work all the time: each frame of its blocks has a mark, which nobody else of this process may have put.
fn other(tenant: &Tenant<'_>, marks: &[AtomicBool], stop: &AtomicBool, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut cpu = tenant.cpu();
    let mut held: Vec<(FrameId, Order)> = Vec::new();
    let mark = |(frame, order): (FrameId, Order), on: bool| {
        for f in frame.0..frame.0 + order.frames() {
            assert_eq!(marks[f as usize].swap(on, Ordering::Relaxed), !on, "frame {f} has two owners");
        }
    };
    let free = |cpu: &mut Cpu<'_>, block: (FrameId, Order)| {
        mark(block, false);
        cpu.free(block.0, block.1).expect("ours");
    };
    while !stop.load(Ordering::Relaxed) {
        let order = order(random.u8(..=LARGEST));
        match cpu.alloc(order) {
            Ok(allocation) if held.len() < 2000 => {
                let block = (ready(allocation), order);
                mark(block, true);
                held.push(block);
            }
            Ok(allocation) => cpu.free(allocation.position().0, order).expect("ours"),
            Err(_) => {}
        }
        if held.len() > 1000 && random.bool() {
            let block = held.swap_remove(random.usize(..held.len()));
            free(&mut cpu, block);
        }
    }
    held.into_iter().for_each(|block| free(&mut cpu, block));
}

#[test]
fn what_a_killed_process_held_comes_back_while_others_are_at_work() {
    if std::env::var_os(FILE).is_some() {
        return;
    }
    let mut random = fastrand::Rng::new();
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("table");
    std::fs::File::create(&path).and_then(|file| file.set_len(BYTES as u64)).expect("a file");
    let shared = Shared::new(&path);
    let tenant = shared.tenant(Initial::Free);
    let (stop, marks) = (AtomicBool::new(false), (0..FRAMES).map(|_| AtomicBool::new(false)).collect::<Vec<_>>());
    let returned = std::thread::scope(|scope| {
        for seed in 0..2 {
            let (tenant, marks, stop) = (&tenant, &marks, &stop);
            scope.spawn(move || other(tenant, marks, stop, seed));
        }
        let mut returned = 0;
        for _ in 0..KILLS {
            run_and_kill(&path, Duration::from_micros(random.u64(..20_000)));
            for thread in 0..THREADS {
                returned += tenant.give_back(shared.ledger(thread));
                let record = shared.record(thread).swap(0, Ordering::Acquire);
                if let Some(order) = Order::new(record as u8 >> 1).filter(|_| record & 1 != 0) {
                    tenant.free(FrameId(record >> 8), order).expect("its last block");
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
        returned
    });
    let lost = FRAMES - tenant.stats().free_frames;
    let kills = KILLS * THREADS as u64;
    eprintln!("{returned} frames came back from {kills} handles, {lost} were lost");
    assert!(returned > kills, "handles hold some frames most of the time");
    // A row in each handle's hands at the worst, and mostly less.
    assert!(lost <= kills * 64, "{lost} frames are lost of {kills} handles");
    assert!(!marks.iter().any(|mark| mark.load(Ordering::Relaxed)));
}

#[test]
fn a_handle_that_is_never_dropped_is_given_back_to_the_last_frame() {
    let table = crate::common::Table::installed(64);
    let tenant = table.tenant();
    let words = [const { AtomicU64::new(0) }; LEDGER_WORDS];
    let ledger = Ledger::new(&words);
    let mut cpu = tenant.recorded_cpu(ledger).expect("nobody has it");
    assert!(ledger.is_in_use() && tenant.recorded_cpu(ledger).is_none());
    let blocks: Vec<_> = (0..100).map(|n| (ready(cpu.alloc(order(n % 4)).expect("free")), order(n % 4))).collect();
    // Two of a row gather in a register.
    blocks.iter().take(50).for_each(|(frame, order)| cpu.free(*frame, *order).expect("ours"));
    let held = |tenant: &Tenant<'_>| 64 * FRAMES_PER_HUGE - tenant.stats().free_frames;
    let owned: u64 = blocks.iter().skip(50).map(|(_, order)| order.frames()).sum();
    std::mem::forget(cpu);
    let hidden = held(&tenant) - owned;
    assert!(hidden > 0, "what it held is allocated to all others");
    assert_eq!(tenant.give_back(ledger), hidden);
    assert_eq!((held(&tenant), tenant.validate()), (owned, Ok(())));
    assert_eq!(tenant.give_back(ledger), 0);
    blocks.iter().skip(50).for_each(|(frame, order)| tenant.free(*frame, *order).expect("allocated"));
    let mut next = tenant.recorded_cpu(ledger).expect("given back");
    assert_eq!((0..32).filter(|_| next.alloc(Order::MAX).is_ok()).count(), 32);
    drop(next);
    assert!(!ledger.is_in_use());
}

#[test]
fn any_words_in_a_ledger_leave_the_table_sound() {
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..2000 {
        let table = crate::common::Table::installed(64);
        let tenant = table.tenant();
        let mut cpu = tenant.cpu();
        for _ in 0..20 {
            ready(cpu.alloc(order(random.u8(..=10))).expect("there is memory"));
        }
        let word = |random: &mut fastrand::Rng| match random.u8(..4) {
            0 => 0,
            1 => random.u64(..64 * FRAMES_PER_HUGE),
            2 => random.u64(..) & random.u64(..),
            _ => random.u64(..),
        };
        let words: [_; LEDGER_WORDS] = std::array::from_fn(|_| AtomicU64::new(word(&mut random)));
        words[0].store(1, Ordering::Relaxed);
        tenant.give_back(Ledger::new(&words));
        drop(cpu);
        assert_eq!(tenant.validate(), Ok(()));
    }
}
