//! A driver in a test: writes registers and rings as a guest would, well or badly.

use super::mmio::{QUEUE_NOTIFY, Transport};
use super::request::Buffer;
use super::request::Request;
use super::{DriverError, Served, Source, VirtioDevice};
use llfree_monitor::memory::{Backing, GuestRam};
use std::io::{ErrorKind, PipeReader, Read};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress};

/// All steps of an initialisation.
pub(super) const DRIVER_OK: u32 = 15;
pub(super) const NEEDS_RESET: u32 = 64;
/// Descriptors of the test's queues.
pub(super) const SIZE: u16 = 8;
const VERSION_1: u64 = 1 << 32;
/// Where queue 0 has its rings, and how far the next one is.
const RINGS: u64 = 0x10_0000;
const STRIDE: u64 = 0x3000;
/// Where contents of requests go.
pub(super) const CONTENTS: u64 = 0x18_0000;

/// A device and its driver.
pub(super) struct Driver {
    pub(super) device: Arc<Transport>,
    pub(super) ram: Arc<GuestRam>,
    pub(super) interrupts: Arc<AtomicU32>,
    made: [u16; 8],
}

impl Driver {
    /// RAM of `mib` MiB, and the device that `make` builds over it.
    pub(super) fn new(mib: u64, make: impl FnOnce(Arc<GuestRam>) -> Box<dyn VirtioDevice>) -> Self {
        Self::over(GuestRam::new(mib << 20, Backing::Anon).expect("small"), make)
    }

    /// The device that `make` builds over this RAM, of which the driver needs the first 2 MiB.
    pub(super) fn over(ram: GuestRam, make: impl FnOnce(Arc<GuestRam>) -> Box<dyn VirtioDevice>) -> Self {
        let ram = Arc::new(ram);
        let interrupts = Arc::new(AtomicU32::new(0));
        let count = interrupts.clone();
        let notifier = Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let device = Arc::new(Transport::new(make(ram.clone()), ram.clone(), notifier).expect("events"));
        Self { interrupts, ..Self::of(device, ram) }
    }

    /// A driver of this device, of which it needs the first 2 MiB of RAM. Interrupts are not counted.
    pub(super) fn of(device: Arc<Transport>, ram: Arc<GuestRam>) -> Self {
        Self { device, ram, interrupts: Arc::default(), made: [0; 8] }
    }

    pub(super) fn read(&self, register: u32) -> u32 {
        let mut word = [0; 4];
        self.device.read(register.into(), &mut word);
        u32::from_le_bytes(word)
    }

    pub(super) fn write(&self, register: u32, value: u32) {
        self.device.write(register.into(), &value.to_le_bytes());
    }

    pub(super) fn config(&self, offset: u32) -> u32 {
        self.read(reg::VIRTIO_MMIO_CONFIG + offset)
    }

    pub(super) fn status(&self) -> u32 {
        self.read(reg::VIRTIO_MMIO_STATUS)
    }

    /// Everything that the device offers.
    pub(super) fn offered(&self) -> u64 {
        let half = |page: u32| {
            self.write(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, page);
            u64::from(self.read(reg::VIRTIO_MMIO_DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    /// Up to the point where queues are set up.
    pub(super) fn negotiate(&self, features: u64) {
        for status in [0, 1, 3] {
            self.write(reg::VIRTIO_MMIO_STATUS, status);
        }
        for page in 0..2 {
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, page);
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, ((features | VERSION_1) >> (32 * page)) as u32);
        }
        self.write(reg::VIRTIO_MMIO_STATUS, 11);
    }

    /// Addresses of a queue's three rings.
    pub(super) fn rings(queue: usize) -> [u64; 3] {
        let base = RINGS + queue as u64 * STRIDE;
        [base, base + 0x1000, base + 0x2000]
    }

    /// Sets a queue up at these addresses.
    pub(super) fn set_queue(&self, queue: usize, rings: [u64; 3]) {
        self.write(reg::VIRTIO_MMIO_QUEUE_SEL, queue as u32);
        self.write(reg::VIRTIO_MMIO_QUEUE_NUM, SIZE.into());
        let registers =
            [reg::VIRTIO_MMIO_QUEUE_DESC_LOW, reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, reg::VIRTIO_MMIO_QUEUE_USED_LOW];
        for (register, address) in registers.into_iter().zip(rings) {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
    }

    /// Brings the device up with its first `queues` queues.
    pub(super) fn start(&mut self, features: u64, queues: usize) {
        self.made = [0; 8];
        self.negotiate(features);
        for queue in 0..queues {
            let rings = Self::rings(queue);
            rings.into_iter().for_each(|ring| self.put(ring, &[0; 0x800]));
            self.set_queue(queue, rings);
        }
        self.write(reg::VIRTIO_MMIO_STATUS, DRIVER_OK);
        assert_eq!(self.status(), DRIVER_OK);
    }

    /// Writes guest memory.
    pub(super) fn put(&self, address: u64, bytes: &[u8]) {
        self.ram.guest_memory().write_slice(bytes, GuestAddress(address)).expect("in RAM");
    }

    /// Writes words to where requests' contents go; the buffer that they make.
    pub(super) fn words(&self, words: &[u32]) -> Buffer {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.put(CONTENTS, &bytes);
        Buffer { address: CONTENTS, bytes: bytes.len() as u32, writable: false }
    }

    /// Puts a descriptor into a queue's table.
    pub(super) fn descriptor(&self, queue: usize, index: u16, buffer: Buffer, flags: u16, next: u16) {
        let at = Self::rings(queue)[0] + 16 * u64::from(index);
        self.put(at, &buffer.address.to_le_bytes());
        self.put(at + 8, &buffer.bytes.to_le_bytes());
        self.put(at + 12, &(flags | u16::from(buffer.writable) << 1).to_le_bytes());
        self.put(at + 14, &next.to_le_bytes());
    }

    /// Makes the chain that starts at `head` available without a notification.
    pub(super) fn add(&mut self, queue: usize, head: u16) {
        let available = Self::rings(queue)[1];
        let slot = u64::from(self.made[queue] % SIZE);
        self.put(available + 4 + 2 * slot, &head.to_le_bytes());
        self.made[queue] = self.made[queue].wrapping_add(1);
        // Release, for a device on another thread.
        let index = GuestAddress(available + 2);
        self.ram.guest_memory().store(self.made[queue], index, Ordering::Release).expect("in RAM");
    }

    /// Notifies the device, if it wants that for the last chain, as `EVENT_IDX` has it.
    pub(super) fn kick_if_wanted(&self, queue: usize) {
        std::sync::atomic::fence(Ordering::SeqCst);
        let event = GuestAddress(Self::rings(queue)[2] + 4 + 8 * u64::from(SIZE));
        let event: u16 = self.ram.guest_memory().load(event, Ordering::Acquire).expect("in RAM");
        if event.wrapping_add(1) == self.made[queue] {
            self.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, queue as u32);
        }
    }

    /// Offers the chain that starts at `head`, and has the device serve the queue.
    pub(super) fn offer(&mut self, queue: usize, head: u16) {
        self.add(queue, head);
        self.device.write(QUEUE_NOTIFY, &(queue as u32).to_le_bytes());
        self.device.serve(queue, || false);
    }

    /// Sends one request.
    pub(super) fn send(&mut self, queue: usize, buffers: &[Buffer]) {
        for (i, buffer) in buffers.iter().enumerate() {
            let last = i + 1 == buffers.len();
            self.descriptor(queue, i as u16, *buffer, u16::from(!last), i as u16 + 1);
        }
        self.offer(queue, 0);
    }

    /// Requests that the device gave back.
    pub(super) fn used(&self, queue: usize) -> u16 {
        self.ram.guest_memory().load(GuestAddress(Self::rings(queue)[2] + 2), Ordering::Acquire).expect("in RAM")
    }

    /// Asserts that the device counted this many errors of its driver and asks for a reset.
    pub(super) fn assert_driver_errors(&self, errors: u64) {
        assert_eq!(self.device.driver_errors(), errors);
        assert_ne!(self.status() & NEEDS_RESET, 0, "it asks for a reset");
    }
}

/// A device that takes everything, with as many bytes as it was offered.
pub(super) struct Echo;

impl VirtioDevice for Echo {
    fn id(&self) -> u32 {
        42
    }
    fn name(&self) -> &'static str {
        "echo"
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 16]
    }
    fn features(&self) -> u64 {
        1
    }
    fn start(&mut self, _: u64) {}
    fn reset(&mut self) {}
    fn config(&self) -> Vec<u8> {
        vec![1, 2, 3, 4, 5, 6]
    }
    fn write_config(&mut self, offset: u64, _: &[u8]) -> bool {
        offset == 0
    }
    fn serve(&mut self, _: usize, request: &Request<'_>) -> Result<Served, DriverError> {
        let bytes = request.readable(1 << 20)?;
        Ok(Served::Done(bytes.len() as u32))
    }
}

/// A device that fills each request with the next byte from a pipe, once there is one.
pub(super) struct Feed {
    pub(super) pipe: PipeReader,
    /// Requests that it was asked about, served or not.
    pub(super) asked: Arc<AtomicU32>,
}

impl VirtioDevice for Feed {
    fn id(&self) -> u32 {
        42
    }
    fn name(&self) -> &'static str {
        "feed"
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }
    fn features(&self) -> u64 {
        0
    }
    fn start(&mut self, _: u64) {}
    fn reset(&mut self) {}
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
    fn write_config(&mut self, _: u64, _: &[u8]) -> bool {
        false
    }
    fn serve(&mut self, _: usize, request: &Request<'_>) -> Result<Served, DriverError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let mut byte = [0];
        match self.pipe.read(&mut byte) {
            Ok(1) => request.write(&byte).map(Served::Done),
            Ok(_) => Ok(Served::Later),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Served::Later),
            Err(error) => panic!("{error}"),
        }
    }
    fn sources(&self) -> Vec<Source> {
        vec![Source { fd: self.pipe.as_raw_fd(), queue: 0 }]
    }
}
