//! [`Header`]: the first page of the shared region, and [`Layout`], where all else lies.
//!
//! The header is written by the host before the guest starts and read by the guest. The plain
//! fields never change after that; the [`ControlWord`]s after them are updated by the host
//! while the guest runs and are read as atomics. The host never reads any of them back. Behind
//! those lie the [`GuestWord`]s, which the guest updates; what the host reads there is a claim.
//!
//! # A guest with an allocator of its own
//! A kernel such as Linux keeps its allocator, and shares what it knows about whole huge frames. With
//! [`FEATURE_OWN_ALLOCATOR`]:
//! - All entries start as taken and evicted ([`HUGE_EVICTED`](shared_layout::HugeEntry::HUGE_EVICTED)). Until its
//!   Hello says [`HELLO_OWN_ALLOCATOR`](crate::call::HELLO_OWN_ALLOCATOR), the guest has memory by touching it, and
//!   that is no violation.
//! - It gives a huge frame (`give_huge`) when all of it is free in its allocator, and takes it (`take_huge`)
//!   before any of it leaves. It uses no other transition, and the bitfields not at all. A frame that it never gives is
//!   never taken from it, so a guest that knows nothing of this loses nothing.
//! - Before Hello it gives what is free and asks for an install of everything else that it may touch from
//!   then on: afterwards a touch of a frame that was not installed is a violation, as for all guests. If the host
//!   had no memory for some of it, Hello says [`HELLO_BY_TOUCH`](crate::call::HELLO_BY_TOUCH) as well, touches stay
//!   what they were, and the guest asks again now and then; when it has all, it says Hello without that flag. Only with
//!   [`FEATURE_BY_TOUCH`]: without it, a guest asks once, and Hello says nothing of the rest.
//! - [`GuestWord`]s say what entries cannot.
//!
//! # When to raise [`ABI_VERSION`]
//! Raise it whenever a guest built against the old number would misread or miswrite a word: a
//! field moves, changes meaning or disappears, a call's words change. Do not raise it for what an
//! old guest can ignore: a new [`Call`](crate::Call), a new control word, a new field in space
//! that was zero; announce those with a feature bit. A part that changes its size needs none either, for the header has
//! offsets and sizes, and [`Header::check`] compares them. Host and guest must have the same number.

use crate::mailbox::Mailbox;
use shared_layout::table::TableLayout;
use shared_layout::units::FRAME_SIZE;
#[cfg(feature = "bytes")]
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use shared_layout::table::{HUGE_PER_TREE, MAX_HUGE_FRAMES};

/// `"LLFREEVM"` in memory order.
pub const MAGIC: u64 = u64::from_le_bytes(*b"LLFREEVM");
/// The number both sides must agree on; the module says when to raise it.
pub const ABI_VERSION: u32 = 2;
/// Bytes reserved for the header and the control words after it.
pub const HEADER_BYTES: u64 = FRAME_SIZE;
/// Name of the ELF note with which a guest image states its ABI (type [`NOTE_TYPE`], one u32).
pub const NOTE_NAME: &str = "llfree-vmm";
/// Type of that note.
pub const NOTE_TYPE: u32 = 1;

/// The doorbell also exists as I/O ports, for guests in ring 0.
pub const FEATURE_DOORBELL_PORT: u64 = 1 << 0;
/// There are [devices](crate::devices), and the fields and the control word that speak of them count.
pub const FEATURE_DEVICES: u64 = 1 << 1;
/// The table is for a guest with an [allocator of its own](self#a-guest-with-an-allocator-of-its-own).
pub const FEATURE_OWN_ALLOCATOR: u64 = 1 << 2;
/// There is an interrupt for changes of the [`ControlWord`]s, and [`Header::notice_gsi`] counts.
pub const FEATURE_NOTICES: u64 = 1 << 3;
// Bit 4 is kept for thin frames: free frames without memory inside a huge frame that is in use.
/// A hand-over may be in part: Hello takes [`HELLO_BY_TOUCH`](crate::call::HELLO_BY_TOUCH), and an install that fails
/// before the hand-over is complete leaves what its frames have.
pub const FEATURE_BY_TOUCH: u64 = 1 << 5;

/// The fixed part of the shared region's first page. Offsets count from the header's address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "bytes", derive(FromBytes, IntoBytes, Immutable, KnownLayout))]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: u64,
    /// [`ABI_VERSION`] of the host.
    pub abi_version: u32,
    /// [`HEADER_BYTES`].
    pub header_bytes: u32,
    /// Feature bits, `FEATURE_*`; unknown bits are to be ignored.
    pub features: u64,
    /// Guest-physical address of frame 0.
    pub ram_base: u64,
    /// Huge frames of RAM.
    pub huge_frames: u32,
    /// vCPUs, and so mailboxes.
    pub vcpus: u32,
    /// The start of the mailboxes.
    pub mailboxes_offset: u64,
    /// The start of the huge entries.
    pub entries_offset: u64,
    /// The start of the bitfields.
    pub bitfields_offset: u64,
    /// The start of the tenant area: the guest's own business.
    pub tenant_offset: u64,
    /// Bytes of the tenant area.
    pub tenant_bytes: u64,
    /// Bytes of the whole shared region.
    pub total_bytes: u64,
    /// Guest-physical address of the doorbell page.
    pub doorbell_gpa: u64,
    /// First I/O port of the doorbell, if [`FEATURE_DOORBELL_PORT`] is set.
    pub doorbell_port: u64,
    /// Frequency of the time-stamp counter in kHz, 0 if unknown.
    pub tsc_khz: u64,
    /// Guest-physical address of the first device's page, if [`FEATURE_DEVICES`] is set.
    pub devices_gpa: u64,
    /// Devices, each in a page of its own, one after the other.
    pub devices: u32,
    /// Huge frames of RAM below the hole in the guest's address space; the others follow from
    /// [`HIGH_RAM`] on. 0: there is no hole. Set if [`FEATURE_OWN_ALLOCATOR`] is.
    pub low_huge_frames: u32,
    /// The interrupt, by its number in ACPI (edge-triggered), that is raised when a [`ControlWord`] has
    /// changed, if [`FEATURE_NOTICES`] is set.
    pub notice_gsi: u32,
    /// Free for later; zero.
    pub reserved: u32,
}

/// Where RAM goes on after a hole, as a guest-physical address.
pub const HIGH_RAM: u64 = 4 << 30;

const _: () = assert!(size_of::<Header>() == 136);
const _: () = assert!(core::mem::offset_of!(Header, abi_version) == 8);
const _: () = assert!(core::mem::offset_of!(Header, ram_base) == 24);
const _: () = assert!(core::mem::offset_of!(Header, huge_frames) == 32);
const _: () = assert!(core::mem::offset_of!(Header, mailboxes_offset) == 40);
const _: () = assert!(core::mem::offset_of!(Header, doorbell_gpa) == 88);
const _: () = assert!(core::mem::offset_of!(Header, tsc_khz) == 104);
const _: () = assert!(core::mem::offset_of!(Header, devices_gpa) == 112);
const _: () = assert!(core::mem::offset_of!(Header, low_huge_frames) == 124);
const _: () = assert!(core::mem::offset_of!(Header, notice_gsi) == 128);

/// Words in the header page that the host updates while the guest runs: each is a u64.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum ControlWord {
    /// Huge frames that the guest may hold.
    Limit = 0x100,
    /// Huge frames that the host still wants: a guest that can, gives up caches.
    Wanted = 0x108,
    /// Raised after every release: hints about free memory are stale.
    ReturnEpoch = 0x110,
    /// Raised with every interrupt of a device: what a guest without interrupts polls.
    DeviceEvents = 0x118,
}

impl ControlWord {
    /// Bytes from the header's address.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self as u64
    }
}

const _: () = assert!(size_of::<Header>() as u64 <= ControlWord::Limit.offset());
const _: () = assert!(ControlWord::DeviceEvents.offset() + 8 <= GuestWord::Floor.offset());

/// Words in the header page that a guest with [`FEATURE_OWN_ALLOCATOR`] updates: each is a u64, zero at
/// first, and the guest's claim. The bytes from 0x1c0 to 0x200 are kept for thin frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum GuestWord {
    /// Huge frames that the host is asked to leave free: with less the guest would kill processes.
    Floor = 0x180,
    /// Free 4 KiB frames in huge frames that are not wholly free. Up to a second old.
    FragmentedFrames = 0x188,
    /// Held huge frames that the guest has noticed, and no longer counts as its memory.
    SetAside = 0x190,
}

impl GuestWord {
    /// Bytes from the header's address.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self as u64
    }
}

const _: () = assert!(GuestWord::SetAside.offset() + 8 <= HEADER_BYTES);

/// The most vCPUs one table describes.
pub const MAX_VCPUS: u32 = 1024;

/// Offsets of the parts of a shared region, computed from its geometry by both sides.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// Huge frames of RAM, `1..=MAX_HUGE_FRAMES`.
    pub huge_frames: u32,
    /// vCPUs, `1..=MAX_VCPUS`.
    pub vcpus: u32,
    /// The start of the mailboxes.
    pub mailboxes: u64,
    /// The start of the huge entries.
    pub entries: u64,
    /// The start of the bitfields.
    pub bitfields: u64,
    /// The start of the tenant area.
    pub tenant: u64,
    /// Bytes of the tenant area.
    pub tenant_bytes: u64,
    /// Bytes of the whole region, page aligned.
    pub total: u64,
}

impl Layout {
    /// The layout for a geometry; `None` if either number is zero or above its maximum.
    #[must_use]
    pub const fn new(huge_frames: u32, vcpus: u32) -> Option<Self> {
        if vcpus == 0 || vcpus > MAX_VCPUS {
            return None;
        }
        let mailboxes = HEADER_BYTES;
        let start = mailboxes + vcpus as u64 * size_of::<Mailbox>() as u64;
        // Whole pages, so that the parts can be mapped and protected one by one.
        match TableLayout::place(Self::HOST_WORDS, start, huge_frames, FRAME_SIZE) {
            Some(table) => Some(Self::of(vcpus, mailboxes, &table)),
            None => None,
        }
    }

    /// The place where [`TableLayout`] finds the words of its host.
    const HOST_WORDS: [u64; 3] =
        [ControlWord::Limit.offset(), ControlWord::Wanted.offset(), ControlWord::ReturnEpoch.offset()];

    const fn of(vcpus: u32, mailboxes: u64, table: &TableLayout) -> Self {
        let &TableLayout { huge_frames, entries, bitfields, tenant, tenant_bytes, total, .. } = table;
        Self { huge_frames, vcpus, mailboxes, entries, bitfields, tenant, tenant_bytes, total }
    }

    /// The frame table in this region, without what a VMM adds to it.
    #[must_use]
    pub const fn table(&self) -> TableLayout {
        let &Self { huge_frames, vcpus: _, mailboxes: _, entries, bitfields, tenant, tenant_bytes, total } = self;
        let [limit, wanted, return_epoch] = Self::HOST_WORDS;
        TableLayout { huge_frames, limit, wanted, return_epoch, entries, bitfields, tenant, tenant_bytes, total }
    }

    /// The start of the mailbox of `vcpu`; `None` if there is no such vCPU.
    #[must_use]
    pub const fn mailbox(&self, vcpu: u32) -> Option<u64> {
        if vcpu < self.vcpus { Some(self.mailboxes + vcpu as u64 * size_of::<Mailbox>() as u64) } else { None }
    }
}

impl Header {
    /// The header of a region laid out as `layout`, without the addresses that the VMM chooses.
    #[must_use]
    pub const fn new(layout: &Layout) -> Self {
        Self {
            magic: MAGIC,
            abi_version: ABI_VERSION,
            header_bytes: HEADER_BYTES as u32,
            features: 0,
            ram_base: 0,
            huge_frames: layout.huge_frames,
            vcpus: layout.vcpus,
            mailboxes_offset: layout.mailboxes,
            entries_offset: layout.entries,
            bitfields_offset: layout.bitfields,
            tenant_offset: layout.tenant,
            tenant_bytes: layout.tenant_bytes,
            total_bytes: layout.total,
            doorbell_gpa: 0,
            doorbell_port: 0,
            tsc_khz: 0,
            devices_gpa: 0,
            devices: 0,
            low_huge_frames: 0,
            notice_gsi: 0,
            reserved: 0,
        }
    }

    /// Guest: check a header that a host left, and rebuild its layout.
    ///
    /// # Errors
    /// The mismatch, with the number found; the layout is that of this crate or none.
    pub const fn check(&self) -> Result<Layout, HeaderError> {
        if self.magic != MAGIC {
            return Err(HeaderError::Magic(self.magic));
        }
        if self.abi_version != ABI_VERSION {
            return Err(HeaderError::AbiVersion(self.abi_version));
        }
        let Some(layout) = Layout::new(self.huge_frames, self.vcpus) else {
            return Err(HeaderError::Geometry);
        };
        if self.mailboxes_offset != layout.mailboxes
            || self.entries_offset != layout.entries
            || self.bitfields_offset != layout.bitfields
            || self.tenant_offset != layout.tenant
            || self.tenant_bytes != layout.tenant_bytes
            || self.total_bytes != layout.total
        {
            return Err(HeaderError::Geometry);
        }
        Ok(layout)
    }
}

/// Why a guest refuses a header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HeaderError {
    /// Not [`MAGIC`]: no header at all.
    Magic(u64),
    /// The host speaks this version, we [`ABI_VERSION`].
    AbiVersion(u32),
    /// Numbers that contradict each other.
    Geometry,
}

impl core::fmt::Display for HeaderError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Magic(found) => write!(f, "no table header: magic {found:#x}, expected {MAGIC:#x}"),
            Self::AbiVersion(host) => write!(f, "the host speaks ABI version {host}, this guest {ABI_VERSION}"),
            Self::Geometry => write!(f, "the header's offsets do not fit its geometry"),
        }
    }
}

impl core::error::Error for HeaderError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes_of_a_header() {
        let layout = Layout::new(8192, 2).expect("in range");
        let header = Header {
            doorbell_gpa: 0x4_1000_0000,
            tsc_khz: 2_500_000,
            devices_gpa: 0x4_1000_1000,
            devices: 3,
            low_huge_frames: 1536,
            notice_gsi: 12,
            ..Header::new(&layout)
        };
        #[rustfmt::skip]
        let golden: [u8; 136] = [
            b'L', b'L', b'F', b'R', b'E', b'E', b'V', b'M',
            2, 0, 0, 0,              0x00, 0x10, 0, 0,
            0, 0, 0, 0, 0, 0, 0, 0,
            0, 0, 0, 0, 0, 0, 0, 0,
            0x00, 0x20, 0, 0,        2, 0, 0, 0,
            0x00, 0x10, 0, 0, 0, 0, 0, 0,
            0x00, 0x20, 0, 0, 0, 0, 0, 0,
            0x00, 0x60, 0, 0, 0, 0, 0, 0,
            0x00, 0x60, 8, 0, 0, 0, 0, 0,
            0xc0, 0x02, 0, 0, 0, 0, 0, 0,
            0x00, 0x70, 8, 0, 0, 0, 0, 0,
            0, 0, 0, 0x10, 4, 0, 0, 0,
            0, 0, 0, 0, 0, 0, 0, 0,
            0xa0, 0x25, 0x26, 0, 0, 0, 0, 0,
            0, 0x10, 0, 0x10, 4, 0, 0, 0,
            3, 0, 0, 0,              0, 6, 0, 0,
            12, 0, 0, 0,             0, 0, 0, 0,
        ];
        assert_eq!(header.as_bytes(), golden);
        assert_eq!(header.check(), Ok(layout));
    }

    #[test]
    fn a_foreign_header_is_refused_with_its_numbers() {
        let good = Header::new(&Layout::new(512, 1).expect("in range"));
        assert_eq!(Header { magic: 7, ..good }.check(), Err(HeaderError::Magic(7)));
        assert_eq!(Header { abi_version: 9, ..good }.check(), Err(HeaderError::AbiVersion(9)));
        assert_eq!(Header { huge_frames: 0, ..good }.check(), Err(HeaderError::Geometry));
        assert_eq!(Header { entries_offset: 0, ..good }.check(), Err(HeaderError::Geometry));
    }

    #[test]
    fn parts_of_a_layout_do_not_overlap() {
        for huge in [1, 15, 16, 17, 512, 8192, MAX_HUGE_FRAMES] {
            for vcpus in [1, 2, 8, 9, MAX_VCPUS] {
                let l = Layout::new(huge, vcpus).expect("in range");
                assert!(l.mailbox(vcpus - 1).expect("last vCPU") + 512 <= l.entries);
                assert_eq!(l.mailbox(vcpus), None);
                assert!(l.entries + u64::from(huge) * 2 <= l.bitfields);
                assert!(l.bitfields + u64::from(huge) * 64 <= l.tenant);
                assert!(l.tenant + l.tenant_bytes <= l.total);
                assert_eq!(l.table().hints() + TableLayout::hint_words(huge) * 2, l.tenant + l.tenant_bytes);
            }
        }
        assert_eq!(Layout::new(0, 1), None);
        assert_eq!(Layout::new(1, 0), None);
        assert_eq!(Layout::new(MAX_HUGE_FRAMES + 1, 1), None);
    }
}
