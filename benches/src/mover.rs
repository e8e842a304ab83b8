//! [`Mover`]: the bare `UFFDIO_MOVE` of huge pages from one mapping to another, which no install can
//! be faster than. The structures are those of `linux/userfaultfd.h`. Two mappings of its own are all
//! that it touches, and nobody ever faults in them.

use llfree_monitor::memory::{Backing, GuestRam, MemoryError};
use rustix::fd::OwnedFd;
use rustix::mm::UserfaultfdFlags;
use shared_layout::{HUGE_SIZE, HugeId, HugeRange};
use std::io;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

const IOC: u32 = 0xaa;
const API: u64 = 0xaa;
const FEATURE_MOVE: u64 = 1 << 16;
const MODE_MISSING: u64 = 1;
const USER_MODE_ONLY: u32 = 1;

ioctl_iowr_nr!(IOC_API, IOC, 0x3f, [u64; 3]);
ioctl_iowr_nr!(IOC_REGISTER, IOC, 0x00, [u64; 4]);
ioctl_iowr_nr!(IOC_MOVE, IOC, 0x05, [u64; 5]);

/// Memory to move, where it goes, and the descriptor that moves it.
pub(crate) struct Mover {
    fd: OwnedFd,
    source: GuestRam,
    target: GuestRam,
}

impl Mover {
    /// Two mappings of this many huge frames.
    ///
    /// # Errors
    /// Where the kernel has no memory, no userfaultfd for us, or one that cannot move.
    pub(crate) fn new(huge_frames: u32) -> io::Result<Self> {
        let ram = || GuestRam::new(u64::from(huge_frames) * HUGE_SIZE, Backing::Anon).map_err(io::Error::other);
        let (source, target) = (ram()?, ram()?);
        // Faults of user code are more than there will be, and permitted to everybody.
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
        // SAFETY: the call only makes a descriptor.
        let fd = unsafe { rustix::mm::userfaultfd(flags) }?;
        let mut api = [API, FEATURE_MOVE, 0];
        // SAFETY: `struct uffdio_api` is three words.
        check(unsafe { ioctl_with_mut_ref(&fd, IOC_API(), &mut api) })?;
        let mut register = [target.host_address(), target.bytes(), MODE_MISSING, 0];
        // SAFETY: `struct uffdio_register` is four words; the range is a mapping of ours in which
        // nobody faults.
        check(unsafe { ioctl_with_mut_ref(&fd, IOC_REGISTER(), &mut register) })?;
        Ok(Self { fd, source, target })
    }

    /// Puts memory where it is moved from, and takes away what was moved.
    pub(crate) fn prepare(&self) -> Result<(), MemoryError> {
        self.target.discard(HugeRange::saturating(HugeId(0), self.target.huge_frames()))?;
        self.source.populate(HugeRange::saturating(HugeId(0), self.source.huge_frames()))
    }

    /// Moves the memory of a frame.
    pub(crate) fn move_frame(&self, huge: HugeId) -> io::Result<()> {
        let at = huge.byte_offset();
        if at >= self.source.bytes() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut arg = [self.target.host_address() + at, self.source.host_address() + at, HUGE_SIZE, 0, 0];
        // SAFETY: `struct uffdio_move` is five words; both frames lie in mappings that are ours alone
        // and that nobody refers to.
        check(unsafe { ioctl_with_mut_ref(&self.fd, IOC_MOVE(), &mut arg) })
    }
}

fn check(result: std::ffi::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use test_support::skipped;
    use vm_memory::{Bytes as _, GuestAddress};

    #[test]
    fn memory_moves_with_what_it_holds() {
        let mover = match Mover::new(2) {
            Ok(mover) => mover,
            Err(error) => return skipped(format!("no userfaultfd that moves: {error}")),
        };
        mover.prepare().expect("there is memory");
        let at = GuestAddress(HUGE_SIZE + 4096);
        mover.source.guest_memory().write_obj(7_u64, at).expect("in the mapping");
        mover.move_frame(HugeId(1)).expect("it is there");
        assert_eq!(mover.target.guest_memory().read_obj::<u64>(at).expect("in the mapping"), 7);
        assert_eq!(mover.source.residency().expect("the kernel answers").resident_bytes, HUGE_SIZE);
        assert!(mover.move_frame(HugeId(1)).is_err(), "it has gone");
        assert!(mover.move_frame(HugeId(2)).is_err(), "there is no such frame");
    }
}
