//! [`Mapping`]: one stretch of address space that is guest RAM, from `mmap` to `munmap`.
//!
//! Knows nothing of frames. Keeps three invariants: the stretch starts at a multiple of 2 MiB, so
//! that the kernel can map it with huge entries; what lies before and after it in the process is
//! never touched; and it stays mapped as long as any view of it exists.

use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use shared_layout::{FRAME_SIZE, HUGE_SIZE};
use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;
use vm_memory::mmap::MmapRegion;

/// Space before and behind the RAM: enough to align it, and at least one unmapped page each.
const MARGIN: usize = (HUGE_SIZE + FRAME_SIZE) as usize;

/// Who uses the memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum User {
    /// A guest: no child of ours, no core dump and no debugger has business there.
    Guest,
    /// This process, as any other of its memory.
    ThisProcess,
}

/// Owns the address space of one guest's RAM.
#[derive(Debug)]
pub(super) struct Mapping {
    /// The RAM itself.
    start: usize,
    len: usize,
    /// What to unmap: the RAM, with its margins if it has any.
    outer_start: usize,
    outer_len: usize,
    /// The views that were handed out; see `Drop`.
    views: Vec<Arc<MmapRegion>>,
}

impl Mapping {
    /// Private anonymous memory; nothing is accounted or reserved before it is touched.
    pub(super) fn anonymous(len: usize, user: User) -> Result<Self, Errno> {
        let mapping = Self::reserve(len)?;
        // Raising the protection of reserved space, instead of mapping over it, leaves no moment in
        // which the addresses belong to nobody.
        // SAFETY: the range lies inside the space that `reserve` just made for us alone.
        unsafe { rustix::mm::mprotect(mapping.pointer(0), len, MprotectFlags::READ | MprotectFlags::WRITE) }?;
        Ok(mapping.advised(user))
    }

    /// A shared mapping of `file` from byte `offset` on, where it holds at least `len` bytes.
    pub(super) fn shared(len: usize, file: &OwnedFd, offset: u64) -> Result<Self, Errno> {
        let mapping = Self::reserve(len)?;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the range lies inside the space that `reserve` just made for us alone, so the
        // mapping replaces nobody's memory.
        let mapped = unsafe { rustix::mm::mmap(mapping.pointer(0), len, read_write(), flags, file, offset) };
        if let Err(error) = mapped {
            // The kernel may have emptied the range before it failed, and another thread may live
            // there by now: to give up address space is safe, to unmap it is not.
            std::mem::forget(mapping);
            return Err(error);
        }
        Ok(mapping.advised(User::Guest))
    }

    /// A shared mapping of a hugetlb `file`. The kernel aligns it, and reserves every page of it
    /// or fails with `ENOMEM`.
    pub(super) fn hugetlb(len: usize, file: &OwnedFd) -> Result<Self, Errno> {
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nobody uses.
        let start = unsafe { rustix::mm::mmap(ptr::null_mut(), len, read_write(), MapFlags::SHARED, file, 0) }?;
        let start = start.expose_provenance();
        Ok(Self { start, len, outer_start: start, outer_len: len, views: Vec::new() }.advised(User::Guest))
    }

    /// `len` bytes that lie in another process.
    pub(super) fn absent(len: usize) -> Self {
        Self { start: 0, len, outer_start: 0, outer_len: 0, views: Vec::new() }
    }

    /// Whether it is mapped in this process.
    pub(super) fn is_here(&self) -> bool {
        self.outer_len > 0
    }

    /// Takes address space for `len` bytes and its margins, all of it inaccessible.
    fn reserve(len: usize) -> Result<Self, Errno> {
        let outer_len = len.checked_add(MARGIN).ok_or(Errno::NOMEM)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nobody uses.
        let outer = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), outer_len, ProtFlags::empty(), flags) }?;
        let outer_start = outer.expose_provenance();
        // At most 2 MiB above `outer_start`, which leaves at least a page behind the RAM.
        let start = (outer_start + FRAME_SIZE as usize).next_multiple_of(HUGE_SIZE as usize);
        Ok(Self { start, len, outer_start, outer_len, views: Vec::new() })
    }

    /// Keeps guest RAM out of child processes and core dumps, and asks for huge pages.
    fn advised(self, user: User) -> Self {
        let advices: &[_] = match user {
            User::Guest => &[Advice::LinuxHugepage, Advice::LinuxDontFork, Advice::LinuxDontDump],
            User::ThisProcess => &[Advice::LinuxHugepage],
        };
        for advice in advices.iter().copied() {
            // SAFETY: the range is ours, and none of the three changes what it holds.
            if let Err(error) = unsafe { rustix::mm::madvise(self.pointer(0), self.len, advice) } {
                // Each is an improvement, none a need: hugetlb has no transparent huge pages, and
                // a kernel may lack them.
                log::debug!("guest RAM without {advice:?}: {error}");
            }
        }
        self
    }

    /// First address of the RAM.
    pub(super) fn start(&self) -> usize {
        self.start
    }

    /// Bytes of the RAM.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The address of a byte of the RAM, for a system call.
    pub(super) fn pointer(&self, offset: usize) -> *mut c_void {
        debug_assert!(offset <= self.len);
        ptr::with_exposed_provenance_mut(self.start + offset)
    }

    /// `len` bytes of the RAM from `offset` on, which it has, as a bounds-checked region. The mapping
    /// outlives every clone of it.
    pub(super) fn view(
        &mut self,
        offset: usize,
        len: usize,
        flags: MapFlags,
    ) -> Result<Arc<MmapRegion>, vm_memory::mmap::MmapRegionError> {
        assert!(offset <= self.len && len <= self.len - offset, "a view lies inside its mapping");
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // The kernel's flags all lie below bit 31.
        let flags = flags.bits() as i32;
        // SAFETY: the range is inside the mapping, as just checked, readable and writable, and `Drop`
        // leaves it so while a clone of this region exists.
        let region = unsafe { MmapRegion::build_raw(self.pointer(offset).cast(), len, prot, flags) }?;
        let view = Arc::new(region);
        self.views.push(Arc::clone(&view));
        Ok(view)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if !self.is_here() {
            return;
        }
        // Regions hand out clones in safe code. If one is still alive, unmapping would leave it
        // dangling over whatever is mapped there next.
        if self.views.drain(..).fold(false, |held, view| held | Arc::into_inner(view).is_none()) {
            log::error!("{} bytes of guest RAM stay mapped: something still holds a view of them", self.len);
            return;
        }
        let outer = ptr::with_exposed_provenance_mut(self.outer_start);
        // SAFETY: we mapped exactly this range, and the last view of it is gone.
        if let Err(error) = unsafe { rustix::mm::munmap(outer, self.outer_len) } {
            log::error!("cannot unmap {} bytes of guest RAM: {error}", self.len);
        }
    }
}

fn read_write() -> ProtFlags {
    ProtFlags::READ | ProtFlags::WRITE
}
