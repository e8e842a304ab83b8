//! [`Userfault`]: guest RAM under a userfaultfd, so that nobody gets memory there unasked.
//!
//! This is the only place that speaks the kernel's userfaultfd interface; its structures come from
//! `linux/userfaultfd.h`. It knows addresses, not frames, and decides nothing: the reader of the faults
//! does. Invariants: every range is inside the registered mapping before a system call sees it, and
//! once it is [detached](Userfault::detach) nobody sleeps in a fault any more.

use llfree_base::faults;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{BorrowedFd, FromRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::mm::UserfaultfdFlags;
use shared_layout::FRAME_SIZE;
use std::fs::OpenOptions;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use thiserror::Error;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

const DEVICE: &str = "/dev/userfaultfd";
const IOC: u32 = 0xaa;
/// `UFFD_API`, the only version there is.
const API: u64 = 0xaa;
/// `UFFD_FEATURE_THREAD_ID`, Linux 4.14.
const FEATURE_THREAD_ID: u64 = 1 << 8;
/// `UFFD_FEATURE_EXACT_ADDRESS`, Linux 5.18.
const FEATURE_EXACT_ADDRESS: u64 = 1 << 11;
/// `UFFD_FEATURE_MOVE`, Linux 6.8.
const FEATURE_MOVE: u64 = 1 << 16;
const MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
const FAULT_WRITE: u64 = 1;
/// `UFFD_USER_MODE_ONLY`.
const USER_MODE_ONLY: u32 = 1;
/// Calls for a page that the kernel is at for a moment.
const PATIENCE: u32 = 64;
/// `sizeof(struct uffd_msg)`.
const MESSAGE: usize = 32;
/// A page of zeroes, to copy.
static ZEROES: [u8; FRAME_SIZE as usize] = [0; FRAME_SIZE as usize];
/// Faults read with one system call.
const MESSAGES: usize = 16;

ioctl_io_nr!(IOC_NEW, IOC, 0x00);
ioctl_iowr_nr!(IOC_API, IOC, 0x3f, ApiArg);
ioctl_iowr_nr!(IOC_REGISTER, IOC, 0x00, RegisterArg);
ioctl_ior_nr!(IOC_UNREGISTER, IOC, 0x01, RangeArg);
ioctl_ior_nr!(IOC_WAKE, IOC, 0x02, RangeArg);
ioctl_iowr_nr!(IOC_COPY, IOC, 0x03, CopyArg);
ioctl_iowr_nr!(IOC_ZEROPAGE, IOC, 0x04, ZeropageArg);
ioctl_iowr_nr!(IOC_MOVE, IOC, 0x05, MoveArg);

/// `struct uffdio_api`.
#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct RangeArg {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct RegisterArg {
    range: RangeArg,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct CopyArg {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct ZeropageArg {
    range: RangeArg,
    mode: u64,
    zeroed: i64,
}

/// `struct uffdio_move`.
#[repr(C)]
struct MoveArg {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    moved: i64,
}

const _: () = assert!(size_of::<RegisterArg>() == 32 && size_of::<ZeropageArg>() == 32 && size_of::<MoveArg>() == 40);
const _: () = assert!(size_of::<CopyArg>() == 40);

/// Why guest RAM cannot be under a userfaultfd here.
#[derive(Debug, Error)]
pub enum UserfaultError {
    /// Neither way to get one is open to this process.
    #[error(
        "userfaultfd is not permitted: {DEVICE}: {device}; the system call: {syscall}{}; let this user open {DEVICE}, \
         or set `sysctl vm.unprivileged_userfaultfd=1`",
        if *user_mode { " (one for faults of user code alone, which is permitted, does not see those of KVM)" } else { "" }
    )]
    Denied {
        /// Why the device does not give one.
        device: io::Error,
        /// Why the system call does not.
        syscall: io::Error,
        /// Whether one that sees no faults in the kernel would be permitted.
        user_mode: bool,
    },
    /// The kernel is too old.
    #[error("this kernel's userfaultfd cannot {0}; Linux 6.8 can")]
    Lacks(&'static str),
    /// It was had, but not put to use.
    #[error("cannot {step} with userfaultfd")]
    Refused {
        /// What.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Somebody touched registered memory that has no page, and sleeps until it has one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// Byte of the RAM.
    pub offset: u64,
    /// The thread that sleeps.
    pub thread: i32,
    /// Whether it writes.
    pub write: bool,
}

/// A move that did not get to its end.
#[derive(Debug)]
pub(super) struct MoveError {
    /// Bytes that were moved before.
    pub moved: usize,
    /// What came then.
    pub error: Errno,
}

/// A userfaultfd over one guest's RAM.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
    start: usize,
    len: usize,
    attached: AtomicBool,
}

impl Userfault {
    /// Puts `len` bytes from address `start` on under a userfaultfd: from now on missing pages come
    /// by [`Self::move_in`] and [`Self::lend_zeroes`] alone, and any other thread that touches one sleeps.
    ///
    /// # Errors
    /// [`UserfaultError`], and nothing has changed.
    pub(super) fn attach(start: usize, len: usize) -> Result<Self, UserfaultError> {
        // A descriptor tells what there is once, and is used up by it.
        let offered = handshake(&open()?, 0)?;
        for (feature, what) in [
            (FEATURE_MOVE, "move pages"),
            (FEATURE_THREAD_ID, "name a thread"),
            (FEATURE_EXACT_ADDRESS, "name an exact address"),
        ] {
            if offered & feature == 0 {
                return Err(UserfaultError::Lacks(what));
            }
        }
        let fd = open()?;
        handshake(&fd, FEATURE_MOVE | FEATURE_THREAD_ID | FEATURE_EXACT_ADDRESS)?;
        let mut register = RegisterArg { range: range(start, len), mode: MODE_MISSING, ioctls: 0 };
        // SAFETY: the structure is the one this request takes. Pages that are there stay; missing
        // ones come later than they would have.
        if unsafe { ioctl_with_mut_ref(&fd, IOC_REGISTER(), &mut register) } != 0 {
            return Err(UserfaultError::Refused { step: "register guest memory", source: io::Error::last_os_error() });
        }
        Ok(Self { fd, start, len, attached: AtomicBool::new(true) })
    }

    /// Whether missing pages still wait for us.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.attached.load(Ordering::Acquire)
    }

    /// Unregisters the RAM: threads that sleep in a fault wake up, and missing pages come from
    /// the kernel again when somebody touches them.
    pub(super) fn detach(&self) {
        // First: an install that finds the RAM gone from under it must find this, too. One that asks
        // the kernel for pages a moment too early sleeps until the next step wakes it.
        self.attached.store(false, Ordering::Release);
        let all = range(self.start, self.len);
        // SAFETY: the structure is the one this request takes; it changes no page.
        if unsafe { ioctl_with_ref(&self.fd, IOC_UNREGISTER(), &all) } != 0 {
            log::error!("guest memory stays registered with userfaultfd: {}", io::Error::last_os_error());
        }
        // The kernel wakes sleepers before it lets go of a range, and a fault that comes between the
        // two would sleep for ever.
        self.wake_all();
    }

    /// Moves the pages of `source` to the RAM from byte `offset` on, huge pages as a whole, and
    /// wakes threads that wait there. Nothing is copied: `source` has no page afterwards.
    ///
    /// # Errors
    /// [`MoveError`] says how far it came. `EEXIST`: there is a page already; `ENOENT`: `source` has
    /// none, or the RAM is detached.
    ///
    /// # Safety
    /// `source` must be private anonymous memory of the caller's own that nothing else refers to.
    pub(super) unsafe fn move_in(&self, offset: usize, source: Range<usize>) -> Result<(), MoveError> {
        let (len, mut moved) = (source.len(), 0);
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(MoveError { moved, error: Errno::INVAL });
        }
        // A page that the kernel is at for a moment (compaction, a split) is worth some more calls.
        let mut patience = PATIENCE;
        while moved < len {
            if let Err(error) = faults::point(faults::MOVE) {
                return Err(MoveError { moved, error: Errno::from_io_error(&error).unwrap_or(Errno::IO) });
            }
            let mut arg = MoveArg {
                dst: (self.start + offset + moved) as u64,
                src: (source.start + moved) as u64,
                len: (len - moved) as u64,
                mode: 0,
                moved: 0,
            };
            // SAFETY: the structure is the one this request takes. The destination is inside the RAM,
            // of which it only fills pages that are missing; the source is the caller's.
            let result = unsafe { ioctl_with_mut_ref(&self.fd, IOC_MOVE(), &mut arg) };
            let error = last_errno();
            // On success, too, it says how far it came; on failure an error may stand there.
            moved += usize::try_from(arg.moved).unwrap_or(0).min(len - moved);
            if result == 0 {
                continue;
            }
            // After part of the way it says EAGAIN, whatever stopped it.
            if !matches!(error, Errno::AGAIN | Errno::BUSY | Errno::INTR) || (arg.moved <= 0 && patience == 0) {
                return Err(MoveError { moved, error });
            }
            if arg.moved <= 0 {
                patience -= 1;
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    /// Gives all pages of these bytes that are missing memory, zeroed, of 4 KiB each.
    ///
    /// # Errors
    /// If the kernel has no memory; some pages may have theirs.
    pub(super) fn fill(&self, bytes: Range<u64>) -> io::Result<()> {
        let first = bytes.start - bytes.start % FRAME_SIZE;
        for offset in (first..bytes.end).step_by(FRAME_SIZE as usize) {
            self.fill_page(offset)?;
        }
        Ok(())
    }

    fn fill_page(&self, offset: u64) -> io::Result<()> {
        let Some(page) = self.page(offset) else { return Err(Errno::INVAL.into()) };
        for _ in 0..PATIENCE {
            let mut arg =
                CopyArg { dst: page as u64, src: ZEROES.as_ptr() as u64, len: FRAME_SIZE, mode: 0, copied: 0 };
            // SAFETY: the structure is the one this request takes. It only fills a page that is missing, inside the RAM.
            if unsafe { ioctl_with_mut_ref(&self.fd, IOC_COPY(), &mut arg) } == 0 {
                return Ok(());
            }
            match last_errno() {
                Errno::AGAIN | Errno::INTR => std::thread::yield_now(),
                Errno::EXIST => return Ok(()),
                error => return Err(error.into()),
            }
        }
        Err(Errno::AGAIN.into())
    }

    /// Lets threads that wait for the page at byte `offset` see zeroes there, and write to them: then it
    /// costs 4 KiB. Nothing happens to a page that is there.
    ///
    /// # Errors
    /// If the kernel has no memory for a page table.
    pub fn lend_zeroes(&self, offset: u64) -> io::Result<()> {
        let Some(page) = self.page(offset) else { return Err(Errno::INVAL.into()) };
        for _ in 0..PATIENCE {
            let mut arg = ZeropageArg { range: range(page, FRAME_SIZE as usize), mode: 0, zeroed: 0 };
            // SAFETY: the structure is the one this request takes, and the page is inside the RAM.
            if unsafe { ioctl_with_mut_ref(&self.fd, IOC_ZEROPAGE(), &mut arg) } == 0 {
                return Ok(());
            }
            match last_errno() {
                Errno::AGAIN | Errno::INTR => std::thread::yield_now(),
                // Somebody was first, and this request wakes nobody then.
                Errno::EXIST => return self.wake_range(page, FRAME_SIZE as usize),
                // Nobody waits at memory that is not registered.
                Errno::NOENT if !self.is_attached() => return Ok(()),
                error => return Err(error.into()),
            }
        }
        Err(Errno::AGAIN.into())
    }

    /// Wakes all threads that sleep in a fault: one that still misses its page faults again.
    pub fn wake_all(&self) {
        if let Err(error) = self.wake_range(self.start, self.len)
            && self.is_attached()
        {
            log::error!("cannot wake the threads that wait for guest memory: {error}");
        }
    }

    /// Waits until there are faults to read or `event` is readable, at most for `timeout`. True for
    /// the event.
    ///
    /// # Errors
    /// If the kernel does not wait.
    pub fn wait(&self, event: BorrowedFd<'_>, timeout: Option<Duration>) -> io::Result<bool> {
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN), PollFd::from_borrowed_fd(event, PollFlags::IN)];
        // Shorter than a poll can be told, by far.
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) => Ok(!fds[1].revents().is_empty()),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads the faults that wait, at most a few; never waits itself.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn read(&self, faults: &mut Vec<Fault>) -> io::Result<()> {
        faults::point(faults::USERFAULT_READ)?;
        let mut buffer = [0u8; MESSAGE * MESSAGES];
        let bytes = match rustix::io::read(&self.fd, &mut buffer) {
            Ok(bytes) => bytes,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        faults.extend(buffer[..bytes].chunks_exact(MESSAGE).filter_map(|message| self.decode(message)));
        Ok(())
    }

    /// `struct uffd_msg`: the event, then flags, address and thread.
    fn decode(&self, message: &[u8]) -> Option<Fault> {
        let word = |at: usize| Some(u64::from_ne_bytes(message.get(at..at + 8)?.try_into().ok()?));
        if message.first() != Some(&EVENT_PAGEFAULT) {
            return None;
        }
        let offset = word(16)?.checked_sub(self.start as u64)?;
        let thread = i32::from_ne_bytes(message.get(24..28)?.try_into().ok()?);
        (offset < self.len as u64).then_some(Fault { offset, thread, write: word(8)? & FAULT_WRITE != 0 })
    }

    /// The address of the page that a byte of the RAM lies in.
    fn page(&self, offset: u64) -> Option<usize> {
        let offset = usize::try_from(offset).ok()?;
        (offset < self.len).then(|| self.start + offset - offset % FRAME_SIZE as usize)
    }

    fn wake_range(&self, start: usize, len: usize) -> io::Result<()> {
        let arg = range(start, len);
        // SAFETY: the structure is the one this request takes; it changes no page.
        match unsafe { ioctl_with_ref(&self.fd, IOC_WAKE(), &arg) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn range(start: usize, len: usize) -> RangeArg {
    RangeArg { start: start as u64, len: len as u64 }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// A new descriptor that sees faults in the kernel too: KVM's are.
fn open() -> Result<OwnedFd, UserfaultError> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    let device = match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(device) => {
            // SAFETY: this request takes flags and makes a descriptor.
            let fd = unsafe { ioctl_with_val(&device, IOC_NEW(), flags.bits().into()) };
            if fd >= 0 {
                // SAFETY: the kernel has just made it for us alone.
                return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
            }
            io::Error::last_os_error()
        }
        Err(error) => error,
    };
    // SAFETY: the call only makes a descriptor; what is done with it is checked where it is done.
    let syscall = match unsafe { rustix::mm::userfaultfd(flags) } {
        Ok(fd) => return Ok(fd),
        Err(error) => error.into(),
    };
    // SAFETY: as above.
    let user_mode =
        unsafe { rustix::mm::userfaultfd(flags | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY)) }.is_ok();
    Err(UserfaultError::Denied { device, syscall, user_mode })
}

/// Asks for features; returns all that the kernel has.
fn handshake(fd: &OwnedFd, features: u64) -> Result<u64, UserfaultError> {
    let mut api = ApiArg { api: API, features, ioctls: 0 };
    // SAFETY: the structure is the one this request takes.
    if unsafe { ioctl_with_mut_ref(fd, IOC_API(), &mut api) } != 0 {
        return Err(UserfaultError::Refused { step: "agree on features", source: io::Error::last_os_error() });
    }
    Ok(api.features)
}
