//! [`Platform`]: the one mapping beside RAM that a VMM shares with its guest.
//!
//! ```text
//! 0          RAM        next GiB                                                          doorbell, devices
//! +-------------+ ...  +---------------+---------+------------------------+-------------+---------+
//! | RAM's slot  |      | shared region | vectors | vCPU 0 | vCPU 1 | ...  | page tables | no slot |
//! +-------------+      +---------------+---------+------------------------+-------------+---------+
//!                      |<------------------ the platform's slot ---------------------->|
//! a vCPU's block: descriptors | guard | exception stack | guard | stack, 64 KiB
//! ```
//! The guest reaches the shared region, its stacks, the doorbell page and the devices' pages; the rest
//! is mapped for ring 0 or, like guards and page tables, not at all. Once the guest has started, the
//! host treats all of it as the guest's claims: it is read word by word, through atomics, each word
//! once, and no offset or count is ever taken from it.

use super::paging::{Access, Tables, tables_needed};
use super::{BootError, cpu};
use guest_abi::call::{DOORBELL_BYTES, DOORBELL_PORT};
use guest_abi::devices::{DEVICE_BYTES, DEVICE_SLOTS};
use guest_abi::header::{
    FEATURE_BY_TOUCH, FEATURE_DEVICES, FEATURE_DOORBELL_PORT, FEATURE_NOTICES, FEATURE_OWN_ALLOCATOR,
};
use guest_abi::mailbox::{Mailbox, WORDS, Words};
use guest_abi::{ControlWord, GuestWord, Header, Layout};
use kvm_ioctls::VcpuFd;
use llfree_monitor::{Region, Table};
use shared_layout::{FRAME_SIZE, HUGE_SIZE};
use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use zerocopy::IntoBytes;

const ALIGNMENT: u64 = 1 << 30;
/// What lies after the slot: the doorbell, then the devices.
const MMIO_BYTES: u64 = DOORBELL_BYTES + DEVICE_SLOTS as u64 * DEVICE_BYTES;

/// Offsets in a vCPU's block; the pages between them are guards.
const EXCEPTION_STACK: u64 = 2 * FRAME_SIZE;
const EXCEPTION_STACK_TOP: u64 = EXCEPTION_STACK + FRAME_SIZE;
const STACK: u64 = EXCEPTION_STACK_TOP + FRAME_SIZE;
const BLOCK_BYTES: u64 = STACK + STACK_BYTES;

/// Bytes of the stack that a vCPU starts with.
pub const STACK_BYTES: u64 = 64 << 10;

/// The platform region of one VM: shared region, boot data, and the doorbell's address.
#[derive(Debug)]
pub struct Platform {
    region: Arc<Region>,
    /// The table at the start of it.
    table: Table,
    layout: Layout,
    gpa: u64,
    /// Offsets from `gpa`, in the order of the picture above.
    vectors: u64,
    blocks: u64,
    tables: u64,
}

impl Platform {
    /// Maps and fills the region for `ram_bytes` of RAM at guest-physical address 0. Every huge
    /// frame starts free and evicted, the control words start as zero.
    ///
    /// # Errors
    /// Numbers out of range, an address width that is too small, or no room in this process.
    pub fn new(ram_bytes: u64, vcpus: u32, address_bits: u8) -> Result<Self, BootError> {
        let platform = Self::map(ram_bytes, ram_bytes, vcpus, address_bits, true)?;
        platform.write_boot_data();
        platform.write_page_tables(ram_bytes);
        Ok(platform)
    }

    /// The same for a guest that boots on its own and has its own page tables: only the shared region,
    /// above `ram_end`, below which the guest's address space has `ram_bytes` of RAM.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn above(ram_end: u64, ram_bytes: u64, vcpus: u32, address_bits: u8) -> Result<Self, BootError> {
        Self::map(ram_end, ram_bytes, vcpus, address_bits, false)
    }

    /// Where the region lies, given the end of RAM.
    #[must_use]
    pub fn place(ram_end: u64) -> u64 {
        ram_end.next_multiple_of(ALIGNMENT)
    }

    fn map(
        ram_end: u64,
        ram_bytes: u64,
        vcpus: u32,
        address_bits: u8,
        has_page_tables: bool,
    ) -> Result<Self, BootError> {
        let huge_frames = u32::try_from(ram_bytes / HUGE_SIZE).unwrap_or(u32::MAX);
        if !ram_bytes.is_multiple_of(HUGE_SIZE) || huge_frames < 2 || Layout::new(huge_frames, 1).is_none() {
            return Err(BootError::RamSize { ram_bytes });
        }
        let layout = Layout::new(huge_frames, vcpus).ok_or(BootError::VcpuCount { vcpus })?;

        // No sum below overflows: RAM is at most 2^46 bytes, the rest less than 2^34.
        let gpa = Self::place(ram_end);
        let vectors = layout.total;
        let blocks = vectors + FRAME_SIZE;
        let tables = blocks + u64::from(vcpus) * BLOCK_BYTES;
        // The doorbell lies after the tables and needs tables itself: grow until they suffice.
        let mut table_count = 0;
        loop {
            if !has_page_tables {
                break;
            }
            let needed = tables_needed(ram_bytes, gpa, tables + table_count * FRAME_SIZE + MMIO_BYTES);
            if needed <= table_count {
                break;
            }
            table_count = needed;
        }
        let bytes = tables + table_count * FRAME_SIZE;
        let end = gpa + bytes + MMIO_BYTES;
        let limit = 1_u64.checked_shl(u32::from(address_bits)).unwrap_or(u64::MAX);
        if end > limit {
            return Err(BootError::AddressWidth { ram_bytes, end, address_bits, limit });
        }

        let region = Arc::new(Region::anonymous(bytes as usize).map_err(|source| BootError::Map { bytes, source })?);
        let table = Table::new(region.clone(), layout.table()).expect("the region begins with what the layout takes");
        let platform = Self { region, table, layout, gpa, vectors, blocks, tables };
        platform.write_header();
        platform.table.clear();
        Ok(platform)
    }

    fn write_header(&self) {
        let header = Header {
            features: FEATURE_DOORBELL_PORT,
            doorbell_gpa: self.doorbell_gpa(),
            doorbell_port: u64::from(DOORBELL_PORT),
            ..Header::new(&self.layout)
        };
        self.write(0, header.as_bytes());
    }

    fn write_boot_data(&self) {
        self.write(self.vectors, &cpu::vectors(self.gpa + self.vectors, self.doorbell_gpa()));
        for block in self.vcpu_blocks() {
            self.write(block, cpu::gdt(self.gpa + block + cpu::TSS_OFFSET).as_bytes());
            self.write(block + cpu::TSS_OFFSET, &cpu::tss(self.gpa + block + EXCEPTION_STACK_TOP));
        }
    }

    fn write_page_tables(&self, ram_bytes: u64) {
        let words = self.region.atomics(self.tables, (self.region.bytes() - self.tables as usize) / size_of::<u64>());
        let mut tables = Tables::new(words, self.gpa + self.tables);
        // The first huge frame stays unmapped: a null pointer faults.
        for address in (HUGE_SIZE..ram_bytes).step_by(HUGE_SIZE as usize) {
            tables.map_huge(address);
        }
        let mut map = |offset: u64, bytes: u64, access| {
            for page in (offset..offset + bytes).step_by(FRAME_SIZE as usize) {
                tables.map_page(self.gpa + page, access);
            }
        };
        map(0, self.layout.total, Access::User);
        map(self.vectors, FRAME_SIZE, Access::KernelCode);
        for block in self.vcpu_blocks() {
            map(block, FRAME_SIZE, Access::Kernel);
            map(block + EXCEPTION_STACK, FRAME_SIZE, Access::Kernel);
            map(block + STACK, STACK_BYTES, Access::User);
        }
        map(self.region.bytes() as u64, MMIO_BYTES, Access::User);
    }

    fn vcpu_blocks(&self) -> impl Iterator<Item = u64> {
        (0..u64::from(self.layout.vcpus)).map(|vcpu| self.blocks + vcpu * BLOCK_BYTES)
    }

    fn block(&self, index: u32) -> Result<u64, BootError> {
        let vcpus = self.layout.vcpus;
        if index >= vcpus {
            return Err(BootError::NoVcpu { index, vcpus });
        }
        Ok(self.blocks + u64::from(index) * BLOCK_BYTES)
    }

    /// Where the parts of the shared region lie.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Guest-physical address of the header, where the shared region and the memslot start.
    #[must_use]
    pub fn header_gpa(&self) -> u64 {
        self.gpa
    }

    /// Guest-physical address of the doorbell page, which is in no memslot.
    #[must_use]
    pub fn doorbell_gpa(&self) -> u64 {
        self.gpa + self.region.bytes() as u64
    }

    /// Guest-physical address of the first device's page; these are in no memslot either.
    #[must_use]
    pub fn devices_gpa(&self) -> u64 {
        self.doorbell_gpa() + DOORBELL_BYTES
    }

    /// The memslot to register: guest-physical address, host address, bytes. It must be gone from
    /// the VM before this value is dropped.
    #[must_use]
    pub fn memslot(&self) -> (u64, u64, u64) {
        (self.gpa, self.region.host_address(), self.region.bytes() as u64)
    }

    /// Tells the guest the frequency of its time-stamp counter. Only before the guest starts: it
    /// reads the header once.
    pub fn set_tsc_khz(&self, khz: u64) {
        self.region.word(offset_of!(Header, tsc_khz) as u64).store(khz, Ordering::Relaxed);
    }

    /// Tells the guest how many devices there are. Only before the guest starts, as above.
    pub fn set_devices(&self, count: u32) {
        self.region.word(offset_of!(Header, features) as u64).fetch_or(FEATURE_DEVICES, Ordering::Relaxed);
        self.region.word(offset_of!(Header, devices_gpa) as u64).store(self.devices_gpa(), Ordering::Relaxed);
        self.region.word(offset_of!(Header, devices) as u64).store(u64::from(count), Ordering::Relaxed);
    }

    /// Tells the guest how many interrupts its devices raised, at any time.
    pub fn set_device_events(&self, number: u64) {
        // Release: a guest that sees a new number sees what its devices wrote before.
        self.region.word(ControlWord::DeviceEvents.offset()).store(number, Ordering::Release);
    }

    /// Offers the table to a guest with an allocator of its own, which counts `low_huge_frames` of RAM below a
    /// hole (0: no hole), and gets an interrupt when control words change. Only before the guest starts, as above.
    pub fn offer_to_own_allocator(&self, low_huge_frames: u32, notice_gsi: u32) {
        let features = FEATURE_OWN_ALLOCATOR | FEATURE_NOTICES | FEATURE_BY_TOUCH;
        self.region.word(offset_of!(Header, features) as u64).fetch_or(features, Ordering::Relaxed);
        self.write(offset_of!(Header, low_huge_frames) as u64, &low_huge_frames.to_le_bytes());
        self.write(offset_of!(Header, notice_gsi) as u64, &notice_gsi.to_le_bytes());
    }

    /// What the guest says in one of its words: a claim.
    #[must_use]
    pub fn guest_word(&self, word: GuestWord) -> u64 {
        self.region.word(word.offset()).load(Ordering::Relaxed)
    }

    /// The table in the shared region, as the monitor reaches it.
    #[must_use]
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// A copy of the vCPU's request, each word read once; `None` if there is no such vCPU.
    #[must_use]
    pub fn read_request(&self, vcpu: u32) -> Option<Words> {
        // The vCPU is stopped in its doorbell exit, and the exit orders its writes before our reads; a
        // word that another vCPU writes meanwhile only confuses that guest.
        let request = self.half(vcpu, offset_of!(Mailbox, request))?;
        Some(std::array::from_fn(|i| request[i].load(Ordering::Relaxed)))
    }

    /// Puts a reply into the vCPU's mailbox; `false` if there is no such vCPU.
    #[must_use]
    pub fn write_reply(&self, vcpu: u32, reply: &Words) -> bool {
        let Some(half) = self.half(vcpu, offset_of!(Mailbox, reply)) else { return false };
        for (word, value) in half.iter().zip(reply) {
            word.store(*value, Ordering::Relaxed);
        }
        true
    }

    fn half(&self, vcpu: u32, offset: usize) -> Option<&[AtomicU64]> {
        Some(self.region.atomics(self.layout.mailbox(vcpu)? + offset as u64, WORDS))
    }

    /// Every byte of the shared region, for tests that play a hostile guest.
    #[must_use]
    pub fn shared_bytes(&self) -> &[AtomicU8] {
        self.region.atomics(0, self.layout.total as usize)
    }

    /// Puts vCPU `index` at `entry` in ring 3: RDI is the header's address, RSI the index, RSP the
    /// end of its own stack, aligned as for a function that was just called (its return address is in
    /// the null page). Its CPUID must be set before.
    ///
    /// # Errors
    /// No such vCPU, or KVM refuses a register.
    pub fn enter(&self, vcpu_fd: &VcpuFd, index: u32, entry: u64) -> Result<(), BootError> {
        let block = self.block(index)?;
        // The return address; it must be reset to zero if this vCPU ran before.
        let stack = block + BLOCK_BYTES - 8;
        self.region.word(stack).store(0, Ordering::Relaxed);
        let start = cpu::Start {
            page_tables: self.gpa + self.tables,
            gdt: self.gpa + block,
            idt: self.gpa + self.vectors,
            entry,
            stack: self.gpa + stack,
            arguments: [self.gpa, u64::from(index)],
        };
        cpu::enter(vcpu_fd, &start)
    }

    /// The last `N` words of the vCPU's exception stack: what its first exception pushed.
    pub(super) fn exception_words<const N: usize>(&self, index: u32) -> Result<[u64; N], BootError> {
        let top = self.block(index)? + EXCEPTION_STACK_TOP;
        let words = self.region.atomics::<AtomicU64>(top - N as u64 * 8, N);
        Ok(std::array::from_fn(|i| words[i].load(Ordering::Relaxed)))
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        for (to, from) in self.region.atomics::<AtomicU8>(offset, bytes.len()).iter().zip(bytes) {
            to.store(*from, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared_layout::HugeEntry;
    use shared_layout::table::MAX_HUGE_FRAMES;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_header_is_what_a_guest_checks() {
        let platform = Platform::new(64 << 20, 2, 40).expect("small");
        platform.set_tsc_khz(2_500_000);
        let bytes: Vec<u8> =
            platform.shared_bytes()[..size_of::<Header>()].iter().map(|b| b.load(Ordering::Relaxed)).collect();
        let header: Header = zerocopy::FromBytes::read_from_bytes(&bytes).expect("same size");
        assert_eq!(header.check().as_ref(), Ok(platform.layout()));
        assert_eq!(header.features, FEATURE_DOORBELL_PORT);
        assert_eq!((header.ram_base, header.huge_frames, header.vcpus), (0, 32, 2));
        assert_eq!((header.doorbell_port, header.tsc_khz), (u64::from(DOORBELL_PORT), 2_500_000));
        let (gpa, _, bytes) = platform.memslot();
        assert_eq!((gpa, header.doorbell_gpa), (GIB, gpa + bytes));
    }

    #[test]
    fn an_own_allocator_finds_what_it_needs_in_the_header() {
        let platform = Platform::above(5 * GIB, 4 * GIB, 2, 40).expect("small");
        platform.offer_to_own_allocator(1536, 12);
        let bytes: Vec<u8> =
            platform.shared_bytes()[..size_of::<Header>()].iter().map(|b| b.load(Ordering::Relaxed)).collect();
        let header: Header = zerocopy::FromBytes::read_from_bytes(&bytes).expect("same size");
        let offered = FEATURE_DOORBELL_PORT | FEATURE_OWN_ALLOCATOR | FEATURE_NOTICES | FEATURE_BY_TOUCH;
        assert_eq!(header.features, offered);
        assert_eq!((header.low_huge_frames, header.notice_gsi, header.devices), (1536, 12, 0));
        assert_eq!(header.check().as_ref(), Ok(platform.layout()));
        platform.shared_bytes()[GuestWord::Floor.offset() as usize].store(7, Ordering::Relaxed);
        assert_eq!((platform.guest_word(GuestWord::Floor), platform.guest_word(GuestWord::SetAside)), (7, 0));
    }

    #[test]
    fn every_frame_starts_free_and_evicted() {
        let platform = Platform::new(GIB, 1, 40).expect("small");
        assert_eq!(platform.table().entries().len(), 512);
        assert!(platform.table().entries().iter().all(|e| e.load(Ordering::Relaxed) == HugeEntry::FREE_EVICTED.bits()));
        assert_eq!(platform.table().bitfields().len(), 512 * 8);
        assert!(platform.table().bitfields().iter().all(|word| word.load(Ordering::Relaxed) == 0));
    }

    #[test]
    fn a_terabyte_and_more_has_page_tables() {
        for ram in [16 * GIB, 1 << 40, (3 << 40) + HUGE_SIZE] {
            let platform = Platform::new(ram, 3, 46).expect("fits 46 bits");
            assert_eq!(platform.header_gpa(), ram.next_multiple_of(GIB));
            assert_eq!(platform.table().entries().len() as u64, ram / HUGE_SIZE);
        }
    }

    #[test]
    fn memory_beyond_the_address_width_is_refused_with_both_numbers() {
        let text = Platform::new(16 * GIB, 1, 34).expect_err("too wide").to_string();
        assert!(text.contains("17179869184 bytes") && text.contains("34 address bits"), "{text}");
        assert!(Platform::new(16 * GIB, 1, 35).is_ok());
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        for ram in [0, HUGE_SIZE, 3 << 20, (u64::from(MAX_HUGE_FRAMES) + 1) * HUGE_SIZE, u64::MAX] {
            assert!(matches!(Platform::new(ram, 1, 52), Err(BootError::RamSize { ram_bytes }) if ram_bytes == ram));
        }
        for count in [0, 1025] {
            assert!(matches!(Platform::new(GIB, count, 52), Err(BootError::VcpuCount { vcpus }) if vcpus == count));
        }
    }

    #[test]
    fn mailboxes_beyond_the_last_vcpu_do_not_exist() {
        let platform = Platform::new(64 << 20, 2, 40).expect("small");
        assert!(platform.read_request(1).is_some() && platform.read_request(2).is_none());
        assert!(platform.write_reply(1, &[7; WORDS]) && !platform.write_reply(2, &[7; WORDS]));
        assert_eq!(platform.read_request(1), Some([0; WORDS]));
    }
}
