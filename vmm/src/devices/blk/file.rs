//! [`DiskFile`]: the file that backs a disk, opened, checked and locked; bytes between it and guest memory.
//!
//! All accesses lie in the file's first [`DiskFile::bytes`] bytes, which the caller ensures. The kernel
//! copies straight from and to guest memory; no reference to guest memory is made. A lock on the file,
//! exclusive if it may be written, keeps VMs that use the same image apart; it is advisory, as all file
//! locks are.

use super::config::{DiskConfig, DiskError};
use llfree_base::printable;
use rustix::fs::{FallocateFlags, FlockOperation};
use std::fs::{self, File, FileType};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use vm_memory::VolatileSlice;

/// Bytes of a sector: the unit of everything in virtio-blk.
pub(super) const SECTOR: u64 = 512;
/// Slices that the kernel takes in one call (`UIO_MAXIOV`).
const MOST_SLICES: usize = 1024;
/// How many zero bytes are written at once where the file system has no better way.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Between the file and guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Direction {
    /// From the file.
    Read,
    /// To the file.
    Write,
}

/// An open disk.
#[derive(Debug)]
pub(super) struct DiskFile {
    file: File,
    bytes: u64,
    punches: bool,
}

impl DiskFile {
    pub(super) fn open(disk: &DiskConfig) -> Result<Self, DiskError> {
        let path = || disk.path.clone();
        let failed = |error| disk.cannot_open(error);
        let check = |kind: FileType| match wrong_kind(kind) {
            Some(what) => Err(DiskError::Kind { path: path(), what }),
            None => Ok(()),
        };
        // Checked before opening, so that no device's driver is asked to open it.
        check(fs::metadata(&disk.path).map_err(failed)?.file_type())?;
        let mut options = File::options();
        // O_NONBLOCK: if it has become a pipe, opening it does not wait for the other end.
        options.read(true).write(!disk.read_only).custom_flags(libc::O_NONBLOCK);
        let mut file = options.open(&disk.path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        check(metadata.file_type())?;
        lock(&file, disk)?;
        let bytes = match metadata.file_type().is_file() {
            true => metadata.len(),
            false => file.seek(SeekFrom::End(0)).map_err(failed)?,
        };
        match bytes {
            0 => Err(DiskError::Empty { path: path() }),
            _ if !bytes.is_multiple_of(SECTOR) => Err(DiskError::Size { path: path(), bytes }),
            _ => Ok(Self::new(file, bytes, disk.read_only)),
        }
    }

    /// `bytes` is the size of the disk.
    pub(super) fn new(file: File, bytes: u64, read_only: bool) -> Self {
        // Punching a hole past the end changes nothing, and tells whether the file system can do so. Block
        // devices have nothing there, so their contents are not touched.
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let punches = !read_only && rustix::fs::fallocate(&file, hole, bytes, 4096).is_ok();
        Self { file, bytes, punches }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether parts of it can be given back.
    pub(super) fn punches(&self) -> bool {
        self.punches
    }

    /// Reads or writes all of `slices`, from `offset` on.
    pub(super) fn transfer(&self, direction: Direction, slices: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
        let mut vectors: Vec<libc::iovec> =
            guards.iter().map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }).collect();
        let mut rest = vectors.as_mut_slice();
        // At most the size of a file, which fits the kernel's offset type.
        let mut at = offset as libc::off_t;
        while !rest.is_empty() {
            let count = rest.len().min(MOST_SLICES) as libc::c_int;
            let (fd, first) = (self.file.as_raw_fd(), rest.as_ptr());
            // SAFETY: `first` leads `count` vectors, each of them memory of the guest that `slices`
            // borrow, mapped and writable; it is shared with the guest and nothing of ours relies on
            // what it holds.
            let done = unsafe {
                match direction {
                    Direction::Read => libc::preadv(fd, first, count, at),
                    Direction::Write => libc::pwritev(fd, first, count, at),
                }
            };
            match usize::try_from(done) {
                // The file ends before the disk: it was truncated.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => {
                    at += done as libc::off_t;
                    rest = skip(rest, bytes);
                }
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Makes sure that everything that was written is on the host's disk.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Punches a hole: frees the storage of a range, which reads as zeroes afterwards.
    pub(super) fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.file, hole, offset, bytes))?)
    }

    /// Zeroes a range and keeps its storage allocated.
    pub(super) fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        match rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.file, zero, offset, bytes)) {
            Err(rustix::io::Errno::OPNOTSUPP) => self.write_zeroes(offset, bytes),
            other => Ok(other?),
        }
    }

    pub(super) fn write_zeroes(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let end = offset + bytes;
        let mut at = offset;
        while at < end {
            let part = (end - at).min(ZEROES.len() as u64);
            self.file.write_all_at(&ZEROES[..part as usize], at)?;
            at += part;
        }
        Ok(())
    }
}

/// What a file is, if it cannot be a disk.
fn wrong_kind(kind: FileType) -> Option<&'static str> {
    match kind {
        _ if kind.is_file() || kind.is_block_device() => None,
        _ if kind.is_dir() => Some("a directory"),
        _ if kind.is_char_device() => Some("a character device"),
        _ if kind.is_fifo() => Some("a pipe"),
        _ => Some("a socket"),
    }
}

fn lock(file: &File, disk: &DiskConfig) -> Result<(), DiskError> {
    let how = match disk.read_only {
        true => FlockOperation::NonBlockingLockShared,
        false => FlockOperation::NonBlockingLockExclusive,
    };
    match rustix::fs::flock(file, how) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(DiskError::Locked { path: disk.path.clone() }),
        // Some network file systems have no locks; that is not a reason to refuse the disk.
        Err(error) => {
            let path = printable(&disk.path.to_string_lossy());
            log::warn!("the disk {path} cannot be locked, so nothing keeps another VM from writing to it: {error}");
            Ok(())
        }
    }
}

/// What is left of `vectors` after their first `bytes` bytes.
pub(super) fn skip(vectors: &mut [libc::iovec], mut bytes: usize) -> &mut [libc::iovec] {
    let mut whole = 0;
    for vector in vectors.iter_mut() {
        if bytes < vector.iov_len {
            vector.iov_base = vector.iov_base.wrapping_byte_add(bytes);
            vector.iov_len -= bytes;
            break;
        }
        bytes -= vector.iov_len;
        whole += 1;
    }
    &mut vectors[whole..]
}
