//! [`Kernel`]: a guest image, checked before it is loaded and asked for symbols when it crashes.
//!
//! [`Kernel::parse`] makes every check that needs no RAM, so that a bad image costs nothing and
//! gets one clear line; later steps rely on those checks. Parsing is total: any bytes end in a
//! kernel or in a [`KernelError`], after work bounded by the size of the file.

mod error;
#[cfg(test)]
mod tests;

pub use error::{Found, KernelError, MAX_IMAGE_BYTES, Place};

use guest_abi::header::{ABI_VERSION, NOTE_NAME, NOTE_TYPE};
use linux_loader::loader::{KernelLoader, elf::Elf};
use llfree_base::printable;
use object::LittleEndian;
use object::elf::{self, FileHeader64, ProgramHeader64};
use object::read::elf::{FileHeader, NoteIterator, ProgramHeader, Sym};
use rustc_demangle::demangle;
use shared_layout::HUGE_SIZE;
use shared_layout::table::MAX_HUGE_FRAMES;
use std::fs::File;
use std::io::{Cursor, Read};
use std::ops::Range;
use std::path::Path;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The most program headers of one image: a linker makes about ten.
const MAX_PROGRAM_HEADERS: u16 = 64;
/// The most bytes of one note segment: a compiler makes less than a hundred.
const MAX_NOTE_BYTES: u64 = 64 << 10;
/// How many bytes of a symbol's name are shown; mangled names of generic code run long.
const MAX_NAME_BYTES: usize = 512;

type Header = FileHeader64<LittleEndian>;

/// A static, position-dependent x86-64 ELF that speaks our ABI.
#[derive(Debug)]
pub struct Kernel {
    name: String,
    image: Vec<u8>,
    entry: u64,
    /// By address, not empty, without overlap.
    segments: Vec<Segment>,
}

#[derive(Clone, Debug)]
struct Segment {
    memory: Range<u64>,
    file_bytes: u64,
    executable: bool,
}

impl Kernel {
    /// Reads and parses the image at `path`.
    ///
    /// # Errors
    /// It cannot be read, or [`Kernel::parse`] refuses it.
    pub fn open(path: &Path) -> Result<Self, KernelError> {
        let (name, image) = read_image(path)?;
        Self::parse(&name, image)
    }

    /// Checks an image; `name` is what errors call it.
    ///
    /// # Errors
    /// The first thing that keeps it from running as a guest.
    pub fn parse(name: &str, image: Vec<u8>) -> Result<Self, KernelError> {
        let header = file_header(name, &image)?;
        let programs = header
            .program_headers(LittleEndian, image.as_slice())
            .map_err(|source| KernelError::Malformed { name: name.into(), source })?;
        let segments = segments(name, &image, programs)?;
        let entry = header.e_entry.get(LittleEndian);
        if !segments.iter().any(|segment| segment.executable && segment.memory.contains(&entry)) {
            return Err(KernelError::Entry { name: name.into(), entry });
        }
        check_note(name, &image, programs)?;
        Ok(Self { name: name.into(), entry, segments, image })
    }

    /// Checks that every segment lies in RAM.
    ///
    /// # Errors
    /// The segment that does not.
    pub fn check_fits(&self, ram_bytes: u64) -> Result<(), KernelError> {
        match self.segments.iter().find(|segment| segment.memory.end > ram_bytes) {
            Some(segment) => Err(self.outside_ram(segment, ram_bytes)),
            None => Ok(()),
        }
    }

    /// From the first to the last byte of all segments.
    #[must_use]
    pub fn bytes(&self) -> Range<u64> {
        let first = self.segments.first().map_or(0, |segment| segment.memory.start);
        first..self.segments.last().map_or(first, |segment| segment.memory.end)
    }

    /// The huge frames that they lie in.
    #[must_use]
    pub fn huge_frames(&self) -> Range<u32> {
        let bytes = self.bytes();
        // Addresses are below MAX_HUGE_FRAMES huge frames, so the numbers fit.
        (bytes.start / HUGE_SIZE) as u32..bytes.end.div_ceil(HUGE_SIZE) as u32
    }

    /// Copies the segments into guest memory, which must be there already, and zeroes what an
    /// image leaves out of its file (.bss).
    ///
    /// # Errors
    /// A segment outside `memory`.
    pub fn load(&self, memory: &GuestMemoryMmap<()>) -> Result<(), KernelError> {
        Elf::load(memory, None, &mut Cursor::new(&self.image), None)
            .map_err(|source| KernelError::Load { name: self.name.clone(), source })?;
        let zeroes = vec![0; HUGE_SIZE as usize];
        for segment in &self.segments {
            let bss = segment.memory.start + segment.file_bytes..segment.memory.end;
            for address in bss.clone().step_by(zeroes.len()) {
                let bytes = (bss.end - address).min(HUGE_SIZE) as usize;
                memory.write_slice(&zeroes[..bytes], GuestAddress(address)).map_err(|source| KernelError::Zero {
                    name: self.name.clone(),
                    address,
                    source,
                })?;
            }
        }
        Ok(())
    }

    /// Its name in errors.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Guest-physical (and virtual) address of the first instruction.
    #[must_use]
    pub fn entry(&self) -> u64 {
        self.entry
    }

    /// The function at a code address as `name+0x12`; `None` outside code or without symbols.
    #[must_use]
    pub fn symbolize(&self, address: u64) -> Option<String> {
        let in_code = |address| self.segments.iter().any(|s| s.executable && s.memory.contains(&address));
        if !in_code(address) {
            return None;
        }
        // Crashes are rare: the table is searched in the image instead of being kept sorted.
        let data = self.image.as_slice();
        let sections = Header::parse(data).ok()?.sections(LittleEndian, data).ok()?;
        let symbols = sections.symbols(LittleEndian, data, elf::SHT_SYMTAB).ok()?;
        let best = symbols
            .iter()
            .filter(|symbol| {
                let (start, bytes) = (symbol.st_value(LittleEndian), symbol.st_size(LittleEndian));
                // Labels in assembly have neither type nor size.
                matches!(symbol.st_type(), elf::STT_FUNC | elf::STT_NOTYPE)
                    && symbol.st_name(LittleEndian) != 0
                    && start <= address
                    && (bytes == 0 || address - start < bytes)
                    && in_code(start)
            })
            .max_by_key(|symbol| (symbol.st_value(LittleEndian), symbol.st_size(LittleEndian) != 0))?;
        let name = symbols.symbol_name(LittleEndian, best).ok()?;
        let name = String::from_utf8_lossy(&name[..name.len().min(MAX_NAME_BYTES)]);
        let name = printable(&format!("{:#}", demangle(&name)));
        Some(format!("{name}+{:#x}", address - best.st_value(LittleEndian)))
    }

    fn outside_ram(&self, segment: &Segment, ram_bytes: u64) -> KernelError {
        KernelError::OutsideRam { name: self.name.clone(), segment: Place(segment.memory.clone()), ram_bytes }
    }
}

/// Reads an image, whatever it is: what errors call it, and its bytes.
///
/// # Errors
/// It cannot be read.
pub(super) fn read_image(path: &Path) -> Result<(String, Vec<u8>), KernelError> {
    let name = path.display().to_string();
    let fail = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound => KernelError::Missing { name: name.clone() },
        _ => KernelError::Unreadable { name: name.clone(), source },
    };
    // Ask before opening: opening a FIFO would wait for its writer.
    let metadata = path.metadata().map_err(fail)?;
    if metadata.is_dir() {
        return Err(KernelError::Directory { name });
    }
    if !metadata.is_file() {
        return Err(KernelError::NotAFile { name });
    }
    let bytes = metadata.len();
    if bytes > MAX_IMAGE_BYTES {
        return Err(KernelError::TooLarge { name, bytes });
    }
    let mut image = Vec::new();
    // A file that grows meanwhile is read up to the limit and judged by that.
    File::open(path).and_then(|file| file.take(MAX_IMAGE_BYTES).read_to_end(&mut image)).map_err(fail)?;
    Ok((name, image))
}

/// The file header, if it is one of a static x86-64 program.
fn file_header<'a>(name: &str, image: &'a [u8]) -> Result<&'a Header, KernelError> {
    let name = || name.to_owned();
    if image.is_empty() {
        return Err(KernelError::Empty { name: name() });
    }
    if !image.starts_with(&elf::ELFMAG) {
        return Err(KernelError::NotElf { name: name(), found: Found(image[..image.len().min(4)].to_vec()) });
    }
    // Class and byte order come first: they say how to read the rest.
    match image.get(4) {
        Some(2) => {}
        Some(1) => return Err(KernelError::Not64Bit { name: name() }),
        _ => return Err(KernelError::Cut { name: name(), bytes: image.len() as u64 }),
    }
    if image.get(5) == Some(&2) {
        return Err(KernelError::BigEndian { name: name() });
    }
    let Ok(header) = Header::parse(image) else {
        return Err(KernelError::Cut { name: name(), bytes: image.len() as u64 });
    };
    let machine = header.e_machine.get(LittleEndian);
    if machine != elf::EM_X86_64 {
        return Err(KernelError::Machine { name: name(), machine: machine.0 });
    }
    match header.e_type.get(LittleEndian) {
        elf::ET_EXEC => {}
        elf::ET_DYN => return Err(KernelError::PositionIndependent { name: name() }),
        other => return Err(KernelError::NotExecutable { name: name(), kind: other.0 }),
    }
    let count = header.e_phnum.get(LittleEndian);
    if count > MAX_PROGRAM_HEADERS {
        return Err(KernelError::TooManyHeaders { name: name(), count, limit: MAX_PROGRAM_HEADERS });
    }
    Ok(header)
}

/// The segments to load, by address, each checked alone and against its neighbour.
fn segments(name: &str, image: &[u8], programs: &[ProgramHeader64<LittleEndian>]) -> Result<Vec<Segment>, KernelError> {
    const LIMIT: u64 = MAX_HUGE_FRAMES as u64 * HUGE_SIZE;
    let name = || name.to_owned();
    let mut segments = Vec::new();
    for program in programs {
        let kind = program.p_type(LittleEndian);
        if kind != elf::PT_LOAD && kind != elf::PT_NOTE {
            continue;
        }
        let (offset, file_bytes) = program.file_range(LittleEndian);
        if offset.checked_add(file_bytes).is_none_or(|end| end > image.len() as u64) {
            return Err(KernelError::Truncated { name: name(), offset, file_bytes, bytes: image.len() as u64 });
        }
        let (start, bytes) = (program.p_paddr(LittleEndian), program.p_memsz(LittleEndian));
        if kind == elf::PT_NOTE || bytes == 0 && file_bytes == 0 {
            continue;
        }
        if file_bytes > bytes {
            return Err(KernelError::FileLarger { name: name(), start, file_bytes, bytes });
        }
        let virtual_address = program.p_vaddr(LittleEndian);
        if virtual_address != start {
            return Err(KernelError::NotIdentity { name: name(), start, virtual_address });
        }
        let Some(end) = start.checked_add(bytes).filter(|end| *end <= LIMIT) else {
            return Err(KernelError::BeyondLimit { name: name(), start, bytes, limit: LIMIT });
        };
        if start < HUGE_SIZE {
            return Err(KernelError::FirstFrame { name: name(), segment: Place(start..end), limit: HUGE_SIZE });
        }
        let executable = program.p_flags(LittleEndian).0 & elf::PF_X.0 != 0;
        segments.push(Segment { memory: start..end, file_bytes, executable });
    }
    if segments.is_empty() {
        return Err(KernelError::NothingToLoad { name: name() });
    }
    segments.sort_by_key(|segment| segment.memory.start);
    for pair in segments.windows(2) {
        let [lower, upper] = [&pair[0].memory, &pair[1].memory];
        if lower.end > upper.start {
            let (lower, upper) = (Place(lower.clone()), Place(upper.clone()));
            return Err(KernelError::Overlap { name: name(), lower, upper });
        }
    }
    Ok(segments)
}

/// Checks that the image states our ABI version, in a note of one u32.
fn check_note(name: &str, image: &[u8], programs: &[ProgramHeader64<LittleEndian>]) -> Result<(), KernelError> {
    // Notes are padded to 4 bytes or to 8. The segment's alignment should say to which, but may be
    // larger for another reason; so both are tried. With ours alone both give the same.
    let notes = programs
        .iter()
        .filter(|program| program.p_type(LittleEndian) == elf::PT_NOTE)
        .filter(|program| program.p_filesz(LittleEndian) <= MAX_NOTE_BYTES)
        .filter_map(|program| program.data(LittleEndian, image).ok())
        .flat_map(|data| [4, 8].map(|align| NoteIterator::<Header>::new(LittleEndian, align, data)))
        .filter_map(Result::ok)
        .flatten()
        .filter_map(Result::ok);
    for note in notes {
        if note.name() != NOTE_NAME.as_bytes() || note.n_type(LittleEndian).0 != NOTE_TYPE {
            continue;
        }
        let Ok(version) = <[u8; 4]>::try_from(note.desc()) else {
            return Err(KernelError::NoteSize { name: name.into(), bytes: note.desc().len() });
        };
        let found = u32::from_le_bytes(version);
        if found != ABI_VERSION {
            return Err(KernelError::AbiVersion { name: name.into(), found, needed: ABI_VERSION });
        }
        return Ok(());
    }
    Err(KernelError::NoNote { name: name.into() })
}
