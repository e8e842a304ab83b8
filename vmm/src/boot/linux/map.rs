//! The layout of a Linux guest's physical memory, and the memory map that its kernel gets.
//!
//! ```text
//! 0      64K     640K       1M                  3G or less     0xd0000000   0xfec00000  4G
//! +------+-------+----------+-------------------+ ... hole ... +------------+-----------+-----------+ ...
//! | boot | RAM   | reserved | RAM               |              | virtio-    | I/O and   | RAM, or   | platform
//! | data |       | (ACPI)   |                   |              | mmio pages | local APIC| its rest  | (reserved)
//! +------+-------+----------+-------------------+              +------------+-----------+-----------+
//! ```
//! The addresses are those that PCs have; nothing below 64 KiB is needed once the kernel runs.

use guest_abi::devices::DEVICE_BYTES;
use llfree_monitor::memory::AddressMap;
use shared_layout::HUGE_SIZE;

pub use llfree_monitor::memory::HOLE_START;
/// The first device's page; each is [`DEVICE_BYTES`] long.
pub const DEVICES_START: u64 = 0xd000_0000;
/// Registers of the I/O APIC.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Registers of each CPU's own APIC.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on Intel CPUs, above all devices.
pub const KVM_PAGES: u64 = 0xfffb_d000;

/// The GDT that the first CPU starts with.
pub(super) const GDT: u64 = 0x500;
/// boot_params, or the start info of a PVH kernel.
pub(super) const BOOT_PARAMS: u64 = 0x7000;
/// Page tables: one page per level.
pub(super) const PAGE_TABLES: u64 = 0x9000;
/// What PVH start info points to: modules, then the memory map.
pub(super) const PVH_MODULES: u64 = 0xc000;
pub(super) const PVH_MEMORY_MAP: u64 = 0xd000;
/// The command line.
pub(super) const COMMAND_LINE: u64 = 0x2_0000;
/// Room for it: more than any kernel takes.
pub(super) const COMMAND_LINE_BYTES: usize = 0x1_0000;
/// Where low memory ends for a kernel that expects a BIOS.
const LOW_END: u64 = 0x9_fc00;
/// ACPI tables: in the range that kernels search for the first one.
pub const ACPI_START: u64 = 0xe_0000;
/// RAM continues here.
pub(super) const HIGH_MEMORY: u64 = 0x10_0000;

/// Interrupt lines of the devices, in order: first those that a PC does not have, then those that
/// nothing else uses here. The serial line has 4, ACPI 9.
pub const DEVICE_GSIS: [u32; 13] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11];

/// The interrupt line for changes of the shared words: a PC's mouse.
pub const NOTICE_GSI: u32 = 12;

/// The address map of `bytes` of RAM, around the hole.
#[must_use]
pub fn address_map(bytes: u64) -> AddressMap {
    AddressMap::with_hole(bytes, bytes.min(HOLE_START))
}

/// The address map of RAM whose first part always stays with the guest, and whose rest is one range
/// that virtio-mem manages; both are multiples of 2 MiB, the first part at most [`HOLE_START`].
#[must_use]
pub fn address_map_for_hotplug(bytes: u64, boot: u64) -> AddressMap {
    AddressMap::with_hole(bytes, boot.min(HOLE_START) / HUGE_SIZE * HUGE_SIZE)
}

/// A device's page and interrupt line; `None` if there are no more.
#[must_use]
pub fn device(slot: usize) -> Option<(u64, u32)> {
    Some((DEVICES_START + slot as u64 * DEVICE_BYTES, *DEVICE_GSIS.get(slot)?))
}

/// What a range of addresses is, as e820 numbers it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Kind {
    /// The kernel's to use.
    Ram = 1,
    /// Not to be touched without knowing what is there.
    Reserved = 2,
}

/// One entry of the memory map that a kernel gets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length.
    pub bytes: u64,
    /// Its kind.
    pub kind: Kind,
}

/// The memory map: `ram` are the parts of RAM that are the kernel's from the start, in order,
/// `platform` the region that is shared with the host.
#[must_use]
pub fn e820(ram: &[std::ops::Range<u64>], platform: std::ops::Range<u64>) -> Vec<Range> {
    let range = |start: u64, end: u64, kind| Range { start, bytes: end.saturating_sub(start), kind };
    let mut map = vec![range(0, LOW_END, Kind::Ram), range(LOW_END, HIGH_MEMORY, Kind::Reserved)];
    map.extend(ram.iter().map(|part| range(part.start.max(HIGH_MEMORY), part.end, Kind::Ram)));
    map.push(range(platform.start, platform.end, Kind::Reserved));
    map.retain(|range| range.bytes > 0);
    map
}
