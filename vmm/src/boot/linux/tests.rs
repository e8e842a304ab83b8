//! Files that are not kernels, kernels that are cut off, and the boot data of a whole one.

use super::kernel::{Entry, LinuxKernel, Setup};
use super::map::{self, Kind};
use super::{Initrd, LinuxError, acpi};
use crate::boot::{Image, ImageError};
use linux_loader::loader::bootparam::setup_header;
use llfree_monitor::memory::{Backing, GuestRam};
use proptest::prelude::*;
use vm_memory::{ByteValued, Bytes, GuestAddress};

const MIB: u64 = 1 << 20;
const SETUP_SECTORS: u8 = 3;
const PAYLOAD: usize = 4096;

/// A bzImage with a real header and no real payload.
fn bzimage(change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
    let mut header = setup_header {
        setup_sects: SETUP_SECTORS,
        syssize: PAYLOAD as u32 / 16,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x020f,
        loadflags: 1,
        relocatable_kernel: 1,
        xloadflags: 1,
        cmdline_size: 2047,
        initrd_addr_max: 0x7fff_ffff,
        pref_address: 16 * MIB,
        init_size: 8 * MIB as u32,
        ..Default::default()
    };
    change(&mut header);
    let mut image = vec![0; (usize::from(SETUP_SECTORS) + 1) * 512];
    image[..2].copy_from_slice(b"MZ");
    image[0x1f1..0x1f1 + size_of::<setup_header>()].copy_from_slice(header.as_slice());
    image.extend((0..PAYLOAD).map(|i| i as u8));
    image
}

/// An ELF with one segment at 16 MiB, and a PVH note that names its start.
fn vmlinux() -> Vec<u8> {
    let (notes, code) = (0x100_u64, 0x200_u64);
    let mut image = vec![0; code as usize + PAYLOAD];
    image[..8].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(24, &(16 * MIB).to_le_bytes());
    put(32, &64_u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 2, 0]);
    let program = |kind: u32, offset: u64, address: u64, bytes: u64, memory: u64| {
        let mut header = Vec::new();
        header.extend(kind.to_le_bytes());
        header.extend(5_u32.to_le_bytes());
        for word in [offset, 0xffff_ffff_8000_0000 + address, address, bytes, memory, 4096] {
            header.extend(word.to_le_bytes());
        }
        header
    };
    put(64, &program(1, code, 16 * MIB, PAYLOAD as u64, 2 * MIB));
    let mut note = program(4, notes, 0, 20, 20);
    // Notes are aligned to four bytes.
    note[48..].copy_from_slice(&4_u64.to_le_bytes());
    put(120, &note);
    put(notes as usize, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0]);
    put(notes as usize + 16, &(16 * MIB as u32).to_le_bytes());
    image
}

fn refused(image: Vec<u8>) -> String {
    Image::parse("vmlinuz", image).expect_err("no kernel").to_string()
}

#[test]
fn whole_kernels_are_told_apart_by_their_contents() {
    let entry = |image| match Image::parse("k", image).expect("a kernel") {
        Image::Linux(kernel) => kernel.entry(),
        Image::Own(_) => panic!("Linux"),
    };
    assert_eq!(entry(bzimage(|_| {})), Entry::Long { address: MIB + 0x200 });
    assert_eq!(entry(vmlinux()), Entry::Pvh { address: 16 * MIB });
    assert!(Image::parse("shim", images::SHIM_ELF.to_vec()).expect("ours").kernel().is_some());
}

#[test]
fn a_kernel_that_was_cut_says_so_wherever_it_was_cut() {
    let image = bzimage(|_| {});
    for bytes in [2, 100, 0x1f1, 0x206, 0x260, 0x800, image.len() - 1] {
        let text = refused(image[..bytes].to_vec());
        assert!(text.contains("cut off") && text.contains(&format!("{bytes} bytes")), "{bytes}: {text}");
    }
    let image = vmlinux();
    for bytes in [0x114, 0x200, image.len() - 1] {
        let text = refused(image[..bytes].to_vec());
        assert!(text.contains("cut off") && text.contains("ELF kernel"), "{bytes}: {text}");
    }
    // The missing part may be its note.
    let text = refused(image[..0x100].to_vec());
    assert!(text.contains("cut off"), "{text}");
}

#[test]
fn kernels_that_cannot_be_started_say_what_they_lack() {
    assert!(refused(bzimage(|header| header.version = 0x0206)).contains("boot protocol 2.12"));
    assert!(refused(bzimage(|header| header.xloadflags = 0)).contains("64-bit"));
    assert!(refused(bzimage(|header| header.relocatable_kernel = 0)).contains("1 MiB"));
    assert!(refused(bzimage(|header| header.pref_address = u64::MAX)).contains("0xffffffffffffffff"));
    let mut without = vmlinux();
    without[0x10c..0x110].copy_from_slice(b"GNU\0");
    assert!(refused(without).contains("no PVH entry; use its bzImage"));
    let mut low = vmlinux();
    low[64 + 24..64 + 32].copy_from_slice(&0x1000_u64.to_le_bytes());
    assert!(refused(low).contains("0x1000"));
    let mut elsewhere = vmlinux();
    elsewhere[0x110..0x114].copy_from_slice(&[0; 4]);
    assert!(refused(elsewhere).contains("not in any segment"));
}

fn linux(image: Vec<u8>) -> LinuxKernel {
    match Image::parse("vmlinuz", image) {
        Ok(Image::Linux(kernel)) => kernel,
        other => panic!("{other:?}"),
    }
}

fn initrd(bytes: &[u8]) -> Initrd {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), bytes).expect("room");
    Initrd::open(file.path()).expect("an initrd")
}

#[test]
fn an_initrd_goes_to_the_end_of_low_memory_or_says_what_is_missing() {
    let kernel = linux(bzimage(|_| {}));
    let initrd = initrd(&[7; 5000]);
    assert_eq!(kernel.initrd_address(Some(&initrd), 128 * MIB, false).expect("room"), 128 * MIB - 2 * 4096);
    assert_eq!(kernel.initrd_address(Some(&initrd), 3 << 30, false).expect("room"), (2 << 30) - 2 * 4096);
    assert_eq!(kernel.initrd_address(None, 128 * MIB, false).expect("room"), 0);
    let text = kernel.initrd_address(Some(&initrd), 32 * MIB, false).expect_err("too small").to_string();
    assert!(text.contains("58 MiB") && text.contains("32 MiB") && text.contains("memory below 3 GiB"), "{text}");
    let text = kernel.initrd_address(Some(&initrd), 32 * MIB, true).expect_err("too small").to_string();
    assert!(text.contains("boot="), "{text}");
}

#[test]
fn an_initrd_that_no_memory_could_hold_does_not_ask_for_more() {
    let initrd = initrd(&[7; 5000]);
    // The kernel's end is at 24 MiB.
    for (most, refused) in [(24 * MIB + 3 * 4096, false), (24 * MIB + 2 * 4096, true), (4096, true)] {
        let kernel = linux(bzimage(|header| header.initrd_addr_max = most as u32 - 1));
        match kernel.initrd_address(Some(&initrd), 3 << 30, false) {
            Ok(address) => assert!(!refused && address == 24 * MIB + 4096, "{address:#x}"),
            Err(error) => {
                let text = error.to_string();
                assert!(refused && text.contains("5000 bytes") && !text.contains("--mem"), "{text}");
            }
        }
        assert_eq!(kernel.initrd_address(None, 3 << 30, false).expect("room"), 0);
    }
}

#[test]
fn initrds_that_are_none_are_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let text = |path: &std::path::Path| llfree_base::error_line(&Initrd::open(path).expect_err("none"));
    assert!(text(directory.path()).contains("not a regular file"));
    assert!(text(&directory.path().join("gone")).contains("cannot read the initrd"));
    let empty = directory.path().join("empty");
    std::fs::write(&empty, []).expect("room");
    assert!(text(&empty).contains("is empty"));
}

#[test]
fn a_command_line_has_its_kernels_limit_and_printable_characters() {
    let kernel = linux(bzimage(|_| {}));
    kernel.check_command_line(&"x".repeat(2047)).expect("as long as it may be");
    let text = kernel.check_command_line(&"x".repeat(2048)).expect_err("too long").to_string();
    assert!(text.contains("2048") && text.contains("2047"), "{text}");
    let ram = GuestRam::new(64 * MIB, Backing::Anon).expect("small");
    let setup = Setup { initrd: None, command_line: "a\nb", memory_map: &[], acpi: &[] };
    assert!(matches!(kernel.load(ram.guest_memory(), &setup, 0), Err(LinuxError::CommandLine { .. })));
}

#[test]
fn a_kernel_finds_its_image_initrd_command_line_and_tables() {
    let initrd = initrd(b"files");
    let memory_map = map::e820(std::slice::from_ref(&(0..64 * MIB)), 1 << 30..(1 << 30) + 4096);
    for image in [bzimage(|_| {}), vmlinux()] {
        let kernel = linux(image);
        let ram = GuestRam::new(64 * MIB, Backing::Anon).expect("small");
        let memory = ram.guest_memory();
        let address = kernel.initrd_address(Some(&initrd), 64 * MIB, false).expect("room");
        let setup =
            Setup { initrd: Some(&initrd), command_line: "console=ttyS0", memory_map: &memory_map, acpi: b"RSD" };
        kernel.load(memory, &setup, address).expect("loaded");
        let read = |at: u64, bytes: usize| {
            let mut buffer = vec![0; bytes];
            memory.read_slice(&mut buffer, GuestAddress(at)).expect("in RAM");
            buffer
        };
        let word = |at: u64| u64::from_le_bytes(read(at, 8).try_into().expect("eight"));
        assert_eq!(read(address, 5), b"files");
        assert_eq!(read(0x2_0000, 14), b"console=ttyS0\0");
        assert_eq!(read(map::ACPI_START, 3), b"RSD");
        match kernel.entry() {
            Entry::Long { address: entry } => {
                let payload: Vec<u8> = (0..16).collect();
                assert_eq!(read(entry - 0x200, 16), payload);
                assert_eq!(read(0x7202, 4), b"HdrS");
                assert_eq!((read(0x71e8, 1)[0] as usize, word(0x72d0)), (memory_map.len(), 0));
                assert_eq!(u64::from(word(0x7218) as u32), address);
            }
            Entry::Pvh { address: entry } => {
                assert_eq!(read(entry, 2), [0, 0]);
                assert_eq!(word(0x7000) as u32, 0x336e_c578);
                assert_eq!((word(0xc000), word(0xc008)), (address, 5));
                assert_eq!(word(0x7030) as u32 as usize, memory_map.len());
            }
        }
    }
}

#[test]
fn the_memory_map_tells_of_all_ram_and_of_the_shared_region() {
    let platform = 6 << 30..(6 << 30) + MIB;
    let map = map::e820(&[0..3 << 30, 4 << 30..6 << 30], platform.clone());
    let ram: u64 = map.iter().filter(|range| range.kind == Kind::Ram).map(|range| range.bytes).sum();
    assert!((5 << 30) - ram <= MIB, "all but a little below 1 MiB");
    let last = map.last().expect("not empty");
    assert_eq!((last.start..last.start + last.bytes, last.kind), (platform, Kind::Reserved));
    for pair in map.windows(2) {
        assert!(pair[0].start + pair[0].bytes <= pair[1].start, "{pair:?}");
    }
    assert!(map.iter().all(|range| !(map::HOLE_START..4 << 30).contains(&range.start)));
}

/// Sums of all bytes of all tables, reached as a kernel reaches them.
#[test]
fn acpi_tables_point_at_each_other_and_add_up() {
    let devices: Vec<_> = map::DEVICE_GSIS.iter().map(|gsi| acpi::Mmio { page: 0xd000_0000, gsi: *gsi }).collect();
    let bytes = acpi::tables(254, &devices);
    assert!(map::ACPI_START as usize + bytes.len() <= MIB as usize, "below 1 MiB");
    let at = |address: u64| &bytes[(address - map::ACPI_START) as usize..];
    let word = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight"));
    let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    let table = |address: u64| {
        let table = at(address);
        let length = u32::from_le_bytes(table[4..8].try_into().expect("four")) as usize;
        assert_eq!(sum(&table[..length]), 0, "{}", String::from_utf8_lossy(&table[..4]));
        &table[..length]
    };
    assert_eq!((&bytes[..8], sum(&bytes[..20]), sum(&bytes[..36])), (&b"RSD PTR "[..], 0, 0));
    let xsdt = table(word(&bytes, 24));
    let (fadt, madt) = (table(word(xsdt, 36)), table(word(xsdt, 44)));
    assert_eq!((&fadt[..4], &madt[..4]), (&b"FACP"[..], &b"APIC"[..]));
    assert_eq!(madt.len(), 44 + 254 * 8 + 12);
    let dsdt = table(word(fadt, 140));
    assert_eq!(&dsdt[..4], b"DSDT");
    let count = |what: &[u8]| dsdt.windows(what.len()).filter(|window| *window == what).count();
    assert_eq!((count(b"LNRO0005"), count(b"QEMU0001"), count(b"_S5_")), (devices.len(), 1, 1));
    let facs = at(u64::from(u32::from_le_bytes(fadt[36..40].try_into().expect("four"))));
    assert_eq!(&facs[..4], b"FACS");
}

#[test]
fn ours_and_theirs_have_errors_of_their_own() {
    assert!(matches!(Image::parse("x", b"MZ".to_vec()), Err(ImageError::Linux(_))));
    assert!(matches!(Image::parse("x", b"#!/bin/sh".to_vec()), Err(ImageError::Kernel(_))));
}

proptest! {
    #[test]
    fn no_bytes_make_the_parser_panic(
        at in 0usize..0x800,
        bytes in prop::collection::vec(any::<u8>(), 0..64),
        cut in 0usize..9000,
    ) {
        for mut image in [bzimage(|_| {}), vmlinux()] {
            let end = (at + bytes.len()).min(image.len());
            image[at..end].copy_from_slice(&bytes[..end - at]);
            image.truncate(cut);
            if let Ok(Image::Linux(kernel)) = Image::parse("x", image) {
                let _ = kernel.initrd_address(None, 64 << 20, false);
                let ram = GuestRam::new(64 << 20, Backing::Anon).expect("small");
                let setup = Setup { initrd: None, command_line: "x", memory_map: &[], acpi: &[] };
                let _ = kernel.load(ram.guest_memory(), &setup, 0);
            }
        }
    }
}
