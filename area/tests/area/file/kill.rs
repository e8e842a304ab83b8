//! A process that works in an area of a file is killed at random moments, again and again; the next one opens what it left.
//!
//! The first block of the area holds the owners' records: a word a block, written after the block was allocated and
//! filled, and cleared before it is freed. Meanwhile memory is taken back as fast as that goes, and the limit moves.
//!
//! `LLFREE_AREA_KILLS` says how many kills there are, `LLFREE_AREA_KILL_SEED` which.

use super::directories;
use llfree_area::{Area, Builder, Opened, Order, Switch};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};
use std::time::Duration;
use test_support::in_own_process;

const BYTES: u64 = 48 << 20;
const THREADS: usize = 2;
/// Blocks that each thread may own.
const RECORDS: usize = 128;
const KILLS: u64 = 110;
/// The most huge frames of a run.
const LONGEST: u32 = 3;

fn builder() -> Builder {
    Area::builder().size(BYTES).auto_reclaim(Switch(None))
}

/// A block as a word; 0 is none.
fn record(offset: u64, bytes: u64) -> u64 {
    (offset / 4096) << 32 | (bytes / 4096)
}

fn block(record: u64) -> Option<(u64, u64)> {
    (record != 0).then_some(((record >> 32) * 4096, u64::from(record as u32) * 4096))
}

/// The first word of each page of a block.
fn words(start: *mut u8, bytes: u64) -> impl Iterator<Item = *mut u64> {
    (0..bytes as usize).step_by(4096).map(move |offset| start.wrapping_add(offset).cast())
}

/// Whether each of these words is what it should be.
fn holds(start: *mut u8, bytes: u64, word: impl Fn(u64) -> u64) -> bool {
    // SAFETY: the caller's block, which nobody else writes.
    (0..).zip(words(start, bytes)).all(|(page, at)| unsafe { at.read_volatile() } == word(page))
}

/// The records of each thread, in the block that the root names.
fn records(root: *mut u8) -> Vec<&'static [AtomicU64]> {
    // SAFETY: a block of one page, in which there are nothing but records, mapped for as long as these are used.
    let all = unsafe { std::slice::from_raw_parts(root.cast::<AtomicU64>(), THREADS * RECORDS) };
    all.chunks(RECORDS).collect()
}

/// Why a child ended by itself.
enum Wrong {
    Open = 3,
    NotZeroed,
    Overwritten,
    NotThere,
    NotFreed,
}

fn exit(why: Wrong) -> ! {
    // SAFETY: ends this child at once.
    unsafe { libc::_exit(why as i32) }
}

/// Works until it is killed.
fn work(area: &Area, records: &[AtomicU64], mut random: fastrand::Rng) -> ! {
    let mut handle = area.handle();
    loop {
        let slot = &records[random.usize(..records.len())];
        let Some((offset, bytes)) = block(slot.load(Ordering::Relaxed)) else {
            let taken = match random.u8(..6) {
                0 => handle.alloc_run(random.u32(1..=LONGEST)),
                1 => handle.alloc(Order::new(random.u8(..=10)).expect("an order")),
                _ => handle.alloc(Order::BASE),
            };
            let Ok(taken) = taken else { continue };
            let (start, bytes) = (taken.as_ptr(), taken.bytes() as u64);
            if taken.is_zeroed() && !holds(start.as_ptr(), bytes, |_| 0) {
                exit(Wrong::NotZeroed);
            }
            let record = record(area.offset_of(start).expect("of the area"), bytes);
            for (page, word) in (0..).zip(words(start.as_ptr(), bytes)) {
                // SAFETY: ours, and this large.
                unsafe { word.write_volatile(record ^ page) };
            }
            slot.store(record, Ordering::Release);
            continue;
        };
        let start = area.at(offset).expect("of the area").as_ptr();
        if !holds(start, bytes, |page| record(offset, bytes) ^ page) {
            exit(Wrong::Overwritten);
        }
        slot.store(0, Ordering::Release);
        // A kill cuts between two instructions: it is the compiler that must keep these in order.
        compiler_fence(Ordering::SeqCst);
        // SAFETY: we are its owner, by the record.
        let Some(block) = (unsafe { area.block_at(offset, bytes) }) else { exit(Wrong::NotThere) };
        if handle.free(block).is_err() {
            exit(Wrong::NotFreed);
        }
    }
}

/// Owned bytes, by offset.
fn owners(root: *mut u8) -> BTreeMap<u64, u64> {
    let records = records(root);
    let words = records.iter().flat_map(|records| records.iter()).map(|word| word.load(Ordering::Acquire));
    let mut owners: BTreeMap<u64, u64> = BTreeMap::from([(0, 4096)]);
    for (offset, bytes) in words.filter_map(block) {
        assert_eq!(owners.insert(offset, bytes), None, "two blocks at {offset}");
    }
    let mut end = 0;
    for (offset, bytes) in &owners {
        assert!(*offset >= end, "{offset} has two owners");
        end = offset + bytes;
    }
    owners
}

/// Frees what the last process left without an owner, in 4 KiB pages.
fn clean(opened: &mut Opened) -> (BTreeMap<u64, u64>, u64) {
    let owners = owners(opened.at(0).expect("the first block").as_ptr());
    let owns = |at: u64| owners.range(..=at).next_back().is_some_and(|(offset, bytes)| at < offset + bytes);
    let leaks = opened.free_unowned(|offset, _| owns(offset)).total_frames();
    (owners, leaks)
}

fn live(path: &Path, seed: u64) -> ! {
    let mut random = fastrand::Rng::with_seed(seed);
    let open = || builder().open_at(path).unwrap_or_else(|_| exit(Wrong::Open));
    if random.u8(..4) == 0 {
        // Little but opening and closing.
        for _ in 0..random.u8(..20) {
            let _ = open().area();
        }
    }
    let mut opened = open();
    clean(&mut opened);
    let area = opened.area().unwrap_or_else(|_| exit(Wrong::Open));
    let records = records(area.at(0).expect("the first block").as_ptr());
    std::thread::scope(|scope| {
        for records in records {
            let (area, random) = (&area, random.fork());
            scope.spawn(move || work(area, records, random));
        }
        loop {
            let _ = match random.u8(..4) {
                0 => area.shrink_to(random.u64(..BYTES)).map(drop),
                1 => area.grow_to(BYTES).map(drop),
                _ => area.reclaim(u64::MAX).map(drop),
            };
        }
    })
}

/// Kills a forked child that does `work` after a while.
fn kill_after(time: Duration, work: impl FnOnce()) {
    // SAFETY: the child does what the test is about, and ends.
    let child = unsafe { libc::fork() };
    assert_ne!(child, -1, "no child");
    if child == 0 {
        work();
        // SAFETY: ends this child at once.
        unsafe { libc::_exit(2) };
    }
    std::thread::sleep(time);
    let mut status = 0;
    // SAFETY: our child, and a place for its status.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
    }
    assert!(libc::WIFSIGNALED(status), "the child ended by itself with {}", libc::WEXITSTATUS(status));
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn whatever_a_kill_cuts_off_the_file_opens_and_every_owner_has_its_own() {
    in_own_process(|| {
        let seed = number("LLFREE_AREA_KILL_SEED", fastrand::u64(..));
        eprintln!("LLFREE_AREA_KILL_SEED={seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let (directories, kills) = (directories(), number("LLFREE_AREA_KILLS", KILLS));
        let paths: Vec<_> = directories.iter().map(|directory| directory.path().join("area")).collect();
        for path in &paths {
            let area = builder().create_at(path).expect("a new file");
            let first = area.handle().alloc(Order::BASE).expect("room");
            assert_eq!(area.offset_of(first.as_ptr()), Some(0));
        }
        let (mut most, mut repaired) = (0, 0);
        for kill in 0..kills {
            let path = &paths[kill as usize % paths.len()];
            kill_after(Duration::from_micros(random.u64(..8_000)), || live(path, seed ^ kill));
            let mut opened = builder().open_at(path).expect("it was an area before");
            let recovery = opened.file().recovery().unwrap_or_default();
            assert_eq!((recovery.entries, recovery.bitfields), (0, 0), "a kill breaks no entry");
            repaired += recovery.counters;
            let (owners, leaks) = clean(&mut opened);
            let bound = THREADS as u64 * (llfree::HANDLE_FRAMES + u64::from(LONGEST) * 512);
            assert!(leaks <= bound, "{leaks} pages had no owner, {bound} may have none");
            most = most.max(leaks);
            let area = opened.area().expect("address space");
            let owned: u64 = owners.values().sum();
            assert_eq!(area.status().expect("known").used_bytes, owned);
            for (offset, bytes) in owners.into_iter().skip(1) {
                let start = area.at(offset).expect("of the area").as_ptr();
                assert!(
                    holds(start, bytes, |page| record(offset, bytes) ^ page),
                    "{offset}: somebody else wrote to it"
                );
            }
            area.grow_to(BYTES).expect("ours");
            let validation = area.validate().expect("known");
            assert!(validation.findings.is_empty(), "{validation:?}");
        }
        eprintln!("{kills} kills, at most {most} pages without an owner, {repaired} counters mended");
    });
}

#[test]
fn a_kill_while_a_file_is_made_leaves_a_whole_one_or_none() {
    in_own_process(|| {
        let mut random = fastrand::Rng::new();
        for directory in directories() {
            let at = |number: u32| directory.path().join(number.to_string());
            for _ in 0..10 {
                kill_after(Duration::from_micros(random.u64(..3_000)), || {
                    for number in 0.. {
                        let _ = std::fs::remove_file(at(number % 4));
                        builder().create_at(&at(number % 4)).unwrap_or_else(|_| exit(Wrong::Open));
                    }
                });
                for entry in std::fs::read_dir(directory.path()).expect("ours") {
                    let path = entry.expect("ours").path();
                    let area = builder().open_at(&path).and_then(|opened| opened.area()).expect("whole");
                    assert_eq!(area.status().expect("known").used_bytes, 0);
                }
            }
        }
    });
}
