//! [`NamedFile`]: table and memory of an area in one file, which outlives its process.
//!
//! All parts follow from the number of huge frames, and the header names each of them, so that a file of another make is told
//! from ours before a byte of it is changed:
//!
//! ```text
//! +-----------------------------+-------------------------+---------+--------+-------------------------+
//! | magic, version, shape |     | region of llfree, with  | marks   | unused | memory, from a multiple |
//! | root, boot, synced          | the table in it         | 1 B/2 M | a page | of 2 MiB on             |
//! | 4 KiB                       | llfree::persist         |         |        |                         |
//! +-----------------------------+-------------------------+---------+--------+-------------------------+
//! ```
//!
//! What a process stores reaches the file's pages however it ends; whether they reached the disk when the machine went down
//! nobody can tell. So the header says on which boot the file was open last, and whether it was on the disk when
//! it was closed. A lock on the file keeps everybody else out while it is open. Who may write to the file can harm its user, by a cut as
//! by a store: it is made for its user alone.

use crate::error::AreaError;
use crate::file_error::{FileError, FileFault};
use llfree::persist::{self, Persistent};
use llfree::{Initial, Leaks, Recovery, WriteBack};
use llfree_monitor::Region;
use llfree_monitor::memory::GuestRam;
use rustix::fs::{AtFlags, CWD, FallocateFlags, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use shared_layout::{FRAME_SIZE, HUGE_SIZE, TableLayout};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::{FileOffset, MmapRegion};

/// `"LLFRAREA"` in memory order.
pub const MAGIC: u64 = u64::from_le_bytes(*b"LLFRAREA");
/// Version of the file. Raised whenever a program with the old number would misread it; the region in it has a version of its own.
pub const VERSION: u32 = 2;

const HEADER_BYTES: usize = 4096;
const WORDS: usize = HEADER_BYTES / 8;
// Fixed once the file is made: the magic, version and bytes of the header, huge frames, and where the parts lie.
const W_MAGIC: usize = 0;
const W_VERSION: usize = 1;
const W_HUGE_FRAMES: usize = 2;
const SHAPE: usize = 7;
// These change.
const W_ROOT: usize = 8;
const W_BOOT: [usize; 2] = [9, 10];
const W_SYNCED: usize = 11;
/// Of a header that nobody knows more of.
const RESERVED: [std::ops::Range<usize>; 2] = [SHAPE..W_ROOT, W_SYNCED + 1..WORDS];

/// Where the parts of a file lie.
#[derive(Clone, Copy, Debug)]
struct Shape {
    /// Counted from the start of the file.
    layout: TableLayout,
    region_bytes: usize,
    marks_at: u64,
    memory_at: u64,
    total: u64,
}

impl Shape {
    fn new(huge_frames: u32) -> Option<Self> {
        let region = persist::table_layout(huge_frames)?;
        // The table begins behind two headers instead of one.
        let layout = TableLayout::after(HEADER_BYTES as u64 + region.return_epoch, huge_frames)?;
        let marks_at = HEADER_BYTES as u64 + region.total;
        let marks_end = marks_at + u64::from(huge_frames);
        let memory_at = (marks_end + FRAME_SIZE).next_multiple_of(HUGE_SIZE);
        let total = memory_at + u64::from(huge_frames) * HUGE_SIZE;
        Some(Self { layout, region_bytes: region.total as usize, marks_at, memory_at, total })
    }

    fn for_bytes(bytes: u64) -> Result<Self, AreaError> {
        let huge_frames = u32::try_from(bytes.div_ceil(HUGE_SIZE)).ok();
        huge_frames.and_then(Self::new).ok_or(AreaError::Size { bytes })
    }

    fn words(&self) -> [u64; SHAPE] {
        let version = (HEADER_BYTES as u64) << 32 | u64::from(VERSION);
        let huge_frames = u64::from(self.layout.huge_frames);
        [MAGIC, version, huge_frames, HEADER_BYTES as u64, self.marks_at, self.memory_at, self.total]
    }

    fn memory_bytes(&self) -> u64 {
        self.total - self.memory_at
    }

    /// Of a file that begins with these words and has so many bytes.
    fn of(words: &[u64; WORDS], bytes: u64) -> Result<Self, FileFault> {
        if words[W_MAGIC] != MAGIC {
            return Err(FileFault::Magic { found: words[W_MAGIC] });
        }
        let version = words[W_VERSION] as u32;
        if version != VERSION {
            return Err(FileFault::Version { found: version, read: VERSION });
        }
        let huge_frames = words[W_HUGE_FRAMES];
        let size = || AreaError::Size { bytes: huge_frames.saturating_mul(HUGE_SIZE) };
        let shape = u32::try_from(huge_frames).ok().and_then(Self::new).ok_or_else(size)?;
        let reserved = RESERVED.into_iter().flatten().map(|index| (index, 0));
        for (index, expected) in shape.words().into_iter().enumerate().chain(reserved) {
            if words[index] != expected {
                return Err(FileFault::Header { offset: index * 8, found: words[index], expected });
            }
        }
        match shape.total {
            said if said != bytes => Err(FileFault::Length { bytes, said }),
            _ => Ok(shape),
        }
    }
}

/// What an area is made of that lies in a file.
pub(crate) struct Parts {
    pub(crate) ram: GuestRam,
    pub(crate) region: Arc<Region>,
    pub(crate) layout: TableLayout,
    pub(crate) marks_at: u64,
    pub(crate) named: NamedFile,
}

/// The file of an open area.
pub struct NamedFile {
    instance: Persistent<'static>,
    /// What `instance` lies in.
    region: Arc<Region>,
    /// Has the lock, as all copies of the descriptor.
    file: OwnedFd,
    path: Box<Path>,
}

impl NamedFile {
    /// A number that the file keeps for its user, such as the offset of the first object; 0 in a new one.
    #[must_use]
    pub fn root(&self) -> u64 {
        self.region.word(at(W_ROOT)).load(Ordering::Acquire)
    }

    /// Sets it. What was stored before is in the file before this is.
    pub fn set_root(&self, root: u64) {
        self.region.word(at(W_ROOT)).store(root, Ordering::Release);
    }

    /// The number of times that it was opened, its creation included.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.instance.generation()
    }

    /// The repairs of the table, if whoever had the file open before did not close it; `None` if it was closed, or is new.
    #[must_use]
    pub fn recovery(&self) -> Option<Recovery> {
        self.instance.recovery()
    }

    /// Where it was when it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Frees what nobody owns; nobody may be at work in the table.
    pub(crate) fn free_unowned(&mut self, mut owned: impl FnMut(u64, u64) -> bool) -> Leaks {
        self.instance.recover_leaks(|frame, order| owned(frame.byte_offset(), order.bytes()))
    }

    /// Nobody uses the area any more. Only a file that is closed `durably` may be opened after the machine went down.
    pub(crate) fn close(self, durably: bool) -> Result<(), FileError> {
        let Self { instance, region, file, path } = self;
        let sync = || rustix::fs::fsync(&file).map_err(|error| FileFault::Io("brought to the disk", error.into()));
        let close = || {
            if durably {
                sync()?;
            }
            instance.close().map_err(|error| FileFault::Io("closed", io::Error::other(error)))?;
            if durably {
                region.word(at(W_SYNCED)).store(1, Ordering::Relaxed);
                sync()?;
            }
            Ok(())
        };
        close().map_err(|fault| FileError { path: path.into(), fault })
    }
}

impl std::fmt::Debug for NamedFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NamedFile").field("path", &self.path).field("instance", &self.instance).finish_non_exhaustive()
    }
}

/// The byte of a word of the header.
fn at(word: usize) -> u64 {
    word as u64 * 8
}

/// Makes a file for an area of so many bytes. It gets its name when it is whole, where its file system can do that.
pub(crate) fn create(path: &Path, bytes: u64) -> Result<Parts, FileError> {
    let create = || {
        let shape = Shape::for_bytes(bytes)?;
        let new = NewFile::at(path)?;
        lock(&new.file)?;
        let io = |what| move |error: Errno| FileFault::Io(what, error.into());
        rustix::fs::ftruncate(&new.file, shape.total).map_err(io("made as large"))?;
        // A table without room on the disk would be a SIGBUS.
        let front = shape.marks_at + u64::from(shape.layout.huge_frames);
        match rustix::fs::fallocate(&new.file, FallocateFlags::empty(), 0, front) {
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(error) => return Err(io("given room for its table")(error)),
        }
        can_punch(&new.file, &shape)?;
        let (region, base) = map(&new.file, &shape)?;
        let (huge_frames, none) = (shape.layout.huge_frames, WriteBack::NONE);
        // SAFETY: mapped just now, this long, kept by `NamedFile` together with the instance; nobody else has the file.
        let instance = unsafe { Persistent::create_raw(base, shape.region_bytes, huge_frames, Initial::Evicted, none) };
        let instance = instance.map_err(|error| AreaError::Table(io::Error::other(error)))?;
        note_boot(&region);
        for (index, word) in shape.words().into_iter().enumerate().rev() {
            // The magic comes last: with it, all else is there.
            region.word(at(index)).store(word, Ordering::Release);
        }
        parts(&new.file, &shape, (region, instance), path).and_then(|parts| new.keep().map(|()| parts))
    };
    create().map_err(|fault| FileError { path: path.to_owned(), fault })
}

/// Opens a file that [`create`] made, and recovers its table if it was not closed. Nothing is changed in one that is refused.
pub(crate) fn open(path: &Path) -> Result<Parts, FileError> {
    let open = || {
        let io = |error: Errno| FileFault::Io("opened", error.into());
        // A pipe would keep us waiting.
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| match error {
            Errno::ISDIR => FileFault::NotAFile,
            error => io(error),
        })?;
        if FileType::from_raw_mode(rustix::fs::fstat(&file).map_err(io)?.st_mode) != FileType::RegularFile {
            return Err(FileFault::NotAFile);
        }
        lock(&file)?;
        // Now that nobody is about to make it another.
        let bytes = u64::try_from(rustix::fs::fstat(&file).map_err(io)?.st_size).unwrap_or(0);
        let words = header(&file, bytes)?;
        let shape = Shape::of(&words, bytes)?;
        let was_synced = words[W_SYNCED] != 0;
        if !was_synced && !is_this_boot(W_BOOT.map(|index| words[index])) {
            return Err(FileFault::Torn);
        }
        can_punch(&file, &shape)?;
        let (region, base) = map(&file, &shape)?;
        // SAFETY: as in `create`; the lock keeps others out who open it as an area.
        let instance = unsafe { Persistent::open_raw(base, shape.region_bytes, WriteBack::NONE) }?;
        note_boot(&region);
        if was_synced {
            region.word(at(W_SYNCED)).store(0, Ordering::Relaxed);
            // Before anything changes in it that this does not hold for.
            rustix::fs::fsync(&file).map_err(|error| FileFault::Io("marked as open", error.into()))?;
        }
        parts(&file, &shape, (region, instance), path)
    };
    open().map_err(|fault| FileError { path: path.to_owned(), fault })
}

fn parts(
    file: &OwnedFd,
    shape: &Shape,
    (region, instance): (Arc<Region>, Persistent<'static>),
    path: &Path,
) -> Result<Parts, FileFault> {
    let copy = || file.try_clone().map_err(|error| FileFault::Io("opened once more", error));
    let ram = GuestRam::in_file(shape.memory_bytes(), copy()?, shape.memory_at).map_err(AreaError::from)?;
    let named = NamedFile { instance, region: region.clone(), file: copy()?, path: path.into() };
    Ok(Parts { ram, region, layout: shape.layout, marks_at: shape.marks_at, named })
}

/// A file that has no name yet. Where its file system cannot make such, it has one, and loses it unless it is kept.
struct NewFile<'a> {
    file: OwnedFd,
    path: &'a Path,
    to_remove: bool,
}

impl<'a> NewFile<'a> {
    fn at(path: &'a Path) -> Result<Self, FileFault> {
        if path.symlink_metadata().is_ok() {
            return Err(FileFault::Exists);
        }
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let (flags, mode) = (OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
        let (made, to_remove) = match rustix::fs::open(directory, flags | OFlags::TMPFILE, mode) {
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
                (rustix::fs::open(path, flags | OFlags::CREATE | OFlags::EXCL, mode), true)
            }
            made => (made, false),
        };
        match made {
            Ok(file) => Ok(Self { file, path, to_remove }),
            Err(Errno::EXIST) => Err(FileFault::Exists),
            Err(error) => Err(FileFault::Io("made", error.into())),
        }
    }

    fn keep(mut self) -> Result<(), FileFault> {
        if std::mem::take(&mut self.to_remove) {
            return Ok(());
        }
        let unnamed = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        rustix::fs::linkat(CWD, unnamed, CWD, self.path, AtFlags::SYMLINK_FOLLOW).map_err(|error| match error {
            Errno::EXIST => FileFault::Exists,
            error => FileFault::Io("given its name", error.into()),
        })
    }
}

impl Drop for NewFile<'_> {
    fn drop(&mut self) {
        if self.to_remove {
            let _ = rustix::fs::unlink(self.path);
        }
    }
}

/// Goes with the last copy of the descriptor, also when its process is killed.
fn lock(file: &OwnedFd) -> Result<(), FileFault> {
    rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
        Errno::WOULDBLOCK => FileFault::InUse,
        error => FileFault::Io("locked", error.into()),
    })
}

fn header(file: &OwnedFd, bytes: u64) -> Result<[u64; WORDS], FileFault> {
    let mut header = [0; HEADER_BYTES];
    let short = || FileFault::Length { bytes, said: HEADER_BYTES as u64 };
    let read = rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut header, 0));
    match read.map_err(|error| FileFault::Io("read", error.into()))? {
        HEADER_BYTES => {}
        _ => return Err(short()),
    }
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(header.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().map_err(|_| short())?);
    }
    Ok(words)
}

/// Tries it on a page that is of no use.
fn can_punch(file: &OwnedFd, shape: &Shape) -> Result<(), FileFault> {
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let tried = rustix::fs::fallocate(file, punch, shape.memory_at - FRAME_SIZE, FRAME_SIZE);
    tried.map_err(|error| FileFault::CannotPunch(error.into()))
}

/// What lies in front of the memory, and where the region of `llfree` begins.
fn map(file: &OwnedFd, shape: &Shape) -> Result<(Arc<Region>, *mut u8), FileFault> {
    let map = || mapped(file.try_clone()?.into(), shape.memory_at as usize);
    let region = map().map_err(AreaError::Table)?;
    let base = std::ptr::with_exposed_provenance_mut(region.host_address() as usize + HEADER_BYTES);
    Ok((Arc::new(region), base))
}

/// The first bytes of a file, which has as many. A forked child does not inherit them.
pub(crate) fn mapped(file: File, bytes: usize) -> io::Result<Region> {
    let mapping = MmapRegion::from_file(FileOffset::new(file, 0), bytes).map_err(io::Error::other)?;
    let region = Region::over(mapping)?;
    let start = std::ptr::with_exposed_provenance_mut(region.host_address() as usize);
    // SAFETY: our mapping, of this length; the advice changes nothing that it holds.
    unsafe { rustix::mm::madvise(start, bytes, rustix::mm::Advice::LinuxDontFork) }?;
    Ok(region)
}

/// Which boot of the machine this is; zero where the kernel does not say.
fn boot() -> [u64; 2] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let number = u128::from_str_radix(&digits, 16).unwrap_or(0);
    [number as u64, (number >> 64) as u64]
}

fn is_this_boot(words: [u64; 2]) -> bool {
    words != [0, 0] && words == boot()
}

fn note_boot(region: &Region) {
    for (index, word) in W_BOOT.into_iter().zip(boot()) {
        region.word(at(index)).store(word, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_lies_where_the_region_has_it_and_no_parts_overlap() {
        for huge_frames in [1, 7, 1023, 1024, 31_000, shared_layout::table::MAX_HUGE_FRAMES] {
            let shape = Shape::new(huge_frames).expect("in range");
            let region = persist::table_layout(huge_frames).expect("in range");
            let moved = |offset| HEADER_BYTES as u64 + offset;
            let layout = shape.layout;
            let here =
                [layout.limit, layout.return_epoch, layout.entries, layout.bitfields, layout.tenant, layout.total];
            let there =
                [region.limit, region.return_epoch, region.entries, region.bitfields, region.tenant, region.total];
            assert_eq!(here, there.map(moved));
            assert!(layout.total <= shape.marks_at);
            assert!(shape.marks_at + u64::from(huge_frames) + FRAME_SIZE <= shape.memory_at);
            assert!(shape.memory_at.is_multiple_of(HUGE_SIZE));
            assert_eq!(shape.memory_bytes(), u64::from(huge_frames) * HUGE_SIZE);
        }
        assert!(Shape::new(0).is_none() && Shape::for_bytes(u64::MAX).is_err());
    }
}
