//! What a tenant with an allocator of its own may rely on: it boots by touching, is not robbed of what it never gave,
//! and keeps the floor that it asks for.

use llfree_base::faults::{self, Scenario};
use llfree_base::thread::Spawner;
use llfree_monitor::memory::{Backing, GuestRam, MemoryError, PoolConfig, Supply, UseUserfaultfd};
use llfree_monitor::{
    Direction, HandOver, InstallError, Monitor, OnViolation, Region, Table, TenantStart, Terms, Violations,
};
use shared_layout::table::HELD_STAYS;
use shared_layout::{FRAME_SIZE, HUGE_SIZE, HostWord, HugeEntry, HugeId, HugeRange, TableLayout};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use vm_memory::{Bytes as _, GuestAddress};

const FRAMES: u32 = 32;

/// A tenant that has handed nothing over yet, and how often it was notified.
struct Tenant {
    monitor: Arc<Monitor>,
    table: Table,
    ram: Arc<GuestRam>,
    floor: Arc<AtomicU32>,
    notices: Arc<AtomicU32>,
}

impl Tenant {
    fn boot() -> Self {
        Self::boot_on(UseUserfaultfd::Off).expect("no pool, no userfaultfd")
    }

    /// Not where there is no userfaultfd to have.
    fn boot_on(userfaultfd: UseUserfaultfd) -> Result<Self, MemoryError> {
        let (taken, installed) = (0..FRAMES, vec![0..2, 5..6]);
        Self::start(userfaultfd, TenantStart { threads: 1, taken, installed, ..TenantStart::default() })
    }

    fn start(userfaultfd: UseUserfaultfd, start: TenantStart) -> Result<Self, MemoryError> {
        let ram = Arc::new(GuestRam::new(u64::from(FRAMES) * HUGE_SIZE, Backing::Anon).expect("small"));
        let supply = Supply::new(ram.clone(), PoolConfig::default(), userfaultfd, &Spawner::default())?;
        let layout = TableLayout::new(FRAMES).expect("small");
        let region = Arc::new(Region::anonymous(layout.total as usize).expect("room"));
        let table = Table::new(region, layout).expect("it fits");
        table.clear();
        let monitor = Monitor::new(ram.clone(), supply, table.clone(), start).expect("memory for some frames");
        let monitor = Arc::new(monitor);
        let (floor, notices) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let (asks, told) = (floor.clone(), notices.clone());
        monitor.agree(Terms {
            floor: Box::new(move || asks.load(Ordering::Relaxed)),
            notice: Box::new(move || {
                told.fetch_add(1, Ordering::Relaxed);
            }),
        });
        Ok(Self { monitor, table, ram, floor, notices })
    }

    fn entry(&self, frame: u32) -> HugeEntry {
        HugeEntry::from_bits(self.table.entries()[frame as usize].load(Ordering::Relaxed))
    }

    fn give(&self, frames: std::ops::Range<u32>) {
        for frame in frames {
            let given = self.entry(frame).give_huge().expect("it is taken");
            self.table.entries()[frame as usize].store(given.bits(), Ordering::Relaxed);
        }
    }

    fn touch(&self, frame: u32) {
        let at = GuestAddress(u64::from(frame) * HUGE_SIZE);
        self.ram.guest_memory().write_obj(1u64, at).expect("in RAM");
    }

    fn word(&self, frame: u32) -> u64 {
        let at = GuestAddress(u64::from(frame) * HUGE_SIZE);
        self.ram.guest_memory().read_obj(at).expect("in RAM")
    }

    fn shrink(&self, frames: u32) -> u32 {
        let resize = self.monitor.resize(Direction::Shrink, frames, || (), |_: Duration| false).expect("it discards");
        (resize.actual / HUGE_SIZE) as u32
    }
}

#[test]
fn it_starts_with_all_taken_and_only_its_image_in_memory() {
    let tenant = Tenant::boot();
    for frame in 0..FRAMES {
        let image = [0, 1, 5].contains(&frame);
        let expected = if image { HugeEntry::HUGE_INSTALLED } else { HugeEntry::HUGE_EVICTED };
        assert_eq!(tenant.entry(frame), expected, "frame {frame}");
    }
    assert_eq!(tenant.monitor.census().installed, 3);
}

#[test]
fn what_was_never_given_is_never_taken() {
    let tenant = Tenant::boot();
    tenant.touch(9);
    assert_eq!(tenant.shrink(1), FRAMES);
    assert_eq!(tenant.monitor.evict_by_force(u32::MAX).expect("nothing to do").frames, 0);
}

/// It may believe that a frame which was held stays so until there is another epoch.
#[test]
fn what_is_held_stays_held_for_as_long_as_the_host_says_so() {
    test_support::in_own_process(|| {
        let scenario = Scenario::start();
        let tenant = Tenant::boot();
        let word = || tenant.table.claimed_control(HostWord::ReturnEpoch);
        let number = || {
            assert_ne!(word() & HELD_STAYS, 0, "nobody gives anything back");
            word() & !HELD_STAYS
        };
        let held = || (0..FRAMES).filter(|frame| tenant.entry(*frame).is_held()).count();
        let first = number();
        tenant.give(0..2);
        tenant.monitor.hand_over(HandOver::Complete);
        scenario.set(faults::DISCARD, "return(12)").expect("it is a point");
        assert!(tenant.monitor.shrink_by_force(0).is_err());
        assert_eq!((tenant.entry(0), number()), (HugeEntry::FREE_INSTALLED, first + 2));
        assert!(tenant.monitor.evict_by_force(2).is_err());
        assert_eq!(number(), first + 4, "it says so again");
        scenario.set(faults::DISCARD, "off").expect("it is a point");
        assert_eq!((tenant.shrink(0), held(), number()), (FRAMES - 2, 2, first + 4), "nothing came back");
        assert_eq!((tenant.monitor.grow(FRAMES - 1).frames, held(), number()), (1, 1, first + 6));
        // The next one to take charge may be of another version, or the last one have been in the middle of a return.
        tenant.table.set_control(HostWord::ReturnEpoch, 70);
        tenant.monitor.take_over().expect("the kernel answers");
        assert!(number() > 70);
        // The tenant can write it as well.
        tenant.table.set_control(HostWord::ReturnEpoch, u64::MAX);
        tenant.monitor.take_over().expect("the kernel answers");
        assert!(number() < HELD_STAYS - 1);
    });
}

/// What a driver of a device finds is not held.
#[test]
fn what_was_held_is_free_again_with_a_new_epoch_when_memory_is_left_to_a_device() {
    let tenant = Tenant::boot();
    let word = || tenant.table.claimed_control(HostWord::ReturnEpoch);
    tenant.give(0..2);
    assert_eq!(tenant.shrink(0), FRAMES - 2);
    let before = word();
    assert!(tenant.monitor.leave_to_device() && !tenant.entry(0).is_held());
    assert_ne!(word(), before);
}

#[test]
fn touches_are_no_violations_until_it_has_handed_over() {
    let tenant = Tenant::boot();
    tenant.touch(9);
    assert_eq!(tenant.monitor.audit().expect("the kernel answers"), 0);
    assert_eq!(tenant.entry(9), HugeEntry::HUGE_INSTALLED, "adopted");
    // Touched in boot, but only found after it.
    tenant.touch(10);
    tenant.give(10..12);
    tenant.monitor.hand_over(HandOver::Complete);
    assert!(!tenant.monitor.is_booting());
    assert_eq!(tenant.monitor.audit().expect("the kernel answers"), 0);
    assert_eq!(tenant.monitor.counters.boot_touches.get(), 2);
    tenant.touch(11);
    assert_eq!(tenant.monitor.audit().expect("the kernel answers"), 1);
    assert_eq!(tenant.monitor.counters.violations.get(), 1);
}

#[test]
fn an_install_that_fails_in_boot_leaves_what_was_touched() {
    test_support::in_own_process(|| {
        let scenario = Scenario::start();
        let tenant = Tenant::boot();
        let install = || tenant.monitor.install(HugeRange::saturating(HugeId(8), 4));
        tenant.touch(9);
        scenario.set(faults::POPULATE, "return(12)").expect("it is a point");
        assert_eq!(install(), Err(InstallError::NoMemory));
        assert_eq!((tenant.word(9), tenant.entry(9)), (1, HugeEntry::HUGE_EVICTED), "it is in use, and still to come");
        assert_eq!(tenant.monitor.audit().expect("the kernel answers"), 0);
        assert_eq!((tenant.word(9), tenant.entry(9)), (1, HugeEntry::HUGE_INSTALLED), "adopted");
        scenario.set(faults::POPULATE, "off").expect("it is a point");
        assert_eq!(install(), Ok(()));
        assert_eq!(tenant.word(9), 1);
    });
}

#[test]
fn after_a_hand_over_in_part_touches_are_no_violations_and_what_they_left_stays() {
    test_support::in_own_process(|| {
        let scenario = Scenario::start();
        let tenant = Tenant::boot();
        let used = HugeRange::saturating(HugeId(8), 4);
        tenant.touch(9);
        tenant.give(20..28);
        scenario.set(faults::POPULATE, "return(12)").expect("it is a point");
        assert_eq!(tenant.monitor.install(used), Err(InstallError::NoMemory));
        tenant.monitor.hand_over(HandOver::ByTouch);
        assert!(!tenant.monitor.is_booting(), "what is free is shared");
        assert_eq!(tenant.shrink(FRAMES - 2), FRAMES - 2);
        // Twice, as the first audit after a hand-over excuses what was there before in any case.
        for frame in [9, 10] {
            tenant.touch(frame);
            assert_eq!(tenant.monitor.install(used), Err(InstallError::NoMemory), "another try");
            assert_eq!(tenant.word(frame), 1, "it is in use, whatever the host lacks");
            assert_eq!(tenant.monitor.audit().expect("the kernel answers"), 0, "frame {frame}");
            assert_eq!(tenant.entry(frame), HugeEntry::HUGE_INSTALLED, "adopted");
        }
        scenario.set(faults::POPULATE, "off").expect("it is a point");
        assert_eq!(tenant.monitor.install(used), Ok(()));
        tenant.monitor.hand_over(HandOver::Complete);
        assert_eq!(tenant.monitor.audit().expect("the kernel answers"), 0);
        tenant.touch(20);
        assert_eq!(tenant.monitor.audit().expect("the kernel answers"), 1, "now it has no more excuse");
        assert_eq!((tenant.word(9), tenant.word(10), tenant.monitor.counters.boot_touches.get()), (1, 1, 2));
    });
}

/// The same under a userfaultfd, which asks what a touch is before there is memory: with the strictest policy.
#[test]
fn a_touch_that_is_seen_in_the_act_stays_though_the_host_has_no_memory_to_install() {
    test_support::in_own_process(|| {
        let scenario = Scenario::start();
        let tenant = match Tenant::boot_on(UseUserfaultfd::On) {
            Ok(tenant) => tenant,
            Err(error) => return test_support::skipped(llfree_base::error_line(&error)),
        };
        let (ended, policy) = (Arc::new(AtomicU32::new(0)), OnViolation::Stop);
        let of_watch = ended.clone();
        let end = move |_| {
            of_watch.fetch_add(1, Ordering::Relaxed);
        };
        let watch = Violations::watch(tenant.monitor.clone(), |_| None, policy, true, end, &Spawner::default())
            .expect("a thread")
            .expect("RAM is under a userfaultfd");
        // One in boot, one after the hand-over in part; more pages than a thread is ever lent.
        scenario.set(faults::POPULATE, "return(12)").expect("it is a point");
        let pages = |frame: u64| (0..64).map(move |page| GuestAddress(frame * HUGE_SIZE + page * FRAME_SIZE));
        for (frame, to) in [(9, HandOver::ByTouch), (10, HandOver::ByTouch)] {
            for at in pages(frame) {
                tenant.ram.guest_memory().write_obj(at.0, at).expect("in RAM");
            }
            tenant.monitor.hand_over(to);
        }
        scenario.set(faults::POPULATE, "off").expect("it is a point");
        assert_eq!(tenant.monitor.install(HugeRange::saturating(HugeId(8), 4)), Ok(()));
        tenant.monitor.hand_over(HandOver::Complete);
        for at in pages(9).chain(pages(10)) {
            assert_eq!(tenant.ram.guest_memory().read_obj::<u64>(at).expect("in RAM"), at.0);
        }
        let counters = &tenant.monitor.counters;
        assert_eq!((counters.violations.get(), counters.boot_touches.get(), ended.load(Ordering::Relaxed)), (0, 2, 0));
        tenant.touch(20);
        // Who touched it goes on before the end is told.
        watch.finish();
        assert_eq!((counters.violations.get(), ended.load(Ordering::Relaxed)), (1, 1), "no excuse any more");
    });
}

/// A move into a frame may end part of the way, and what came is written to without a fault.
#[test]
fn what_a_failed_move_left_is_in_use_and_stays() {
    test_support::in_own_process(|| {
        let scenario = Scenario::start();
        let tenant = match Tenant::boot_on(UseUserfaultfd::On) {
            Ok(tenant) => tenant,
            Err(error) => return test_support::skipped(llfree_base::error_line(&error)),
        };
        let part_of_a_move = |frame: u32| {
            let userfault = tenant.monitor.supply().userfault().expect("RAM is under it");
            userfault.lend_zeroes(u64::from(frame) * HUGE_SIZE).expect("there is a page table");
            tenant.touch(frame);
        };
        part_of_a_move(8);
        scenario.set(faults::MOVE, "return(5)").expect("it is a point");
        assert_eq!(tenant.monitor.install(HugeRange::saturating(HugeId(8), 2)), Err(InstallError::Refused));
        assert_eq!((tenant.word(8), tenant.entry(8)), (1, HugeEntry::HUGE_INSTALLED), "the rest is lent");
        assert_eq!(tenant.entry(9), HugeEntry::HUGE_EVICTED, "nothing came there");
        scenario.set(faults::MOVE, "off").expect("it is a point");
        // The tenant was quicker than the next try, or than the end of this one.
        part_of_a_move(10);
        assert_eq!(tenant.monitor.install(HugeRange::saturating(HugeId(8), 4)), Ok(()));
        assert_eq!((tenant.word(8), tenant.word(9), tenant.word(10), tenant.word(11)), (1, 0, 1, 0));
        let last = GuestAddress(11 * HUGE_SIZE - FRAME_SIZE);
        assert_eq!(tenant.ram.guest_memory().read_obj::<u64>(last).expect("in RAM"), 0, "whole, though nobody lends");
    });
}

/// What it touched before it gave it went when the host held it, so that nothing excuses what is there later.
#[test]
fn a_touch_of_a_held_frame_is_a_violation_before_the_hand_over_is_complete() {
    let tenant = Tenant::boot();
    tenant.touch(9);
    tenant.touch(20);
    tenant.give(20..28);
    assert_eq!(tenant.shrink(FRAMES - 8), FRAMES - 8);
    assert_eq!(tenant.monitor.audit().expect("the kernel answers"), 0);
    assert_eq!((tenant.word(9), tenant.monitor.counters.boot_touches.get()), (1, 1), "in use, and no violation");
    tenant.touch(21);
    assert_eq!(tenant.monitor.audit().expect("the kernel answers"), 1);
    assert_eq!(tenant.monitor.counters.held_violations.get(), 1);
    assert_eq!(tenant.word(21), 0, "taken back");
}

#[test]
fn a_hand_over_in_part_takes_a_host_that_had_no_memory() {
    let tenant = Tenant::boot();
    assert_eq!(tenant.monitor.install(HugeRange::saturating(HugeId(FRAMES - 1), 2)), Err(InstallError::OutOfRange));
    tenant.monitor.hand_over(HandOver::ByTouch);
    assert_eq!(tenant.monitor.handed_over(), HandOver::Complete, "its own fault is no reason");
    tenant.monitor.audit().expect("the kernel answers");
    tenant.touch(9);
    assert_eq!(tenant.monitor.audit().expect("the kernel answers"), 1);
}

#[test]
fn a_shrink_leaves_the_floor_and_a_forced_one_does_not() {
    let tenant = Tenant::boot();
    tenant.give(8..28);
    tenant.monitor.hand_over(HandOver::Complete);
    tenant.floor.store(6, Ordering::Relaxed);
    assert_eq!(tenant.shrink(1), FRAMES - 14, "20 are free, 6 stay");
    assert_eq!(tenant.monitor.wanted(), u64::from(FRAMES - 14 - 1), "it is asked for the rest");
    assert_eq!(tenant.monitor.grow(FRAMES).frames, 14);
    let forced = tenant.monitor.resize_by_force(1, || (), |_: Duration| false).expect("it discards");
    assert_eq!((forced.actual / HUGE_SIZE) as u32, FRAMES - 20);
    assert!(tenant.notices.load(Ordering::Relaxed) >= 3, "it was told each time");
}

#[test]
fn a_reclaim_leaves_memory_behind_the_floor() {
    let tenant = Tenant::boot();
    tenant.monitor.install(HugeRange::saturating(HugeId(8), 10)).expect("memory");
    tenant.give(8..28);
    tenant.monitor.hand_over(HandOver::Complete);
    tenant.floor.store(4, Ordering::Relaxed);
    assert_eq!(tenant.monitor.evict(u32::MAX).expect("it discards").frames, 6, "10 have memory, 4 keep it");
    assert_eq!(tenant.monitor.evict(u32::MAX).expect("nothing to do").frames, 0);
    assert_eq!(tenant.monitor.evict_by_force(u32::MAX).expect("it discards").frames, 4);
}

#[test]
fn a_floor_that_is_nonsense_takes_nothing_and_frees_nothing() {
    let tenant = Tenant::boot();
    tenant.give(8..28);
    tenant.monitor.hand_over(HandOver::Complete);
    tenant.floor.store(u32::MAX, Ordering::Relaxed);
    assert_eq!(tenant.monitor.floor(), FRAMES);
    assert_eq!(tenant.shrink(1), FRAMES);
    assert_eq!(tenant.monitor.evict(u32::MAX).expect("nothing to do").frames, 0);
}

#[test]
fn whoever_comes_first_decides_for_good() {
    let said = Tenant::boot();
    assert!(said.monitor.hand_over(HandOver::Complete) && said.monitor.is_shared());
    assert!(!said.monitor.leave_to_device(), "it shares its table");
    assert_eq!(said.monitor.handed_over(), HandOver::Complete);
    assert_eq!(said.entry(9), HugeEntry::HUGE_EVICTED, "nothing was changed");

    let driven = Tenant::boot();
    assert!(driven.monitor.leave_to_device() && driven.monitor.leave_to_device(), "a driver may start again");
    for to in [HandOver::ByTouch, HandOver::Complete] {
        assert!(!driven.monitor.hand_over(to), "too late");
        assert!(driven.monitor.is_left_to_device() && !driven.monitor.is_shared() && !driven.monitor.is_booting());
    }

    let silent = Tenant::boot();
    assert!(silent.monitor.is_booting() && !silent.monitor.is_shared() && !silent.monitor.is_left_to_device());
}

#[test]
fn of_many_that_come_at_once_one_is_first() {
    for _ in 0..64 {
        let tenant = Tenant::boot();
        let (said, driven) = std::thread::scope(|scope| {
            let said = scope.spawn(|| tenant.monitor.hand_over(HandOver::Complete));
            let driven = scope.spawn(|| tenant.monitor.leave_to_device());
            (said.join().expect("it ends"), driven.join().expect("it ends"))
        });
        assert_ne!(said, driven);
        assert_eq!((tenant.monitor.is_shared(), tenant.monitor.is_left_to_device()), (said, driven));
    }
}

#[test]
fn what_is_left_to_a_device_comes_by_touch_for_ever() {
    let tenant = Tenant::boot();
    tenant.touch(9);
    // It gave some without a word, and some of these were taken.
    tenant.give(20..28);
    assert_eq!(tenant.shrink(FRAMES - 4), FRAMES - 4);
    assert!(tenant.monitor.leave_to_device());
    assert_eq!((tenant.monitor.limit(), tenant.monitor.census().installed), (FRAMES, FRAMES.into()));
    let held = (0..FRAMES).filter(|frame| tenant.entry(*frame).is_held() || tenant.entry(*frame).is_evicted());
    assert_eq!(held.count(), 0, "all is the tenant's");
    tenant.touch(10);
    tenant.touch(21);
    assert_eq!(tenant.monitor.audit().expect("the kernel answers"), 0);
    let counters = &tenant.monitor.counters;
    assert_eq!((counters.violations.get(), tenant.word(9), tenant.word(21)), (0, 1, 1));
    // A device takes pages of it past the table, and they come back by touch.
    tenant.ram.discard_bytes(9 * HUGE_SIZE..9 * HUGE_SIZE + FRAME_SIZE).expect("it discards");
    assert_eq!(tenant.word(9), 0);
    tenant.touch(9);
    assert_eq!((tenant.monitor.audit().expect("the kernel answers"), tenant.word(9)), (0, 1));
}

/// The same under a userfaultfd, which is of no use then and goes.
#[test]
fn what_is_left_to_a_device_is_not_watched_any_more() {
    let tenant = match Tenant::boot_on(UseUserfaultfd::On) {
        Ok(tenant) => tenant,
        Err(error) => return test_support::skipped(llfree_base::error_line(&error)),
    };
    let ended = Arc::new(AtomicU32::new(0));
    let of_watch = ended.clone();
    let end = move |_| {
        of_watch.fetch_add(1, Ordering::Relaxed);
    };
    let watch = Violations::watch(tenant.monitor.clone(), |_| None, OnViolation::Stop, true, end, &Spawner::default())
        .expect("a thread")
        .expect("RAM is under a userfaultfd");
    tenant.touch(9);
    assert!(tenant.monitor.leave_to_device());
    tenant.ram.discard_bytes(9 * HUGE_SIZE..10 * HUGE_SIZE).expect("it discards");
    assert_eq!(tenant.word(9), 0, "nobody waits for ever");
    for frame in 0..FRAMES {
        tenant.touch(frame);
    }
    watch.finish();
    assert!(tenant.monitor.supply().userfault().is_none());
    let counters = &tenant.monitor.counters;
    assert_eq!((counters.violations.get(), ended.load(Ordering::Relaxed)), (0, 0));
}

#[test]
fn a_start_with_all_installed_leaves_nothing_to_ask_for() {
    for userfaultfd in [UseUserfaultfd::Off, UseUserfaultfd::Auto] {
        let start = TenantStart { threads: 1, taken: 0..FRAMES, populated: true, ..TenantStart::default() };
        let tenant = Tenant::start(userfaultfd, start).expect("memory");
        let resident = || tenant.ram.residency().expect("the kernel answers").resident_bytes;
        assert_eq!(resident(), u64::from(FRAMES) * HUGE_SIZE);
        assert!((0..FRAMES).all(|frame| tenant.entry(frame) == HugeEntry::HUGE_INSTALLED));
        tenant.give(8..28);
        tenant.monitor.hand_over(HandOver::Complete);
        assert_eq!(tenant.monitor.counters.installs.get(), 0, "nobody asked");
        assert_eq!(tenant.monitor.audit().expect("the kernel answers"), 0);
        assert!(tenant.monitor.validate().expect("the kernel answers").findings.is_empty());
        // What is free goes as ever.
        assert_eq!(tenant.shrink(FRAMES - 8), FRAMES - 8);
        assert_eq!(resident(), u64::from(FRAMES - 8) * HUGE_SIZE);
    }
}

#[test]
fn frames_that_are_free_at_a_start_with_all_installed_have_memory() {
    let start = TenantStart {
        threads: 1,
        unusable: 0..1,
        installed: vec![1..2, 2..3],
        populated: true,
        ..TenantStart::default()
    };
    let tenant = Tenant::start(UseUserfaultfd::Off, start).expect("memory");
    assert_eq!(tenant.entry(0), HugeEntry::HUGE_EVICTED, "nobody's");
    assert_eq!((tenant.entry(2), tenant.entry(3)), (HugeEntry::HUGE_INSTALLED, HugeEntry::FREE_INSTALLED));
    let census = tenant.monitor.census();
    assert_eq!((census.installed, census.free_installed), (u64::from(FRAMES) - 1, u64::from(FRAMES) - 3));
}
