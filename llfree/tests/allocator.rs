//! Promises to a tenant: exhaustion to the last frame, preferences, misuse, two threads.

use crate::common::{Table, order, ready};
use llfree::{AllocError, Allocation, FreeError, Reclaim};
use shared_layout::{FRAMES_PER_HUGE, FrameId, HugeEntry, HugeId, Order};
use std::sync::atomic::{AtomicU64, Ordering};

#[test]
fn every_order_reaches_the_last_block() {
    for o in 0..=10 {
        let table = Table::installed(34);
        let tenant = table.tenant();
        let mut cpu = tenant.cpu();
        let blocks = 34 * FRAMES_PER_HUGE / order(o).frames();
        let got: Vec<_> = (0..blocks).map(|_| ready(cpu.alloc(order(o)).expect("free"))).collect();
        assert_eq!(cpu.alloc(order(o)), Err(AllocError::OutOfMemory(order(o))), "order {o}");
        assert_eq!(tenant.stats().free_frames, 0);
        for frame in got {
            cpu.free(frame, order(o)).expect("ours");
        }
        cpu.drain();
        assert_eq!(tenant.stats().free_huge, 34, "order {o}");
        assert_eq!(tenant.validate(), Ok(()));
    }
}

#[test]
fn small_blocks_of_two_cpus_share_no_huge_frame_while_there_is_room() {
    let table = Table::installed(64);
    let tenant = table.tenant();
    let (mut a, mut b) = (tenant.cpu(), tenant.cpu());
    for _ in 0..300 {
        let (x, y) = (ready(a.alloc(order(2)).expect("free")), ready(b.alloc(order(2)).expect("free")));
        assert_ne!(x.huge(), y.huge());
    }
    assert!(tenant.stats().free_huge >= 64 - 6, "small blocks are kept together");
}

#[test]
fn frames_with_memory_are_taken_before_evicted_ones() {
    let table = Table::evicted(64);
    for huge in [40, 41, 50] {
        table.host().claim(HugeId(huge)).expect("idle").install().expect("not held").done();
    }
    let tenant = table.tenant();
    tenant.recount();
    let mut cpu = tenant.cpu();
    for _ in 0..3 {
        ready(cpu.alloc(Order::HUGE).expect("free"));
    }
    assert!(matches!(cpu.alloc(Order::HUGE), Ok(Allocation::Evicted(_))));
}

#[test]
fn a_return_behind_the_guests_back_is_found() {
    let table = Table::installed(32);
    let (tenant, host) = (table.tenant(), table.host());
    let mut cpu = tenant.cpu();
    for huge in 0..32 {
        host.claim(HugeId(huge)).expect("idle").reclaim(Reclaim::Hard).expect("free").done();
    }
    assert_eq!(cpu.alloc(Order::BASE), Err(AllocError::OutOfMemory(Order::BASE)));
    assert!(host.claim(HugeId(17)).expect("idle").release().expect("held"));
    // Even without the epoch the entries are the truth.
    let Ok(Allocation::Evicted(block)) = cpu.alloc(Order::BASE) else { panic!("frame 17 is free and evicted") };
    assert_eq!(block.first_huge(), HugeId(17));
    let block = block.confirm(&tenant).expect_err("the host did not install it");
    host.claim(HugeId(17)).expect("idle").install().expect("not held").done();
    assert_eq!(block.confirm(&tenant).expect("installed").frame().huge(), Some(HugeId(17)));
}

#[test]
fn order_ten_is_evicted_if_one_half_is() {
    for half in [2, 3] {
        let table = Table::installed(4);
        table.host().claim(HugeId(half)).expect("idle").reclaim(Reclaim::Soft).expect("free").done();
        let tenant = table.tenant();
        let allocation = tenant.alloc_at(FrameId(1024), Order::MAX).expect("free");
        let Allocation::Evicted(block) = allocation else { panic!("half {half} has nothing behind it") };
        assert_eq!((block.first_huge(), block.huge_frames()), (HugeId(2), 2));
    }
}

#[test]
fn misuse_is_refused_and_changes_nothing() {
    let table = Table::installed(4);
    let tenant = table.tenant();
    let at = |frame, o| ready(tenant.alloc_at(FrameId(frame), order(o)).expect("free"));
    let small = at(64, 3);
    let huge = at(512, 9);
    let before = tenant.stats();
    let frame = |f| FrameId(f);
    let refused = [
        (tenant.free(frame(72), order(3)), FreeError::NotAllocated(frame(72), order(3))),
        (tenant.free(frame(64), order(4)), FreeError::NotAllocated(frame(64), order(4))),
        (tenant.free(frame(65), order(1)), FreeError::Misaligned(frame(65), order(1))),
        (tenant.free(frame(512), order(0)), FreeError::NotAllocated(frame(512), order(0))),
        (tenant.free(frame(0), order(9)), FreeError::NotAllocated(frame(0), order(9))),
        (tenant.free(frame(0), order(10)), FreeError::NotAllocated(frame(0), order(10))),
        (tenant.free(frame(2048), order(0)), FreeError::OutOfRange(frame(2048), order(0))),
        (tenant.free(frame(u64::MAX), order(0)), FreeError::OutOfRange(frame(u64::MAX), order(0))),
        (tenant.free(frame(0), order(7)), FreeError::NotAllocated(frame(0), order(7))),
    ];
    for (got, expected) in refused {
        assert_eq!(got, Err(expected));
    }
    assert_eq!(tenant.alloc_at(frame(66), order(0)), Err(AllocError::NotFree(frame(66), order(0))));
    assert_eq!(tenant.alloc_at(frame(1), order(1)), Err(AllocError::Misaligned(frame(1), order(1))));
    assert_eq!(tenant.alloc_at(frame(2048), order(0)), Err(AllocError::OutOfRange(frame(2048), order(0))));
    assert_eq!(tenant.alloc_at(frame(512), order(10)), Err(AllocError::Misaligned(frame(512), order(10))));
    assert_eq!(tenant.stats(), before);
    tenant.free(small, order(3)).expect("ours");
    tenant.free(huge, order(9)).expect("ours");
    assert_eq!(tenant.free(huge, order(9)), Err(FreeError::NotAllocated(huge, order(9))));
    assert_eq!(tenant.validate(), Ok(()));
}

#[test]
fn a_double_free_into_the_row_cache_is_refused() {
    let table = Table::installed(4);
    let tenant = table.tenant();
    let mut cpu = tenant.cpu();
    let frame = ready(cpu.alloc(Order::BASE).expect("free"));
    cpu.free(frame, Order::BASE).expect("ours");
    assert_eq!(cpu.free(frame, Order::BASE), Err(FreeError::NotAllocated(frame, Order::BASE)));
}

#[test]
fn the_host_never_takes_a_cached_row() {
    let table = Table::installed(1);
    let (tenant, host) = (table.tenant(), table.host());
    let mut cpu = tenant.cpu();
    let frame = ready(cpu.alloc(Order::BASE).expect("free"));
    cpu.free(frame, Order::BASE).expect("ours");
    assert!(host.claim(HugeId(0)).expect("idle").reclaim(Reclaim::Hard).is_err());
    cpu.drain();
    host.claim(HugeId(0)).expect("idle").reclaim(Reclaim::Hard).expect("drained").done();
}

/// Two CPUs allocate, stamp, check and free at random while a host takes, returns and installs.
#[test]
fn no_frame_has_two_owners_under_two_cpus_and_a_host() {
    const HUGE: usize = 24;
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let table = Table::evicted(HUGE);
    let owners: Vec<AtomicU64> = (0..HUGE as u64 * FRAMES_PER_HUGE).map(|_| AtomicU64::new(0)).collect();
    let stop = AtomicU64::new(0);
    let install = |block: &llfree::EvictedBlock| {
        let (host, first) = (table.host(), block.first_huge().0);
        for huge in (first..first + block.huge_frames()).map(HugeId) {
            loop {
                if let Some(claim) = host.claim(huge) {
                    claim.install().expect("an owned frame is not held").done();
                    break;
                }
                std::thread::yield_now();
            }
        }
    };
    let worker = |id: u64| {
        let mut rng = fastrand::Rng::with_seed(seed ^ id);
        let tenant = table.tenant();
        let mut cpu = tenant.cpu();
        let mut blocks = Vec::new();
        for round in 0..60_000 {
            if rng.u8(..100) < 51 && blocks.len() < 600 {
                let o = order([0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10][rng.usize(..14)]);
                let Ok(allocation) = cpu.alloc(o) else { continue };
                let (frame, o) = match allocation {
                    Allocation::Ready(block) => (block.frame(), block.order()),
                    Allocation::Evicted(block) => {
                        install(&block);
                        let block = block.confirm(&tenant).expect("just installed");
                        (block.frame(), block.order())
                    }
                };
                for f in frame.0..frame.0 + o.frames() {
                    let old = owners[f as usize].swap(id, Ordering::Relaxed);
                    assert_eq!(old, 0, "frame {f} belongs to {old} and to {id}");
                }
                blocks.push((frame, o));
            } else if !blocks.is_empty() {
                let (frame, o) = blocks.swap_remove(rng.usize(..blocks.len()));
                for f in frame.0..frame.0 + o.frames() {
                    assert_eq!(owners[f as usize].swap(0, Ordering::Relaxed), id);
                }
                cpu.free(frame, o).expect("ours");
            }
            if round % 5000 == 0 {
                cpu.drain();
            }
        }
        for (frame, o) in blocks {
            owners[frame.0 as usize..(frame.0 + o.frames()) as usize]
                .iter()
                .for_each(|w| w.store(0, Ordering::Relaxed));
            cpu.free(frame, o).expect("ours");
        }
    };
    std::thread::scope(|scope| {
        let host_thread = scope.spawn(|| {
            let (host, mut rng, mut taken) = (table.host(), fastrand::Rng::with_seed(!seed), 0u64);
            while stop.load(Ordering::Relaxed) == 0 {
                let huge = HugeId(rng.u32(..HUGE as u32));
                let Some(claim) = host.claim(huge) else { continue };
                let how = if rng.bool() { Reclaim::Hard } else { Reclaim::Soft };
                if claim.residency() == llfree::Residency::Held {
                    assert!(claim.release().expect("held"));
                    table.epoch.fetch_add(1, Ordering::Release);
                } else if let Ok(reclaimed) = claim.reclaim(how) {
                    let first = huge.first_frame().0 as usize;
                    for owner in &owners[first..first + 512] {
                        assert_eq!(owner.load(Ordering::Relaxed), 0, "the host took an owned frame");
                    }
                    reclaimed.done();
                    taken += 1;
                }
            }
            taken
        });
        let workers = [scope.spawn(|| worker(1)), scope.spawn(|| worker(2))];
        for w in workers {
            w.join().expect("no panic");
        }
        stop.store(1, Ordering::Relaxed);
        assert!(host_thread.join().expect("no panic") > 0, "the host got something");
    });
    let host = table.host();
    for huge in (0..HUGE as u32).map(HugeId) {
        let _ = host.claim(huge).expect("idle").release();
    }
    let stats = table.tenant().stats();
    assert_eq!(stats.free_huge, HUGE as u64, "frames were lost: {stats:?}");
    assert_eq!(table.tenant().validate(), Ok(()));
}

#[test]
fn a_frame_that_the_host_is_at_is_not_called_corrupt() {
    let table = Table::installed(2);
    let host = table.host();
    let reclaimed = host.claim(HugeId(1)).expect("idle").reclaim(Reclaim::Hard).expect("free");
    assert_eq!(host.census().corrupt, 0, "the entry says held, R not yet");
    reclaimed.done();
    assert_eq!((host.census().corrupt, host.census().held), (0, 1));
    for lie in [HugeEntry::FREE_EVICTED, HugeEntry::from_bits(0xffff)] {
        table.entries[1].store(lie.bits(), Ordering::Relaxed);
        let census = host.census();
        assert_eq!((census.corrupt, census.free_evicted), (1, 0), "{lie:?}");
    }
}
