//! Promises of the ELF parser, held against images built byte by byte: no toolchain is needed.

use super::*;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

/// One program header and the bytes it names.
#[derive(Clone)]
struct Part {
    kind: u32,
    flags: u32,
    address: u64,
    virtual_address: u64,
    data: Vec<u8>,
    file_bytes: u64,
    memory_bytes: u64,
    align: u64,
}

impl Part {
    fn load(flags: u32, address: u64, data: &[u8], memory_bytes: u64) -> Self {
        let file_bytes = data.len() as u64;
        Self {
            kind: 1,
            flags,
            address,
            virtual_address: address,
            data: data.into(),
            file_bytes,
            memory_bytes,
            align: 4,
        }
    }

    fn note(name: &[u8], kind: u32, desc: &[u8]) -> Self {
        Self::padded_note(name, kind, desc, 4)
    }

    fn padded_note(name: &[u8], kind: u32, desc: &[u8], align: usize) -> Self {
        let mut data = Vec::new();
        for word in [name.len() as u32 + 1, desc.len() as u32, kind] {
            data.extend(word.to_le_bytes());
        }
        for field in [[name, b"\0"].concat().as_slice(), desc] {
            data.extend(field);
            data.resize(data.len().next_multiple_of(align), 0);
        }
        let bytes = data.len() as u64;
        Self { kind: 4, align: align as u64, ..Self::load(4, 0, &data, bytes) }
    }
}

/// An image under construction; [`Image::good`] is one that is accepted.
#[derive(Clone)]
struct Image {
    machine: u16,
    kind: u16,
    entry: u64,
    parts: Vec<Part>,
    /// Name, address, size, type.
    symbols: Vec<(&'static str, u64, u64, u8)>,
}

const CODE: [u8; 32] = [0x90; 32];

impl Image {
    fn good() -> Self {
        Self {
            machine: 62,
            kind: 2,
            entry: 2 * MIB + 16,
            parts: vec![
                Part::load(5, 2 * MIB, &CODE, 32),
                Part::load(6, 5 * MIB, b"data", 3 * MIB),
                Part::note(b"llfree-vmm", 1, &ABI_VERSION.to_le_bytes()),
            ],
            symbols: vec![
                ("_start", 2 * MIB, 0, 0),
                ("_ZN4shim4main17h0123456789abcdefE", 2 * MIB + 8, 16, 2),
                ("counter", 5 * MIB, 4, 1),
            ],
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let headers = 64 + 56 * self.parts.len();
        let mut data = Vec::new();
        let mut programs = Vec::new();
        for part in &self.parts {
            programs.extend(part.kind.to_le_bytes());
            programs.extend(part.flags.to_le_bytes());
            let offset = (headers + data.len()) as u64;
            for word in [offset, part.virtual_address, part.address, part.file_bytes, part.memory_bytes, part.align] {
                programs.extend(word.to_le_bytes());
            }
            data.extend(&part.data);
            data.resize(data.len().next_multiple_of(8), 0);
        }

        let mut strings = vec![0];
        let mut symbols = vec![0; 24];
        for (name, address, bytes, kind) in &self.symbols {
            symbols.extend((strings.len() as u32).to_le_bytes());
            symbols.extend([*kind, 0, 1, 0]);
            symbols.extend(address.to_le_bytes());
            symbols.extend(bytes.to_le_bytes());
            strings.extend(name.bytes().chain([0]));
        }
        let symbols_at = (headers + data.len()) as u64;
        let strings_at = symbols_at + symbols.len() as u64;
        let sections_at = strings_at + strings.len() as u64;
        let section = |kind: u32, at: u64, bytes: usize, link: u32, entry: u64| {
            let mut section = Vec::new();
            for (low, high) in [(0, kind), (0, 0), (0, 0)] {
                section.extend(u32::to_le_bytes(low));
                section.extend(high.to_le_bytes());
            }
            for word in [at, bytes as u64, u64::from(link), 8, entry] {
                section.extend(word.to_le_bytes());
            }
            section
        };

        let mut image = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        image.extend(self.kind.to_le_bytes());
        image.extend(self.machine.to_le_bytes());
        image.extend(1_u32.to_le_bytes());
        for word in [self.entry, 64, sections_at] {
            image.extend(word.to_le_bytes());
        }
        image.extend(0_u32.to_le_bytes());
        for half in [64, 56, self.parts.len() as u16, 64, 3, 2] {
            image.extend(half.to_le_bytes());
        }
        image.extend(programs);
        image.extend(data);
        image.extend(&symbols);
        image.extend(&strings);
        image.extend([0; 64]);
        image.extend(section(2, symbols_at, symbols.len(), 2, 24));
        image.extend(section(3, strings_at, strings.len(), 0, 0));
        image
    }

    fn parse(&self) -> Result<Kernel, KernelError> {
        Kernel::parse("guest.elf", self.bytes())
    }
}

/// Asserts that the changed image is refused with one line that holds all `words`.
#[track_caller]
fn refused(change: impl FnOnce(&mut Image), words: &[&str]) {
    let mut image = Image::good();
    change(&mut image);
    refused_bytes(image.bytes(), words);
}

#[track_caller]
fn refused_bytes(bytes: Vec<u8>, words: &[&str]) {
    let text = Kernel::parse("guest.elf", bytes).expect_err("must be refused").to_string();
    assert!(text.starts_with("guest.elf: ") && !text.contains('\n'), "{text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
}

#[test]
fn a_good_image_loads_where_it_says() {
    let kernel = Image::good().parse().expect("good");
    assert_eq!(kernel.entry(), 2 * MIB + 16);
    assert_eq!(kernel.huge_frames(), 1..4);
    kernel.check_fits(8 * MIB).expect("ends there");

    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 16 << 20)]).expect("small");
    // Left over from an earlier run: must be gone.
    memory.write_slice(&[0xff; 6 << 20], GuestAddress(4 * MIB)).expect("in range");
    kernel.load(&memory).expect("fits");
    let mut code = [0; 32];
    memory.read_slice(&mut code, GuestAddress(2 * MIB)).expect("in range");
    assert_eq!(code, CODE);
    let mut data = vec![0; 3 << 20];
    memory.read_slice(&mut data, GuestAddress(5 * MIB)).expect("in range");
    assert_eq!(data[..4], *b"data");
    assert!(data[4..].iter().all(|byte| *byte == 0));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(8 * MIB)).expect("in range"), 0xff);
}

#[test]
fn addresses_have_readable_names() {
    let kernel = Image::good().parse().expect("good");
    let name = |offset| kernel.symbolize(2 * MIB + offset);
    assert_eq!(name(4).as_deref(), Some("_start+0x4"));
    assert_eq!(name(8 + 4).as_deref(), Some("shim::main+0x4"));
    assert_eq!(name(8 + 16).as_deref(), Some("_start+0x18"));
    assert_eq!(name(32), None);
    assert_eq!(kernel.symbolize(5 * MIB), None);
    assert_eq!(kernel.symbolize(0), None);
}

#[test]
fn names_of_a_hostile_image_are_fit_for_a_terminal() {
    let mut image = Image::good();
    image.symbols = vec![("\x1b]0;owned\x07\x1b[2J\u{202e}name\n", 2 * MIB, 0, 0)];
    let kernel = image.parse().expect("good");
    assert_eq!(kernel.symbolize(2 * MIB + 4).as_deref(), Some(" ]0;owned  [2Jname +0x4"));
}

#[test]
fn what_is_no_elf_is_refused() {
    refused_bytes(vec![], &["empty", "0 bytes"]);
    refused_bytes(b"#!/bin/sh\n".to_vec(), &["not an ELF file", "23 21 2f 62", "#!/b"]);
    refused_bytes(b"\x7fELF".to_vec(), &["header of 64 bytes", "has 4"]);
    let byte = |at: usize, value| {
        let mut bytes = Image::good().bytes();
        bytes[at] = value;
        bytes
    };
    refused_bytes(byte(4, 1), &["32-bit", "x86_64"]);
    refused_bytes(byte(4, 9), &["damaged"]);
    refused_bytes(byte(5, 2), &["big-endian"]);
    refused_bytes(Image::good().bytes()[..63].to_vec(), &["cut off", "has 63"]);
    refused_bytes(Image::good().bytes()[..70].to_vec(), &["program headers are damaged"]);
}

#[test]
fn another_kind_of_elf_is_named() {
    refused(|image| image.machine = 183, &["AArch64", "183", "62"]);
    refused(|image| image.machine = 9999, &["unknown machine", "9999"]);
    refused(|image| image.kind = 3, &["position-independent", "-no-pie"]);
    refused(|image| image.kind = 1, &["ELF type 1"]);
    refused(|image| image.parts = vec![image.parts[0].clone(); 65], &["65 program headers", "64"]);
}

#[test]
fn segments_must_make_sense() {
    refused(|image| _ = image.parts.drain(..2), &["no PT_LOAD"]);
    refused(|image| image.parts[1].address = 2 * MIB + 31, &["wants virtual 0x500000"]);
    let moved = |to: u64| {
        move |image: &mut Image| {
            image.parts[1].address = to;
            image.parts[1].virtual_address = to;
        }
    };
    refused(moved(2 * MIB + 31), &["0x200000..0x200020 and 0x20001f..0x50001f overlap"]);
    refused(moved(MIB), &["0x100000..0x400000", "below 0x200000"]);
    refused(moved(u64::MAX - 5), &["0xfffffffffffffffa", "0x400000000000"]);
    refused(moved(1 << 46), &["0x400000000000", "link it lower"]);
    refused(|image| image.parts[1].memory_bytes = 3, &["4 bytes in the file but 3 in memory"]);
    refused(|image| image.parts[1].file_bytes = 4000, &["truncated", "4000 bytes"]);
    refused(|image| image.parts[1].file_bytes = u64::MAX, &["truncated"]);
}

#[test]
fn the_entry_must_be_code() {
    refused(|image| image.entry = 0, &["entry 0x0"]);
    refused(|image| image.entry = 2 * MIB + 32, &["entry 0x200020", "not in an executable segment"]);
    refused(|image| image.entry = 5 * MIB, &["entry 0x500000"]);
}

#[test]
fn the_abi_version_must_be_ours() {
    refused(|image| _ = image.parts.pop(), &["no ABI note", "llfree-vmm"]);
    let note = |name: &[u8], kind, desc: &[u8]| Part::note(name, kind, desc);
    refused(|image| image.parts[2] = note(b"GNU", 1, &[1, 0, 0, 0]), &["no ABI note"]);
    refused(|image| image.parts[2] = note(b"llfree-vmm", 2, &[1, 0, 0, 0]), &["no ABI note"]);
    refused(|image| image.parts[2] = note(b"llfree-vmm", 1, &[1]), &["1 bytes", "4"]);
    refused(|image| image.parts[2] = note(b"llfree-vmm", 1, &[7, 0, 0, 0]), &["ABI version 7", "VMM speaks 2"]);
}

#[test]
fn the_note_is_found_whatever_its_segments_alignment() {
    for padding in [4, 8] {
        // After another note whose length shows the padding.
        let mut note = Part::padded_note(b"GNU", 5, &[0; 12], padding);
        let ours = Part::padded_note(b"llfree-vmm", 1, &ABI_VERSION.to_le_bytes(), padding);
        note.data.extend(ours.data);
        note.file_bytes = note.data.len() as u64;
        for align in [0, 1, 4, 8, 16, 4096] {
            let mut image = Image::good();
            image.parts[2] = Part { align, ..note.clone() };
            image.parse().unwrap_or_else(|error| panic!("padding {padding}, alignment {align}: {error}"));
        }
    }
}

#[test]
fn ram_must_hold_every_segment() {
    let kernel = Image::good().parse().expect("good");
    let text = kernel.check_fits(6 * MIB).expect_err("ends at 8 MiB").to_string();
    assert_eq!(
        text,
        "guest.elf: segment 0x500000..0x800000 lies outside the 0x600000 bytes of RAM: give more memory or \
         link it lower"
    );
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4 << 20)]).expect("small");
    assert!(matches!(kernel.load(&memory), Err(KernelError::Load { .. })));
}

#[test]
fn files_that_cannot_be_an_image_are_refused() {
    let folder = tempfile::tempdir().expect("scratch");
    let path = folder.path().join("guest.elf");
    let text = |path: &Path| Kernel::open(path).expect_err("must be refused").to_string();
    assert!(text(&path).contains("no such file"));
    assert!(text(folder.path()).contains("is a directory"));
    assert!(text(Path::new("/dev/zero")).contains("not a regular file"));
    let file = File::create(&path).expect("scratch");
    assert!(text(&path).contains("is empty"));
    file.set_len(MAX_IMAGE_BYTES + 1).expect("sparse");
    assert!(text(&path).contains("has 1073741825 bytes, but at most 1073741824"));
    std::fs::write(&path, Image::good().bytes()).expect("scratch");
    assert_eq!(Kernel::open(&path).expect("good").entry(), 2 * MIB + 16);
}

/// Whatever was accepted must also survive its use.
fn use_it(bytes: Vec<u8>, memory: &GuestMemoryMmap<()>) {
    let Ok(kernel) = Kernel::parse("hostile", bytes) else { return };
    assert!(!kernel.huge_frames().is_empty());
    for offset in [0, 8, 24, 31] {
        let _ = kernel.symbolize(kernel.entry().wrapping_add(offset));
    }
    if kernel.check_fits(16 * MIB).is_ok() {
        let _ = kernel.load(memory);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_images_never_panic(
        writes in prop::collection::vec(
            (any::<prop::sample::Index>(), prop_oneof![any::<u8>(), Just(0), Just(255)]),
            0..12,
        ),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 16 << 20)]).expect("small");
        let mut bytes = Image::good().bytes();
        for (at, value) in writes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        use_it(bytes, &memory);
    }

    #[test]
    fn random_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..1024), magic in any::<bool>()) {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 16 << 20)]).expect("small");
        if magic {
            let good = Image::good().bytes();
            let len = bytes.len().min(64);
            bytes[..len].copy_from_slice(&good[..len]);
        }
        use_it(bytes, &memory);
    }
}
