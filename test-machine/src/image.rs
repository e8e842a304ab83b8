//! Guest images made byte by byte, so that a test can run any few instructions as a guest.
//!
//! A guest starts in ring 3 with RDI at the header and RSI its vCPU's number; the code made here
//! is for one vCPU, whose mailbox is the first.

use guest_abi::header::{ABI_VERSION, HEADER_BYTES, Header, NOTE_NAME, NOTE_TYPE};
use guest_abi::{Call, mailbox};

/// The address of the code: the lowest address a guest may use.
pub const BASE: u64 = 0x20_0000;

/// `ud2`.
pub const UD2: &[u8] = &[0x0f, 0x0b];
/// `hlt`.
pub const HLT: &[u8] = &[0xf4];
/// `jmp $`.
pub const LOOP: &[u8] = &[0xeb, 0xfe];
/// `xor eax, eax; mov rax, [rax]`.
pub const NULL_READ: &[u8] = &[0x31, 0xc0, 0x48, 0x8b, 0x00];
/// `nop`.
pub const NOP: &[u8] = &[0x90];

/// Code that fills the mailbox's request words and rings the doorbell.
pub fn call(call: Call, words: &[u64]) -> Vec<u8> {
    let mut code = Vec::new();
    for (index, word) in words.iter().enumerate() {
        code.extend([0x48, 0xb8]); // mov rax, word
        code.extend(word.to_le_bytes());
        code.extend([0x48, 0x89, 0x87]); // mov [rdi + offset], rax
        code.extend((HEADER_BYTES as u32 + index as u32 * 8).to_le_bytes());
    }
    code.extend(ring(call as u8));
    code
}

/// Code that rings the doorbell at an offset of its page.
pub fn ring(offset: u8) -> Vec<u8> {
    // mov rax, [rdi + doorbell_gpa]; mov [rax + offset], eax
    vec![0x48, 0x8b, 0x47, std::mem::offset_of!(Header, doorbell_gpa) as u8, 0x89, 0x40, offset]
}

/// Code that rings the doorbell with a text.
pub fn say(how: Call, text: &str) -> Vec<u8> {
    call(how, &mailbox::pack_text(text))
}

/// Code that states our ABI, as a good guest does first.
pub fn hello() -> Vec<u8> {
    call(Call::Hello, &[ABI_VERSION.into()])
}

/// An ELF file; what is public may be spoilt.
#[derive(Clone)]
pub struct Image {
    /// ELF class: 2 is 64-bit.
    pub class: u8,
    /// 2 is a static executable.
    pub kind: u16,
    /// 62 is x86-64.
    pub machine: u16,
    /// The address at which the code is loaded and starts.
    pub address: u64,
    /// Bytes of memory that the segment takes, if more than the code.
    pub memory_bytes: u64,
    /// ABI version in the note.
    pub abi: Option<u32>,
    /// Name and offset in the code.
    pub symbols: Vec<(&'static str, u64)>,
    /// Machine code, from the entry on.
    pub code: Vec<u8>,
    /// A second segment with the same code.
    pub again_at: Option<u64>,
}

impl Image {
    /// An image that is accepted and runs this code.
    pub fn new(code: &[&[u8]]) -> Self {
        Self {
            class: 2,
            kind: 2,
            machine: 62,
            address: BASE,
            memory_bytes: 0,
            abi: Some(ABI_VERSION),
            symbols: Vec::new(),
            code: code.concat(),
            again_at: None,
        }
    }

    /// The file's bytes: header, program headers, code, note, symbols, their names, sections.
    pub fn bytes(&self) -> Vec<u8> {
        const HEADERS: u64 = 64 + 3 * 56;
        let mut data = self.code.clone();
        data.resize(data.len().next_multiple_of(8), 0x90);
        let note_at = HEADERS + data.len() as u64;
        let note = self.abi.map(note).unwrap_or_default();
        data.extend(&note);
        data.resize(data.len().next_multiple_of(8), 0);

        let (mut strings, mut symbols) = (vec![0], vec![0; 24]);
        for (name, offset) in &self.symbols {
            symbols.extend((strings.len() as u32).to_le_bytes());
            symbols.extend([2, 0, 1, 0]);
            symbols.extend((self.address + offset).to_le_bytes());
            symbols.extend(0_u64.to_le_bytes());
            strings.extend(name.bytes().chain([0]));
        }
        strings.resize(strings.len().next_multiple_of(8), 0);
        let symbols_at = HEADERS + data.len() as u64;
        let strings_at = symbols_at + symbols.len() as u64;
        let sections_at = strings_at + strings.len() as u64;

        let mut image = vec![0x7f, b'E', b'L', b'F', self.class, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        for half in [self.kind, self.machine] {
            image.extend(half.to_le_bytes());
        }
        image.extend(1_u32.to_le_bytes());
        for word in [self.address, 64, sections_at] {
            image.extend(word.to_le_bytes());
        }
        image.extend(0_u32.to_le_bytes());
        for half in [64_u16, 56, 3, 64, 3, 2] {
            image.extend(half.to_le_bytes());
        }
        let code_bytes = self.code.len() as u64;
        let second = self.again_at.map_or([0; 3], |address| [address, code_bytes, code_bytes]);
        for (kind, flags, at, [address, file_bytes, bytes]) in [
            (1_u32, 5_u32, HEADERS, [self.address, code_bytes, self.memory_bytes.max(code_bytes)]),
            (u32::from(self.again_at.is_some()), 5, HEADERS, second),
            (4, 4, note_at, [0, note.len() as u64, note.len() as u64]),
        ] {
            image.extend(kind.to_le_bytes());
            image.extend(flags.to_le_bytes());
            for word in [at, address, address, file_bytes, bytes, 4] {
                image.extend(word.to_le_bytes());
            }
        }
        image.extend(data);
        image.extend(&symbols);
        image.extend(&strings);
        image.extend([0; 64]);
        for (kind, at, bytes, link, entry) in
            [(2_u32, symbols_at, symbols.len(), 2_u32, 24_u64), (3, strings_at, strings.len(), 0, 0)]
        {
            image.extend(0_u32.to_le_bytes());
            image.extend(kind.to_le_bytes());
            image.extend([0; 16]);
            for word in [at, bytes as u64, u64::from(link), 8, entry] {
                image.extend(word.to_le_bytes());
            }
        }
        image
    }
}

fn note(abi: u32) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [NOTE_NAME.len() as u32 + 1, 4, NOTE_TYPE] {
        note.extend(word.to_le_bytes());
    }
    note.extend(NOTE_NAME.bytes().chain([0]));
    note.resize(note.len().next_multiple_of(4), 0);
    note.extend(abi.to_le_bytes());
    note
}
