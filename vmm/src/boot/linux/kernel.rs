//! [`LinuxKernel`]: a bzImage, or an ELF with a PVH entry, checked before it is loaded.
//!
//! Parsing is total, like that of our own guests: any bytes end in a kernel or in an error. The
//! copying is linux-loader's; the boot data for the kernel is put together here.

use super::error::LinuxError;
use super::map::{self, BOOT_PARAMS, COMMAND_LINE, COMMAND_LINE_BYTES, HIGH_MEMORY, PVH_MEMORY_MAP, PVH_MODULES};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::{Cmdline, KernelLoader, load_cmdline};
use llfree_base::units::Bytes;
use object::LittleEndian;
use object::elf::{FileHeader64, NoteType, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use shared_layout::FRAME_SIZE;
use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;
use vm_memory::{ByteValued, Bytes as _, GuestAddress, GuestMemoryMmap};

/// Where a bzImage says what it is.
const SETUP_HEADER: usize = 0x1f1;
/// `HdrS` at 0x202.
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// The first release of the boot protocol that describes 64-bit entries (Linux 3.8).
const PROTOCOL_2_12: u16 = 0x020c;
/// The flag in `xloadflags` for an entry in 64-bit mode, and where it is.
const KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
/// The flag in `loadflags` for a kernel above 1 MiB.
const LOADED_HIGH: u8 = 1;
/// A boot loader without a number of its own.
const UNKNOWN_LOADER: u8 = 0xff;
/// What a PVH kernel checks.
const PVH_MAGIC: u32 = 0x336e_c578;
/// The note with a PVH kernel's entry.
const PVH_NOTE: NoteType = NoteType(18);
/// Characters of a PVH kernel's command line: x86's `COMMAND_LINE_SIZE`, without the final zero.
const PVH_COMMAND_LINE: usize = 2047;
/// The largest initrd address that PVH kernels take.
const PVH_INITRD_MAX: u64 = 0x7fff_ffff;
/// Memory that a kernel needs in addition to its image to come up at all, in bytes.
const SLACK: u64 = 32 << 20;
/// The largest initrd that is read.
const MAX_INITRD: u64 = map::HOLE_START;

/// How a kernel is entered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// In 64-bit mode, with boot_params.
    Long {
        /// First instruction.
        address: u64,
    },
    /// In 32-bit mode without paging, with PVH start info.
    Pvh {
        /// First instruction.
        address: u64,
    },
}

/// A kernel that can be started.
#[derive(Debug)]
pub struct LinuxKernel {
    name: String,
    image: Vec<u8>,
    entry: Entry,
    /// First address past all memory that it uses before it has read its memory map.
    end: u64,
    initrd_max: u64,
    command_line_max: usize,
}

/// An initial RAM file system.
#[derive(Debug, Default)]
pub struct Initrd(Vec<u8>);

impl Initrd {
    /// Reads it.
    ///
    /// # Errors
    /// It does not exist, is not a file, is empty, or is larger than any guest could take.
    pub fn open(path: &Path) -> Result<Self, LinuxError> {
        let name = || path.display().to_string();
        let fail = |source| LinuxError::Initrd { path: name(), source };
        // Asked before opening: opening a FIFO would wait for its writer.
        let metadata = path.metadata().map_err(fail)?;
        let no = |what| Err(LinuxError::NoInitrd { path: name(), what });
        match metadata.len() {
            _ if !metadata.is_file() => return no("not a regular file"),
            0 => return no("empty"),
            bytes if bytes > MAX_INITRD => return no("larger than 3 GiB"),
            _ => {}
        }
        let mut bytes = Vec::new();
        File::open(path).and_then(|file| file.take(MAX_INITRD).read_to_end(&mut bytes)).map_err(fail)?;
        Ok(Self(bytes))
    }
}

/// What a kernel is loaded with.
#[derive(Debug)]
pub struct Setup<'a> {
    /// Its initial file system, if it has one.
    pub initrd: Option<&'a Initrd>,
    /// Its command line.
    pub command_line: &'a str,
    /// Its memory map.
    pub memory_map: &'a [map::Range],
    /// The ACPI tables, for [`map::ACPI_START`].
    pub acpi: &'a [u8],
}

impl LinuxKernel {
    /// Whether a file looks like a Linux kernel, whole or not.
    #[must_use]
    pub fn is_one(image: &[u8]) -> bool {
        is_bzimage(image) || pvh_entry(image).is_some() || is_linked_high(image)
    }

    /// Checks an image that [`is_one`](Self::is_one); `name` is what errors call it.
    ///
    /// # Errors
    /// What keeps it from being started.
    pub fn parse(name: &str, image: Vec<u8>) -> Result<Self, LinuxError> {
        if is_bzimage(&image) { Self::parse_bzimage(name, image) } else { Self::parse_pvh(name, image) }
    }

    fn parse_bzimage(name: &str, image: Vec<u8>) -> Result<Self, LinuxError> {
        let bytes = image.len() as u64;
        let cut = |needed| LinuxError::Cut { name: name.into(), format: "bzImage", bytes, needed };
        let header = setup_header(&image).ok_or_else(|| cut((SETUP_HEADER + size_of::<setup_header>()) as u64))?;
        let lacks = |lacks| LinuxError::TooOld { name: name.into(), lacks };
        if header.version < PROTOCOL_2_12 {
            return Err(lacks("boot protocol 2.12"));
        }
        if header.xloadflags & KERNEL_64 == 0 {
            return Err(lacks("a 64-bit entry"));
        }
        if header.loadflags & LOADED_HIGH == 0 || header.relocatable_kernel == 0 {
            return Err(lacks("the means to be loaded at 1 MiB"));
        }
        let sectors = match header.setup_sects {
            0 => 4,
            sectors => sectors,
        };
        let needed = (u64::from(sectors) + 1) * 512 + u64::from(header.syssize) * 16;
        if bytes < needed {
            return Err(cut(needed));
        }
        let (preferred, init_size) = (header.pref_address, u64::from(header.init_size));
        let end = preferred.max(HIGH_MEMORY).checked_add(init_size).filter(|end| *end < map::HOLE_START);
        let end = end.ok_or_else(|| LinuxError::Malformed {
            name: name.into(),
            what: format!("its header asks for {init_size} bytes from {preferred:#x} on"),
        })?;
        Ok(Self {
            name: name.into(),
            entry: Entry::Long { address: HIGH_MEMORY + ENTRY_64 },
            end: end.max(HIGH_MEMORY + bytes),
            initrd_max: header.initrd_addr_max.into(),
            command_line_max: (header.cmdline_size as usize).min(COMMAND_LINE_BYTES - 1),
            image,
        })
    }

    fn parse_pvh(name: &str, image: Vec<u8>) -> Result<Self, LinuxError> {
        let malformed = |what: String| LinuxError::Malformed { name: name.into(), what };
        let bytes = image.len() as u64;
        let header = FileHeader64::<LittleEndian>::parse(image.as_slice()).map_err(|e| malformed(e.to_string()))?;
        let programs = header.program_headers(LittleEndian, image.as_slice()).map_err(|e| malformed(e.to_string()))?;
        let mut end = 0;
        let mut segments = Vec::new();
        for program in programs.iter().filter(|program| program.p_type(LittleEndian) == PT_LOAD) {
            let (offset, in_file) = program.file_range(LittleEndian);
            let (start, in_memory) = (program.p_paddr(LittleEndian), program.p_memsz(LittleEndian));
            match offset.checked_add(in_file) {
                Some(needed) if needed <= bytes => {}
                Some(needed) => {
                    return Err(LinuxError::Cut { name: name.into(), format: "ELF kernel", bytes, needed });
                }
                None => return Err(malformed("a segment's offset lies past the end of any file".to_owned())),
            }
            let segment_end = start.checked_add(in_memory.max(in_file)).filter(|end| *end < map::HOLE_START);
            let Some(segment_end) = segment_end.filter(|_| start >= HIGH_MEMORY) else {
                return Err(malformed(format!("a segment lies at {start:#x}, outside 1 MiB to 3 GiB")));
            };
            segments.push(start..segment_end);
            end = end.max(segment_end);
        }
        // Last: of a file that was cut, the note may be what is missing.
        let address = pvh_entry(&image).ok_or_else(|| {
            malformed("it has no PVH entry; use its bzImage (vmlinuz), or build it with CONFIG_PVH".to_owned())
        })?;
        if !segments.iter().any(|segment| segment.contains(&address)) {
            return Err(malformed(format!("its PVH entry {address:#x} is not in any segment")));
        }
        Ok(Self {
            name: name.into(),
            entry: Entry::Pvh { address },
            end,
            initrd_max: PVH_INITRD_MAX,
            command_line_max: PVH_COMMAND_LINE,
            image,
        })
    }

    /// What is still needed of it once it is in guest memory: all but the image.
    #[must_use]
    pub fn without_image(&self) -> Self {
        Self { name: self.name.clone(), image: Vec::new(), ..*self }
    }

    /// Its name in errors.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How it is entered.
    #[must_use]
    pub fn entry(&self) -> Entry {
        self.entry
    }

    /// Checks a command line.
    ///
    /// # Errors
    /// It is too long for this kernel, or not a valid command line.
    pub fn check_command_line(&self, line: &str) -> Result<(), LinuxError> {
        match line.len() {
            bytes if bytes > self.command_line_max => {
                Err(LinuxError::CommandLineLength { bytes, limit: self.command_line_max })
            }
            _ => command_line(line).map(drop),
        }
    }

    /// Where an initrd goes, at the upper end of `low` bytes of low memory; 0 without one.
    ///
    /// # Errors
    /// How much more memory is needed: below 3 GiB, or in virtio-mem's boot part, if `is_boot_part`; or
    /// that no memory would be enough.
    pub fn initrd_address(&self, initrd: Option<&Initrd>, low: u64, is_boot_part: bool) -> Result<u64, LinuxError> {
        let bytes = initrd.map_or(0, |initrd| initrd.0.len() as u64);
        let needed = (self.end + bytes + SLACK).next_multiple_of(2 << 20);
        let initrd_end = self.initrd_max.saturating_add(1);
        let limit = (map::HOLE_START - SLACK).min(initrd_end.saturating_sub(FRAME_SIZE));
        let limit = limit.saturating_sub(self.end) & !(FRAME_SIZE - 1);
        if bytes > limit {
            return Err(LinuxError::InitrdTooLarge { name: self.name.clone(), bytes, limit: Bytes(limit) });
        }
        let top = low.min(initrd_end);
        if low < needed {
            let (name, needed, memory) = (self.name.clone(), Bytes(needed), Bytes(low));
            return Err(match is_boot_part {
                true => LinuxError::BootTooSmall { name, needed, memory },
                false => LinuxError::TooSmall { name, needed, memory },
            });
        }
        Ok(if bytes == 0 { 0 } else { (top - bytes) & !(FRAME_SIZE - 1) })
    }

    /// The addresses that [`load`](Self::load) writes to, each range in one part of RAM.
    #[must_use]
    pub fn loaded(&self, initrd: Option<&Initrd>, initrd_address: u64) -> Vec<std::ops::Range<u64>> {
        let image_end = match self.entry {
            Entry::Long { .. } => HIGH_MEMORY + self.image.len() as u64,
            Entry::Pvh { .. } => self.end,
        };
        let initrd = initrd.map(|initrd| initrd_address..initrd_address + initrd.0.len() as u64);
        std::iter::once(0..image_end).chain(initrd).collect()
    }

    /// Copies the kernel and its boot data into `memory`, the initrd to `initrd_address`.
    ///
    /// # Errors
    /// Something does not fit, or the command line is not valid.
    pub fn load(&self, memory: &GuestMemoryMmap<()>, setup: &Setup<'_>, initrd_address: u64) -> Result<(), LinuxError> {
        let mut image = Cursor::new(self.image.as_slice());
        let line = command_line(setup.command_line)?;
        load_cmdline(memory, GuestAddress(COMMAND_LINE), &line).map_err(LinuxError::Load)?;
        memory.write_slice(setup.acpi, GuestAddress(map::ACPI_START))?;
        let initrd = setup.initrd.map_or(&[][..], |initrd| &initrd.0);
        memory.write_slice(initrd, GuestAddress(initrd_address))?;
        let unplaced = |error: linux_loader::configurator::Error| LinuxError::Malformed {
            name: self.name.clone(),
            what: error.to_string(),
        };
        match self.entry {
            Entry::Long { .. } => {
                BzImage::load(memory, Some(GuestAddress(HIGH_MEMORY)), &mut image, None).map_err(LinuxError::Load)?;
                let mut params =
                    boot_params { hdr: setup_header(&self.image).unwrap_or_default(), ..Default::default() };
                params.hdr.type_of_loader = UNKNOWN_LOADER;
                params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
                // Both below 3 GiB.
                params.hdr.ramdisk_image = initrd_address as u32;
                params.hdr.ramdisk_size = initrd.len() as u32;
                params.acpi_rsdp_addr = map::ACPI_START;
                for (entry, range) in params.e820_table.iter_mut().zip(setup.memory_map) {
                    *entry = boot_e820_entry { addr: range.start, size: range.bytes, r#type: range.kind as u32 };
                }
                // Six at most; there is room for 128.
                params.e820_entries = setup.memory_map.len() as u8;
                let params = BootParams::new(&params, GuestAddress(BOOT_PARAMS));
                LinuxBootConfigurator::write_bootparams(&params, memory).map_err(unplaced)
            }
            Entry::Pvh { .. } => {
                Elf::load(memory, None, &mut image, None).map_err(LinuxError::Load)?;
                let modules: Vec<hvm_modlist_entry> = setup
                    .initrd
                    .map(|initrd| hvm_modlist_entry {
                        paddr: initrd_address,
                        size: initrd.0.len() as u64,
                        ..Default::default()
                    })
                    .into_iter()
                    .collect();
                let memory_map: Vec<hvm_memmap_table_entry> = setup
                    .memory_map
                    .iter()
                    .map(|range| hvm_memmap_table_entry {
                        addr: range.start,
                        size: range.bytes,
                        type_: range.kind as u32,
                        reserved: 0,
                    })
                    .collect();
                let info = hvm_start_info {
                    magic: PVH_MAGIC,
                    version: 1,
                    cmdline_paddr: COMMAND_LINE,
                    rsdp_paddr: map::ACPI_START,
                    nr_modules: modules.len() as u32,
                    modlist_paddr: if modules.is_empty() { 0 } else { PVH_MODULES },
                    memmap_paddr: PVH_MEMORY_MAP,
                    memmap_entries: memory_map.len() as u32,
                    ..Default::default()
                };
                let mut params = BootParams::new(&info, GuestAddress(BOOT_PARAMS));
                params.set_sections(&memory_map, GuestAddress(PVH_MEMORY_MAP));
                if !modules.is_empty() {
                    params.set_modules(&modules, GuestAddress(PVH_MODULES));
                }
                PvhBootConfigurator::write_bootparams(&params, memory).map_err(unplaced)
            }
        }
    }
}

fn command_line(text: &str) -> Result<Cmdline, LinuxError> {
    let none = |source| LinuxError::CommandLine { source };
    let mut line = Cmdline::new(COMMAND_LINE_BYTES).map_err(none)?;
    line.insert_str(text).map_err(none)?;
    Ok(line)
}

/// A bzImage, though perhaps cut: it has the magic of its header, or only the end of a boot sector.
fn is_bzimage(image: &[u8]) -> bool {
    match image.get(0x202..0x206) {
        Some(magic) => magic == MAGIC.to_le_bytes(),
        // EFI stubs begin like a DOS program.
        None => image.starts_with(b"MZ"),
    }
}

fn setup_header(image: &[u8]) -> Option<setup_header> {
    let mut header = setup_header::default();
    let bytes = image.get(SETUP_HEADER..)?.get(..size_of::<setup_header>())?;
    header.as_mut_slice().copy_from_slice(bytes);
    Some(header)
}

/// Whether an ELF is linked to where Linux runs, and none of our guests can.
fn is_linked_high(image: &[u8]) -> bool {
    const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
    let Ok(header) = FileHeader64::<LittleEndian>::parse(image) else { return false };
    let Ok(programs) = header.program_headers(LittleEndian, image) else { return false };
    programs
        .iter()
        .any(|program| program.p_type(LittleEndian) == PT_LOAD && program.p_vaddr(LittleEndian) >= KERNEL_MAP)
}

/// The entry that an ELF's PVH note names.
fn pvh_entry(image: &[u8]) -> Option<u64> {
    let header = FileHeader64::<LittleEndian>::parse(image).ok()?;
    let programs = header.program_headers(LittleEndian, image).ok()?;
    programs.iter().take(64).filter_map(|program| program.notes(LittleEndian, image).ok()?).find_map(|mut notes| {
        while let Ok(Some(note)) = notes.next() {
            if note.name() == b"Xen" && note.n_type(LittleEndian) == PVH_NOTE {
                let entry = note.desc().get(..4)?;
                return Some(u64::from(u32::from_le_bytes(entry.try_into().ok()?)));
            }
        }
        None
    })
}
