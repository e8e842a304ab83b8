//! [`KernelError`]: why an image is not a guest. One line each, for the person who named the file:
//! the file, the number found, the limit, the remedy.

use guest_abi::header::{NOTE_NAME, NOTE_TYPE};
use std::fmt;
use std::ops::Range;

/// The largest image that is read.
pub const MAX_IMAGE_BYTES: u64 = 1 << 30;

/// Why a guest image is refused. Every variant carries the file's name.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each field is named for what the message right above it says")]
pub enum KernelError {
    /// Nothing has this name.
    #[error("{name}: no such file: check the path, or build the guest first")]
    Missing { name: String },
    /// The system refused to read it.
    #[error("{name}: cannot be read: check its permissions")]
    Unreadable { name: String, source: std::io::Error },
    /// A directory.
    #[error("{name}: is a directory: name the ELF file in it")]
    Directory { name: String },
    /// A device, a pipe or a socket.
    #[error("{name}: is not a regular file: copy the image to one")]
    NotAFile { name: String },
    /// An empty file.
    #[error("{name}: is empty (0 bytes): build or copy it again")]
    Empty { name: String },
    /// More than is ever read.
    #[error("{name}: has {bytes} bytes, but at most {} are read: strip its debug information", MAX_IMAGE_BYTES)]
    TooLarge { name: String, bytes: u64 },
    /// The magic number is missing.
    #[error("{name}: is not an ELF file (it starts with {found}): give a static 64-bit ELF, or a Linux bzImage")]
    NotElf { name: String, found: Found },
    /// ELF class 1.
    #[error("{name}: is a 32-bit ELF: build it for 64-bit x86 (x86_64)")]
    Not64Bit { name: String },
    /// ELF data encoding 2.
    #[error("{name}: is a big-endian ELF: build it for x86_64")]
    BigEndian { name: String },
    /// An ELF that ends within its own header.
    #[error("{name}: its ELF header of 64 bytes is cut off or damaged (the file has {bytes}): build or copy it again")]
    Cut { name: String, bytes: u64 },
    /// For another CPU.
    #[error("{name}: is built for {} (ELF machine {machine}): build it for x86_64 (62)", machine_name(*machine))]
    Machine { name: String, machine: u16 },
    /// ET_DYN.
    #[error("{name}: is position-independent (PIE or a shared library), which is not supported: link it with -no-pie")]
    PositionIndependent { name: String },
    /// Neither ET_EXEC nor ET_DYN.
    #[error("{name}: is not an executable (ELF type {kind}, expected 2): link it as a static executable")]
    NotExecutable { name: String, kind: u16 },
    /// More program headers than any linker makes.
    #[error(
        "{name}: has {count} program headers, but at most {limit} are accepted: merge segments in its linker script"
    )]
    TooManyHeaders { name: String, count: u16, limit: u16 },
    /// Tables that point nowhere.
    #[error("{name}: its program headers are damaged: build or copy it again")]
    Malformed { name: String, source: object::read::Error },
    /// No PT_LOAD of more than 0 bytes.
    #[error("{name}: has nothing to load (no PT_LOAD segment): check its linker script")]
    NothingToLoad { name: String },
    /// The file ends before a segment does.
    #[error(
        "{name}: is truncated: a segment needs {file_bytes} bytes at offset {offset:#x}, but the file has {bytes}: \
         build or copy it again"
    )]
    Truncated { name: String, offset: u64, file_bytes: u64, bytes: u64 },
    /// A segment with more bytes in the file than in memory.
    #[error("{name}: segment at {start:#x} has {file_bytes} bytes in the file but {bytes} in memory: link it again")]
    FileLarger { name: String, start: u64, file_bytes: u64, bytes: u64 },
    /// Physical and virtual address differ.
    #[error(
        "{name}: segment at physical {start:#x} wants virtual {virtual_address:#x}, but guests run on an identity map: \
         drop AT() from its linker script"
    )]
    NotIdentity { name: String, start: u64, virtual_address: u64 },
    /// Addresses that no RAM can have.
    #[error(
        "{name}: segment at {start:#x} of {bytes:#x} bytes ends beyond {limit:#x}, the most RAM a guest can have: \
         link it lower"
    )]
    BeyondLimit { name: String, start: u64, bytes: u64, limit: u64 },
    /// In the frame that stays unmapped.
    #[error(
        "{name}: segment {segment} lies below {limit:#x}, which stays unmapped to catch null pointers: \
         link it at {limit:#x} or above"
    )]
    FirstFrame { name: String, segment: Place, limit: u64 },
    /// Two segments claim the same bytes.
    #[error("{name}: segments {lower} and {upper} overlap: check its linker script")]
    Overlap { name: String, lower: Place, upper: Place },
    /// The first instruction is not code.
    #[error("{name}: entry {entry:#x} is not in an executable segment: check ENTRY() in its linker script")]
    Entry { name: String, entry: u64 },
    /// Not one of our guests.
    #[error(
        "{name}: has no ABI note (PT_NOTE with name {NOTE_NAME:?}, type {NOTE_TYPE}), so it is not a guest of this \
         VMM: build it with guest-shim"
    )]
    NoNote { name: String },
    /// A note of the right name and the wrong size.
    #[error("{name}: its ABI note has {bytes} bytes instead of 4: build it again with guest-shim")]
    NoteSize { name: String, bytes: usize },
    /// Built against another ABI.
    #[error("{name}: speaks ABI version {found}, but this VMM speaks {needed}: build both from the same release")]
    AbiVersion { name: String, found: u32, needed: u32 },
    /// A segment that lies outside RAM of this size.
    #[error(
        "{name}: segment {segment} lies outside the {ram_bytes:#x} bytes of RAM: give more memory or link it lower"
    )]
    OutsideRam { name: String, segment: Place, ram_bytes: u64 },
    /// Copying failed.
    #[error("{name}: cannot be loaded into guest memory: give more memory or link it lower")]
    Load { name: String, source: linux_loader::loader::Error },
    /// Zeroing failed.
    #[error("{name}: its zeroed data at {address:#x} is outside guest memory: give more memory")]
    Zero { name: String, address: u64, source: vm_memory::GuestMemoryError },
}

/// An address range, shown in hex.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place(pub Range<u64>);

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.0.start, self.0.end)
    }
}

/// The first bytes of a file, shown in hex and, where they are letters, as such.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found(pub Vec<u8>);

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in &self.0 {
            write!(f, "{byte:02x} ")?;
        }
        write!(f, "({:?})", self.0.escape_ascii().to_string())
    }
}

fn machine_name(machine: u16) -> &'static str {
    match machine {
        3 => "32-bit x86",
        8 => "MIPS",
        20 => "PowerPC",
        21 => "64-bit PowerPC",
        22 => "s390",
        40 => "32-bit Arm",
        183 => "AArch64",
        243 => "RISC-V",
        247 => "BPF",
        258 => "LoongArch",
        _ => "an unknown machine",
    }
}
