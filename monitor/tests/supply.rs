//! Where the memory of installs comes from: the pool, a slot filled on the spot, or guest RAM's own
//! page faults, and that all of them give zeroed memory and the right counts. No KVM needed.

use llfree_base::thread::Spawner;
use llfree_monitor::memory::{Backing, Fill, GuestRam, MemoryError, PoolConfig, Supply, UseUserfaultfd};
use shared_layout::{FRAME_SIZE, HUGE_SIZE, HugeId, HugeRange};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use test_support::skipped;
use vm_memory::{Bytes as _, GuestAddress};

const FRAMES: u32 = 64;

fn pool(huge_frames: u32) -> PoolConfig {
    PoolConfig { huge_frames, rate: 0, fill: Fill::Always }
}

/// RAM under a userfaultfd, or `None` with the reason if none is available.
fn moving(config: PoolConfig) -> Option<(Arc<GuestRam>, Supply)> {
    let ram = Arc::new(GuestRam::new(u64::from(FRAMES) * HUGE_SIZE, Backing::Anon).expect("never touched"));
    match Supply::new(ram.clone(), config, UseUserfaultfd::On, &Spawner::default()) {
        Ok(supply) => Some((ram, supply)),
        Err(error) => {
            skipped(llfree_base::error_line(&error));
            None
        }
    }
}

fn wait_until_full(supply: &Supply) {
    let start = Instant::now();
    while supply.pool_status().resident_bytes < supply.pool_status().size_bytes {
        assert!(start.elapsed() < Duration::from_secs(60), "{:?}", supply.pool_status());
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn has_huge_pages() -> bool {
    llfree_base::kernel_stats::thp_mode().is_ok_and(|mode| mode != llfree_base::kernel_stats::ThpMode::Never)
}

/// Asserts that the frames are there, huge where the host has huge pages, zeroed, and writable.
fn is_good_memory(ram: &GuestRam, first: u32, count: u32) {
    let residency = ram.residency().expect("the kernel answers");
    if has_huge_pages() {
        assert_eq!(residency.huge_bytes, residency.resident_bytes, "all of it stays huge");
    }
    for page in (0..u64::from(count) * HUGE_SIZE).step_by(FRAME_SIZE as usize) {
        let at = GuestAddress(u64::from(first) * HUGE_SIZE + page);
        let word: u64 = ram.guest_memory().read_obj(at).expect("in RAM");
        assert_eq!(word, 0, "{at:?}");
        ram.guest_memory().write_obj(0xdead_u64 + page, at).expect("in RAM");
    }
}

#[test]
fn memory_from_the_pool_is_zeroed_and_stays_huge() {
    let Some((ram, supply)) = moving(pool(8)) else { return };
    wait_until_full(&supply);
    assert_eq!(ram.residency().expect("the kernel answers").resident_bytes, 0, "the pool is not guest RAM");
    supply.install(HugeRange::saturating(HugeId(3), 8)).expect("there is memory");
    assert_eq!((supply.counters().hits.get(), supply.counters().misses.get()), (8, 0));
    assert_eq!(ram.residency().expect("the kernel answers").resident_bytes, 8 * HUGE_SIZE);
    is_good_memory(&ram, 3, 8);
}

#[test]
fn memory_that_was_discarded_comes_back_zeroed() {
    let Some((ram, supply)) = moving(pool(4)) else { return };
    for _ in 0..8 {
        supply.install(HugeRange::saturating(HugeId(0), 6)).expect("there is memory");
        is_good_memory(&ram, 0, 6);
        ram.discard(HugeRange::saturating(HugeId(0), 6)).expect("the kernel takes it");
    }
    assert_eq!(supply.counters().hits.get() + supply.counters().misses.get(), 48);
}

#[test]
fn a_dry_pool_is_no_failure_and_is_counted() {
    let Some((ram, supply)) = moving(pool(2)) else { return };
    supply.install(HugeRange::saturating(HugeId(0), FRAMES)).expect("there is memory");
    assert_eq!(supply.counters().hits.get() + supply.counters().misses.get(), u64::from(FRAMES));
    assert!(supply.counters().misses.get() > 0, "two slots cannot be refilled faster than they are taken in one go");
    is_good_memory(&ram, 0, FRAMES);
}

#[test]
fn without_a_pool_memory_is_made_on_the_spot() {
    let Some((ram, supply)) = moving(pool(0)) else { return };
    supply.install(HugeRange::saturating(HugeId(5), 7)).expect("there is memory");
    assert_eq!((supply.counters().hits.get(), supply.counters().misses.get()), (0, 7));
    is_good_memory(&ram, 5, 7);
}

#[test]
fn a_small_part_of_a_frame_comes_in_pages_and_a_large_one_whole() {
    let Some((ram, supply)) = moving(pool(0)) else { return };
    let resident = || ram.residency().expect("the kernel answers");
    let at = |huge: u64, byte: u64| huge * HUGE_SIZE + byte;
    // The end of one frame and the begin of the next.
    supply.install_part(at(3, HUGE_SIZE - 5)..at(4, FRAME_SIZE + 1)).expect("there is memory");
    assert_eq!((resident().resident_bytes, resident().huge_bytes), (3 * FRAME_SIZE, 0));
    for page in [at(3, HUGE_SIZE - FRAME_SIZE), at(4, 0), at(4, FRAME_SIZE)] {
        assert_eq!(ram.guest_memory().read_obj::<u64>(GuestAddress(page)).expect("in RAM"), 0);
        ram.guest_memory().write_obj(page, GuestAddress(page)).expect("in RAM");
    }
    // What is there stays as it is.
    supply.install_part(at(4, 0)..at(4, 3 * FRAME_SIZE)).expect("there is memory");
    assert_eq!(resident().resident_bytes, 4 * FRAME_SIZE);
    assert_eq!(ram.guest_memory().read_obj::<u64>(GuestAddress(at(4, FRAME_SIZE))).expect("in RAM"), at(4, FRAME_SIZE));
    supply.install_part(at(8, 0)..at(9, HUGE_SIZE / 2)).expect("there is memory");
    assert_eq!(resident().resident_bytes, 4 * FRAME_SIZE + 2 * HUGE_SIZE);
    supply.install_part(at(63, 0)..at(64, 1)).expect_err("the last byte is not in RAM");
    supply.install_part(at(1, 7)..at(1, 7)).expect("nothing to do");
    assert_eq!(resident().resident_bytes, 4 * FRAME_SIZE + 2 * HUGE_SIZE);
}

#[test]
fn without_userfaultfd_a_part_is_a_whole_frame() {
    let ram = Arc::new(GuestRam::new(u64::from(FRAMES) * HUGE_SIZE, Backing::Anon).expect("never touched"));
    let supply = Supply::new(ram.clone(), pool(0), UseUserfaultfd::Off, &Spawner::default()).expect("nothing to fail");
    supply.install_part(HUGE_SIZE + 5..HUGE_SIZE + 6).expect("there is memory");
    assert_eq!(ram.residency().expect("the kernel answers").resident_bytes, HUGE_SIZE, "nobody tells of a touch");
}

#[test]
fn without_userfaultfd_memory_is_made_in_place() {
    for backing in [Backing::Anon, Backing::Memfd] {
        let ram = Arc::new(GuestRam::new(u64::from(FRAMES) * HUGE_SIZE, backing).expect("never touched"));
        let supply =
            Supply::new(ram.clone(), pool(4), UseUserfaultfd::Off, &Spawner::default()).expect("nothing to fail");
        assert!(supply.userfault().is_none());
        assert_eq!(supply.pool_status().size_bytes, 0, "it could not be moved");
        supply.install(HugeRange::saturating(HugeId(5), 7)).expect("there is memory");
        assert_eq!((supply.counters().hits.get(), supply.counters().misses.get()), (0, 7));
        assert_eq!(ram.residency().expect("the kernel answers").resident_bytes, 7 * HUGE_SIZE);
    }
}

#[test]
fn files_cannot_be_under_a_userfaultfd_and_the_refusal_says_so() {
    let ram = Arc::new(GuestRam::new(HUGE_SIZE, Backing::Memfd).expect("never touched"));
    let auto = Supply::new(ram.clone(), pool(4), UseUserfaultfd::Auto, &Spawner::default()).expect("it does without");
    assert!(auto.userfault().is_none());
    let Err(error) = Supply::new(ram, pool(4), UseUserfaultfd::On, &Spawner::default()) else {
        panic!("pages of files do not move")
    };
    assert!(matches!(error, MemoryError::UserfaultBacking(Backing::Memfd)));
    assert!(llfree_base::error_line(&error).contains("pages of memfd memory cannot be moved"));
}

#[test]
fn what_lies_in_the_way_is_replaced() {
    let Some((ram, supply)) = moving(pool(4)) else { return };
    wait_until_full(&supply);
    let userfault = supply.userfault().expect("attached");
    for page in [0, 5, 511] {
        userfault.lend_zeroes(2 * HUGE_SIZE + page * FRAME_SIZE).expect("a page table");
        ram.guest_memory().write_obj(7u64, GuestAddress(2 * HUGE_SIZE + page * FRAME_SIZE)).expect("in RAM");
    }
    supply.install(HugeRange::saturating(HugeId(1), 3)).expect("there is memory");
    for page in 0..3 * 512 {
        let word: u64 = ram.guest_memory().read_obj(GuestAddress(HUGE_SIZE + page * FRAME_SIZE)).expect("in RAM");
        assert_eq!(word, 0, "page {page}");
    }
    assert_eq!(ram.residency().expect("the kernel answers").resident_bytes, 3 * HUGE_SIZE);
}

#[test]
fn ranges_beyond_the_ram_are_refused() {
    let Some((_, supply)) = moving(pool(0)) else { return };
    for (first, count) in [(FRAMES, 1), (FRAMES - 1, 2), (u32::MAX, 2), (0, FRAMES + 1)] {
        let short = supply.install(HugeRange::saturating(HugeId(first), count)).expect_err("out of range");
        assert!(short.installed == 0 && matches!(short.error, MemoryError::OutOfRange { .. }), "{short:?}");
    }
}

#[test]
fn who_touches_missing_memory_sleeps_until_it_comes_and_is_named() {
    let Some((ram, supply)) = moving(pool(0)) else { return };
    let userfault = supply.userfault().expect("attached");
    let nobody = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("an event");
    let at = 9 * HUGE_SIZE + 3 * FRAME_SIZE + 8;
    std::thread::scope(|scope| {
        let toucher = scope.spawn(|| {
            ram.guest_memory().write_obj(1u64, GuestAddress(at)).expect("in RAM");
            rustix::thread::gettid().as_raw_nonzero().get()
        });
        let mut faults = Vec::new();
        while faults.is_empty() {
            userfault.wait(std::os::fd::AsFd::as_fd(&nobody), None).expect("the kernel waits");
            userfault.read(&mut faults).expect("the kernel answers");
        }
        assert!(!toucher.is_finished());
        supply.install(HugeId(9)).expect("there is memory");
        let thread = toucher.join().expect("no panic");
        assert_eq!((faults.len(), faults[0].offset, faults[0].thread, faults[0].write), (1, at, thread, true));
    });
    assert_eq!(ram.guest_memory().read_obj::<u64>(GuestAddress(at)).expect("in RAM"), 1);
}

#[test]
fn detached_memory_comes_by_itself_again_and_the_pool_goes_back() {
    let Some((ram, supply)) = moving(pool(2)) else { return };
    let touched = AtomicU32::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            ram.guest_memory().write_obj(1u64, GuestAddress(0)).expect("in RAM");
            touched.fetch_add(1, Ordering::Relaxed);
        });
        wait_until_full(&supply);
        supply.detach();
    });
    assert_eq!(touched.load(Ordering::Relaxed), 1);
    assert!(supply.userfault().is_none());
    supply.install(HugeRange::saturating(HugeId(20), 4)).expect("in place");
    assert_eq!(ram.residency().expect("the kernel answers").resident_bytes, 5 * HUGE_SIZE);
    let start = Instant::now();
    while supply.pool_status().resident_bytes > 0 {
        assert!(start.elapsed() < Duration::from_secs(60), "nothing can be moved out of it any more");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn two_threads_install_all_frames_between_them() {
    let Some((ram, supply)) = moving(pool(8)) else { return };
    for _ in 0..10 {
        std::thread::scope(|scope| {
            for half in 0..2 {
                let supply = &supply;
                scope.spawn(move || {
                    for frame in (half..FRAMES).step_by(2) {
                        supply.install(HugeId(frame)).expect("there is memory");
                    }
                });
            }
        });
        is_good_memory(&ram, 0, FRAMES);
        ram.discard(HugeRange::saturating(HugeId(0), FRAMES)).expect("the kernel takes it");
    }
    assert_eq!(supply.counters().hits.get() + supply.counters().misses.get(), 10 * u64::from(FRAMES));
    wait_until_full(&supply);
}

#[test]
fn a_dropped_pool_leaves_no_memory_behind() {
    let Some((ram, supply)) = moving(PoolConfig { huge_frames: 32, rate: 64 << 20, fill: Fill::Always }) else {
        return;
    };
    supply.install(HugeId(0)).expect("there is memory");
    drop(supply);
    assert_eq!(ram.residency().expect("the kernel answers").resident_bytes, HUGE_SIZE);
    // No thread sleeps on a range that is no longer registered.
    assert_eq!(ram.guest_memory().read_obj::<u64>(GuestAddress(HUGE_SIZE)).expect("in RAM"), 0);
}
