//! What guest RAM promises about the memory of the whole process and of the machine.
//!
//! These run in their own process and one at a time: each compares the kernel's figures before and
//! after, and nothing else may allocate in between.

use llfree_base::kernel_stats::{HugePagePool, ThpMode, huge_page_pool, process_memory, thp_mode};
use llfree_monitor::memory::{Backing, GuestRam, MemoryError, RamResidency};
use rustix::fs::{FlockOperation, flock};
use shared_layout::{HUGE_SIZE, HugeId, HugeRange};
use std::fs::{self, File};
use std::sync::{Mutex, MutexGuard, PoisonError};
use test_support::skipped;
use vm_memory::{Bytes, GuestAddress};

/// What the test's own bookkeeping may add to the process meanwhile.
const NOISE: u64 = 1 << 20;
const MIB: u64 = 1 << 20;
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Held for the length of a test.
fn alone() -> MutexGuard<'static, ()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

fn rss() -> u64 {
    process_memory().expect("/proc is mounted").share
}

fn resident(ram: &GuestRam) -> u64 {
    ram.residency().expect("/proc is mounted").resident_bytes
}

/// Writes a word into every page of `count` huge frames.
fn dirty(ram: &GuestRam, first: u64, count: u64) {
    for page in first * 512..(first + count) * 512 {
        ram.guest_memory().write_obj(!page, GuestAddress(page * 4096 + 8)).expect("inside the RAM");
    }
}

/// The words that [`dirty`] wrote, or what became of them.
fn words(ram: &GuestRam, first: u64, count: u64) -> impl Iterator<Item = (u64, u64)> {
    (first * 512..(first + count) * 512)
        .map(|page| (page, ram.guest_memory().read_obj(GuestAddress(page * 4096 + 8)).expect("inside the RAM")))
}

#[test]
fn rss_falls_after_discard() {
    let _alone = alone();
    for backing in [Backing::Anon, Backing::Memfd] {
        let before = rss();
        let ram = GuestRam::new(96 * MIB, backing).expect("never touched");
        assert!(rss() - before < NOISE, "{backing}: mapping alone costs nothing");
        dirty(&ram, 0, 48);
        let full = rss();
        // Its share of code falls when another process runs the same.
        assert!(full - before >= 96 * MIB - NOISE, "{backing}: {} bytes came", full - before);
        assert_eq!(resident(&ram), 96 * MIB, "{backing}");

        ram.discard(HugeRange::saturating(HugeId(8), 32)).expect("inside the RAM");
        let fallen = full - rss();
        assert!(fallen.abs_diff(64 * MIB) < NOISE, "{backing}: {fallen} bytes went back");
        assert_eq!(resident(&ram), 32 * MIB, "{backing}");
        assert!(words(&ram, 0, 8).chain(words(&ram, 40, 8)).all(|(page, word)| word == !page), "neighbours are kept");

        drop(ram);
        assert!(rss().saturating_sub(before) < NOISE, "{backing}: nothing stays behind");
    }
}

#[test]
fn discarded_memory_reads_as_zero() {
    let _alone = alone();
    for backing in [Backing::Anon, Backing::Memfd] {
        let ram = GuestRam::new(16 * MIB, backing).expect("never touched");
        dirty(&ram, 0, 8);
        ram.discard(HugeRange::saturating(HugeId(0), 8)).expect("inside the RAM");
        ram.populate(HugeRange::saturating(HugeId(0), 4)).expect("8 MiB");
        assert_eq!(resident(&ram), 8 * MIB, "{backing}");
        assert!(words(&ram, 0, 8).all(|(_, word)| word == 0), "{backing}: populated or just touched");
    }
}

#[test]
fn anonymous_ram_is_all_huge_pages() {
    let _alone = alone();
    match thp_mode() {
        Ok(ThpMode::Always | ThpMode::Madvise) => (),
        other => return skipped(format_args!("no transparent huge pages here: {other:?}")),
    }
    let ram = GuestRam::new(64 * MIB, Backing::Anon).expect("never touched");
    let whole = RamResidency { resident_bytes: 64 * MIB, huge_bytes: 64 * MIB };
    ram.populate(HugeRange::saturating(HugeId(0), 32)).expect("64 MiB");
    assert_eq!(ram.residency().expect("readable"), whole);
    // What comes back after a discard is huge again.
    ram.discard(HugeRange::saturating(HugeId(3), 9)).expect("inside the RAM");
    dirty(&ram, 3, 9);
    assert_eq!(ram.residency().expect("readable"), whole);
}

#[test]
fn a_tebibyte_costs_nothing_until_it_is_touched() {
    let _alone = alone();
    if fs::read_to_string("/proc/sys/vm/overcommit_memory").expect("/proc is mounted").trim() == "2" {
        return skipped("vm.overcommit_memory is 2, so that every promise is counted");
    }
    for backing in [Backing::Anon, Backing::Memfd] {
        let before = rss();
        let ram = GuestRam::new(1 << 40, backing).expect("only address space");
        dirty(&ram, 1 << 18, 1);
        dirty(&ram, (1 << 19) - 1, 1);
        assert_eq!(resident(&ram), 2 * HUGE_SIZE, "{backing}");
        assert!(rss() - before < 2 * HUGE_SIZE + NOISE, "{backing}");
        let mut ranges = 0;
        ram.for_each_resident(|_| ranges += 1).expect("readable");
        assert_eq!(ranges, 2, "{backing}");
        ram.discard(HugeRange::saturating(HugeId(0), 1 << 19)).expect("all of it");
        assert_eq!(resident(&ram), 0, "{backing}");
    }
}

#[test]
fn a_short_pool_fails_at_start_and_teaches() {
    let _alone = alone();
    let Ok(_lock) = lock_pool() else { return skipped("no 2 MiB hugetlb pages here") };
    let pool = huge_page_pool().expect("the pool exists");
    let surplus: u64 = read_pool("nr_overcommit_hugepages");
    let needed = pool.total + surplus + 3;
    let error = GuestRam::new(needed * HUGE_SIZE, Backing::Hugetlb).expect_err("more than the pool can have");
    assert!(
        matches!(error, MemoryError::PoolTooSmall { needed: n, available, .. } if n == needed && available < n),
        "{error:?}"
    );
    assert!(error.is_out_of_memory());
    let text = error.to_string();
    assert!(text.contains(&format!("needs {needed} ")) && text.contains("nr_hugepages"), "{text}");
    eprintln!("{text}");
    assert_eq!(huge_page_pool().expect("the pool exists"), pool, "nothing stays reserved");
}

#[test]
fn hugetlb_pages_are_reserved_at_start_and_go_back_to_the_pool() {
    let _alone = alone();
    let Some(raised) = RaisedPool::by(8) else { return };
    let before = raised.pool();
    let ram = GuestRam::new(8 * HUGE_SIZE, Backing::Hugetlb).expect("the pool was raised for it");
    assert_eq!(ram.host_address() % HUGE_SIZE, 0);
    assert_eq!(raised.pool().available(), before.available() - 8, "all pages are promised");
    assert_eq!(ram.residency().expect("readable"), RamResidency::default());

    ram.populate(HugeRange::saturating(HugeId(0), 4)).expect("reserved");
    dirty(&ram, 4, 4);
    let full = RamResidency { resident_bytes: 8 * HUGE_SIZE, huge_bytes: 8 * HUGE_SIZE };
    assert_eq!(ram.residency().expect("readable"), full);
    assert_eq!(raised.pool().free, before.free - 8);

    ram.discard(HugeRange::saturating(HugeId(2), 4)).expect("inside the RAM");
    assert_eq!(raised.pool().free, before.free - 4, "the pages are the pool's again");
    assert_eq!(resident(&ram), 4 * HUGE_SIZE);
    let mut ranges = Vec::new();
    ram.for_each_resident(|range| ranges.push((range.start / HUGE_SIZE, range.end / HUGE_SIZE))).expect("readable");
    assert_eq!(ranges, [(0, 2), (6, 8)]);
    ram.populate(HugeRange::saturating(HugeId(2), 4)).expect("the pool has pages");
    assert!(words(&ram, 2, 4).all(|(_, word)| word == 0));
    assert!(words(&ram, 6, 2).all(|(page, word)| word == !page), "neighbours are kept");

    drop(ram);
    assert_eq!(raised.pool(), before, "nothing stays behind");
}

#[test]
fn a_dry_pool_is_an_error_and_never_a_signal() {
    let _alone = alone();
    let Some(raised) = RaisedPool::by(4) else { return };
    let before = raised.pool();
    // Takes every available page, whatever the pool held before.
    let pages = before.available();
    let ram = GuestRam::new(pages * HUGE_SIZE, Backing::Hugetlb).expect("the pool has that many");
    ram.populate(HugeRange::saturating(HugeId(0), 2)).expect("reserved");
    ram.discard(HugeRange::saturating(HugeId(0), 2)).expect("inside the RAM");
    let thief = GuestRam::new(2 * HUGE_SIZE, Backing::Hugetlb).expect("the discarded pages are free for anyone");
    let error = ram.populate(HugeId(1)).expect_err("the pool is dry");
    assert!(matches!(error, MemoryError::Populate { .. }) && error.is_out_of_memory(), "{error:?}");
    // The others were reserved at the start and are still available.
    ram.populate(HugeRange::saturating(HugeId(2), 2)).expect("reserved");
    drop(thief);
    ram.populate(HugeRange::saturating(HugeId(0), 2)).expect("the pool has pages again");
    drop(ram);
    assert_eq!(raised.pool(), before, "no reservation is lost or left");
}

fn read_pool(name: &str) -> u64 {
    fs::read_to_string(format!("{POOL}/{name}")).expect("the pool exists").trim().parse().expect("a number")
}

/// Keeps other processes that run this test away from the pool.
fn lock_pool() -> std::io::Result<File> {
    let file = File::open(format!("{POOL}/nr_hugepages"))?;
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

/// A pool with some additional pages until this is dropped.
struct RaisedPool {
    size_before: u64,
    _lock: File,
}

impl RaisedPool {
    fn by(pages: u64) -> Option<Self> {
        let skip = |reason: &str| {
            skipped(reason);
            None
        };
        let Ok(lock) = lock_pool() else { return skip("no 2 MiB hugetlb pages here") };
        if read_pool("nr_overcommit_hugepages") != 0 {
            return skip("the pool grows by itself here");
        }
        let meminfo = fs::read_to_string("/proc/meminfo").expect("/proc is mounted");
        let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB"));
        if available.and_then(|kib| kib.parse::<u64>().ok()).is_none_or(|kib| kib < 1 << 20) {
            return skip("less than 1 GiB of memory to spare");
        }
        let size_before = read_pool("nr_hugepages");
        if fs::write(format!("{POOL}/nr_hugepages"), (size_before + pages).to_string()).is_err() {
            return skip("only root may enlarge the pool of huge pages");
        }
        let raised = Self { size_before, _lock: lock };
        if read_pool("nr_hugepages") < size_before + pages {
            return skip("the kernel found no 2 MiB of contiguous memory");
        }
        Some(raised)
    }

    fn pool(&self) -> HugePagePool {
        huge_page_pool().expect("the pool exists")
    }
}

impl Drop for RaisedPool {
    fn drop(&mut self) {
        let restored = fs::write(format!("{POOL}/nr_hugepages"), self.size_before.to_string());
        assert!(restored.is_ok() || std::thread::panicking(), "the pool could be raised but not restored");
    }
}
