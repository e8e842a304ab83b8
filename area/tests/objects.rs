//! Large objects. The first half are the faults that lgalloc 0.7 has, each a promise here.

mod common;

use common::fork;
use llfree_area::objects::{Handle, Objects, Region};
use llfree_area::{AllocError, Area, Builder, FreeError, MemoryKind, Order, Switch};
use std::ptr::NonNull;
use std::time::{Duration, Instant};
use test_support::skipped;

const MIB: usize = 1 << 20;

fn objects(mib: u64, auto_reclaim: Switch) -> Objects {
    let area = Area::builder().size(mib << 20).memory(MemoryKind::Private).auto_reclaim(auto_reclaim);
    Objects::new(area.build().expect("address space"), Objects::LOCAL_BYTES)
}

fn quiet(mib: u64) -> Objects {
    objects(mib, Switch(None))
}

fn touch(start: NonNull<u8>, bytes: usize, value: u8) {
    for offset in (0..bytes).step_by(4096) {
        // SAFETY: inside the caller's object.
        unsafe { start.add(offset).write_volatile(value) };
    }
}

fn holds(start: NonNull<u8>, bytes: usize, value: u8) -> bool {
    // SAFETY: as above.
    (0..bytes).step_by(4096).all(|offset| unsafe { start.add(offset).read_volatile() } == value)
}

fn make(objects: &Objects, bytes: usize) -> Handle {
    let (start, capacity, handle) = objects.allocate::<u8>(bytes).expect("room");
    touch(start, capacity, 1);
    handle
}

fn resident(objects: &Objects) -> u64 {
    objects.area().status().expect("known").resident_bytes
}

#[test]
fn memory_that_was_freed_is_returned_by_default() {
    let objects = objects(1024, Switch(Some(Builder::AUTO_RECLAIM)));
    let handles: Vec<_> = (0..128).map(|_| make(&objects, 2 * MIB)).collect();
    assert!(resident(&objects) >= 256 << 20);
    handles.into_iter().for_each(|handle| objects.deallocate(handle).expect("ours"));
    // It takes less than a second where nothing else runs, but for as much as came back lately, which is less each time.
    let deadline = Instant::now() + Duration::from_secs(20);
    while resident(&objects) > 0 {
        assert!(Instant::now() < deadline, "{:?}", objects.stats());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_lies_idle_in_a_threads_cache_is_returned_too() {
    let objects = objects(256, Switch(Some(Builder::AUTO_RECLAIM)));
    // Of many classes, by threads that do nothing afterwards, but live.
    std::thread::scope(|scope| {
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let over = std::sync::Arc::new(std::sync::Barrier::new(3));
        for _ in 0..2 {
            let (objects, done, over) = (&objects, done.clone(), over.clone());
            scope.spawn(move || {
                let handles: Vec<_> = (1..8).map(|mib| make(objects, mib * MIB)).collect();
                handles.into_iter().for_each(|handle| objects.deallocate(handle).expect("ours"));
                let small: Vec<_> = (1..8).map(|n| make(objects, n * 100_000)).collect();
                small.into_iter().for_each(|handle| objects.deallocate(handle).expect("ours"));
                done.send(()).expect("somebody waits");
                over.wait();
            });
        }
        wait.recv().and_then(|()| wait.recv()).expect("both are done");
        let deadline = Instant::now() + Duration::from_secs(20);
        while resident(&objects) > 0 {
            assert!(Instant::now() < deadline, "{:?}", objects.stats());
            std::thread::sleep(Duration::from_millis(20));
        }
        over.wait();
    });
    let stats = objects.stats();
    assert!(stats.flushed > 0 && stats.classes.iter().all(|class| class.in_use() == 0 && class.cached == 0));
}

#[test]
fn caches_are_bounded_in_bytes_of_all_classes_together() {
    let objects = quiet(1024);
    objects.set_local_bytes(16 * MIB);
    let handles: Vec<_> = (0..60).map(|n| make(&objects, (n % 6 + 1) * MIB)).collect();
    handles.into_iter().for_each(|handle| objects.deallocate(handle).expect("ours"));
    let cached: u64 = objects.stats().classes.iter().map(|class| class.cached * class.bytes).sum();
    assert!(cached <= 16 << 20, "{cached}");
    assert_eq!(objects.area().status().expect("known").used_bytes, cached);
}

#[test]
fn address_space_is_returned_with_the_last_of_the_objects() {
    let mapped = |start: usize| {
        let mut state = 0u8;
        // SAFETY: the kernel says whether the page is mapped, and touches nothing but the state.
        unsafe { libc::mincore(std::ptr::without_provenance_mut(start), 4096, &raw mut state) == 0 }
    };
    let objects = quiet(64);
    let handle = make(&objects, 4 * MIB);
    let start = objects.allocate::<u8>(MIB).expect("room").0.as_ptr().addr() & !4095;
    assert!(mapped(start));
    objects.deallocate(handle).expect("ours");
    let clone = objects.clone();
    drop(objects);
    assert!(mapped(start), "a clone is there");
    let barrier = &std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        // A thread that used them, and does nothing any more.
        scope.spawn({
            let objects = clone.clone();
            move || {
                objects.deallocate(make(&objects, MIB)).expect("ours");
                drop(objects);
                barrier.wait();
                barrier.wait();
                // It goes on with others.
                let other = quiet(64);
                other.deallocate(make(&other, MIB)).expect("ours");
            }
        });
        barrier.wait();
        drop(clone);
        assert!(!mapped(start), "neither thread keeps them");
        barrier.wait();
    });
}

#[test]
fn locked_objects_are_freed_and_the_reclaimer_goes_on() {
    let objects = objects(256, Switch(Some(Builder::AUTO_RECLAIM)));
    let locked = make(&objects, 2 * MIB);
    let (start, ..) = objects.allocate::<u8>(2 * MIB).expect("room");
    touch(start, 2 * MIB, 1);
    // SAFETY: ours; what it holds does not change.
    if unsafe { libc::mlock(start.as_ptr().cast(), 2 * MIB) } != 0 {
        objects.deallocate(locked).expect("ours");
        return skipped("no memory may be locked here");
    }
    let (again, _, handle) = objects.allocate::<u8>(2 * MIB).expect("room");
    assert_ne!(again, start);
    objects.deallocate(handle).expect("ours");
    // The locked one itself.
    objects.deallocate(locked).expect("no panic, no error");
    objects.area().reclaim(u64::MAX).expect("what is locked is in use");
    let later = make(&objects, 64 * MIB);
    objects.deallocate(later).expect("ours");
    let deadline = Instant::now() + Duration::from_secs(20);
    while resident(&objects) > 2 << 20 {
        assert!(Instant::now() < deadline, "the thread goes on: {:?}", objects.stats());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn capacities_that_overflow_are_refused() {
    let objects = quiet(64);
    let count = (1 << 61) + (1 << 18);
    let error = objects.allocate::<u64>(count).expect_err("more than the address space has");
    assert_eq!(error, AllocError::Size { count, size: 8 });
    assert_eq!(objects.allocate_zeroed::<u64>(count).expect_err("the same"), error);
    for count in [1 << 60, usize::MAX] {
        objects.allocate::<u8>(count).expect_err("more than the area has");
    }
    #[repr(align(4194304))]
    struct Wide;
    #[repr(align(4194304))]
    struct WideByte(#[expect(dead_code, reason = "it is there for its size")] u8);
    assert!(matches!(objects.allocate::<WideByte>(1), Err(AllocError::Alignment(_))));
    let (pointer, capacity, handle) = objects.allocate::<Wide>(5).expect("no memory");
    assert!(pointer.as_ptr().addr().is_multiple_of(4 * MIB) && capacity >= 5);
    objects.deallocate(handle).expect("nothing");
}

#[test]
fn a_forked_child_has_its_own_objects() {
    let objects = quiet(64);
    let (start, bytes, handle) = objects.allocate::<u8>(4 * MIB).expect("room");
    touch(start, bytes, 7);
    let child = fork(|| {
        let ours = holds(start, bytes, 7);
        touch(start, bytes, 8);
        let (other, more, _) = objects.allocate::<u8>(3 * MIB).expect("room");
        touch(other, more, 9);
        ours && holds(start, bytes, 8) && objects.deallocate(handle).is_ok()
    });
    assert!(child);
    assert!(holds(start, bytes, 7));
}

#[test]
fn a_forked_child_that_has_no_objects_drops_its_vectors_and_touches_nothing() {
    let area = Area::builder().size(64 << 20).memory(MemoryKind::MemoryFile).auto_reclaim(Switch(None));
    let objects = Objects::new(area.build().expect("a memory file"), Objects::LOCAL_BYTES);
    let mut region = Region::new(&objects, 10).expect("room");
    region.extend((0..1000).map(|n| n.to_string()));
    let child = fork(|| {
        let mut region = std::mem::replace(&mut region, Region::new(&objects, 0).expect("no memory"));
        let empty = region.is_empty() && region.iter_mut().next().is_none();
        let refused = region.push("x".to_owned()).is_err();
        region.clear();
        drop(region);
        empty && refused && objects.allocate::<u8>(MIB).is_err()
    });
    assert!(child);
    assert_eq!(region.last().map(String::as_str), Some("999"));
}

#[test]
fn nothing_is_given_back_twice() {
    let objects = quiet(256);
    let handle = make(&objects, 64 * MIB);
    objects.deallocate(handle).expect("ours");
    let first = objects.area().reclaim(u64::MAX).expect("nothing is locked");
    assert_eq!((first.discarded, first.freed_bytes), (32, 64 << 20));
    let second = objects.area().reclaim(u64::MAX).expect("nothing is locked");
    assert_eq!((second.frames, second.discarded), (0, 0));
}

#[test]
fn memory_is_split_joined_and_moved_between_classes() {
    let objects = quiet(64);
    objects.set_local_bytes(0);
    for bytes in [64 * MIB, 2 * MIB, 5 * MIB, 100_000, 40 * MIB] {
        // All of the area in objects of one size, then in those of another. Of 112 KiB there are eight in a MiB.
        let handles: Vec<_> = std::iter::from_fn(|| objects.allocate::<u8>(bytes).ok()).map(|found| found.2).collect();
        let sum: usize = handles.iter().map(Handle::bytes).sum();
        assert!(sum + handles[0].bytes() + 8 * MIB >= 64 * MIB, "{} of {bytes}", handles.len());
        handles.into_iter().for_each(|handle| objects.deallocate(handle).expect("ours"));
        assert_eq!(objects.area().status().expect("known").used_bytes, 0);
    }
    assert!(objects.allocate::<u8>(33 * MIB).expect("room").1 <= 40 * MIB, "no power of two");
}

#[test]
fn any_number_of_instances_work_side_by_side_and_refuse_each_others() {
    let all: Vec<_> = (0..20).map(|_| quiet(16)).collect();
    let handles: Vec<_> = all.iter().map(|objects| make(objects, MIB)).collect();
    for (index, handle) in handles.into_iter().enumerate() {
        if index % 2 == 0 {
            all[index].deallocate(handle).expect("its own");
        } else {
            assert_eq!(all[index - 1].deallocate(handle), Err(FreeError::Foreign));
        }
    }
}

#[test]
fn memory_can_be_had_ahead_of_time_or_that_fails() {
    let objects = quiet(64);
    let (_, bytes, handle) = objects.allocate::<u8>(8 * MIB).expect("room");
    handle.prefetch(2 * MIB..6 * MIB).expect("there is memory");
    assert_eq!(resident(&objects), 4 << 20);
    handle.prefetch(0..bytes + 1).expect_err("beyond the object");
    handle.prefetch(5..5).expect("nothing");
    objects.deallocate(handle).expect("ours");
}

#[test]
fn zeroed_objects_are_zero_and_cost_a_memset_only_where_they_were_used() {
    let objects = quiet(64);
    objects.set_local_bytes(0);
    let all_zero = |start: NonNull<u8>, bytes| {
        // SAFETY: ours, and initialized by the kernel or by us.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), bytes) }.iter().all(|byte| *byte == 0)
    };
    let (start, bytes, handle) = objects.allocate_zeroed::<u8>(20 * MIB).expect("room");
    assert_eq!(resident(&objects), 0, "nobody has touched it");
    assert!(all_zero(start, bytes));
    touch(start, 6 * MIB, 9);
    objects.deallocate(handle).expect("ours");
    // Half of what is free goes back: the next one has frames of both kinds.
    objects.area().reclaim(10 << 20).expect("nothing is locked");
    for size in [40 * MIB, 2 * MIB, 100_000] {
        let (start, bytes, handle) = objects.allocate_zeroed::<u8>(size).expect("room");
        assert!(all_zero(start, bytes), "{size}");
        touch(start, bytes, 3);
        objects.deallocate(handle).expect("ours");
    }
    objects.set_local_bytes(64 * MIB);
    let handle = make(&objects, 4 * MIB);
    objects.deallocate(handle).expect("ours");
    let (start, bytes, _) = objects.allocate_zeroed::<u8>(4 * MIB).expect("out of the cache");
    assert!(all_zero(start, bytes));
}

#[test]
fn an_object_grows_where_it_is_while_there_is_room_behind_it() {
    let objects = quiet(64);
    let (start, bytes, mut handle) = objects.allocate::<u8>(4 * MIB).expect("room");
    touch(start, bytes, 5);
    assert_eq!(objects.grow_in_place(&mut handle, 9 * MIB), Ok(10 * MIB));
    touch(start, 10 * MIB, 6);
    let next = make(&objects, 2 * MIB);
    let out = objects.grow_in_place(&mut handle, 64 * MIB);
    assert_eq!(out, Err(AllocError::OutOfMemory { bytes: 64 << 20 }));
    assert_eq!(handle.bytes(), 10 * MIB);
    assert_eq!(objects.grow_in_place(&mut handle, 1), Ok(10 * MIB), "it has that");
    objects.deallocate(handle).expect("ours");
    objects.deallocate(next).expect("ours");
    objects.area().reclaim(0).expect("caches are emptied");
    assert_eq!(objects.area().status().expect("known").used_bytes, 0);
}

#[test]
fn a_region_is_a_vector_that_drops_its_elements() {
    let objects = quiet(64);
    let counter = std::sync::Arc::new(());
    let mut region = Region::new(&objects, 10).expect("room");
    assert_eq!(region.extend((0..50_000).map(|_| counter.clone())), 50_000);
    assert_eq!((region.len(), std::sync::Arc::strong_count(&counter)), (50_000, 50_001));
    region.clear();
    assert_eq!(std::sync::Arc::strong_count(&counter), 1);
    assert!(region.push(counter.clone()).is_ok() && region.capacity() >= 50_000);
    drop(region);
    assert_eq!(std::sync::Arc::strong_count(&counter), 1);
    let mut full = Region::new(&objects, 1).expect("room");
    let pushed = full.extend(0u64..);
    assert!((1 << 20..8 << 20).contains(&pushed), "until the area is full: {pushed}");
    assert!((0..).zip(full.iter()).all(|(number, element)| number == *element));
    let mut nothing = Region::new(&objects, 0).expect("no memory");
    assert_eq!(nothing.extend([(); 1000]), 1000);
}

#[test]
fn objects_travel_between_threads_and_those_that_end_leave_nothing() {
    let objects = quiet(256);
    let (send, receive) = std::sync::mpsc::sync_channel::<Handle>(16);
    std::thread::scope(|scope| {
        let producer = objects.clone();
        let producing = scope.spawn(move || {
            let mut random = fastrand::Rng::with_seed(1);
            for _ in 0..3000 {
                let (start, bytes, handle) = producer.allocate::<u8>(random.usize(1..6 * MIB)).expect("room");
                // SAFETY: ours, and this large.
                unsafe { start.write(1) };
                // SAFETY: as above.
                unsafe { start.add(bytes - 1).write(2) };
                send.send(handle).expect("somebody frees them");
            }
        });
        let consumer = objects.clone();
        let consuming =
            scope.spawn(move || receive.into_iter().for_each(|handle| consumer.deallocate(handle).expect("ours")));
        // The end of a scope comes before the very end of its threads.
        producing.join().expect("no panic");
        consuming.join().expect("no panic");
    });
    let stats = objects.stats();
    assert_eq!(stats.area.expect("known").used_bytes, 0, "{stats:?}");
    assert!(stats.slow.iter().sum::<u64>() > 0 && stats.classes.iter().all(|class| class.in_use() == 0));
    assert!(objects.area().validate().expect("known").findings.is_empty());
}

#[test]
fn what_other_threads_keep_is_found_before_memory_is_short() {
    let objects = quiet(64);
    std::thread::scope(|scope| {
        let barrier = std::sync::Arc::new(std::sync::Barrier::new(2));
        let (other, ours) = (barrier.clone(), objects.clone());
        scope.spawn(move || {
            ours.deallocate(make(&ours, 40 * MIB)).expect("ours");
            other.wait();
            other.wait();
        });
        barrier.wait();
        let (_, _, handle) = objects.allocate::<u8>(40 * MIB).expect("stolen");
        assert_eq!(objects.stats().stolen, 1);
        objects.deallocate(handle).expect("ours");
        let (_, _, handle) = objects.allocate::<u8>(60 * MIB).expect("all caches are emptied for it");
        objects.deallocate(handle).expect("ours");
        barrier.wait();
    });
}

/// A thread that had objects goes on; the area, too, without them.
#[test]
fn objects_that_are_dropped_before_their_area_leave_no_part_of_it_to_their_threads() {
    let objects = quiet(256);
    let area = objects.area().clone();
    let barrier = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        let ours = objects.clone();
        let waits = &barrier;
        scope.spawn(move || {
            let (start, bytes, handle) = ours.allocate::<u8>(2 * MIB).expect("room");
            touch(start, bytes, 1);
            ours.deallocate(handle).expect("ours");
            drop(ours);
            waits.wait();
            waits.wait();
        });
        barrier.wait();
        drop(objects);
        let mut handle = area.handle();
        let block = handle.alloc(Order::HUGE);
        barrier.wait();
        let block = block.expect("room");
        assert!(!block.is_zeroed(), "what has memory is first");
        handle.free(block).expect("ours");
    });
}
