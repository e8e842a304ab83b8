//! Runs of huge frames: found, taken whole or not at all, given back in any shape.

use crate::memory::Memory;
use llfree::host::Installer;
use llfree::run::{Behind, RunError, TakenRun};
use llfree::{AllocError, Allocation, HugeEntry, HugeId, HugeRange, Initial, Order, Reclaim, Table, Tenant};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};

const HUGE: u32 = 100;
const BYTES: usize = Table::bytes_for(HUGE).expect("in range");

fn range(first: u32, count: u32) -> HugeRange {
    HugeRange::new(HugeId(first), count).expect("in range")
}

fn run(tenant: &Tenant<'_>, count: u32) -> Result<TakenRun, RunError> {
    tenant.alloc_run(count, Behind::Any, &mut HugeId(0))
}

#[test]
fn runs_of_every_length_are_taken_and_given_back() {
    let mut memory = Memory::new(BYTES);
    let tenant = Table::new(memory.bytes(BYTES), HUGE, Initial::Free).expect("it fits").tenant();
    let mut near = HugeId(77);
    for count in 1..=HUGE {
        let taken = tenant.alloc_run(count, Behind::Memory, &mut near).expect("all is free");
        assert_eq!((taken.range.count(), taken.evicted, near), (count, 0, taken.range.end()));
        assert_eq!(tenant.stats().free_huge, u64::from(HUGE - count));
        tenant.free_run(taken.range).expect("ours");
        tenant.validate().expect("sound");
    }
    assert_eq!(tenant.stats().free_huge, u64::from(HUGE));
}

#[test]
fn what_is_wrong_with_a_run_is_told_and_changes_nothing() {
    let mut memory = Memory::new(BYTES);
    let tenant = Table::new(memory.bytes(BYTES), HUGE, Initial::Free).expect("it fits").tenant();
    assert_eq!(run(&tenant, 0), Err(RunError::Empty));
    for huge_frames in [HUGE + 1, u32::MAX] {
        assert_eq!(run(&tenant, huge_frames), Err(RunError::OutOfMemory { huge_frames }));
    }
    let all = run(&tenant, HUGE).expect("all is free").range;
    assert_eq!(run(&tenant, 1), Err(RunError::OutOfMemory { huge_frames: 1 }));
    assert_eq!(tenant.alloc_run_at(range(5, 2)), Err(RunError::NotFree(range(5, 2))));
    assert_eq!(tenant.alloc_run_at(range(99, 2)), Err(RunError::OutOfRange(range(99, 2))));
    assert_eq!(tenant.free_run(range(99, 2)), Err(RunError::OutOfRange(range(99, 2))));
    tenant.free_run(range(10, 3)).expect("a part of ours");
    assert_eq!(tenant.free_run(all), Err(RunError::NotAllocated(all)));
    assert_eq!(tenant.free_run(range(12, 2)), Err(RunError::NotAllocated(range(12, 2))));
    assert_eq!(tenant.stats().free_huge, 3);
    // Small blocks in one of them are none of a run's business.
    let Allocation::Ready(block) = tenant.alloc(Order::BASE).expect("room") else { panic!("all is backed") };
    let huge = block.frame().huge().expect("in range");
    assert_eq!(tenant.free_run(huge.into()), Err(RunError::NotAllocated(huge.into())));
    tenant.free(block.frame(), Order::BASE).expect("ours");
    for rest in [range(0, 10), range(13, HUGE - 13)] {
        tenant.free_run(rest).expect("ours");
    }
    assert_eq!(tenant.stats().free_huge, u64::from(HUGE));
    tenant.validate().expect("sound");
}

#[test]
fn a_run_and_blocks_of_order_nine_are_the_same_frames() {
    let mut memory = Memory::new(BYTES);
    let tenant = Table::new(memory.bytes(BYTES), HUGE, Initial::Free).expect("it fits").tenant();
    let taken = run(&tenant, 6).expect("all is free").range;
    for huge in taken {
        tenant.free(huge.first_frame(), Order::HUGE).expect("a frame of ours");
    }
    let mut cpu = tenant.cpu();
    for _ in 0..HUGE {
        let _ = cpu.alloc(Order::HUGE).expect("hints know what a run gave back");
    }
    assert_eq!(cpu.alloc(Order::HUGE), Err(AllocError::OutOfMemory(Order::HUGE)));
    tenant.free_run(range(0, HUGE)).expect("all of it is allocated in huge frames");
    assert!(cpu.alloc(Order::MAX).is_ok(), "and a refusal is over");
}

#[test]
fn an_object_grows_where_its_neighbours_are_free() {
    let mut memory = Memory::new(BYTES);
    let tenant = Table::new(memory.bytes(BYTES), HUGE, Initial::Free).expect("it fits").tenant();
    let object = run(&tenant, 3).expect("all is free").range;
    let more = range(object.end().0, 4);
    assert_eq!(tenant.alloc_run_at(more).map(|run| run.evicted), Ok(0));
    assert_eq!(tenant.alloc_run_at(more), Err(RunError::NotFree(more)));
    tenant.free_run(range(object.first().0, 7)).expect("one object now");
}

/// Soft reclaim of these frames, whose tenant installs by itself.
fn evict(table: &Table<'_>, residency: &[AtomicU8], frames: impl Iterator<Item = u32>) {
    let host = table.host(residency).expect("one each").installed_by(Installer::Tenant);
    for huge in frames {
        host.claim(HugeId(huge)).expect("idle").reclaim(Reclaim::Soft).expect("free").done();
    }
}

#[test]
fn runs_with_memory_come_first_then_those_with_the_most() {
    let mut memory = Memory::new(BYTES);
    let residency: Vec<_> = (0..HUGE).map(|_| AtomicU8::new(1)).collect();
    let table = Table::new(memory.bytes(BYTES), HUGE, Initial::Free).expect("it fits");
    let tenant = table.tenant();
    // Backed are 50 to 59, and every other frame from 70 on.
    evict(&table, &residency, (0..50).chain(60..70).chain((70..HUGE).step_by(2)));
    let mut near = HugeId(0);
    let mut take = |count, behind| tenant.alloc_run(count, behind, &mut near).map(|run| (run.range, run.evicted));
    assert_eq!(take(4, Behind::Memory), Ok((range(50, 4), 0)));
    assert_eq!(take(4, Behind::Any), Ok((range(54, 4), 0)));
    assert_eq!(take(4, Behind::Memory), Err(RunError::OutOfMemory { huge_frames: 4 }));
    let (best, evicted) = take(4, Behind::Any).expect("free");
    assert_eq!((best, evicted), (range(58, 4), 2), "two of them are the rest of the backed ones");
    assert_eq!(take(5, Behind::Any), Ok((range(71, 5), 2)));
    assert_eq!(take(40, Behind::Any), Ok((range(0, 40), 40)), "no memory is better than none at all");
}

#[test]
fn a_process_clears_the_marks_and_the_host_follows() {
    let mut memory = Memory::new(BYTES);
    let residency: Vec<_> = (0..HUGE).map(|_| AtomicU8::new(0)).collect();
    let table = Table::new(memory.bytes(BYTES), HUGE, Initial::Evicted).expect("it fits");
    let (tenant, host) = (table.tenant(), table.host(&residency).expect("one each").installed_by(Installer::Tenant));
    let taken = run(&tenant, 8).expect("all is free");
    assert_eq!(taken.evicted, 8);
    tenant.self_install(taken.range);
    let Allocation::Evicted(block) = tenant.alloc(Order::BASE).expect("room") else { panic!("nothing is backed") };
    let block = block.self_install(&tenant);
    host.validate().expect("R follows");
    assert_eq!((host.census().installed, host.census().free_installed), (9, 0));
    tenant.free_run(taken.range).expect("ours");
    tenant.free(block.frame(), block.order()).expect("ours");
    assert_eq!(host.census().free_installed, 9);
    for huge in taken.range {
        let reclaimed = host.claim(huge).expect("idle").reclaim(Reclaim::Soft).expect("free");
        assert!(reclaimed.has_memory(), "the tenant said so");
        assert!(tenant.entry(huge).is_some_and(HugeEntry::is_held), "nobody can take it while its memory goes");
        reclaimed.done();
        assert_eq!(tenant.entry(huge), Some(HugeEntry::FREE_EVICTED));
    }
    // A discard that is refused leaves it as it was, at once.
    let last = block.frame().huge().expect("in range");
    drop(host.claim(last).expect("idle").reclaim(Reclaim::Hard).expect("free"));
    assert_eq!(tenant.entry(last), Some(HugeEntry::FREE_INSTALLED));
    // Of an evicted one nothing is told but that it is free.
    drop(host.claim(HugeId(50)).expect("idle").reclaim(Reclaim::Hard).expect("free"));
    assert_eq!(tenant.entry(HugeId(50)), Some(HugeEntry::FREE_EVICTED));
    host.validate().expect("R follows");
}

#[test]
fn a_host_believes_no_memory_into_being_held() {
    let mut memory = Memory::new(BYTES);
    let residency: Vec<_> = (0..HUGE).map(|_| AtomicU8::new(0)).collect();
    let table = Table::new(memory.bytes(BYTES), HUGE, Initial::Evicted).expect("it fits");
    let host = table.host(&residency).expect("one each").installed_by(Installer::Tenant);
    let claim = host.claim(HugeId(0)).expect("idle");
    assert_eq!(claim.residency(), llfree::Residency::Evicted);
    // The tenant takes, touches and frees it between claim and reclaim.
    let taken = run(&table.tenant(), 1).expect("free");
    table.tenant().self_install(taken.range);
    table.tenant().free_run(taken.range).expect("ours");
    let reclaimed = claim.reclaim(Reclaim::Hard).expect("free again");
    assert!(reclaimed.has_memory(), "a held frame would keep it for ever");
    reclaimed.done();
    assert_eq!(host.residency(HugeId(0)), Some(llfree::Residency::Held));
}

#[test]
fn a_new_host_takes_over_what_the_last_one_held() {
    let mut memory = Memory::new(BYTES);
    let [first, second] = std::array::from_fn(|_| (0..HUGE).map(|_| AtomicU8::new(0)).collect::<Vec<_>>());
    let table = Table::new(memory.bytes(BYTES), HUGE, Initial::Evicted).expect("it fits");
    let host = |residency| table.host(residency).expect("one each").installed_by(Installer::Tenant);
    let (old, new) = (host(&first), host(&second));
    old.claim(HugeId(3)).expect("idle").reclaim(Reclaim::Hard).expect("free").done();
    assert!(!new.claim(HugeId(2)).expect("idle").adopt(), "it is nobody's");
    assert!(new.claim(HugeId(3)).expect("idle").release().is_err(), "not its own");
    assert!(new.claim(HugeId(3)).expect("idle").adopt() && !new.claim(HugeId(3)).expect("idle").adopt());
    assert_eq!(new.claim(HugeId(3)).expect("idle").release(), Ok(true));
    assert_eq!(table.tenant().stats().free_huge, u64::from(HUGE));
    // What one evicts the other does not evict again.
    let taken = run(&table.tenant(), 1).expect("free");
    table.tenant().self_install(taken.range);
    table.tenant().free_run(taken.range).expect("ours");
    let huge = taken.range.first();
    assert_eq!([old, new].map(|host| host.residency(huge)), [Some(llfree::Residency::Installed); 2]);
    old.claim(huge).expect("idle").reclaim(Reclaim::Soft).expect("free").done();
    assert!(new.claim(huge).expect("idle").reclaim(Reclaim::Soft).is_err());
    // Nor does it keep what the other evicted while it was about to.
    let taken = table.tenant().alloc_run_at(taken.range).expect("free");
    table.tenant().self_install(taken.range);
    table.tenant().free_run(taken.range).expect("ours");
    let late = new.claim(huge).expect("idle");
    old.claim(huge).expect("idle").reclaim(Reclaim::Soft).expect("free").done();
    let reclaimed = late.reclaim(Reclaim::Soft).expect("free");
    assert!(!reclaimed.has_memory());
    drop(reclaimed);
    assert_eq!(table.tenant().stats().free_huge, u64::from(HUGE), "it is not held");
}

#[test]
fn racing_runs_and_a_reclaimer_lose_no_frame_and_share_none() {
    let mut memory = Memory::new(BYTES);
    let residency: Vec<_> = (0..HUGE).map(|_| AtomicU8::new(0)).collect();
    let owners: Vec<_> = (0..HUGE).map(|_| AtomicU32::new(0)).collect();
    let table = Table::new(memory.bytes(BYTES), HUGE, Initial::Evicted).expect("it fits");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (1..=2u32)
            .map(|me| {
                let (table, owners) = (&table, &owners);
                scope.spawn(move || {
                    let tenant = table.tenant();
                    let mut random = fastrand::Rng::with_seed(me.into());
                    let mut near = HugeId(0);
                    let mut mine: Vec<HugeRange> = Vec::new();
                    let own = |range: HugeRange, from, to| {
                        for huge in range {
                            let owner = &owners[huge.index()];
                            assert_eq!(owner.swap(to, Ordering::Relaxed), from, "two owners of {huge:?}");
                        }
                    };
                    for _ in 0..20_000 {
                        let taken = tenant.alloc_run(random.u32(1..12), Behind::Any, &mut near);
                        if let Ok(taken) = taken {
                            tenant.self_install(taken.range);
                            own(taken.range, 0, me);
                            mine.push(taken.range);
                        }
                        if taken.is_err() || mine.len() > 6 {
                            // All of it may be with the others for the moment.
                            let Some(last) = mine.len().checked_sub(1) else { continue };
                            let range = mine.swap_remove(random.usize(..=last));
                            own(range, me, 0);
                            tenant.free_run(range).expect("ours");
                        }
                    }
                    for range in mine {
                        own(range, me, 0);
                        tenant.free_run(range).expect("ours");
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            let host = table.host(&residency).expect("one each").installed_by(Installer::Tenant);
            let mut random = fastrand::Rng::with_seed(9);
            while !over.load(Ordering::Relaxed) {
                let huge = HugeId(random.u32(..HUGE));
                if let Ok(reclaimed) = host.claim(huge).expect("the only host").reclaim(Reclaim::Soft) {
                    let owner = owners[huge.index()].load(Ordering::Relaxed);
                    assert_eq!(owner, 0, "{huge:?} has an owner");
                    if random.u8(..) > 200 { drop(reclaimed) } else { reclaimed.done() }
                }
            }
        });
        for worker in workers {
            worker.join().expect("no panic");
        }
        over.store(true, Ordering::Relaxed);
    });
    assert_eq!(table.tenant().stats().free_huge, u64::from(HUGE));
    table.tenant().validate().expect("sound");
    table.host(&residency).expect("one each").installed_by(Installer::Tenant).validate().expect("R follows");
}
