//! A look at what the host shares: the header that the kernel's command line names, and the
//! doorbell, by its page and by its ports.
//!
//! What a kernel that shares its allocator would do, done by root through `/dev/mem` and
//! `/dev/port`. Nothing but the mailbox of vCPU 0 is written.

use guest_abi::call::DOORBELL_BYTES;
use guest_abi::header::{ABI_VERSION, HEADER_BYTES, HeaderError};
use guest_abi::mailbox::{Mailbox, WORDS};
use guest_abi::{Call, Header, Layout, Request, Status};
use rustix::mm::{MapFlags, ProtFlags};
use rustix::thread::CpuSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::mem::offset_of;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::ptr;

/// The kernel parameter with the header's address.
pub const PARAMETER: &str = "llfree.header";
/// A status that no host writes, to tell a reply from none.
const NO_REPLY: u64 = 0x6e6f_2072_6570_6c79;

/// The mistake.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// The command line does not say where.
    #[error("the kernel's command line has no {PARAMETER}=ADDRESS; this VM shares no table")]
    NoParameter,
    /// Its value is not an address.
    #[error("{PARAMETER}={0} on the kernel's command line is not the address of a page; write it like 0x40000000")]
    BadParameter(String),
    /// A file of the kernel that cannot be used.
    #[error("cannot use {0}; this needs root")]
    File(&'static str, #[source] io::Error),
    /// A range that cannot be mapped.
    #[error("cannot map {bytes} bytes at {address:#x}; the memory map has to call them reserved")]
    Map {
        /// Its start.
        address: u64,
        /// Its length.
        bytes: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No header, or another's.
    #[error("there is no header of this ABI at {0:#x}")]
    Header(u64, #[source] HeaderError),
    /// The host answered otherwise than it should.
    #[error("the doorbell, rung by {way}, answered {found:#x} instead of 0 for Ok")]
    Answer {
        /// The way that it was rung.
        way: &'static str,
        /// Its answer.
        found: u64,
    },
}

/// A name, and how to ring at a call's offset.
type Way<'a> = (&'static str, &'a dyn Fn(u64) -> io::Result<()>);

/// Checks all of it; what it saw, in lines.
///
/// # Errors
/// The first [`LookError`].
pub fn look() -> Result<Vec<String>, LookError> {
    let cmdline = fs::read_to_string("/proc/cmdline").map_err(|error| LookError::File("/proc/cmdline", error))?;
    let address = address_in(&cmdline)?;
    let memory = open("/dev/mem")?;
    let page = Mapping::new(&memory, address, HEADER_BYTES)?;
    let header: Header = zerocopy::transmute!(page.read::<{ size_of::<Header>() / 8 }>(0));
    let layout = header.check().map_err(|error| LookError::Header(address, error))?;
    let mut lines = vec![format!(
        "header at {address:#x}: magic and ABI version {} are right, {} huge frames, {} vCPUs",
        header.abi_version, header.huge_frames, header.vcpus
    )];
    // The host looks at the mailbox of the vCPU that rings.
    let mut first = CpuSet::new();
    first.set(0);
    rustix::thread::sched_setaffinity(None, &first).map_err(|error| LookError::File("CPU 0", error.into()))?;
    let mailbox = Mapping::new(&memory, address, layout.entries)?;
    let doorbell = Mapping::new(&memory, header.doorbell_gpa, DOORBELL_BYTES)?;
    let ports = open("/dev/port")?;
    let by_page = |call: u64| {
        doorbell.write(call, 1);
        Ok(())
    };
    // A byte, as that is how the kernel's file rings; the value means nothing.
    let by_port = |call: u64| ports.write_all_at(&[1], header.doorbell_port + call / 8);
    let ways: [Way<'_>; 2] = [("its page", &by_page), ("its port", &by_port)];
    for (way, ring) in ways {
        say_hello(&mailbox, &layout);
        ring(Call::Hello as u64).map_err(|error| LookError::File("/dev/port", error))?;
        let found = mailbox.read::<1>(reply(&layout))[0];
        if found != Status::Ok as u64 {
            return Err(LookError::Answer { way, found });
        }
        lines.push(format!("doorbell by {way}: Hello with ABI version {ABI_VERSION} is answered {:?}", Status::Ok));
    }
    Ok(lines)
}

/// The address on a kernel's command line.
fn address_in(cmdline: &str) -> Result<u64, LookError> {
    let found = cmdline.split_whitespace().find_map(|word| word.strip_prefix(PARAMETER)?.strip_prefix('='));
    let text = found.ok_or(LookError::NoParameter)?;
    let address = text.strip_prefix("0x").and_then(|digits| u64::from_str_radix(digits, 16).ok());
    address
        .filter(|address| address.is_multiple_of(HEADER_BYTES))
        .ok_or_else(|| LookError::BadParameter(text.to_owned()))
}

fn open(path: &'static str) -> Result<File, LookError> {
    let flags = rustix::fs::OFlags::SYNC.bits().cast_signed();
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
    file.map_err(|error| LookError::File(path, error))
}

/// Fills the mailbox of vCPU 0 with a greeting and spoils the last reply.
fn say_hello(mailbox: &Mapping, layout: &Layout) {
    let (_, words) = Request::Hello { abi_version: ABI_VERSION, flags: 0 }.encode();
    for (index, word) in words.iter().enumerate() {
        mailbox.write(layout.mailboxes + index as u64 * 8, *word);
    }
    mailbox.write(reply(layout), NO_REPLY);
}

const fn reply(layout: &Layout) -> u64 {
    layout.mailboxes + offset_of!(Mailbox, reply) as u64
}

const _: () = assert!(offset_of!(Mailbox, reply) == WORDS * 8);

/// Physical memory that the host reads and writes as well: volatile accesses only.
struct Mapping {
    base: *mut u8,
    bytes: u64,
}

impl Mapping {
    fn new(memory: &File, address: u64, bytes: u64) -> Result<Self, LookError> {
        let (flags, access) = (MapFlags::SHARED, ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: a new mapping wherever the kernel likes; its physical memory does not belong to this process.
        let base = unsafe { rustix::mm::mmap(ptr::null_mut(), bytes as usize, access, flags, memory, address) };
        let base = base.map_err(|error| LookError::Map { address, bytes, source: error.into() })?;
        Ok(Self { base: base.cast(), bytes })
    }

    fn word(&self, offset: u64) -> *mut u64 {
        assert!(offset.is_multiple_of(8) && offset < self.bytes, "{offset:#x} of {:#x}", self.bytes);
        // SAFETY: within the mapping by the assertion.
        unsafe { self.base.add(offset as usize) }.cast()
    }

    fn read<const N: usize>(&self, offset: u64) -> [u64; N] {
        // SAFETY: within the mapping and aligned, by `word`.
        std::array::from_fn(|index| unsafe { self.word(offset + index as u64 * 8).read_volatile() })
    }

    fn write(&self, offset: u64, value: u64) {
        // SAFETY: within the mapping and aligned, by `word`.
        unsafe { self.word(offset).write_volatile(value) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and lent to nobody.
        let unmapped = unsafe { rustix::mm::munmap(self.base.cast(), self.bytes as usize) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_read_from_a_command_line() {
        assert_eq!(address_in("console=ttyS0 llfree.header=0x140000000 quiet\n").ok(), Some(0x1_4000_0000));
        assert!(matches!(address_in("console=ttyS0 llfree.headers=0x1000"), Err(LookError::NoParameter)));
        for wrong in ["", "0x", "4096", "0x1001", "0x1ffffffffffffffff"] {
            let cmdline = format!("llfree.header={wrong}");
            assert!(matches!(address_in(&cmdline), Err(LookError::BadParameter(text)) if text == wrong), "{wrong}");
        }
    }

    #[test]
    fn a_mailbox_is_greeted_and_its_old_reply_is_gone() {
        let file = tempfile::tempfile().expect("a file");
        let layout = Layout::new(512, 1).expect("in range");
        file.set_len(layout.entries).expect("room");
        let mailbox = Mapping::new(&file, 0, layout.entries).expect("a mapping");
        say_hello(&mailbox, &layout);
        assert_eq!(mailbox.read::<2>(layout.mailboxes), [u64::from(ABI_VERSION), 0]);
        assert_eq!(mailbox.read::<1>(reply(&layout)), [NO_REPLY]);
        assert_eq!(Status::from_word(NO_REPLY), None);
    }
}
