//! What a thread may ask of the kernel: permissions, and the groups of them that several crates
//! need.
//!
//! Data only. A crate that starts a thread says, with the thread's [`Role`](super::Role), which
//! system calls it makes; a sandbox makes filters of that. A role's rights are a union of groups,
//! so that "waits for descriptors" is said once.

use libc::c_long;

/// One permission.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Allow {
    /// A call, whatever its arguments.
    Call(c_long),
    /// A call whose 32-bit argument at this index is one of these.
    With(c_long, u8, &'static [u64]),
    /// A call whose 32-bit argument at this index has none of these bits.
    Without(c_long, u8, u64),
    /// A call whose 32-bit argument at this index has all of these bits.
    WithBits(c_long, u8, u64),
    /// A call whose pointer at this index is null.
    Null(c_long, u8),
    /// One of these signals, to a thread of this process.
    Signal(&'static [u64]),
}

use Allow::{Call, With, Without};

/// `_IOC`: an ioctl's number from its parts, as `asm-generic/ioctl.h` packs it.
#[must_use]
pub const fn ioc(direction: u64, group: u64, number: u64, bytes: u64) -> u64 {
    direction << 30 | bytes << 16 | group << 8 | number
}

/// `_IOC_WRITE`: the kernel reads what the argument points to.
pub const WRITE: u64 = 1;
/// `_IOC_READ`: the kernel writes there.
pub const READ: u64 = 2;

/// Of a file's flags, those that could change a file.
const OPEN_TO_CHANGE: u64 = (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC) as u64;

/// `PAGEMAP_SCAN`: which pages are there, by a file that is open already.
pub const SCAN_PAGES: Allow = With(libc::SYS_ioctl, 1, &[ioc(READ | WRITE, b'f' as u64, 16, 0x60)]);

/// Asking the kernel what is resident: `/proc`, `/sys`, and the guest's memory file.
pub const READ_FILES: &[Allow] = &[
    Without(libc::SYS_openat, 2, OPEN_TO_CHANGE),
    Call(libc::SYS_read),
    Call(libc::SYS_pread64),
    Call(libc::SYS_lseek),
    Call(libc::SYS_fstat),
    Call(libc::SYS_newfstatat),
    Call(libc::SYS_statx),
    Call(libc::SYS_mincore),
    SCAN_PAGES,
];

/// Waiting for descriptors, and reading them.
pub const EVENTS: &[Allow] = &[
    Call(libc::SYS_read),
    Call(libc::SYS_poll),
    Call(libc::SYS_ppoll),
    Call(libc::SYS_epoll_wait),
    Call(libc::SYS_epoll_pwait),
    Call(libc::SYS_epoll_ctl),
];

/// Waiting until a descriptor can be read or written, where it must not block or cannot.
pub const WAIT: &[Allow] = &[Call(libc::SYS_poll), Call(libc::SYS_ppoll)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_ioctls_are_the_kernels() {
        assert_eq!(ioc(0, 0xae, 0x80, 0), 0xae80, "KVM_RUN");
        assert_eq!(ioc(READ | WRITE, u64::from(b'f'), 16, 0x60), 0xc060_6610, "PAGEMAP_SCAN");
    }
}
