//! Persistent regions: what they keep, what they refuse, and that a refusal changes nothing.

use crate::memory::Memory;
use llfree::persist::{MAGIC, VERSION, inspect, region_bytes, table_layout};
use llfree::{AllocError, CloseError, CreateError, Initial, OpenError, Persistent, Recovery, Table, WriteBack};
use proptest::prelude::*;
use shared_layout::{FrameId, HugeEntry, Order};
use std::sync::atomic::AtomicU8;

const HUGE: u32 = 20;
const FRAMES: u64 = HUGE as u64 * 512;
const BYTES: usize = region_bytes(HUGE).expect("in range");
/// The offsets of the entries and the bitfields, as the format defines them.
const ENTRIES: usize = 192;
const BITFIELDS: usize = 256;

struct Region(Memory);

impl Region {
    /// A region that was created and left without a close.
    fn created() -> Self {
        let mut memory = Memory::new(BYTES);
        create(memory.bytes(BYTES)).expect("fresh");
        Self(memory)
    }

    fn closed() -> Self {
        let mut memory = Memory::new(BYTES);
        create(memory.bytes(BYTES)).expect("fresh").close().expect("alone");
        Self(memory)
    }

    fn bytes(&mut self, len: usize) -> &mut [u8] {
        self.0.bytes(len)
    }

    fn region(&mut self) -> &mut [u8] {
        self.bytes(BYTES)
    }

    fn set(&mut self, offset: usize, word: u64) {
        self.region()[offset..offset + 8].copy_from_slice(&word.to_le_bytes());
    }
}

fn create(region: &mut [u8]) -> Result<Persistent<'_>, CreateError> {
    Persistent::create(region, HUGE, WriteBack::NONE)
}

fn open(region: &mut [u8]) -> Result<Persistent<'_>, OpenError> {
    Persistent::open(region, WriteBack::NONE)
}

fn atomics(region: &mut [u8]) -> &[AtomicU8] {
    // SAFETY: same layout, and the exclusive borrow is given up for this one.
    unsafe { &*(std::ptr::from_mut(region) as *const [AtomicU8]) }
}

fn order(order: u8) -> Order {
    Order::new(order).expect("in range")
}

/// Opening and inspecting `region` fail with this error, which names these words; nothing changes.
fn refuses(region: &mut [u8], error: OpenError, words: &[&str]) {
    let before = region.to_vec();
    assert_eq!(open(region).err(), Some(error));
    assert_eq!(inspect(atomics(region)).err(), Some(error));
    assert_eq!(region, before, "a refused region was changed");
    let text = error.to_string();
    assert!(words.iter().all(|word| text.contains(word)), "{text}");
}

#[test]
fn what_was_allocated_is_allocated_after_a_close() {
    let mut memory = Region(Memory::new(BYTES));
    let instance = create(memory.region()).expect("fresh");
    assert_eq!((instance.generation(), instance.recovery()), (1, None));
    let tenant = instance.tenant();
    let mut cpu = tenant.cpu();
    let blocks: Vec<_> = (0..=10).map(|o| cpu.alloc(order(o)).expect("much is free").position()).collect();
    drop(cpu);
    let stats = tenant.stats();
    assert_eq!(stats.free_frames, FRAMES - 2047);
    instance.close().expect("alone");

    let found = inspect(atomics(memory.region())).expect("a region");
    assert_eq!((found.clean, found.generation, found.huge_frames, found.inconsistent), (true, 1, HUGE, 0));
    assert_eq!(found.stats, stats);

    let instance = open(memory.region()).expect("closed");
    assert_eq!((instance.generation(), instance.recovery()), (2, None));
    let tenant = instance.tenant();
    assert_eq!((tenant.stats(), tenant.validate()), (stats, Ok(())));
    for (frame, order) in blocks {
        assert_eq!(tenant.alloc_at(frame, order), Err(AllocError::NotFree(frame, order)));
        tenant.free(frame, order).expect("ours");
    }
    assert_eq!(tenant.stats().free_huge, u64::from(HUGE));
}

#[test]
fn an_instance_that_was_not_closed_is_recovered_once() {
    let mut memory = Region::created();
    // A take that stopped between its two steps, and a give likewise.
    memory.region()[ENTRIES..ENTRIES + 2].copy_from_slice(&(512u16 - 4).to_le_bytes());
    memory.region()[BITFIELDS + 64..BITFIELDS + 72].copy_from_slice(&3u64.to_le_bytes());
    memory.region()[ENTRIES + 2..ENTRIES + 4].copy_from_slice(&(512u16 - 3).to_le_bytes());
    let found = inspect(atomics(memory.region())).expect("a region");
    assert_eq!((found.clean, found.inconsistent), (false, 2));
    {
        let instance = open(memory.region()).expect("a region");
        assert_eq!(instance.recovery(), Some(Recovery { counters: 2, ..Recovery::default() }));
        assert_eq!(instance.tenant().validate(), Ok(()));
        assert_eq!(instance.tenant().stats().free_frames, FRAMES - 2);
    }
    let instance = open(memory.region()).expect("a region");
    assert_eq!(instance.recovery(), Some(Recovery::default()), "dropped is not closed");
    instance.close().expect("alone");
    assert_eq!(open(memory.region()).expect("closed").recovery(), None);
}

#[test]
fn a_closed_instance_with_a_broken_entry_is_recovered() {
    let mut memory = Region::closed();
    memory.region()[ENTRIES + 8] = 0xff;
    memory.region()[ENTRIES + 9] = 0x1f;
    let instance = open(memory.region()).expect("the header is fine");
    assert_eq!(instance.recovery(), Some(Recovery { entries: 1, ..Recovery::default() }));
    assert_eq!(instance.tenant().stats().free_huge, u64::from(HUGE));
}

#[test]
fn held_and_evicted_frames_stay_so() {
    let mut memory = Region::created();
    let held = HugeEntry::FREE_EVICTED.hold().expect("free");
    let used = HugeEntry::FREE_EVICTED.take(5).expect("free");
    for (i, entry) in [held, HugeEntry::HUGE_EVICTED, used].into_iter().enumerate() {
        memory.region()[ENTRIES + 2 * i..][..2].copy_from_slice(&entry.bits().to_le_bytes());
    }
    let instance = open(memory.region()).expect("a region");
    let stats = instance.tenant().stats();
    assert_eq!((stats.held_huge, stats.allocated_huge, stats.evicted_huge), (1, 1, 3));
    assert_eq!(stats.free_frames, FRAMES - 1024);
}

#[test]
fn the_table_of_a_region_is_one_that_others_can_join() {
    let mut memory = Region(Memory::new(BYTES));
    let base = memory.region().as_mut_ptr();
    // SAFETY: the memory outlives both, and nobody accesses it otherwise meanwhile.
    let instance = unsafe { Persistent::create_raw(base, BYTES, HUGE, Initial::Evicted, WriteBack::NONE) };
    let instance = instance.expect("fresh");
    assert_eq!(instance.tenant().stats().evicted_huge, u64::from(HUGE), "nothing has memory yet");
    let layout = table_layout(HUGE).expect("in range");
    // SAFETY: as above.
    let joined = unsafe { Table::from_layout(base, BYTES, &layout, Initial::Joined) }.expect("a table");
    let (frame, _) = joined.tenant().alloc(order(9)).expect("free").position();
    instance.tenant().free(frame, order(9)).expect("of the same table");
    let residency = [const { AtomicU8::new(0) }; HUGE as usize];
    let host = joined.host(&residency).expect("a byte a huge frame");
    assert_eq!((host.validate(), instance.tenant().validate()), (Ok(()), Ok(())));
    instance.close().expect("alone");
    // SAFETY: as above.
    let again = unsafe { Persistent::open_raw(base, BYTES, WriteBack::NONE) }.expect("closed");
    assert_eq!((again.recovery(), again.tenant().stats().evicted_huge), (None, u64::from(HUGE)));
}

#[test]
fn leaks_are_what_no_owner_claims() {
    let mut memory = Region::created();
    let mut instance = open(memory.region()).expect("a region");
    let tenant = instance.tenant();
    let mut cpu = tenant.cpu();
    let mine: Vec<_> = [0, 0, 0, 0, 0, 3, 9, 10].map(|o| cpu.alloc(order(o)).expect("free").position()).to_vec();
    let lost = cpu.alloc(order(9)).expect("free").position().0;
    std::mem::forget(cpu);
    let owns =
        |frame: FrameId| mine.iter().any(|(first, order)| (first.0..first.0 + order.frames()).contains(&frame.0));
    assert!(!owns(lost));
    let leaks = instance.recover_leaks(|frame, order| {
        assert!(frame.is_aligned(order));
        owns(frame)
    });
    // Of its second share, eight frames, it gave out one.
    assert_eq!((leaks.frames, leaks.huge, leaks.total_frames()), (7, 1, 7 + 512));
    let tenant = instance.tenant();
    assert_eq!((tenant.stats().free_frames, tenant.validate()), (FRAMES - 13 - 512 - 1024, Ok(())));
    for (frame, order) in &mine {
        tenant.free(*frame, *order).expect("still ours");
    }
    assert_eq!(tenant.stats().free_huge, u64::from(HUGE));
    assert_eq!(instance.recover_leaks(|_, _| false).total_frames(), 0);
}

#[test]
fn every_mapping_gets_the_instruction_it_needs() {
    let Some(write_back) = WriteBack::detect() else {
        // Past the harness, which shows nobody what a passing test prints.
        let _ = std::io::Write::write_fmt(
            &mut std::io::stderr(),
            format_args!("SKIPPED: no cache-line write-back is known for this CPU\n"),
        );
        return;
    };
    assert_ne!(write_back, WriteBack::NONE);
    let mut memory = Region(Memory::new(BYTES));
    let instance = Persistent::create(memory.region(), HUGE, write_back).expect("fresh");
    let tenant = instance.tenant();
    let mut cpu = tenant.cpu();
    let blocks: Vec<_> = (0..=10).map(|o| cpu.alloc(order(o)).expect("free").position()).collect();
    blocks.iter().for_each(|(frame, order)| cpu.free(*frame, *order).expect("ours"));
    drop(cpu);
    instance.close().expect("alone");
    let instance = Persistent::open(memory.region(), write_back).expect("closed");
    assert_eq!((instance.recovery(), instance.tenant().stats().free_frames), (None, FRAMES));
}

#[test]
fn create_refuses_what_does_not_fit() {
    let mut memory = Region(Memory::new(BYTES));
    let none = WriteBack::NONE;
    let refused = |region: &mut [u8], huge: u32, error: CreateError, words: &[&str]| {
        let before = region.to_vec();
        assert_eq!(Persistent::create(region, huge, none).err(), Some(error));
        assert_eq!(region, before, "a refused region was changed");
        let text = error.to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    };
    let max = shared_layout::table::MAX_HUGE_FRAMES;
    for huge in [0, max + 1, u32::MAX] {
        assert_eq!(region_bytes(huge), None);
        let words = [&*huge.to_string(), &max.to_string()];
        refused(memory.region(), huge, CreateError::HugeFrames(huge), &words);
    }
    for bytes in [0, BYTES - 1, BYTES + 1] {
        let words = [&*bytes.to_string(), &BYTES.to_string()];
        refused(memory.bytes(bytes), HUGE, CreateError::Length { bytes, needed: BYTES }, &words);
    }
    let region = &mut memory.bytes(BYTES + 8)[8..];
    let address = region.as_ptr().addr();
    refused(region, HUGE, CreateError::Misaligned { address }, &[&format!("{address:#x}"), "64"]);
    memory.set(0, 5);
    refused(memory.region(), HUGE, CreateError::Occupied { first: 5 }, &["0x0000000000000005"]);
    let mut memory = Region::created();
    refused(memory.region(), HUGE, CreateError::Occupied { first: MAGIC }, &[]);
    // On request it is available.
    memory.set(0, 0);
    assert_eq!(create(memory.region()).expect("zeroed").generation(), 1);
}

#[test]
fn open_refuses_a_region_that_is_too_short_for_a_header() {
    let mut memory = Region::closed();
    for bytes in [0, 1, 127] {
        refuses(memory.bytes(bytes), OpenError::NoHeader { bytes, needed: 128 }, &[&bytes.to_string(), "128"]);
    }
}

#[test]
fn open_refuses_a_base_that_is_not_aligned() {
    let mut memory = Region::closed();
    memory.bytes(BYTES + 8).copy_within(..BYTES, 8);
    let region = &mut memory.bytes(BYTES + 8)[8..];
    let address = region.as_ptr().addr();
    refuses(region, OpenError::Misaligned { address }, &[&format!("{address:#x}"), "64"]);
}

#[test]
fn open_refuses_what_is_no_region() {
    let mut memory = Region(Memory::new(BYTES));
    refuses(memory.region(), OpenError::Magic { found: 0 }, &["0x0000000000000000"]);
    memory.region().fill(b'x');
    refuses(memory.region(), OpenError::Magic { found: 0x7878_7878_7878_7878 }, &["0x7878787878787878"]);
}

#[test]
fn open_refuses_other_versions_with_both_numbers() {
    let mut memory = Region::closed();
    let newer = VERSION + 6;
    memory.region()[8..12].copy_from_slice(&newer.to_le_bytes());
    refuses(memory.region(), OpenError::NewerVersion { found: newer }, &["10", "reads 4"]);
    memory.region()[8..12].copy_from_slice(&0u32.to_le_bytes());
    refuses(memory.region(), OpenError::OlderVersion { found: 0 }, &["0", "reads 4"]);
}

#[test]
fn open_refuses_a_geometry_that_contradicts_itself() {
    let mut memory = Region::closed();
    for huge in [0, u64::from(shared_layout::table::MAX_HUGE_FRAMES) + 1, u64::MAX] {
        memory.set(16, huge);
        refuses(memory.region(), OpenError::HugeFrames(huge), &[&huge.to_string()]);
    }
    for offset in [24, 32, 40, 48] {
        let mut memory = Region::closed();
        let expected = u64::from_le_bytes(memory.region()[offset..offset + 8].try_into().expect("8 bytes"));
        memory.set(offset, 77);
        refuses(memory.region(), OpenError::Header { offset, found: 77, expected }, &["0x4d", &offset.to_string()]);
    }
    // The header's own size is a word of it.
    let mut memory = Region::closed();
    memory.region()[12] = 64;
    let (found, expected) = (64 << 32 | u64::from(VERSION), 128 << 32 | u64::from(VERSION));
    refuses(memory.region(), OpenError::Header { offset: 8, found, expected }, &["byte 8"]);
}

#[test]
fn open_refuses_a_file_that_is_not_as_long_as_it_says() {
    let mut memory = Region::closed();
    for bytes in [128, BYTES - 64, BYTES - 1] {
        refuses(
            memory.bytes(bytes),
            OpenError::Shorter { bytes, said: BYTES },
            &[&bytes.to_string(), &BYTES.to_string()],
        );
    }
    let bytes = BYTES + 1;
    refuses(memory.bytes(bytes), OpenError::Longer { bytes, said: BYTES }, &[&bytes.to_string(), &BYTES.to_string()]);
}

#[test]
fn open_refuses_reserved_words_and_unknown_states() {
    for offset in [56, 80, 88, 96, 104, 112, 120] {
        let mut memory = Region::closed();
        memory.set(offset, 9);
        refuses(memory.region(), OpenError::Reserved { offset, found: 9 }, &["0x9", &offset.to_string()]);
    }
    for found in [0, 3, u64::MAX] {
        let mut memory = Region::closed();
        memory.set(64, found);
        refuses(memory.region(), OpenError::State { found }, &[&found.to_string()]);
    }
}

#[test]
fn a_region_that_was_opened_twice_is_not_marked_as_closed() {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(BYTES as u64).expect("room");
    // SAFETY: nobody else has the file, and this test accesses both mappings as atomics only.
    let [mut first, mut second] = [(); 2].map(|()| unsafe { memmap2::MmapMut::map_mut(&file).expect("mapped") });
    let first = create(&mut first).expect("fresh");
    let second = open(&mut second).expect("nothing tells that the other still lives");
    let error = first.close().expect_err("opened since");
    assert_eq!(error, CloseError { opened: 1, found: 2 });
    assert!(error.to_string().contains("generation 1 and is now at 2"), "{error}");
    second.close().expect("the last one");
}

/// Bytes that are changed, and how.
fn mutations() -> impl Strategy<Value = Vec<(usize, u8)>> {
    let place = prop_oneof![3 => 0usize..128, 1 => 0..BYTES];
    prop::collection::vec((place, any::<u8>()), 0..6)
}

proptest! {
    #[test]
    fn open_is_total_on_mutated_regions(clean in any::<bool>(), changes in mutations(), len in prop_oneof![4 => Just(BYTES), 1 => 0..BYTES + 64]) {
        let mut memory = if clean { Region::closed() } else { Region::created() };
        for (offset, byte) in changes {
            memory.region()[offset] = byte;
        }
        let region = memory.bytes(len);
        let before = region.to_vec();
        let inspected = inspect(atomics(region));
        prop_assert_eq!(&*region, &*before, "an inspection wrote");
        match Persistent::open(region, WriteBack::NONE) {
            Err(error) => {
                prop_assert_eq!(inspected, Err(error));
                prop_assert_eq!(&*region, &*before, "a refused region was changed");
            }
            Ok(instance) => {
                prop_assert!(inspected.is_ok());
                let tenant = instance.tenant();
                if instance.recovery().is_some() {
                    prop_assert_eq!(tenant.validate(), Ok(()));
                }
                // Whatever the table says, a user of it comes to an end.
                let mut cpu = tenant.cpu();
                while cpu.alloc(Order::BASE).is_ok() {}
            }
        }
    }

    #[test]
    fn open_is_total_on_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..512), good in 0usize..=128) {
        let mut source = Region::closed();
        let mut memory = Memory::new(bytes.len());
        let region = memory.bytes(bytes.len());
        region.copy_from_slice(&bytes);
        let good = good.min(bytes.len());
        region[..good].copy_from_slice(&source.region()[..good]);
        let before = region.to_vec();
        prop_assert!(open(region).is_err());
        prop_assert_eq!(&*region, &*before);
    }
}
