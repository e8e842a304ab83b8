//! The threads that this crate starts, and what they may ask of the kernel: also what others may
//! that call into it.

use Allow::{Call, With};
use llfree_base::thread::Role;
use llfree_base::thread::rights::{Allow, EVENTS, READ, READ_FILES, SCAN_PAGES, WRITE, ioc};

/// Keeps zeroed frames ready.
pub const INSTALL_POOL: Role = Role::new("install-pool", &[POPULATE, READ_FILES, EVENTS, NICE]);
/// Answers touches of memory that is not there. What is under a userfaultfd is anonymous, and goes
/// by a call that every thread has.
pub const USERFAULT: Role = Role::new("userfault", &[POPULATE, INSTALL, USERFAULTFD, EVENTS]);
/// Reclaims without being asked.
pub const AUTO_RECLAIM: Role = Role::new("auto-reclaim", &[MEMORY]);

/// All of them.
pub const ALL: [Role; 3] = [INSTALL_POOL, USERFAULT, AUTO_RECLAIM];

const UFFD: u64 = 0xaa;
const PUNCH_HOLE: u64 = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u64;

/// Giving guest memory back to the kernel, beyond what every thread may: holes in files, many runs at
/// once, and how much of it was there.
pub const MEMORY: &[Allow] = &[
    With(libc::SYS_fallocate, 1, &[PUNCH_HOLE]),
    With(libc::SYS_process_madvise, 3, &[libc::MADV_DONTNEED as u64]),
    SCAN_PAGES,
];

/// Asking the kernel for zeroed memory.
pub const POPULATE: &[Allow] = &[With(libc::SYS_madvise, 2, &[libc::MADV_POPULATE_WRITE as u64])];

/// Moving it to the guest, out of the pool or of a slot that is made when the pool is dry.
pub const INSTALL: &[Allow] = &[
    With(libc::SYS_ioctl, 1, &[ioc(READ | WRITE, UFFD, 0x05, 40)]), // UFFDIO_MOVE
    SCAN_PAGES,
    With(libc::SYS_madvise, 2, &[libc::MADV_DONTFORK as u64, libc::MADV_DONTDUMP as u64]),
];

/// Answering faults of a userfaultfd that was opened and registered before, and letting go of it.
const USERFAULTFD: &[Allow] = &[With(
    libc::SYS_ioctl,
    1,
    &[
        ioc(READ | WRITE, UFFD, 0x04, 32), // UFFDIO_ZEROPAGE
        ioc(READ, UFFD, 0x02, 16),         // UFFDIO_WAKE
        ioc(READ, UFFD, 0x01, 16),         // UFFDIO_UNREGISTER
    ],
)];

/// Lower priority for good: no thread keeps the capability to step forward.
const NICE: &[Allow] = &[Call(libc::SYS_setpriority)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_ioctls_are_the_kernels() {
        assert_eq!(ioc(READ | WRITE, UFFD, 0x05, 40), 0xc028_aa05, "UFFDIO_MOVE");
    }
}
