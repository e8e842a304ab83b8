//! Areas: what they promise to those who allocate, and to the rest of the machine.

#[path = "../common/mod.rs"]
mod common;
mod file;

use common::{dirty, fork, is_dirty, small};
use llfree_area::area::Builder;
use llfree_area::{AllocError, Area, AreaError, Block, FreeError, MemoryKind, Order, Switch};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use test_support::{deny, skipped};

const MIB: u64 = 1 << 20;
const KINDS: [MemoryKind; 2] = [MemoryKind::Private, MemoryKind::MemoryFile];

#[test]
fn every_order_and_run_is_memory_of_its_owner_alone() {
    for kind in KINDS {
        let area = small(kind);
        let mut handle = area.handle();
        let mut blocks: Vec<Block> =
            (0..=10).map(|o| handle.alloc(Order::new(o).expect("an order")).expect("room")).collect();
        blocks.extend((1..6).map(|n| handle.alloc_run(n).expect("room")));
        for (number, block) in (1..).zip(&blocks) {
            assert!(block.is_zeroed() || block.bytes() < 2 << 20, "nobody had it before");
            assert!(block.as_ptr().as_ptr().addr().is_multiple_of(block.bytes().min(2 << 20).next_power_of_two()));
            dirty(block, number);
        }
        for (number, block) in (1..).zip(&blocks) {
            assert!(is_dirty(block, number), "{block:?}");
        }
        for block in blocks {
            handle.free(block).expect("ours");
        }
        drop(handle);
        assert_eq!(area.status().expect("known").used_bytes, 0);
        assert!(area.validate().expect("known").findings.is_empty());
    }
}

#[test]
fn free_memory_goes_back_and_comes_as_zeroes() {
    for kind in KINDS {
        let area = small(kind);
        let mut handle = area.handle();
        let (keep, free) = (handle.alloc_run(3).expect("room"), handle.alloc_run(8).expect("room"));
        dirty(&keep, 1);
        dirty(&free, 2);
        let at = free.as_ptr();
        handle.free(free).expect("ours");
        let before = area.status().expect("known");
        assert!(before.resident_bytes >= 22 * MIB && before.reclaimable_bytes == 16 * MIB, "{before:?}");
        let pass = area.reclaim(u64::MAX).expect("nothing is locked");
        assert_eq!((pass.frames, pass.discarded), (8, 8));
        let after = area.status().expect("known");
        assert_eq!((after.resident_bytes, after.reclaimable_bytes, after.used_bytes), (6 * MIB, 0, 6 * MIB));
        assert_eq!(area.reclaim(u64::MAX).expect("nothing is locked").frames, 0, "nothing is given back twice");
        assert!(is_dirty(&keep, 1));
        let again = handle.alloc_run(8).expect("room");
        assert!(again.is_zeroed() && again.as_ptr() == at);
        // SAFETY: ours, and this large.
        let bytes = unsafe { std::slice::from_raw_parts(again.as_ptr().as_ptr(), again.bytes()) };
        assert!(bytes.iter().all(|byte| *byte == 0));
        assert!(area.validate().expect("known").findings.is_empty());
        handle.free(again).expect("ours");
        handle.free(keep).expect("ours");
    }
}

#[test]
fn memory_of_the_hugetlb_pool_goes_back_to_it() {
    let area = Area::builder().size(16 * MIB).memory(MemoryKind::Hugetlb).auto_reclaim(Switch(None));
    let area = match area.build() {
        Ok(area) => area,
        Err(AreaError::Memory(error)) => return skipped(format_args!("no hugetlb memory: {error}")),
        Err(error) => panic!("{error}"),
    };
    let free_pages = || {
        let text = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
        text.expect("there is a pool").trim().parse::<u64>().expect("a number")
    };
    let mut handle = area.handle();
    let (keep, free) = (handle.alloc_run(3).expect("room"), handle.alloc_run(5).expect("room"));
    dirty(&keep, 1);
    dirty(&free, 2);
    let before = free_pages();
    handle.free(free).expect("ours");
    assert_eq!(area.status().expect("known").resident_bytes, 16 * MIB);
    assert_eq!(area.reclaim(u64::MAX).expect("nothing is locked").discarded, 5);
    assert_eq!((area.status().expect("known").resident_bytes, free_pages()), (6 * MIB, before + 5));
    let again = handle.alloc_run(5).expect("all of it was reserved");
    dirty(&again, 3);
    assert!(is_dirty(&keep, 1) && is_dirty(&again, 3));
    assert!(area.validate().expect("known").findings.is_empty());
    let registered = area.register(std::path::Path::new("/nowhere"), "pool");
    assert!(matches!(registered, Err(llfree_area::RegisterError::NotShared)), "{registered:?}");
    let child = fork(|| area.handle().alloc(Order::HUGE) == Err(AllocError::Forked));
    assert!(child, "its table is not in the child");
}

#[test]
fn frames_with_memory_come_first() {
    let area = small(MemoryKind::Private);
    let mut handle = area.handle();
    let mut blocks: Vec<_> = (0..20).map(|_| handle.alloc(Order::HUGE).expect("room")).collect();
    blocks.iter().for_each(|block| dirty(block, 3));
    for block in blocks.drain(..) {
        handle.free(block).expect("ours");
    }
    assert_eq!(area.reclaim(20 * MIB).expect("nothing is locked").discarded, 10);
    let mut resident = 0;
    for _ in 0..10 {
        let block = handle.alloc(Order::HUGE).expect("room");
        resident += u32::from(!block.is_zeroed());
        blocks.push(block);
    }
    assert_eq!(resident, 10, "none of them costs a fault");
    assert!(handle.alloc(Order::HUGE).expect("room").is_zeroed(), "the next one does");
}

#[test]
fn a_limit_holds_and_is_lifted() {
    let area = small(MemoryKind::Private);
    let mut handle = area.handle();
    let block = handle.alloc_run(4).expect("room");
    let all = area.bytes();
    let resize = area.shrink_to(16 * MIB).expect("nothing is locked");
    assert_eq!((resize.actual, area.status().expect("known").limit_bytes), (16 * MIB, 16 * MIB));
    let more = handle.alloc_run(4).expect("within the limit");
    assert_eq!(handle.alloc_run(1), Err(AllocError::OutOfMemory { bytes: 2 * MIB }));
    assert_eq!(handle.alloc(Order::HUGE), Err(AllocError::OutOfMemory { bytes: 2 * MIB }));
    let short = area.shrink_to(2 * MIB).expect("nothing is locked");
    assert_eq!(short.actual, 16 * MIB, "all of it is in use, and stays");
    assert_eq!(area.grow_to(all).expect("ours").actual, all);
    handle.free(handle_run(&mut area.handle(), 10)).expect("from another handle");
    handle.free(block).expect("ours");
    handle.free(more).expect("ours");
    assert!(area.validate().expect("known").findings.is_empty());
}

fn handle_run(handle: &mut llfree_area::Handle, huge_frames: u32) -> Block {
    handle.alloc_run(huge_frames).expect("room")
}

#[test]
fn blocks_are_freed_by_any_thread_and_handles_drain_when_theirs_ends() {
    let area = small(MemoryKind::Private);
    let blocks: Vec<Block> = std::thread::scope(|scope| {
        let make = || {
            let mut handle = area.handle();
            (0..200).map(|i| handle.alloc(Order::new(i % 8).expect("an order")).expect("room")).collect::<Vec<_>>()
        };
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(make)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect()
    });
    for block in blocks {
        area.free(block).expect("allocated by a thread that is gone");
    }
    assert_eq!(area.status().expect("known").used_bytes, 0, "nothing stayed with the threads");
}

#[test]
fn a_thread_that_dies_with_a_handle_leaves_what_it_had_allocated_and_no_more() {
    let area = small(MemoryKind::Private);
    let blocks = std::sync::Mutex::new(Vec::new());
    let used = || area.status().expect("known").used_bytes;
    std::thread::scope(|scope| {
        let dies = || {
            let mut handle = area.handle();
            let two = [Order::BASE, Order::HUGE].map(|order| handle.alloc(order).expect("room"));
            blocks.lock().expect("nobody panicked yet").extend(two);
            // Past the hook, which would tell of it.
            std::panic::resume_unwind(Box::new(()));
        };
        scope.spawn(dies).join().expect_err("it panicked");
        assert_eq!(used(), 2 * MIB + 4096, "what it kept to be fast is back");
        // One that never lets go of its handle.
        let forgets = || {
            let mut handle = area.handle();
            let page = handle.alloc(Order::BASE).expect("room");
            std::mem::forget(handle);
            page
        };
        blocks.lock().expect("not held").push(scope.spawn(forgets).join().expect("no panic"));
    });
    for block in blocks.into_inner().expect("not held") {
        area.free(block).expect("ours");
    }
    assert!(used() <= llfree::HANDLE_FRAMES * 4096, "{}", used());
    assert!(area.validate().expect("known").findings.is_empty());
}

#[test]
fn without_huge_pages_memory_comes_and_goes_in_small_ones() {
    let child = fork(|| {
        // SAFETY: numbers only, and of this child alone.
        if unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) } != 0 {
            return true;
        }
        KINDS.into_iter().all(|kind| {
            let area = small(kind);
            let mut handle = area.handle();
            let block = handle.alloc_run(3).expect("room");
            dirty(&block, 4);
            let before = area.status().expect("known");
            let kept = is_dirty(&block, 4);
            handle.free(block).expect("ours");
            let gone = area.reclaim(u64::MAX).expect("nothing is locked").freed_bytes;
            let resident = (before.resident_bytes, before.huge_bytes, area.status().expect("known").resident_bytes);
            kept && gone == 6 * MIB && resident == (6 * MIB, 0, 0)
        })
    });
    assert!(child);
}

#[test]
fn a_foreign_block_is_refused() {
    let (area, other) = (small(MemoryKind::Private), small(MemoryKind::Private));
    let block = area.handle().alloc(Order::BASE).expect("room");
    assert_eq!(other.free(block), Err(FreeError::Foreign));
}

#[test]
fn sizes_that_cannot_be_are_refused_and_odd_ones_rounded_up() {
    for bytes in [0, u64::MAX, (64 << 40) + 1] {
        let error = Area::builder().size(bytes).build().expect_err("no such size");
        assert!(matches!(error, AreaError::Size { bytes: said } if said == bytes), "{error}");
    }
    let area = Area::builder().size(1).build().expect("a huge frame");
    assert_eq!(area.bytes(), 2 * MIB);
    assert_eq!(area.handle().alloc_run(0), Err(AllocError::OutOfMemory { bytes: 0 }));
    assert!(area.handle().alloc_run(u32::MAX).is_err());
}

#[test]
fn an_address_space_that_is_limited_is_an_error() {
    let child = fork(|| {
        let limit = libc::rlimit { rlim_cur: 1 << 30, rlim_max: 1 << 30 };
        // SAFETY: a plain call with a live structure.
        unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) };
        matches!(Area::builder().size(8 << 30).build(), Err(AreaError::Memory(_)))
    });
    assert!(child, "the address space was limited");
}

#[test]
fn memory_files_that_are_denied_are_an_error_and_private_memory_is_not() {
    let child = fork(|| {
        // Where filters are unavailable nothing is denied.
        if deny(libc::SYS_memfd_create, libc::EPERM).is_err() {
            return true;
        }
        let build = |kind| Area::builder().size(4 * MIB).memory(kind).auto_reclaim(Switch(None)).build();
        let denied = [MemoryKind::MemoryFile, MemoryKind::Hugetlb].map(build);
        denied.iter().all(|area| matches!(area, Err(AreaError::Memory(_)))) && build(MemoryKind::Private).is_ok()
    });
    assert!(child);
}

#[test]
fn a_forked_child_has_a_copy_of_private_memory_and_allocates_in_it() {
    let area = small(MemoryKind::Private);
    let mut handle = area.handle();
    let mut kept = handle.alloc_run(2).expect("room");
    dirty(&kept, 1);
    let child = fork(|| {
        let ours = is_dirty(&kept, 1);
        dirty(&kept, 2);
        // Memory of its own, a free of what it inherited, and no reclaimer.
        let more = handle.alloc(Order::HUGE).expect("room");
        dirty(&more, 3);
        let freed = handle.free(std::mem::replace(&mut kept, more)).is_ok();
        ours && freed && is_dirty(&kept, 3) && matches!(area.reclaim(1), Err(AreaError::Forked))
    });
    assert!(child, "the child works on its copy");
    assert!(is_dirty(&kept, 1), "and not on ours");
    handle.free(kept).expect("ours");
    assert_eq!(area.reclaim(u64::MAX).expect("the parent has its reclaimer").frames, 2);
}

#[test]
fn a_forked_child_has_no_shared_memory_and_is_told_so() {
    let area = small(MemoryKind::MemoryFile);
    let mut handle = area.handle();
    let block = handle.alloc(Order::HUGE).expect("room");
    dirty(&block, 1);
    let child = fork(|| {
        let mut new = area.handle();
        let refused = [handle.alloc(Order::BASE), new.alloc(Order::BASE), new.alloc_run(2)];
        let forked = refused.iter().all(|result| *result == Err(AllocError::Forked));
        // All of it is dropped here, and nothing touches the table.
        drop((new, area.clone()));
        forked && matches!(area.status(), Err(AreaError::Forked))
    });
    assert!(child, "typed errors, and no fault");
    assert!(is_dirty(&block, 1));
    handle.free(block).expect("ours");
}

#[test]
fn locked_memory_stays_and_the_rest_goes_back() {
    let area = small(MemoryKind::Private);
    let mut handle = area.handle();
    let blocks = [handle.alloc(Order::HUGE).expect("room"), handle.alloc(Order::HUGE).expect("room")];
    blocks.iter().for_each(|block| dirty(block, 1));
    // SAFETY: ours, and what it holds does not change.
    if unsafe { libc::mlock(blocks[0].as_ptr().as_ptr().cast(), 4096) } != 0 {
        return skipped("no memory may be locked here");
    }
    for block in blocks {
        handle.free(block).expect("ours");
    }
    area.reclaim(u64::MAX).expect_err("the kernel refuses one of them");
    let status = area.status().expect("known");
    assert_eq!((status.resident_bytes, status.reclaimable_bytes), (2 * MIB, 2 * MIB));
    assert!(!handle.alloc(Order::HUGE).expect("room").is_zeroed(), "it is as it was");
    assert!(area.validate().expect("known").findings.is_empty());
}

#[test]
fn what_stays_free_goes_back_by_itself_and_what_is_used_does_not() {
    let settings = llfree_area::Settings { keep_bytes: 4 * MIB, ..Builder::AUTO_RECLAIM };
    let area = Area::builder().size(256 * MIB).memory(MemoryKind::Private).auto_reclaim(Switch(Some(settings)));
    let area = area.build().expect("address space");
    let mut handle = area.handle();
    let begin = Instant::now();
    let mut faulted = 0;
    // Used and freed again and again, for longer than it takes to find something free.
    for round in 0.. {
        let run = handle.alloc_run(32).expect("room");
        faulted += u32::from(round > 0 && run.is_zeroed());
        dirty(&run, 1);
        handle.free(run).expect("ours");
        if begin.elapsed() > Duration::from_secs(1) {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(faulted, 0, "what is in use every now and then stays");
    let deadline = Instant::now() + Duration::from_secs(20);
    while area.status().expect("known").resident_bytes > 4 * MIB {
        assert!(Instant::now() < deadline, "{:?}", area.status());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(area.validate().expect("known").findings.is_empty());
}

#[test]
fn what_handles_of_sleeping_threads_keep_goes_back_too() {
    // SAFETY: a question.
    if unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_QUERY, 0, 0) } <= 0 {
        return skipped(format_args!("no membarrier here: nobody but its thread drains a handle"));
    }
    let auto = |interval| llfree_area::Settings { interval: Duration::from_millis(interval), ..Builder::AUTO_RECLAIM };
    let area = Area::builder().size(128 * MIB).memory(MemoryKind::Private);
    let area = area.auto_reclaim(Switch(Some(auto(20)))).build().expect("built");
    let used = || area.status().expect("known").used_bytes;
    let (stop, worked) = (Barrier::new(9), Barrier::new(9));
    std::thread::scope(|threads| {
        for _ in 0..8 {
            threads.spawn(|| {
                let mut handle = area.handle();
                let work = |handle: &mut llfree_area::Handle| {
                    let blocks: Vec<_> = (0..300).map(|_| handle.alloc(Order::BASE).expect("room")).collect();
                    blocks.iter().for_each(|block| dirty(block, 1));
                    blocks.into_iter().for_each(|block| handle.free(block).expect("ours"));
                };
                work(&mut handle);
                worked.wait();
                // All that this thread does for a while.
                stop.wait();
                work(&mut handle);
            });
        }
        worked.wait();
        let (start, mut left) = (Instant::now(), area.status().expect("known"));
        while (left.used_bytes, left.resident_bytes) != (0, 0) && start.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(5));
            left = area.status().expect("known");
        }
        // Whatever is found: they end.
        stop.wait();
        assert_eq!((left.used_bytes, left.resident_bytes), (0, 0), "{left:?}");
    });
    assert_eq!(used(), 0);
    assert!(area.validate().expect("known").findings.is_empty());
}

#[test]
fn a_handle_at_work_is_drained_beside_it_and_nothing_is_lost() {
    for kind in KINDS {
        let area = small(kind);
        let done = AtomicBool::new(false);
        std::thread::scope(|threads| {
            threads.spawn(|| {
                let mut handle = area.handle();
                let mut blocks: Vec<(u64, Block)> = Vec::new();
                for step in 0..60_000u64 {
                    if step % 120 < 60 || blocks.is_empty() {
                        let block = handle.alloc(Order::BASE).expect("room");
                        dirty(&block, step);
                        blocks.push((step, block));
                    } else {
                        let (number, block) = blocks.swap_remove(step as usize * 7 % blocks.len());
                        assert!(is_dirty(&block, number), "nobody else had it");
                        handle.free(block).expect("ours");
                    }
                }
                blocks.into_iter().for_each(|(_, block)| handle.free(block).expect("ours"));
                done.store(true, Ordering::Relaxed);
            });
            while !done.load(Ordering::Relaxed) {
                area.reclaim(u64::MAX).expect("nothing is locked");
                assert!(area.validate().expect("known").findings.is_empty());
            }
        });
        assert_eq!(area.status().expect("known").used_bytes, 0);
    }
}

#[test]
fn an_allocation_waits_for_what_the_reclaimer_has_in_hand() {
    for kind in KINDS {
        let area = small(kind);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    area.reclaim(u64::MAX).expect("nothing is locked");
                }
            });
            let mut handle = area.handle();
            let mut refused = 0;
            for round in 0..200u64 {
                // All of it, in one piece or in many: a frame in the reclaimer's hands is one too few.
                let blocks: Vec<_> = match round % 2 {
                    0 => vec![handle.alloc_run(32)],
                    _ => (0..32).map(|_| handle.alloc(Order::HUGE)).collect(),
                };
                for block in blocks {
                    match block {
                        Ok(block) => {
                            dirty(&block, round);
                            assert!(is_dirty(&block, round), "the reclaimer took what it did not own");
                            handle.free(block).expect("ours");
                        }
                        Err(_) => refused += 1,
                    }
                }
            }
            over.store(true, Ordering::Relaxed);
            assert_eq!(refused, 0, "it was free but for a moment");
        });
    }
}

#[test]
fn allocating_and_freeing_makes_no_system_call() {
    let area = small(MemoryKind::Private);
    let mut handle = area.handle();
    let warm = handle.alloc_run(16).expect("room");
    dirty(&warm, 1);
    handle.free(warm).expect("ours");
    let child = fork(|| {
        // SAFETY: from here on any call but read, write and exit ends the process.
        if unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT) } != 0 {
            return true;
        }
        for n in 1..2000u32 {
            let run = handle.alloc_run(n % 15 + 1);
            let block = handle.alloc(Order::new((n % 11) as u8).unwrap_or(Order::BASE));
            let (Ok(run), Ok(block)) = (run, block) else { return false };
            dirty(&run, 5);
            if handle.free(run).is_err() || handle.free(block).is_err() {
                return false;
            }
        }
        true
    });
    assert!(child, "no call but the last one, which ends the child");
}
