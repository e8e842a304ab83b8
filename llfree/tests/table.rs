//! The front door: one region of memory, one call, and an allocator that works.

use crate::memory::Memory;
use llfree::{AllocError, Allocation, Class, FrameId, HUGE_SIZE, HugeId, HugeRange, Initial, Order};
use llfree::{MAX_HUGE_FRAMES, Part, Reclaim, Residency, Table, TableError, TableLayout};
use std::sync::atomic::{AtomicU8, Ordering};

const HUGE: u32 = 40;
const FRAMES: u64 = HUGE as u64 * 512;
const BYTES: usize = Table::bytes_for(HUGE).expect("in range");

/// A region full of junk.
fn junk() -> Memory {
    let mut memory = Memory::new(BYTES);
    memory.bytes(BYTES).fill(0xa5);
    memory
}

#[test]
fn a_table_works_over_whatever_was_in_its_region() {
    let mut memory = junk();
    let tenant = Table::new(memory.bytes(BYTES), HUGE, Initial::Free).expect("it fits").tenant();
    tenant.validate().expect("sound");
    assert_eq!((tenant.stats().free_frames, tenant.stats().evicted_huge), (FRAMES, 0));
    let mut cpu = tenant.cpu();
    for _ in 0..FRAMES {
        assert!(matches!(cpu.alloc(Order::BASE), Ok(Allocation::Ready(_))));
    }
    assert_eq!(cpu.alloc(Order::BASE), Err(AllocError::OutOfMemory(Order::BASE)));
}

#[test]
fn an_evicted_table_waits_for_its_host() {
    let mut memory = junk();
    let residency: Vec<_> = (0..HUGE).map(|_| AtomicU8::new(0)).collect();
    let table = Table::new(memory.bytes(BYTES), HUGE, Initial::Evicted).expect("it fits");
    let (tenant, host) = (table.tenant(), table.host(&residency).expect("one each"));
    host.validate().expect("entries fit R");
    let Ok(Allocation::Evicted(block)) = tenant.alloc(Order::MAX) else { panic!("nothing is installed") };
    assert_eq!(block.huge_range(), HugeRange::new(block.first_huge(), 2).expect("in range"));
    for huge in block.huge_range() {
        host.claim(huge).expect("idle").install().expect("not held").done();
    }
    block.confirm(&tenant).expect("installed");
    host.claim(HugeId(39)).expect("idle").reclaim(Reclaim::Hard).expect("free").done();
    host.claim(HugeId(39)).expect("idle").release().expect("held");
    table.return_epoch().fetch_add(1, Ordering::Release);
    host.validate().expect("entries fit R");
}

#[test]
fn an_allocated_table_is_freed_as_far_as_there_is_memory() {
    let mut memory = junk();
    let table = Table::new(memory.bytes(BYTES), HUGE, Initial::Allocated).expect("it fits");
    let tenant = table.tenant();
    assert_eq!(tenant.alloc(Order::BASE), Err(AllocError::OutOfMemory(Order::BASE)));
    tenant.free(HugeId(3).first_frame(), Order::HUGE).expect("allocated from the start");
    assert_eq!(tenant.stats().free_huge, 1);
    tenant.validate().expect("sound");
    let residency: Vec<_> = (0..HUGE).map(|_| AtomicU8::new(Residency::Installed as u8)).collect();
    table.host(&residency).expect("one each").validate().expect("entries fit R");
}

#[test]
fn a_kept_table_gives_nothing_out_twice_and_mixes_no_classes() {
    let mut memory = junk();
    let mut taken = Vec::new();
    let tenant = Table::new(memory.bytes(BYTES), HUGE, Initial::Free).expect("it fits").tenant();
    for o in [0, 0, 3, 9, 10, 6] {
        taken.push(tenant.alloc(Order::new(o).expect("in range")).expect("free").position());
    }
    let free = tenant.stats().free_frames;

    // The same bytes somewhere else, and nothing there to say where to look.
    let mut copy = memory.clone();
    let layout = TableLayout::new(HUGE).expect("in range");
    copy.bytes(BYTES)[layout.tenant as usize..].fill(0);
    let tenant = Table::new(copy.bytes(BYTES), HUGE, Initial::Kept).expect("it fits").tenant();
    tenant.validate().expect("sound");
    assert_eq!(tenant.stats().free_frames, free);
    for (frame, order) in &taken {
        assert!(tenant.alloc_at(*frame, *order).is_err(), "{frame:?} is owned");
    }
    let small = taken[0].0.huge().expect("in the table");
    assert_eq!(tenant.class_of(small), Some(Class::MOVABLE), "not what zeroed hints say");
    for (frame, order) in taken {
        tenant.free(frame, order).expect("owned");
    }
    assert_eq!(tenant.stats().free_huge, u64::from(HUGE));
}

#[test]
fn joining_a_table_changes_no_byte() {
    let mut memory = junk();
    let base = memory.bytes(BYTES).as_mut_ptr();
    // SAFETY: the memory outlives both tables, and nothing else touches it.
    let first = unsafe { Table::from_raw(base, BYTES, HUGE, Initial::Free) }.expect("it fits").tenant();
    let mut cpu = first.cpu();
    let (frame, order) = cpu.alloc(Order::BASE).expect("free").position();
    let before = first.stats();
    // SAFETY: as above.
    let second = unsafe { Table::from_raw(base, BYTES, HUGE, Initial::Joined) }.expect("it fits").tenant();
    assert_eq!(second.stats(), before, "frames that a handle holds back stay there");
    second.free(frame, order).expect("allocated, by whomever");
    assert_eq!(first.stats().free_frames, before.free_frames + 1);

    let mut copy = memory.clone();
    let _ = Table::new(copy.bytes(BYTES), HUGE, Initial::Joined).expect("it fits");
    assert!(copy.bytes(BYTES) == memory.bytes(BYTES));
}

#[test]
fn what_cannot_be_a_table_is_named_and_left_alone() {
    let mut memory = junk();
    let all = memory.bytes(BYTES + 64);
    all.fill(0xa5);
    let refused = |region: &mut [u8], huge| Table::new(region, huge, Initial::Free).map(|_| ()).expect_err("refused");
    assert_eq!(refused(&mut all[..BYTES], 0), TableError::HugeFrames { found: 0 });
    let most = MAX_HUGE_FRAMES;
    assert_eq!(refused(&mut all[..BYTES], most + 1), TableError::HugeFrames { found: most as usize + 1 });
    let short = TableError::Length { part: Part::Region, found: BYTES - 1, needed: BYTES };
    assert_eq!(refused(&mut all[..BYTES - 1], HUGE), short);
    let text = short.to_string();
    assert!(text.contains("region") && text.contains(&BYTES.to_string()), "{text}");
    let address = all.as_ptr().addr() + 8;
    assert_eq!(refused(&mut all[8..], HUGE), TableError::Misaligned { address, align: 64 });
    assert!(all.iter().all(|byte| *byte == 0xa5), "nothing was written");
    assert_eq!((Table::bytes_for(0), Table::bytes_for(most + 1)), (None, None));

    let table = Table::new(&mut all[..], HUGE, Initial::Free).expect("longer than needed");
    let residency = [const { AtomicU8::new(0) }; 39];
    let wrong = TableError::Length { part: Part::Residency, found: 39, needed: 40 };
    assert_eq!(table.host(&residency).expect_err("one is missing"), wrong);
}

#[test]
fn a_table_lies_behind_somebodys_header() {
    let layout = TableLayout::after(100, HUGE).expect("in range");
    let bytes = layout.total as usize;
    let mut memory = Memory::new(bytes);
    memory.bytes(bytes).fill(0x5a);
    let base = memory.bytes(bytes).as_mut_ptr();
    // SAFETY: the memory outlives the table, and nothing else touches the table's part of it.
    let table = unsafe { Table::from_layout(base, bytes, &layout, Initial::Free) }.expect("it fits");
    assert_eq!(table.tenant().stats().free_frames, FRAMES);
    assert!(memory.bytes(bytes)[..100].iter().all(|byte| *byte == 0x5a));
}

#[test]
fn a_reservation_is_exact_or_not_at_all() {
    let mut memory = junk();
    let tenant = Table::new(memory.bytes(BYTES), HUGE, Initial::Free).expect("it fits").tenant();
    for (first, frames) in [(10_000, FRAMES), (u64::MAX - 1, 8), (0, u64::MAX)] {
        let refused = tenant.reserve(FrameId(first), frames);
        assert!(matches!(refused, Err(AllocError::OutOfRange(..))), "{first} and {frames} more: {refused:?}");
        assert_eq!(tenant.stats().free_huge, u64::from(HUGE), "all of it came back");
    }
    // A boot image in the middle, and a last huge frame of which 3 frames exist.
    tenant.reserve(FrameId(700), 2000).expect("free");
    tenant.reserve(FrameId(FRAMES - 509), 509).expect("free");
    assert_eq!(tenant.stats().free_frames, FRAMES - 2509);
    tenant.validate().expect("sound");

    // Frames 300..800 touch the first one; what came before is given back.
    let before = tenant.stats();
    assert!(matches!(tenant.reserve(FrameId(300), 500), Err(AllocError::NotFree(..))));
    tenant.reserve(FrameId(5), 0).expect("nothing is always there");
    assert_eq!(tenant.stats(), before);

    // It goes back in parts: small ones at the ends, whole huge frames between.
    (700..1024).for_each(|frame| tenant.free(FrameId(frame), Order::BASE).expect("reserved"));
    [1024, 1536, 2048].iter().for_each(|frame| tenant.free(FrameId(*frame), Order::HUGE).expect("reserved"));
    (2560..2700).for_each(|frame| tenant.free(FrameId(frame), Order::BASE).expect("reserved"));
    assert_eq!(tenant.stats().free_frames, FRAMES - 509);
    tenant.validate().expect("sound");
}

#[test]
fn a_handle_outlives_the_values_it_came_from() {
    let mut memory = junk();
    let mut cpu = Table::new(memory.bytes(BYTES), HUGE, Initial::Free).expect("it fits").tenant().cpu();
    let (frame, order) = cpu.alloc(Order::HUGE).expect("free").position();
    assert!(frame.byte_offset() < u64::from(HUGE) * HUGE_SIZE);
    cpu.free(frame, order).expect("ours");
    (0..65).for_each(|_| _ = cpu.alloc(Order::BASE).expect("free"));
    assert!(format!("{cpu:?}").contains("cached_frames: 63"), "{cpu:?}");
}

#[test]
fn everything_can_be_printed() {
    let mut memory = junk();
    let residency: Vec<_> = (0..HUGE).map(|_| AtomicU8::new(1)).collect();
    let table = Table::new(memory.bytes(BYTES), HUGE, Initial::Free).expect("it fits");
    let host = table.host(&residency).expect("one each");
    for text in [format!("{table:?}"), format!("{:?}", table.tenant()), format!("{host:?}")] {
        assert!(text.contains("huge_frames: 40"), "{text}");
    }
    let claim = format!("{:?}", host.claim(HugeId(7)));
    assert!(claim.contains("HugeId(7)") && claim.contains("Installed"), "{claim}");
}
