//! The kernel's hooks against the transitions of [`HugeEntry`]: over every value of an entry, and in long random
//! runs of allocations, frees, isolations and moves of blocks, with a host that evicts, holds, returns and fails to
//! install at any moment between two steps, and while an install is under way; with the fallbacks of 6.1 and of 6.12.

use shared_layout::HugeEntry;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

mod aside;
mod returned;

/// Huge frames of the model: with a hole after the first [`LOW`].
const FRAMES: usize = 48;
const LOW: usize = 24;
const ORDER: u32 = 9;
const PAGES: u64 = 512;
const UNMOVABLE: i32 = 0;
const MOVABLE: i32 = 1;
const RECLAIMABLE: i32 = 2;
const ISOLATE: i32 = 4;
/// Which kernel's way of falling back to blocks of other types.
const VERSIONS: [Version; 4] = [Version(false, false), Version(true, false), Version(false, true), Version(true, true)];

/// Is it 6.12's, and is a pageblock as large as the largest block, not as a huge page?
#[derive(Clone, Copy, Debug)]
struct Version(bool, bool);

#[link(name = "llfree-kernel", kind = "static")]
unsafe extern "C" {
    fn model_start(
        entries: *const AtomicU16,
        huge_frames: u64,
        low_frames: u64,
        new_fallbacks: bool,
        large_pageblocks: bool,
    );
    fn model_hand_over();
    fn model_alloc(order: u32, migratetype: i32) -> i64;
    fn model_free(pfn: u64, order: u32);
    fn model_isolate(pfn: u64, order: *mut u32) -> i64;
    fn model_set_type(pfn: u64, migratetype: i32);
    fn model_type(pfn: u64) -> i32;
    fn model_state(frame: u64) -> i32;
    fn model_books(listed: *mut i64, counted: *mut i64, managed: *mut i64, aside: *mut i64);
    fn model_tick(ticks: u64);
    fn model_locked() -> bool;
    fn model_pfn(frame: u64) -> u64;
    fn model_host_returns() -> i64;
    fn llfree_set_held_aside();
    fn llfree_return_blocks(failed: bool) -> u64;
    fn llfree_return_some(failed: bool) -> u64;
    fn __llfree_check_returned();
    fn llfree_follow_host(failed: bool);
    fn model_waits() -> bool;
}

static ENTRIES: [AtomicU16; FRAMES] = [const { AtomicU16::new(0) }; FRAMES];
static INSTALLS: AtomicU64 = AtomicU64::new(0);
/// How often the host was asked, and how often the kernel's files asked to be run once more.
static CALLS: AtomicU64 = AtomicU64::new(0);
static LATER: AtomicU64 = AtomicU64::new(0);
static SOON: AtomicU64 = AtomicU64::new(0);
/// The host's words. The epoch is raised whenever the host has returned something, also after it was read so many times
/// from now on; 0: not by that.
static LIMIT: AtomicU64 = AtomicU64::new(0);
static EPOCH: AtomicU64 = AtomicU64::new(0);
static RAISED_AFTER: AtomicU64 = AtomicU64::new(0);
/// Where they are in the header.
const LIMIT_WORD: u32 = 0x100;
const EPOCH_WORD: u32 = 0x110;
/// One install in so many fails; 0: none.
static FAIL_ONE_IN: AtomicU64 = AtomicU64::new(0);
/// The host also acts while an install is under way.
static RACES: AtomicBool = AtomicBool::new(false);
/// Whenever the kernel's files sleep, an allocation takes a batch back, also of what failed; the batches that it took,
/// and the blocks in them.
static OTHERS: AtomicBool = AtomicBool::new(false);
static OTHERS_RETRY: AtomicBool = AtomicBool::new(false);
static BATCHES: AtomicU64 = AtomicU64::new(0);
static TAKEN: AtomicU64 = AtomicU64::new(0);
/// The next time that they sleep, the host returns what the walk has looked at first.
static RETURNED_ASLEEP: AtomicBool = AtomicBool::new(false);
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
        if now.is_held() {
            EPOCH.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn llfree_word(offset: u32) -> u64 {
    if offset == LIMIT_WORD {
        return LIMIT.load(Ordering::Relaxed);
    }
    assert_eq!(offset, EPOCH_WORD, "not a word that is read here");
    let epoch = EPOCH.load(Ordering::Relaxed);
    let left = RAISED_AFTER.load(Ordering::Relaxed);
    RAISED_AFTER.store(left.saturating_sub(1), Ordering::Relaxed);
    if left == 1 {
        EPOCH.store(epoch + 1, Ordering::Relaxed);
    }
    epoch
}

/// The host's half of an install.
#[unsafe(no_mangle)]
extern "C" fn llfree_install(frame: u64, count: u32) -> bool {
    CALLS.fetch_add(1, Ordering::Relaxed);
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

#[unsafe(no_mangle)]
extern "C" fn llfree_try_later() {
    LATER.fetch_add(1, Ordering::Relaxed);
}

#[unsafe(no_mangle)]
extern "C" fn llfree_try_soon() {
    SOON.fetch_add(1, Ordering::Relaxed);
}

/// What happens while the kernel's files sleep.
#[unsafe(no_mangle)]
extern "C" fn model_sleeps() {
    if RACES.load(Ordering::Relaxed) {
        host_step();
        if random(2) == 0 {
            take_some_back(random(2) == 0);
        }
    }
    if RETURNED_ASLEEP.swap(false, Ordering::Relaxed) {
        set(0, entry(0).release().expect("a held one"));
        EPOCH.fetch_add(1, Ordering::Relaxed);
    }
    if OTHERS.load(Ordering::Relaxed) {
        // SAFETY: it only looks.
        assert!(unsafe { model_waits() }, "two could walk the list at once");
        TAKEN.fetch_add(take_some_back(OTHERS_RETRY.load(Ordering::Relaxed)), Ordering::Relaxed);
        BATCHES.fetch_add(1, Ordering::Relaxed);
    }
}

fn take_some_back(failed: bool) -> u64 {
    // SAFETY: the model runs on this thread alone, and sleeps without its zone's lock.
    unsafe { llfree_return_some(failed) }
}

/// All memory is in use, and evicted; the first `low` huge frames lie below a hole.
fn start(low: usize, version: Version) {
    for frame in 0..FRAMES {
        set(frame, HugeEntry::HUGE_EVICTED);
    }
    // SAFETY: the entries are static; the caller holds the lock.
    unsafe { model_start(ENTRIES.as_ptr(), FRAMES as u64, low as u64, version.0, version.1) };
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
        start(FRAMES, VERSIONS[usize::from(bits & 3)]);
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
    fn new(version: Version) -> Self {
        start(LOW, version);
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
                let kind = if random(4) == 0 { ISOLATE } else { random(4) as i32 };
                // SAFETY: the lock is held.
                unsafe { model_set_type(pfn(random(FRAMES as u64) as usize), kind) };
            }
            89..90 => {
                // SAFETY: the lock is held.
                unsafe {
                    model_tick(random(200));
                    match random(4) {
                        0 => llfree_follow_host(random(2) == 0),
                        3 => __llfree_check_returned(),
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

fn run(version: Version, steps: u64, seed: u64, fail_one_in: u64, races: bool) {
    let _alone = alone();
    println!("{version:?}, seed {seed}");
    SEED.store(seed, Ordering::Relaxed);
    FAIL_ONE_IN.store(fail_one_in, Ordering::Relaxed);
    RACES.store(races, Ordering::Relaxed);
    let mut run = Run::new(version);
    for step in 0..steps {
        run.step();
        if step % 64 == 0 {
            run.check();
        }
    }
    run.check();
    // The host returns all, the guest frees all: nothing was lost.
    FAIL_ONE_IN.store(0, Ordering::Relaxed);
    RACES.store(false, Ordering::Relaxed);
    for frame in 0..FRAMES {
        if let Some(next) = entry(frame).release() {
            set(frame, next);
        }
    }
    while let Some((pfn, order)) = run.some() {
        free(pfn, order);
    }
    EPOCH.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the lock is held.
    unsafe { llfree_follow_host(false) };
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
    for version in VERSIONS {
        run(version, 1_250_000, a_seed(), 0, false);
        run(version, 1_250_000, a_seed() ^ 0xa5a5, 0, true);
    }
}

#[test]
fn installs_that_fail_lose_nothing() {
    for version in VERSIONS {
        run(version, 250_000, a_seed(), 3, true);
    }
}

/// Frees these huge frames, which are not neighbours, as blocks of this type: evicted, or with memory.
fn offer(frames: &[usize], kind: i32, evicted: bool) {
    for &frame in frames {
        set(frame, if evicted { HugeEntry::HUGE_EVICTED } else { HugeEntry::HUGE_INSTALLED });
        // SAFETY: the lock is held.
        unsafe { model_set_type(pfn(frame), kind) };
        free(pfn(frame), ORDER);
    }
}

fn kind_of(frame: usize) -> i32 {
    // SAFETY: it only looks.
    unsafe { model_type(pfn(frame)) }
}

/// A kernel that has handed over nothing yet, and a host that installs, or never does.
fn started(version: Version, fails: bool) {
    RACES.store(false, Ordering::Relaxed);
    FAIL_ONE_IN.store(u64::from(fails), Ordering::Relaxed);
    start(FRAMES, version);
    // SAFETY: the lock is held.
    unsafe { model_hand_over() };
}

fn tick(ticks: u64) {
    // SAFETY: it only counts.
    unsafe { model_tick(ticks) };
}

fn calls() -> u64 {
    CALLS.load(Ordering::Relaxed)
}

/// Movable memory may also come from blocks for contiguous memory. That there are none of those does not make a search
/// forget that it met movable blocks without memory, and rob others.
#[test]
fn a_search_for_contiguous_memory_keeps_what_starves() {
    let _alone = alone();
    for version in VERSIONS {
        started(version, false);
        offer(&[5, 9], MOVABLE, true);
        offer(&[13, 17], UNMOVABLE, false);
        let got = alloc(0, MOVABLE).map(|pfn| pfn / PAGES);
        assert!(got == Some(5) || got == Some(9), "{version:?} took from huge frame {got:?}");
        assert_eq!((kind_of(13), kind_of(17)), (UNMOVABLE, UNMOVABLE), "{version:?}");
    }
}

/// While the host has no memory, blocks that have none keep their type, however often they are asked for.
#[test]
fn failing_installs_do_not_change_the_type_of_a_block() {
    let _alone = alone();
    let frames = [3, 5, 9, 11, 13, 17, 19, 23];
    for version in VERSIONS {
        for (kind, wanted) in [(UNMOVABLE, MOVABLE), (UNMOVABLE, RECLAIMABLE), (MOVABLE, UNMOVABLE)] {
            started(version, true);
            offer(&frames, kind, true);
            for order in [0, 3, 9, 5] {
                for _ in 0..20 {
                    assert_eq!(alloc(order, wanted), None);
                }
                tick(3);
            }
            for frame in frames {
                assert_eq!(kind_of(frame), kind, "{version:?}: huge frame {frame} for type {wanted}");
            }
        }
    }
}

/// A fallback claims the block that has memory, wherever it is, and has memory put behind one if none has.
#[test]
fn a_fallback_claims_what_has_memory() {
    let _alone = alone();
    for version in VERSIONS {
        for order in [0, 5, 9] {
            started(version, false);
            // Two that merge to one of the largest order, which is looked at first.
            offer(&[5, 9, 20, 21], UNMOVABLE, true);
            let before = INSTALLS.load(Ordering::Relaxed);
            assert!(alloc(order, RECLAIMABLE).is_some(), "{version:?}");
            // A whole pageblock, if that can be.
            assert_eq!(INSTALLS.load(Ordering::Relaxed) - before, 1 + u64::from(version.1), "{version:?}");
            started(version, true);
            offer(&[5, 9, 20, 21], UNMOVABLE, true);
            offer(&[13], UNMOVABLE, false);
            assert_eq!(alloc(order, RECLAIMABLE), Some(pfn(13)), "{version:?}");
            assert_eq!((kind_of(5), kind_of(9), kind_of(20)), (UNMOVABLE, UNMOVABLE, UNMOVABLE), "{version:?}");
        }
    }
}

/// A host that had no memory for a moment is asked again soon, and one that has none for long, ever more rarely.
#[test]
fn failed_installs_pause_installs_for_a_moment() {
    let _alone = alone();
    let frames: Vec<usize> = (0..FRAMES).step_by(2).collect();
    for version in VERSIONS {
        started(version, true);
        offer(&frames, MOVABLE, true);
        assert_eq!(alloc(0, MOVABLE), None);
        // 20 ms later.
        tick(5);
        FAIL_ONE_IN.store(0, Ordering::Relaxed);
        assert!(alloc(0, MOVABLE).is_some(), "{version:?}: still paused");
        FAIL_ONE_IN.store(1, Ordering::Relaxed);
        let before = calls();
        // 10 s, in which somebody asks all the time, and what is aside is tried again each second.
        for ticks in 0..2500 {
            alloc(9, UNMOVABLE);
            tick(1);
            if ticks % 250 == 0 {
                // SAFETY: the lock is held.
                unsafe { llfree_return_blocks(true) };
            }
        }
        assert!(calls() - before < 150, "{version:?}: the host was asked {} times", calls() - before);
    }
}
