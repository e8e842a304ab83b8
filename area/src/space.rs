//! [`Space`]: an area's memory and its table, mapped for as long as anybody can reach them.
//!
//! What a block of the table is in bytes and addresses, and what kinds of memory there are. Who takes memory back is not
//! known here.

use crate::device::Parts;
use crate::error::AreaError;
use crate::file::{self, NamedFile, mapped};
use crate::file_error::FileError;
use crate::fork::Maker;
use llfree::{Initial, Tenant};
use llfree_base::choices::Backing;
use llfree_base::error_line;
use llfree_monitor::memory::GuestRam;
use llfree_monitor::{Region, Table};
use rustix::fs::{MemfdFlags, SealFlags};
use shared_layout::{FrameId, HUGE_SIZE, HugeRange, Order, TableLayout};
use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::{fmt, fs, io};

/// The memory that an area lies in.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum MemoryKind {
    /// A memory file if the machine has huge pages for these and permits it, else private memory.
    #[default]
    Auto,
    /// Private anonymous memory with transparent huge pages. Needs no privilege; only this process can take it back; a
    /// forked child has a copy, as of all its memory.
    Private,
    /// A memory file, which whoever has its descriptor can take memory from. A forked child does not have it. Of 4 KiB
    /// pages, and twenty times as slow to take back, unless the machine's `shmem_enabled` allows huge ones.
    MemoryFile,
    /// A file of 2 MiB pages out of the machine's hugetlb pool, all of them reserved from the start.
    Hugetlb,
}

impl MemoryKind {
    /// What it comes down to on this machine, and what is taken instead where that is unavailable.
    fn backings(self, files_have_huge_pages: impl FnOnce() -> bool) -> (Backing, Option<Backing>) {
        match self {
            Self::Private => (Backing::Anon, None),
            Self::MemoryFile => (Backing::Memfd, None),
            Self::Hugetlb => (Backing::Hugetlb, None),
            Self::Auto if files_have_huge_pages() => (Backing::Memfd, Some(Backing::Anon)),
            Self::Auto => (Backing::Anon, None),
        }
    }
}

/// Whether a memory file that asks for huge pages gets them.
fn files_have_huge_pages() -> bool {
    let setting = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    ["[always]", "[advise]", "[within_size]", "[force]"].iter().any(|word| setting.contains(word))
}

/// What makes an area, for another process: [`ForeignArea::adopt`](crate::ForeignArea::adopt).
#[derive(Clone, Copy, Debug)]
pub struct Shared<'a> {
    /// The file of its memory.
    pub memory: BorrowedFd<'a>,
    /// The file of its table, which nobody can shrink or grow.
    pub table: BorrowedFd<'a>,
    /// Its size.
    pub huge_frames: u32,
}

/// Memory and table of one area.
pub(crate) struct Space {
    // Nothing of a shared mapping is there in a forked child: to unmap it would hit whatever lies there by then.
    ram: ManuallyDrop<Arc<GuestRam>>,
    region: ManuallyDrop<Arc<Region>>,
    /// The table's file, where others are to see it.
    table_file: Option<File>,
    /// The file that both lie in and that outlives them.
    named: Option<NamedFile>,
    tenant: Tenant<'static>,
    marks: &'static [AtomicU8],
    layout: TableLayout,
    maker: Maker,
    is_private: bool,
    /// Where the memory begins, and how much it is.
    base: usize,
    bytes: u64,
    /// Tells the blocks of areas apart.
    id: u32,
}

impl Space {
    pub(crate) fn new(bytes: u64, kind: MemoryKind) -> Result<(Self, Table), AreaError> {
        Self::in_one_of(bytes, kind.backings(files_have_huge_pages))
    }

    fn in_one_of(bytes: u64, (first, instead): (Backing, Option<Backing>)) -> Result<(Self, Table), AreaError> {
        match (Self::in_backing(bytes, first), instead) {
            (Err(AreaError::Memory(_) | AreaError::Table(_)), Some(instead)) => Self::in_backing(bytes, instead),
            (made, _) => made,
        }
    }

    fn in_backing(bytes: u64, backing: Backing) -> Result<(Self, Table), AreaError> {
        let huge_frames = bytes.div_ceil(HUGE_SIZE);
        let layout = u32::try_from(huge_frames).ok().and_then(TableLayout::new).ok_or(AreaError::Size { bytes })?;
        let ram = GuestRam::of_process(huge_frames * HUGE_SIZE, backing)?;
        let region_bytes = region_bytes(&layout);
        let (region, file) = match backing {
            Backing::Anon => (Region::anonymous(region_bytes).map_err(AreaError::Table)?, None),
            Backing::Memfd | Backing::Hugetlb => {
                let (region, file) = sealed(region_bytes).map_err(AreaError::Table)?;
                (region, Some(file))
            }
        };
        let (mut space, table) = Self::over(ram, Arc::new(region), (layout, layout.total), Initial::Evicted)?;
        space.table_file = file;
        Ok((space, table))
    }

    /// In a file of that name, which is made for it.
    pub(crate) fn create(path: &Path, bytes: u64) -> Result<(Self, Table), FileError> {
        Self::in_file(file::create(path, bytes)?)
    }

    /// In one that is there.
    pub(crate) fn open(path: &Path) -> Result<(Self, Table), FileError> {
        Self::in_file(file::open(path)?)
    }

    fn in_file(parts: file::Parts) -> Result<(Self, Table), FileError> {
        let file::Parts { ram, region, layout, marks_at, named } = parts;
        match Self::over(ram, region, (layout, marks_at), Initial::Joined) {
            Ok((mut space, table)) => {
                space.named = Some(named);
                Ok((space, table))
            }
            Err(error) => Err(FileError { path: named.path().to_owned(), fault: error.into() }),
        }
    }

    /// Memory, and a region with its table and its marks, which begins in the given state.
    fn over(
        ram: GuestRam,
        region: Arc<Region>,
        (layout, marks_at): (TableLayout, u64),
        initial: Initial,
    ) -> Result<(Self, Table), AreaError> {
        let maker = Maker::new();
        let fits = "the region was made this large";
        let table = Table::new(region.clone(), layout).expect(fits).with_marks(marks_at).expect(fits);
        let base = std::ptr::with_exposed_provenance_mut(region.host_address() as usize);
        // SAFETY: the region is as long as the layout says, page aligned, reached through atomics only, and nobody is at work
        // on it yet. The slices live as long as `Self`, which keeps the region and hands none of them out for longer.
        let tenant = unsafe { llfree::Table::from_layout(base, region.bytes(), &layout, initial) };
        let tenant = tenant.map_err(|error| AreaError::Table(io::Error::other(error)))?.tenant();
        let marks: &[AtomicU8] = region.atomics(marks_at, layout.huge_frames as usize);
        // SAFETY: as above: the region is kept.
        let marks = unsafe { std::slice::from_raw_parts(marks.as_ptr(), marks.len()) };
        static IDS: AtomicU32 = AtomicU32::new(1);
        let space = Self {
            is_private: ram.backing() == Backing::Anon,
            base: ram.host_address() as usize,
            bytes: ram.bytes(),
            ram: ManuallyDrop::new(Arc::new(ram)),
            region: ManuallyDrop::new(region),
            table_file: None,
            named: None,
            tenant,
            marks,
            layout,
            maker,
            id: IDS.fetch_add(1, Ordering::Relaxed),
        };
        Ok((space, table))
    }

    /// The file that it lies in, where that has a name.
    pub(crate) fn named(&self) -> Option<&NamedFile> {
        if self.is_missing() { None } else { self.named.as_ref() }
    }

    pub(crate) fn named_mut(&mut self) -> Option<&mut NamedFile> {
        if self.is_missing() { None } else { self.named.as_mut() }
    }

    /// Its end, with all of it on the disk, where it lies in a file with a name.
    pub(crate) fn close(mut self) -> Result<(), FileError> {
        if self.is_missing() {
            return Ok(());
        }
        self.named.take().map_or(Ok(()), |named| named.close(true))
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    pub(crate) fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    pub(crate) fn shared(&self) -> Option<Shared<'_>> {
        if self.ram.backing() == Backing::Hugetlb {
            // Nobody else can tell what of it is there.
            return None;
        }
        let (memory, table) = (self.ram.file()?, self.table_file.as_ref()?.as_fd());
        Some(Shared { memory, table, huge_frames: self.ram.huge_frames() })
    }

    /// What the kernel needs to take memory back: a memory file, and a table in one.
    pub(crate) fn parts(&self) -> Option<Parts> {
        if self.ram.backing() != Backing::Memfd || self.table_file.is_none() {
            return None;
        }
        let (ram, region) = (Arc::clone(&self.ram), Arc::clone(&self.region));
        Some(Parts { ram, region, layout: self.layout, marks_at: self.layout.total })
    }

    /// The table's side that allocates; the caller keeps the space for as long as it has this.
    pub(crate) fn tenant(&self) -> Tenant<'static> {
        self.tenant
    }

    #[inline]
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    #[inline]
    pub(crate) fn is_private(&self) -> bool {
        self.is_private
    }

    /// Whether memory and table are not here: shared ones, in a child.
    #[inline]
    pub(crate) fn is_missing(&self) -> bool {
        self.maker.is_gone() && !self.is_private()
    }

    /// Whether this is a forked child's copy, in which other threads may have stopped half-way.
    pub(crate) fn is_copy(&self) -> bool {
        self.maker.is_gone()
    }

    /// The address of a frame of the table.
    #[inline]
    pub(crate) fn address(&self, frame: FrameId) -> NonNull<u8> {
        let address = self.base + frame.byte_offset() as usize;
        // A mapping never begins at zero.
        NonNull::new(std::ptr::with_exposed_provenance_mut(address)).unwrap_or(NonNull::dangling())
    }

    /// The frame that begins at an address, if one of the table does.
    #[inline]
    pub(crate) fn frame_at(&self, address: usize) -> Option<FrameId> {
        let offset = address.wrapping_sub(self.base) as u64;
        (offset < self.bytes && offset.is_multiple_of(4096)).then_some(FrameId(offset / 4096))
    }

    /// The address of an offset into the memory.
    pub(crate) fn at(&self, offset: u64) -> Option<NonNull<u8>> {
        let address = self.base + usize::try_from(offset).ok().filter(|_| offset < self.bytes && !self.is_missing())?;
        NonNull::new(std::ptr::with_exposed_provenance_mut(address))
    }

    /// The offset of an address.
    pub(crate) fn offset_of(&self, start: NonNull<u8>) -> Option<u64> {
        let offset = start.as_ptr().addr().wrapping_sub(self.base) as u64;
        (offset < self.bytes).then_some(offset)
    }

    /// The frame that begins at an offset.
    pub(crate) fn frame_at_offset(&self, offset: u64) -> Option<FrameId> {
        self.frame_at(self.base.checked_add(usize::try_from(offset).ok()?)?)
    }

    /// The table shows no difference between a frame that was free all the time and one that was in use a moment ago:
    /// the reclaimer is told, so that it takes the former.
    #[inline]
    pub(crate) fn mark_freed(&self, frames: HugeRange) {
        let (first, end) = (frames.first().index(), frames.end().index());
        for mark in self.marks.get(first..end).unwrap_or(&[]) {
            if mark.load(Ordering::Relaxed) == 0 {
                mark.store(1, Ordering::Relaxed);
            }
        }
    }

    /// The huge frames that some frames lie in.
    pub(crate) fn huge_range(first: FrameId, frames: u64) -> HugeRange {
        let per_huge = Order::HUGE.frames();
        let (start, end) = (first.0 / per_huge, (first.0 + frames).div_ceil(per_huge));
        HugeRange::between(shared_layout::HugeId(start as u32), shared_layout::HugeId(end as u32))
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        if self.is_missing() {
            return;
        }
        // Every handle has given back what it held: nothing is to be recovered.
        if let Some(Err(error)) = self.named.take().map(|named| named.close(false)) {
            log::warn!("{}", error_line(&error));
        }
        // SAFETY: dropped once, here, and not used afterwards.
        unsafe {
            ManuallyDrop::drop(&mut self.ram);
            ManuallyDrop::drop(&mut self.region);
        }
    }
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Space").field("id", &self.id).field("ram", &self.ram).finish_non_exhaustive()
    }
}

/// Bytes of a region: the table, and a mark a huge frame behind it.
pub(crate) fn region_bytes(layout: &TableLayout) -> usize {
    (layout.total + u64::from(layout.huge_frames)).next_multiple_of(4096) as usize
}

/// A region in a memory file whose size nobody can change, so that no access to it is ever past its end. A child does not
/// inherit it.
fn sealed(bytes: usize) -> io::Result<(Region, File)> {
    let file = rustix::fs::memfd_create("llfree-table", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&file, bytes as u64)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    let file = File::from(file);
    let region = mapped(file.try_clone()?, bytes)?;
    Ok((region, file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fork::tests::holds_in_a_child;

    #[test]
    fn without_a_memory_file_there_is_private_memory() {
        let either = MemoryKind::Auto.backings(|| true);
        assert_eq!(either, (Backing::Memfd, Some(Backing::Anon)));
        let made = |backings| Space::in_one_of(4 << 20, backings).map(|(space, _)| space.is_private());
        assert!(made(either).is_ok_and(|is_private| !is_private), "it is not denied yet");
        let denied = || {
            // Where filters are unavailable nothing is denied.
            test_support::deny(libc::SYS_memfd_create, libc::EPERM).is_err()
                || made(either).is_ok_and(|is_private| is_private)
                    && matches!(made(MemoryKind::MemoryFile.backings(|| true)), Err(AreaError::Memory(_)))
        };
        assert!(holds_in_a_child(denied));
        assert!(matches!(made((Backing::Memfd, None)), Ok(false)), "of the child alone");
    }
}
