//! What can be promised about guest RAM without looking at the whole process.

use super::account::lacks_scan;
use super::*;
use shared_layout::{HugeId, HugeRange};
use test_support::skipped;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

const fn is_send_and_sync<T: Send + Sync>() {}
const _: () = is_send_and_sync::<GuestRam>();

fn ram(huge_frames: u32, backing: Backing) -> GuestRam {
    GuestRam::new(u64::from(huge_frames) * HUGE_SIZE, backing).expect("RAM that is never touched")
}

fn resident_ranges(ram: &GuestRam) -> Vec<Range<u64>> {
    let mut ranges = Vec::new();
    ram.for_each_resident(|range| ranges.push(range)).expect("/proc is mounted");
    ranges
}

/// The bytes of a run of huge frames.
fn huge(first: u64, end: u64) -> Range<u64> {
    first * HUGE_SIZE..end * HUGE_SIZE
}

#[test]
fn backings_have_one_name_everywhere() {
    for backing in Backing::ALL {
        assert_eq!(backing.to_string().parse(), Ok(backing));
        assert_eq!(serde_json::to_string(&backing).expect("a plain enum"), format!("\"{backing}\""));
    }
    let error = "ramfs".parse::<Backing>().expect_err("no such backing").to_string();
    assert!(error.contains("ramfs") && error.contains("hugetlb"), "{error}");
}

#[test]
fn only_whole_huge_frames_make_ram() {
    for bytes in [0, 1, 4096, HUGE_SIZE - 1, HUGE_SIZE + 4096, (u64::from(MAX_HUGE_FRAMES) + 1) * HUGE_SIZE, u64::MAX] {
        for backing in Backing::ALL {
            let error = GuestRam::new(bytes, backing).expect_err("a bad size");
            assert!(matches!(error, MemoryError::BadSize { bytes: b } if b == bytes), "{error}");
            assert!(error.to_string().contains(&bytes.to_string()), "{error}");
        }
    }
}

#[test]
fn ram_is_aligned_and_starts_at_guest_address_0() {
    for backing in [Backing::Anon, Backing::Memfd] {
        // Odd sizes push the next mapping off the alignment that the kernel gives by luck.
        let rams: Vec<GuestRam> = [1, 3, 2, 513].map(|huge_frames| ram(huge_frames, backing)).into();
        for ram in &rams {
            assert_eq!(ram.host_address() % HUGE_SIZE, 0);
            assert_eq!(ram.bytes(), u64::from(ram.huge_frames()) * HUGE_SIZE);
            assert_eq!(ram.backing(), backing);
            let region = ram.guest_memory().find_region(GuestAddress(0)).expect("RAM at 0");
            assert_eq!((region.start_addr(), region.len()), (GuestAddress(0), ram.bytes()));
            let host = ram.guest_memory().get_host_address(GuestAddress(0)).expect("RAM at 0");
            assert_eq!(host as u64, ram.host_address());
        }
    }
}

#[test]
fn ram_with_a_hole_is_one_mapping_and_two_regions() {
    for backing in [Backing::Anon, Backing::Memfd] {
        let map = AddressMap::with_hole(8 * HUGE_SIZE, 3 * HUGE_SIZE);
        let ram = GuestRam::with_map(8 * HUGE_SIZE, backing, map).expect("RAM that is never touched");
        let memory = ram.guest_memory();
        let regions: Vec<_> = memory.iter().map(|region| (region.start_addr().0, region.len())).collect();
        assert_eq!(regions, [(0, 3 * HUGE_SIZE), (HOLE_END, 5 * HUGE_SIZE)]);
        for (gpa, offset) in [(0, 0), (2 * HUGE_SIZE, 2 * HUGE_SIZE), (HOLE_END, 3 * HUGE_SIZE)] {
            let host = memory.get_host_address(GuestAddress(gpa)).expect("in RAM");
            assert_eq!(host as u64, ram.host_address() + offset);
        }
        // Frames count in the mapping: frame 3 is the first past the hole.
        memory.write_obj(7u64, GuestAddress(HOLE_END)).expect("in RAM");
        assert_eq!(resident_ranges(&ram)[0].start, 3 * HUGE_SIZE);
        ram.discard(HugeId(3)).expect("inside");
        assert_eq!(ram.residency().expect("/proc is mounted").resident_bytes, 0, "{backing}");
        assert_eq!(memory.read_obj::<u64>(GuestAddress(HOLE_END)).expect("in RAM"), 0);
        assert!(memory.write_obj(7u64, GuestAddress(HOLE_END - 8)).is_err(), "the hole is nobody's");
        assert!(memory.write_obj(7u64, GuestAddress(3 * HUGE_SIZE - 4)).is_err(), "half of it is in the hole");
    }
}

#[test]
fn a_map_of_other_ram_is_refused() {
    let error = GuestRam::with_map(8 * HUGE_SIZE, Backing::Anon, AddressMap::flat(6 * HUGE_SIZE)).expect_err("refused");
    assert!(matches!(error, MemoryError::WrongMap { .. }), "{error}");
}

#[test]
fn a_size_beyond_the_address_space_is_an_error() {
    // 64 TiB fit once into the 128 TiB of a process, not three times.
    let error = (0..3)
        .map(|_| GuestRam::new(u64::from(MAX_HUGE_FRAMES) * HUGE_SIZE, Backing::Anon))
        .collect::<Result<Vec<_>, _>>();
    // With five-level page tables the kernel still stays below 128 TiB unless asked.
    let error = error.expect_err("192 TiB");
    assert!(matches!(error, MemoryError::Map { .. }), "{error}");
    assert!(error.is_out_of_memory());
}

#[test]
fn ranges_are_bounds_checked() {
    let ram = ram(8, Backing::Anon);
    for (first, count) in [(8, 1), (0, 9), (7, 2), (9, 0), (u32::MAX, 1), (1, u32::MAX), (u32::MAX, u32::MAX)] {
        for result in [
            ram.discard(HugeRange::saturating(HugeId(first), count)),
            ram.populate(HugeRange::saturating(HugeId(first), count)),
        ] {
            let error = result.expect_err("outside the RAM");
            assert!(matches!(error, MemoryError::OutOfRange { huge_frames: 8, .. }), "{error}");
            assert!(!error.is_out_of_memory());
        }
    }
    assert_eq!(resident_ranges(&ram), []);
    for backing in [Backing::Anon, Backing::Memfd] {
        let ram = self::ram(8, backing);
        for (first, count) in [(0, 0), (8, 0), (0, 8), (7, 1)] {
            ram.discard(HugeRange::saturating(HugeId(first), count)).expect("inside the RAM");
        }
        ram.populate(HugeRange::saturating(HugeId(8), 0)).expect("nothing to do");
        assert_eq!(resident_ranges(&ram), []);
    }
}

#[test]
fn populated_frames_and_only_they_are_resident() {
    for backing in [Backing::Anon, Backing::Memfd] {
        let ram = ram(16, backing);
        assert_eq!(ram.residency().expect("readable"), RamResidency::default());
        ram.populate(HugeRange::saturating(HugeId(1), 2)).expect("6 MiB");
        ram.populate(HugeId(3)).expect("2 MiB");
        ram.populate(HugeId(15)).expect("2 MiB");
        assert_eq!(resident_ranges(&ram), [huge(1, 4), huge(15, 16)], "{backing}");
        assert_eq!(ram.residency().expect("readable").resident_bytes, 4 * HUGE_SIZE, "{backing}");
        ram.discard(HugeId(2)).expect("inside the RAM");
        assert_eq!(resident_ranges(&ram), [huge(1, 2), huge(3, 4), huge(15, 16)], "{backing}");
        assert_eq!(ram.residency().expect("readable").resident_bytes, 3 * HUGE_SIZE, "{backing}");
        ram.discard(HugeRange::saturating(HugeId(0), 16)).expect("all of it");
        assert_eq!(resident_ranges(&ram), [], "{backing}");
        assert_eq!(ram.residency().expect("readable"), RamResidency::default(), "{backing}");
    }
}

#[test]
fn a_single_touched_page_is_seen() {
    // A file of 4 KiB pages; anonymous memory may come as a whole huge page.
    let ram = ram(4, Backing::Memfd);
    ram.guest_memory().write_obj(7u64, GuestAddress(HUGE_SIZE + 8192)).expect("inside the RAM");
    let ranges = resident_ranges(&ram);
    assert!(matches!(&ranges[..], [range] if range.contains(&(HUGE_SIZE + 8192))), "{ranges:?}");
}

#[test]
fn reading_untouched_memory_makes_nothing_resident() {
    let ram = ram(4, Backing::Anon);
    let zero: u64 = ram.guest_memory().read_obj(GuestAddress(HUGE_SIZE)).expect("inside the RAM");
    assert_eq!(zero, 0);
    assert_eq!(ram.residency().expect("readable"), RamResidency::default(), "the zero page is nobody's memory");
    assert_eq!(resident_ranges(&ram), []);
}

#[test]
fn populate_keeps_what_is_there() {
    for backing in [Backing::Anon, Backing::Memfd] {
        let ram = ram(2, backing);
        ram.guest_memory().write_obj(0xabcd_u64, GuestAddress(HUGE_SIZE)).expect("inside the RAM");
        ram.populate(HugeRange::saturating(HugeId(0), 2)).expect("4 MiB");
        let kept: u64 = ram.guest_memory().read_obj(GuestAddress(HUGE_SIZE)).expect("inside the RAM");
        assert_eq!(kept, 0xabcd);
    }
}

#[test]
fn old_and_new_kernels_give_the_same_account() {
    let ram = ram(1024, Backing::Anon);
    // Across the 1 GiB at which the old way starts its next call.
    for (first, count) in [(0, 1), (3, 2), (511, 2), (1020, 4)] {
        ram.populate(HugeRange::saturating(HugeId(first), count)).expect("a few MiB");
    }
    let expected = [huge(0, 1), huge(3, 5), huge(511, 513), huge(1020, 1024)];

    let mut old = Vec::new();
    let mut joined = Joined::new(|range| old.push(range));
    pages::mincore(ram.mapping.start(), ram.mapping.len(), |range| joined.push(range)).expect("our own mapping");
    joined.finish();
    assert_eq!(old, expected);
    let by_mincore = ram.read_residency_without_scan(None).expect("/proc is mounted");
    assert_eq!(by_mincore.resident_bytes, 9 * HUGE_SIZE);

    let mut new = Vec::new();
    let mut joined = Joined::new(|range| new.push(range));
    let pagemap = ram.pagemap().expect("/proc is mounted");
    match pagemap.scan(ram.mapping.start(), ram.mapping.len(), |range, state| {
        assert!(state.present);
        joined.push(range);
    }) {
        Err(error) if lacks_scan(&error) => skipped("no PAGEMAP_SCAN before Linux 6.7"),
        other => {
            other.expect("/proc is mounted");
            joined.finish();
            assert_eq!(new, expected);
            assert_eq!(ram.residency().expect("readable"), by_mincore);
        }
    }
}

#[test]
fn many_scattered_pages_are_all_reported() {
    // More regions than one scan returns, so that it has to resume where it stopped.
    let ram = ram(8, Backing::Anon);
    // SAFETY: the range is our own mapping, and the advice changes no contents.
    unsafe { rustix::mm::madvise(ram.mapping.pointer(0), ram.mapping.len(), Advice::LinuxNoHugepage) }
        .expect("our own mapping");
    let pages: Vec<u64> = (0..8 * 512).step_by(2).collect();
    for page in &pages {
        ram.guest_memory().write_obj(1u8, GuestAddress(page * 4096)).expect("inside the RAM");
    }
    let expected: Vec<Range<u64>> = pages.iter().map(|page| page * 4096..(page + 1) * 4096).collect();
    assert_eq!(resident_ranges(&ram), expected);
    let mut old = Vec::new();
    pages::mincore(ram.mapping.start(), ram.mapping.len(), |range| old.push(range)).expect("our own mapping");
    assert_eq!(old, expected);
    let residency = ram.residency().expect("readable");
    assert_eq!(residency, RamResidency { resident_bytes: pages.len() as u64 * 4096, huge_bytes: 0 });
}

#[test]
fn a_clone_of_the_view_outlives_the_ram_safely() {
    let ram = ram(1, Backing::Anon);
    let view = ram.guest_memory().clone();
    view.write_obj(5u64, GuestAddress(64)).expect("inside the RAM");
    drop(ram);
    assert_eq!(view.read_obj::<u64>(GuestAddress(64)).expect("still mapped"), 5);
}

#[test]
fn dropped_ram_is_unmapped() {
    for backing in [Backing::Anon, Backing::Memfd] {
        // Larger than what another test of this process could map at the same address meanwhile.
        let ram = ram(4096, backing);
        let (start, len) = (ram.mapping.start(), ram.mapping.len());
        drop(ram);
        let error = pages::mincore(start, len, |_| ()).expect_err("not all of it is mapped");
        assert_eq!(error.raw_os_error(), Some(libc::ENOMEM), "{backing}");
    }
}

#[test]
fn nobody_seals_it_further() {
    use rustix::fs::{SealFlags, fcntl_add_seals, fcntl_get_seals};
    let ram = ram(1, Backing::Memfd);
    let file = ram.file().expect("a file");
    for seal in [SealFlags::WRITE, SealFlags::FUTURE_WRITE] {
        assert_eq!(fcntl_add_seals(file, seal), Err(Errno::PERM));
    }
    assert_eq!(fcntl_get_seals(file), Ok(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL));
}

#[test]
fn running_out_is_told_from_other_failures() {
    let populate = |backing, errno| {
        let source = io::Error::from_raw_os_error(errno);
        MemoryError::Populate { first: 0, count: 1, backing, source }.is_out_of_memory()
    };
    for backing in Backing::ALL {
        assert!(populate(backing, libc::ENOMEM));
        assert!(!populate(backing, libc::EINVAL), "a kernel before 5.14");
        assert_eq!(populate(backing, libc::EFAULT), backing != Backing::Anon);
    }
    assert!(populate(Backing::Hugetlb, libc::EHWPOISON));
    let source = io::Error::from_raw_os_error(libc::ENOMEM);
    assert!(!MemoryError::Discard { first: 0, count: 1, backing: Backing::Anon, source }.is_out_of_memory());
}

#[test]
fn memory_in_a_part_of_a_file_is_given_back_and_counted_there_alone() {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(6 * HUGE_SIZE).expect("room");
    // What lies in front is not ours.
    rustix::io::pwrite(&file, &[9; 8192], 0).expect("room");
    let ram = GuestRam::in_file(4 * HUGE_SIZE, file.try_clone().expect("a copy").into(), 2 * HUGE_SIZE);
    let ram = ram.expect("a file of that size");
    for page in [0, 512, 1024] {
        ram.guest_memory().write_obj(page, GuestAddress(page * 4096)).expect("inside");
    }
    // Some file systems have huge pages, others 4 KiB of each.
    let frames = |ram: &GuestRam| {
        let ranges = resident_ranges(ram);
        let bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        assert_eq!(ram.residency().expect("the file tells").resident_bytes, bytes);
        let frames = ranges.iter().flat_map(|range| range.start / HUGE_SIZE..range.end.div_ceil(HUGE_SIZE));
        frames.collect::<Vec<_>>()
    };
    assert_eq!(frames(&ram), [0, 1, 2]);
    ram.discard(HugeId(1)).expect("the file system makes holes");
    assert_eq!(frames(&ram), [0, 2]);
    assert_eq!(ram.guest_memory().read_obj::<u64>(GuestAddress(HUGE_SIZE)).expect("inside"), 0);
    drop(ram);
    let mut front = [0; 8192];
    rustix::io::pread(&file, &mut front, 0).expect("there");
    let mut kept = [0u8; 8];
    rustix::io::pread(&file, &mut kept, 4 * HUGE_SIZE).expect("there");
    assert_eq!((front, u64::from_le_bytes(kept)), ([9; 8192], 1024), "the file has what was written");
    GuestRam::in_file(HUGE_SIZE + 1, file.into(), 0).expect_err("no whole huge frames");
}
