//! Memory of another process, through the descriptor of its file.
//!
//! The descriptor is somebody else's word for what it is, so it is looked at. Nothing is mapped here.

use super::mapping::Mapping;
use super::{AddressMap, Backing, GuestRam, MemoryError, huge_frames};
use rustix::fd::{AsFd, OwnedFd};
use std::io;
use vm_memory::GuestMemoryMmap;

/// The number of the file system that memory files lie in, of `linux/magic.h`.
const TMPFS: rustix::fs::FsWord = 0x0102_1994;

/// Whether a file lies in tmpfs, as memory files do: those of hugetlb have seals, too, but neither tell what of them is
/// there nor have memory where the pool is empty.
///
/// # Errors
/// Why the kernel does not say.
pub fn lies_in_tmpfs(file: impl AsFd) -> io::Result<bool> {
    Ok(rustix::fs::fstatfs(file)?.f_type == TMPFS)
}

impl GuestRam {
    /// Memory of another process: a memory file that it maps and that we have the descriptor of. It is not mapped here, for
    /// then each discard would have one process more to look after.
    ///
    /// # Errors
    /// [`MemoryError::BadSize`], and [`MemoryError::NotAMemoryFile`] for a file of another kind or size.
    pub fn of_file(bytes: u64, file: OwnedFd) -> Result<Self, MemoryError> {
        let huge_frames = huge_frames(bytes)?;
        let refused = |why: &str| MemoryError::NotAMemoryFile { bytes, why: why.to_owned() };
        // Only memory files have seals.
        rustix::fs::fcntl_get_seals(&file).map_err(|error| refused(&error.to_string()))?;
        let meta = rustix::fs::fstat(&file).map_err(|error| refused(&error.to_string()))?;
        if u64::try_from(meta.st_size) != Ok(bytes) {
            return Err(refused(&format!("it has {} bytes", meta.st_size)));
        }
        if !lies_in_tmpfs(&file).map_err(|error| refused(&error.to_string()))? {
            return Err(refused("it does not lie in tmpfs"));
        }
        let flags = rustix::fs::fcntl_getfl(&file).map_err(|error| refused(&error.to_string()))?;
        if flags & rustix::fs::OFlags::RWMODE != rustix::fs::OFlags::RDWR {
            return Err(refused("it is not open for writing"));
        }
        Ok(Self {
            memory: GuestMemoryMmap::default(),
            mapping: Mapping::absent(bytes as usize),
            file: Some(file),
            file_start: 0,
            pagemap: None,
            vectored: None,
            huge_frames,
            backing: Backing::Memfd,
            map: AddressMap::flat(bytes),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::MemfdFlags;
    use shared_layout::{HUGE_SIZE, HugeId};
    use std::os::fd::AsRawFd;

    fn file(bytes: u64) -> OwnedFd {
        let file = rustix::fs::memfd_create("theirs", MemfdFlags::CLOEXEC).expect("a memory file");
        rustix::fs::ftruncate(&file, bytes).expect("room");
        file
    }

    #[test]
    fn memory_goes_back_from_a_file_that_is_not_mapped_here() {
        let theirs = file(4 * HUGE_SIZE);
        for page in 0..4 * 512 {
            rustix::io::pwrite(&theirs, &[7], page * 4096).expect("room");
        }
        let ram = GuestRam::of_file(4 * HUGE_SIZE, theirs.try_clone().expect("a copy")).expect("a memory file");
        assert_eq!(ram.residency().expect("the file tells").resident_bytes, 4 * HUGE_SIZE);
        ram.discard(HugeId(1)).expect("it is writable");
        let mut resident = Vec::new();
        ram.for_each_resident(|range| resident.push(range)).expect("the file tells");
        assert_eq!(resident, [0..HUGE_SIZE, 2 * HUGE_SIZE..4 * HUGE_SIZE]);
        ram.populate(HugeId(1)).expect_err("that is for its process to do");
        ram.discard(HugeId(4)).expect_err("beyond its end");
    }

    #[test]
    fn other_files_are_refused() {
        let theirs = || file(4 * HUGE_SIZE);
        for bytes in [0, HUGE_SIZE + 1, 8 * HUGE_SIZE] {
            GuestRam::of_file(bytes, theirs()).expect_err("not that size");
        }
        let null = std::fs::File::open("/dev/null").expect("it is everywhere");
        assert!(matches!(GuestRam::of_file(HUGE_SIZE, null.into()), Err(MemoryError::NotAMemoryFile { .. })));
        let theirs = theirs();
        let path = format!("/proc/self/fd/{}", theirs.as_raw_fd());
        let read_only = std::fs::File::open(path).expect("open");
        let error = GuestRam::of_file(4 * HUGE_SIZE, read_only.into()).expect_err("nothing can be taken from it");
        assert!(error.to_string().contains("writing"), "{error}");
    }
}
