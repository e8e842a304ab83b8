//! The kernel's hooks against the transitions of [`HugeEntry`]: over every value of an entry, and in long random
//! runs of allocations, frees, isolations and moves of blocks, with a host that evicts, holds, returns and fails to
//! install at any moment between two steps, and while an install is under way.

use shared_layout::HugeEntry;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Huge frames of the model: with a hole after the first [`LOW`].
const FRAMES: usize = 48;
const LOW: usize = 24;
const ORDER: u32 = 9;
const PAGES: u64 = 512;
const ISOLATE: i32 = 3;

#[link(name = "llfree-kernel", kind = "static")]
unsafe extern "C" {
    fn model_start(entries: *const AtomicU16, huge_frames: u64, low_frames: u64);
    fn model_hand_over();
    fn model_alloc(order: u32, migratetype: i32) -> i64;
    fn model_free(pfn: u64, order: u32);
    fn model_isolate(pfn: u64, order: *mut u32) -> i64;
    fn model_set_type(pfn: u64, migratetype: i32);
    fn model_state(frame: u64) -> i32;
    fn model_books(listed: *mut i64, counted: *mut i64, managed: *mut i64, aside: *mut i64);
    fn model_tick(ticks: u64);
    fn model_locked() -> bool;
    fn model_pfn(frame: u64) -> u64;
    fn llfree_set_held_aside();
    fn llfree_return_blocks(failed: bool) -> u64;
}

static ENTRIES: [AtomicU16; FRAMES] = [const { AtomicU16::new(0) }; FRAMES];
static INSTALLS: AtomicU64 = AtomicU64::new(0);
/// One install in so many fails; 0: none.
static FAIL_ONE_IN: AtomicU64 = AtomicU64::new(0);
/// The host also acts while an install is under way.
static RACES: AtomicBool = AtomicBool::new(false);
static SEED: AtomicU64 = AtomicU64::new(1);
static ALONE: Mutex<()> = Mutex::new(());

/// The model has one state for the whole process.
fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn random(below: u64) -> u64 {
    let mut x = SEED.load(Ordering::Relaxed);
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    SEED.store(x, Ordering::Relaxed);
    (x >> 11) % below
}

fn entry(frame: usize) -> HugeEntry {
    HugeEntry::from_bits(ENTRIES[frame].load(Ordering::Relaxed))
}

fn set(frame: usize, entry: HugeEntry) {
    ENTRIES[frame].store(entry.bits(), Ordering::Relaxed);
}

/// The host takes a step at some frame, if there is one to take.
fn host_step() {
    let frame = random(FRAMES as u64) as usize;
    let now = entry(frame);
    let next = match random(4) {
        0 => now.evict(),
        1 => now.hold(),
        _ => now.release(),
    };
    if let Some(next) = next {
        set(frame, next);
    }
}

/// The host's half of an install.
#[unsafe(no_mangle)]
extern "C" fn llfree_install(frame: u64, count: u32) -> bool {
    for frame in frame as usize..frame as usize + count as usize {
        let one_in = FAIL_ONE_IN.load(Ordering::Relaxed);
        if one_in > 0 && random(one_in) == 0 {
            return false;
        }
        assert!(entry(frame).is_huge(), "installed while others can have it: {:?}", entry(frame));
        if let Some(next) = entry(frame).installed() {
            set(frame, next);
            INSTALLS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the model runs on this thread alone.
        if RACES.load(Ordering::Relaxed) && !unsafe { model_locked() } {
            host_step();
        }
    }
    true
}

/// All memory is in use, and evicted; the first `low` huge frames lie below a hole.
fn start(low: usize) {
    for frame in 0..FRAMES {
        set(frame, HugeEntry::HUGE_EVICTED);
    }
    // SAFETY: the entries are static; the caller holds the lock.
    unsafe { model_start(ENTRIES.as_ptr(), FRAMES as u64, low as u64) };
}

fn pfn(frame: usize) -> u64 {
    // SAFETY: arithmetic on the table that `start` has set.
    unsafe { model_pfn(frame as u64) }
}

fn free(pfn: u64, order: u32) {
    // SAFETY: the caller owns the block; the lock is held.
    unsafe { model_free(pfn, order) }
}

fn alloc(order: u32, kind: i32) -> Option<u64> {
    // SAFETY: the lock is held.
    u64::try_from(unsafe { model_alloc(order, kind) }).ok()
}

fn state(frame: usize) -> i32 {
    // SAFETY: it only looks.
    unsafe { model_state(frame as u64) }
}

/// Frees a huge frame whose entry has any bits: as `give_huge`, or not at all. Then a request for it: as `take_huge` if
/// there is memory, after an install if not, and never if somebody else has it.
#[test]
fn every_entry_is_given_and_taken_as_the_transitions_say() {
    let _alone = alone();
    FAIL_ONE_IN.store(0, Ordering::Relaxed);
    RACES.store(false, Ordering::Relaxed);
    for bits in 0..=u16::MAX {
        start(FRAMES);
        // SAFETY: the lock is held.
        unsafe { model_hand_over() };
        let old = HugeEntry::from_bits(bits);
        set(5, old);
        free(pfn(5), ORDER);
        assert_eq!(entry(5), old.give_huge().unwrap_or(old), "given from {old:?}");
        set(5, old);
        let (installs, got) = (INSTALLS.load(Ordering::Relaxed), alloc(ORDER, 1));
        assert_eq!(got.is_some(), old.take_huge().is_some(), "taken from {old:?}");
        match old.take_huge() {
            Some(taken) => {
                assert_eq!(got, Some(pfn(5)));
                assert_eq!(entry(5), taken.installed().unwrap_or(taken), "{old:?}");
                assert_eq!(INSTALLS.load(Ordering::Relaxed) - installs, u64::from(old.is_evicted()));
            }
            None => assert_eq!((entry(5), state(5)), (old, 2), "{old:?} is set aside, untouched"),
        }
    }
}

/// What each block is, and what must be true of all of them.
struct Run {
    used: BTreeMap<u64, u32>,
}

impl Run {
    fn new() -> Self {
        start(LOW);
        // Boot: some is freed before the host hears of it, the rest after.
        for frame in 0..FRAMES / 2 {
            free(pfn(frame), ORDER);
        }
        // SAFETY: the lock is held.
        unsafe { model_hand_over() };
        for frame in FRAMES / 2..FRAMES - 2 {
            free(pfn(frame), ORDER);
        }
        let mut used = BTreeMap::new();
        for frame in FRAMES - 2..FRAMES {
            set(frame, HugeEntry::HUGE_INSTALLED);
            used.insert(pfn(frame), ORDER);
        }
        Self { used }
    }

    fn some(&mut self) -> Option<(u64, u32)> {
        let at = random(self.used.len().max(1) as u64) as usize;
        let (pfn, order) = self.used.iter().nth(at).map(|(pfn, order)| (*pfn, *order))?;
        self.used.remove(&pfn);
        Some((pfn, order))
    }

    fn own(&mut self, pfn: u64, order: u32) {
        for frame in (pfn / PAGES..).take((1u64 << order).div_ceil(PAGES) as usize) {
            let frame = if frame >= 2048 { frame as usize - 2048 + LOW } else { frame as usize };
            let now = entry(frame);
            assert!(now.is_huge() && !now.is_evicted(), "page {pfn} of order {order} is used under {now:?}");
        }
        assert_eq!(self.used.insert(pfn, order), None);
    }

    fn step(&mut self) {
        match random(100) {
            0..44 => {
                // Most are small, as in life.
                let order = if random(8) == 0 { random(11) } else { random(4) } as u32;
                if let Some(pfn) = alloc(order, random(3) as i32) {
                    self.own(pfn, order);
                }
            }
            44..86 => {
                // Now and then much is freed at once, so that blocks merge.
                for _ in 0..if random(2000) == 0 { self.used.len() } else { 1 } {
                    if let Some((pfn, order)) = self.some() {
                        free(pfn, order);
                    }
                }
            }
            86..88 => {
                let (at, mut order) = (pfn(random(FRAMES as u64) as usize) + random(PAGES), 0);
                // SAFETY: the lock is held.
                if let Ok(pfn) = u64::try_from(unsafe { model_isolate(at, &raw mut order) }) {
                    self.own(pfn, order);
                }
            }
            88..89 => {
                let kind = if random(4) == 0 { ISOLATE } else { random(3) as i32 };
                // SAFETY: the lock is held.
                unsafe { model_set_type(pfn(random(FRAMES as u64) as usize), kind) };
            }
            89..90 => {
                // SAFETY: the lock is held.
                unsafe {
                    model_tick(random(200));
                    match random(3) {
                        0 => llfree_set_held_aside(),
                        1 => drop(llfree_return_blocks(true)),
                        _ => drop(llfree_return_blocks(false)),
                    }
                }
            }
            _ => host_step(),
        }
    }

    /// Entries, lists and books agree.
    fn check(&self) {
        let (mut listed, mut counted, mut managed, mut aside) = (0, 0, 0, 0);
        // SAFETY: it only looks, and writes to four locals.
        unsafe { model_books(&raw mut listed, &raw mut counted, &raw mut managed, &raw mut aside) };
        assert_eq!(listed, counted, "free pages");
        assert_eq!(managed, (FRAMES as i64 - aside) * PAGES as i64, "managed pages");
        for frame in 0..FRAMES {
            let now = entry(frame);
            let fits = match state(frame) {
                0 => now.is_huge(),
                // Held blocks stay in the lists until somebody meets them.
                1 => now.is_all_free() || now.is_held(),
                // Held, returned and not yet noticed, or without memory when it was needed.
                _ => now.is_held() || now.is_all_free() || (now.is_huge() && now.is_evicted()),
            };
            assert!(fits && now.is_valid(), "frame {frame} in state {} has {now:?}", state(frame));
        }
    }
}

fn run(steps: u64, seed: u64, fail_one_in: u64, races: bool) {
    let _alone = alone();
    println!("seed {seed}");
    SEED.store(seed, Ordering::Relaxed);
    FAIL_ONE_IN.store(fail_one_in, Ordering::Relaxed);
    RACES.store(races, Ordering::Relaxed);
    let mut run = Run::new();
    for step in 0..steps {
        run.step();
        if step % 64 == 0 {
            run.check();
        }
    }
    run.check();
    // The host returns all, the guest frees all: nothing was lost.
    FAIL_ONE_IN.store(0, Ordering::Relaxed);
    for frame in 0..FRAMES {
        if let Some(next) = entry(frame).release() {
            set(frame, next);
        }
    }
    while let Some((pfn, order)) = run.some() {
        free(pfn, order);
    }
    // SAFETY: the lock is held.
    unsafe { llfree_return_blocks(true) };
    run.check();
    for frame in 0..FRAMES {
        assert_eq!(state(frame), 1, "frame {frame} is lost: {:?}", entry(frame));
        assert!(entry(frame).is_all_free(), "frame {frame} is lost to the host: {:?}", entry(frame));
    }
}

fn a_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(now.as_nanos() as u64 | 1)
}

#[test]
fn ten_million_random_steps_keep_lists_entries_and_books_together() {
    run(5_000_000, a_seed(), 0, false);
    run(5_000_000, a_seed() ^ 0xa5a5, 0, true);
}

#[test]
fn installs_that_fail_lose_nothing() {
    run(1_000_000, a_seed(), 3, true);
}
