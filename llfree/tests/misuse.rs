//! Wrong calls: what can be seen is a typed error, what cannot be seen harms the caller alone, and
//! nothing panics or makes the table unsound. The crate's front page lists the second kind.

use crate::common::{Table, order, ready};
use llfree::{AllocError, Allocation, Contradiction, FreeError, Host, Part, Reclaim, Refused, Residency};
use llfree::{TableError, Tenant, Violation};
use shared_layout::table::MAX_HUGE_FRAMES;
use shared_layout::{FrameId, HugeEntry, HugeId, Order};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

/// Frees that must be refused the same way by a handle and without one.
fn refuse_both_ways(table: &Table, frame: u64, o: u8, expected: fn(FrameId, Order) -> FreeError) {
    let (frame, o) = (FrameId(frame), order(o));
    let tenant = table.tenant();
    let before = tenant.stats();
    assert_eq!(tenant.free(frame, o), Err(expected(frame, o)), "without a handle");
    assert_eq!(tenant.cpu().free(frame, o), Err(expected(frame, o)), "by a handle");
    assert_eq!(tenant.stats(), before, "a refusal changes nothing");
}

#[test]
fn every_order_is_freed_once() {
    for o in 0..=10 {
        let table = Table::installed(4);
        let tenant = table.tenant();
        let frame = ready(tenant.alloc_at(FrameId(1024), order(o)).expect("free"));
        tenant.free(frame, order(o)).expect("ours");
        refuse_both_ways(&table, frame.0, o, FreeError::NotAllocated);
    }
}

#[test]
fn a_double_free_is_seen_in_every_register_of_a_handle() {
    let table = Table::installed(1);
    let tenant = table.tenant();
    (0..512).for_each(|f| {
        ready(tenant.alloc_at(FrameId(f), Order::BASE).expect("free"));
    });
    // Some frames scattered over the huge frame: a handle takes them all at once.
    let scattered = [3, 70, 71, 200, 450];
    scattered.iter().for_each(|f| tenant.free(FrameId(*f), Order::BASE).expect("ours"));
    let mut cpu = tenant.cpu();
    let first = ready(cpu.alloc(Order::BASE).expect("free"));
    for f in scattered.into_iter().filter(|f| *f != first.0) {
        assert_eq!(cpu.free(FrameId(f), Order::BASE), Err(FreeError::NotAllocated(FrameId(f), Order::BASE)));
        let block = FrameId(f & !63);
        assert_eq!(cpu.free(block, Order::ROW), Err(FreeError::NotAllocated(block, Order::ROW)), "a part is free");
    }
    // And the register of freed frames.
    cpu.free(FrameId(300), Order::BASE).expect("ours");
    assert_eq!(cpu.free(FrameId(300), Order::BASE), Err(FreeError::NotAllocated(FrameId(300), Order::BASE)));
    let pair = FrameId(300);
    assert_eq!(cpu.free(pair, order(1)), Err(FreeError::NotAllocated(pair, order(1))));
    cpu.drain();
    assert_eq!(tenant.stats().free_frames, scattered.len() as u64);
    tenant.validate().expect("sound");
}

#[test]
fn a_double_free_is_seen_when_a_row_of_freed_frames_becomes_the_one_to_serve_from() {
    let table = Table::installed(1);
    let tenant = table.tenant();
    (0..512).for_each(|f| {
        ready(tenant.alloc_at(FrameId(f), Order::BASE).expect("free"));
    });
    [2, 3].iter().for_each(|f| tenant.free(FrameId(*f), Order::BASE).expect("ours"));
    let mut cpu = tenant.cpu();
    cpu.free(FrameId(0), Order::BASE).expect("ours");
    // Frame 0 alone does not do for a pair: the rest of its row is taken as well.
    assert_eq!(ready(cpu.alloc(order(1)).expect("free")), FrameId(2));
    assert_eq!(cpu.free(FrameId(0), Order::BASE), Err(FreeError::NotAllocated(FrameId(0), Order::BASE)));
    cpu.drain();
    assert_eq!(tenant.stats().free_frames, 1);
}

#[test]
fn a_larger_order_than_allocated_is_refused() {
    for o in 0..=8 {
        let table = Table::installed(2);
        ready(table.tenant().alloc_at(FrameId(0), order(o)).expect("free"));
        refuse_both_ways(&table, 0, o + 1, FreeError::NotAllocated);
    }
}

#[test]
fn huge_blocks_are_neither_freed_piecewise_nor_put_together() {
    let table = Table::installed(2);
    ready(table.tenant().alloc_at(FrameId(0), Order::HUGE).expect("free"));
    (0..=8).for_each(|o| refuse_both_ways(&table, 0, o, FreeError::NotAllocated));
    refuse_both_ways(&table, 0, 10, FreeError::NotAllocated);
    // 512 base frames are not a huge block.
    (512..1024).for_each(|f| {
        ready(table.tenant().alloc_at(FrameId(f), Order::BASE).expect("free"));
    });
    refuse_both_ways(&table, 512, 9, FreeError::NotAllocated);
}

#[test]
fn unaligned_and_foreign_frames_are_refused() {
    let table = Table::installed(3);
    for o in 0..=10 {
        let size = order(o).frames();
        if o > 0 {
            refuse_both_ways(&table, size / 2, o, FreeError::Misaligned);
            let frame = FrameId(size / 2);
            assert_eq!(table.tenant().alloc_at(frame, order(o)), Err(AllocError::Misaligned(frame, order(o))));
        }
        let end = (3 * 512u64).next_multiple_of(size);
        for frame in [end, end + size, 1 << 41, (1 << 41) + size, 1 << 63, u64::MAX - (size - 1), u64::MAX] {
            refuse_both_ways(&table, frame, o, FreeError::OutOfRange);
            let got = table.tenant().alloc_at(FrameId(frame), order(o));
            assert_eq!(got, Err(AllocError::OutOfRange(FrameId(frame), order(o))));
        }
    }
    // The third huge frame has no buddy: a block of order 10 does not fit there.
    refuse_both_ways(&table, 1024, 10, FreeError::OutOfRange);
}

#[test]
fn an_order_above_ten_cannot_be_named() {
    assert!((11..=u8::MAX).all(|o| Order::new(o).is_none()));
}

#[test]
fn a_held_frame_cannot_be_freed_or_taken() {
    let table = Table::installed(1);
    assert!(table.reclaim(0, Reclaim::Hard));
    (0..=9).for_each(|o| refuse_both_ways(&table, 0, o, FreeError::NotAllocated));
    assert_eq!(table.tenant().alloc_at(FrameId(0), order(0)), Err(AllocError::NotFree(FrameId(0), order(0))));
    assert!(matches!(table.host().claim(HugeId(0)).expect("idle").install(), Err(Refused::Residency(Residency::Held))));
}

#[test]
fn a_table_of_nothing_has_nothing() {
    let table = Table::evicted(0);
    let tenant = table.tenant();
    let mut cpu = tenant.cpu();
    for o in (0..=10).map(order) {
        assert_eq!(cpu.alloc(o), Err(AllocError::OutOfMemory(o)));
        assert_eq!(tenant.alloc(o), Err(AllocError::OutOfMemory(o)));
        assert_eq!(tenant.alloc_at(FrameId(0), o), Err(AllocError::OutOfRange(FrameId(0), o)));
        refuse_both_ways(&table, 0, o.get(), FreeError::OutOfRange);
    }
    cpu.drain();
    assert_eq!(tenant.stats().frames, 0);
    assert_eq!((tenant.validate(), table.host().validate()), (Ok(()), Ok(())));
    assert!(table.host().claim(HugeId(0)).is_none());
    assert_eq!(table.host().scan(HugeId(7)).count(), 0);
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let u16s = |n: usize| (0..n).map(|_| AtomicU16::new(0)).collect::<Vec<_>>();
    let u64s = |n: usize| (0..n).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
    let epoch = AtomicU64::new(0);
    // 40 huge frames: two trees, a cache line of hints for each, one word a bitmap.
    let check = |entries: usize, rows: usize, hints: usize, summary: usize| {
        Tenant::new(&u16s(entries), &u64s(rows), &u16s(hints), &u64s(summary), &epoch).err()
    };
    let wrong = |part, found, needed| Some(TableError::Length { part, found, needed });
    assert_eq!(check(40, 320, 64, 8), None);
    assert_eq!(check(39, 320, 64, 8), wrong(Part::Rows, 320, 312));
    for rows in [319, 321, 0] {
        assert_eq!(check(40, rows, 64, 8), wrong(Part::Rows, rows, 320));
    }
    for hints in [2, 63, 65] {
        assert_eq!(check(40, 320, hints, 8), wrong(Part::Hints, hints, 64));
    }
    for summary in [0, 1, 7, 9] {
        assert_eq!(check(40, 320, 64, summary), wrong(Part::Summary, summary, 8));
    }
    let host = Host::new(&u16s(3), &[const { AtomicU8::new(0) }; 4]).err();
    assert_eq!(host, wrong(Part::Residency, 4, 3));
    let text = wrong(Part::Summary, 7, 8).expect("some").to_string();
    assert!(text.contains("summary") && text.contains('7') && text.contains('8'), "{text}");
}

#[test]
fn tables_above_the_maximum_are_refused() {
    // Zeroed memory that is never touched costs address space only.
    fn zeroed<T>(count: usize) -> Box<[T]> {
        let layout = std::alloc::Layout::array::<T>(count).expect("small enough");
        // SAFETY: the layout is not empty; all users below are atomics, for which zero is valid, and
        // the box frees with the same layout.
        unsafe {
            let memory = std::alloc::alloc_zeroed(layout).cast::<T>();
            assert!(!memory.is_null());
            Box::from_raw(std::ptr::slice_from_raw_parts_mut(memory, count))
        }
    }
    let most = MAX_HUGE_FRAMES as usize;
    let (entries, residency) = (zeroed::<AtomicU16>(most + 1), zeroed::<AtomicU8>(most + 1));
    let too_many = Some(TableError::HugeFrames { found: most + 1 });
    assert_eq!(Host::new(&entries, &residency).err(), too_many);
    assert!(Host::new(&entries[1..], &residency[1..]).is_ok());
    let rows = zeroed::<AtomicU64>((most + 1) * 8);
    let hints = zeroed::<AtomicU16>(Tenant::hint_len(most as u32 + 1));
    let summary = zeroed::<AtomicU64>(Tenant::summary_len(most as u32 + 1));
    let epoch = AtomicU64::new(0);
    assert_eq!(Tenant::new(&entries, &rows, &hints, &summary, &epoch).err(), too_many);
    let summary = &summary[..Tenant::summary_len(most as u32)];
    let tenant = Tenant::new(&entries[1..], &rows[8..], &hints[1..], summary, &epoch).expect("lengths fit");
    // Its very last block can be allocated, and what a handle remembers past it does no harm.
    entries[most].store(HugeEntry::FREE_INSTALLED.bits(), Ordering::Relaxed);
    tenant.recount();
    let mut cpu = tenant.cpu();
    let last = ready(cpu.alloc(Order::HUGE).expect("one is free"));
    assert_eq!(last.huge(), Some(HugeId(MAX_HUGE_FRAMES - 1)));
    assert_eq!(cpu.alloc(Order::HUGE), Err(AllocError::OutOfMemory(Order::HUGE)));
    cpu.free(last, Order::HUGE).expect("ours");
    assert_eq!(ready(cpu.alloc(Order::HUGE).expect("one is free")), last);
}

#[test]
fn a_foreign_handles_frames_are_refused_where_this_table_can_see_it() {
    let (mine, other) = (Table::installed(2), Table::installed(4));
    let foreign = ready(other.tenant().alloc_at(FrameId(1536), Order::HUGE).expect("free"));
    refuse_both_ways(&mine, foreign.0, 9, FreeError::OutOfRange);
    let foreign = ready(other.tenant().alloc_at(FrameId(512), Order::HUGE).expect("free"));
    refuse_both_ways(&mine, foreign.0, 9, FreeError::NotAllocated);
}

#[test]
fn a_foreign_evicted_block_is_not_confirmed_beyond_the_table() {
    let (mine, other) = (Table::installed(1), Table::evicted(4));
    let Ok(Allocation::Evicted(block)) = other.tenant().alloc_at(FrameId(1024), Order::BASE) else { panic!("evicted") };
    let block = block.confirm(&mine.tenant()).expect_err("no such frame here");
    assert!(block.confirm(&other.tenant()).is_err());
}

#[test]
fn freeing_frames_that_a_handle_caches_leaves_the_table_sound() {
    // Nobody can see this double free: to the table, a handle's frames are allocated.
    let table = Table::installed(2);
    let tenant = table.tenant();
    let mut cpu = tenant.cpu();
    let frame = ready(cpu.alloc(Order::BASE).expect("free"));
    cpu.free(frame, Order::BASE).expect("ours");
    tenant.free(frame, Order::BASE).expect("cannot be seen");
    cpu.drain();
    assert_eq!(tenant.stats().free_huge, 2, "the frame counts once");
    tenant.validate().expect("sound");
    // With an innocent owner next door, its huge frame must not look free to the host.
    let innocent = ready(tenant.alloc_at(FrameId(511), Order::BASE).expect("free"));
    let frame = ready(cpu.alloc(Order::BASE).expect("free"));
    assert_eq!(frame.huge(), innocent.huge());
    cpu.free(frame, Order::BASE).expect("ours");
    tenant.free(frame, Order::BASE).expect("cannot be seen");
    cpu.drain();
    assert!(!table.reclaim(0, Reclaim::Hard), "frame 511 is owned");
    tenant.validate().expect("sound");
}

/// Two parties free overlapping blocks repeatedly: one of them is wrong each time.
#[test]
fn racing_double_frees_lose_no_frame() {
    let table = Table::installed(1);
    let tenant = table.tenant();
    let turn = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            for _ in 0..3000 {
                turn.wait();
                let _ = tenant.free(FrameId(64), order(6));
                turn.wait();
            }
        });
        for _ in 0..3000 {
            ready(tenant.alloc_at(FrameId(0), order(7)).expect("all is free"));
            turn.wait();
            let _ = tenant.free(FrameId(0), order(7));
            turn.wait();
            tenant.validate().expect("sound");
            if tenant.stats().free_huge == 0 {
                tenant.free(FrameId(0), order(6)).expect("the order-6 free came first");
            }
        }
        other.join().expect("no panic");
    });
    assert_eq!(tenant.stats().free_huge, 1);
}

/// Any call with any argument, right or wrong, in any order.
#[test]
fn no_sequence_of_wrong_calls_panics_or_breaks_the_table() {
    for seed in 0..40 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let huge = [1usize, 2, 15, 16, 17, 33][rng.usize(..6)];
        let table = Table::installed(huge);
        let tenant = table.tenant();
        let mut cpus = [tenant.cpu(), tenant.cpu()];
        for _ in 0..3000 {
            let o = order(rng.u8(..=10));
            let frame = match rng.u8(..8) {
                0 => rng.u64(..),
                1 => rng.u64(..(huge as u64 + 2) * 512),
                _ => rng.u64(..(huge as u64 + 1) * 512) & !(o.frames() - 1),
            };
            let (frame, cpu) = (FrameId(frame), &mut cpus[rng.usize(..2)]);
            match rng.u8(..7) {
                0 | 1 => drop(cpu.free(frame, o)),
                2 => drop(tenant.free(frame, o)),
                3 => drop(tenant.alloc_at(frame, o)),
                4 => drop(tenant.alloc(o)),
                5 => drop(cpu.alloc(o)),
                _ if rng.u8(..8) == 0 => cpu.drain(),
                _ => {
                    if let Some(claim) = table.host().claim(HugeId(rng.u32(..huge as u32))) {
                        match rng.u8(..3) {
                            0 => drop(claim.reclaim(Reclaim::Hard).map(llfree::Reclaimed::done)),
                            1 => drop(claim.reclaim(Reclaim::Soft).map(llfree::Reclaimed::done)),
                            _ => drop(claim.release()),
                        }
                    }
                }
            }
        }
        drop(cpus);
        assert_eq!(tenant.validate(), Ok(()), "seed {seed}");
        assert_eq!(table.host().validate(), Ok(()), "seed {seed}");
    }
}

#[test]
fn violations_say_where_and_what() {
    let table = Table::installed(3);
    let set = |huge: usize, entry: HugeEntry| table.entries[huge].store(entry.bits(), Ordering::Relaxed);
    let both = || (table.tenant().validate().err(), table.host().validate().err());
    let violation = |entry: HugeEntry, contradiction| Some(Violation { huge: HugeId(1), entry, contradiction });
    assert_eq!(both(), (None, None));

    let one_taken = HugeEntry::FREE_INSTALLED.take(1).expect("free");
    set(1, one_taken);
    assert_eq!(both(), (violation(one_taken, Contradiction::Counter(512)), None));
    let text = table.tenant().validate().expect_err("just seen").to_string();
    assert!(text.contains("huge frame 1") && text.contains("512"), "{text}");

    table.rows[8].store(1, Ordering::Relaxed);
    assert_eq!(both(), (None, None));
    set(1, HugeEntry::HUGE_INSTALLED);
    assert_eq!(both(), (violation(HugeEntry::HUGE_INSTALLED, Contradiction::Bits(1)), None));
    table.rows[8].store(0, Ordering::Relaxed);
    set(1, HugeEntry::FREE_EVICTED);
    let evicted = violation(HugeEntry::FREE_EVICTED, Contradiction::Evicted(Residency::Installed));
    assert_eq!(both(), (None, evicted));
    let held = HugeEntry::FREE_EVICTED.hold().expect("free");
    set(1, held);
    assert_eq!(both(), (None, violation(held, Contradiction::Held(Residency::Installed))));
    let garbage = HugeEntry::from_bits(0x1fff);
    set(1, garbage);
    assert_eq!(both(), (violation(garbage, Contradiction::Invalid), violation(garbage, Contradiction::Invalid)));
    set(1, HugeEntry::FREE_INSTALLED);
    std::mem::forget(table.host().claim(HugeId(1)));
    assert_eq!(both(), (None, violation(HugeEntry::FREE_INSTALLED, Contradiction::Busy)));
}
