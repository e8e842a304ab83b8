//! virtio from the driver's side: a device's registers (virtio-mmio version 2) and its split queues.
//!
//! A queue has one request in flight at a time, and its caller waits for it in a loop: the
//! guest has no interrupts. Rings and a page for requests lie in one block of RAM that the driver
//! allocated. Why not a crate: `virtio-drivers` gets its memory through functions without a `self`,
//! and so without the vCPU's allocator, and wants references to memory that is given away.

use crate::host::{Doorbell, Host};
use crate::memory::Memory;
use crate::shared::{PAGE_WORDS, Ram};
use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use llfree_agent_core::Refusal;
use shared_layout::{FRAME_SIZE, FrameId, Order};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");

/// Register offsets of virtio-mmio.
mod reg {
    pub(super) const MAGIC: u64 = 0x00;
    pub(super) const VERSION: u64 = 0x04;
    pub(super) const DEVICE_ID: u64 = 0x08;
    pub(super) const DEVICE_FEATURES: u64 = 0x10;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub(super) const DRIVER_FEATURES: u64 = 0x20;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub(super) const QUEUE_SEL: u64 = 0x30;
    pub(super) const QUEUE_SIZE_MAX: u64 = 0x34;
    pub(super) const QUEUE_SIZE: u64 = 0x38;
    pub(super) const QUEUE_READY: u64 = 0x44;
    pub(super) const QUEUE_NOTIFY: u64 = 0x50;
    pub(super) const INTERRUPT_STATUS: u64 = 0x60;
    pub(super) const INTERRUPT_ACK: u64 = 0x64;
    pub(super) const STATUS: u64 = 0x70;
    pub(super) const QUEUE_DESC: u64 = 0x80;
    pub(super) const QUEUE_DRIVER: u64 = 0x90;
    pub(super) const QUEUE_DEVICE: u64 = 0xa0;
    pub(super) const GENERATION: u64 = 0xfc;
    pub(super) const CONFIG: u64 = 0x100;
}

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;
/// Bit 32: not the legacy interface.
const F_VERSION_1: u64 = 1 << 32;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// In the available ring: do not interrupt.
const NO_INTERRUPT: u16 = 1;

/// Descriptors of a queue, at most.
const SIZE: u32 = 256;
/// Rings, followed by a page for the requests' contents.
const BLOCK: Order = match Order::new(2) {
    Some(order) => order,
    None => Order::BASE,
};
const AVAILABLE: u64 = FRAME_SIZE;
const USED: u64 = 2 * FRAME_SIZE;
const CONTENTS: u64 = 3 * FRAME_SIZE;
/// Looks at the used ring before the device's status is looked at, which costs an exit.
const PATIENCE: u32 = 1 << 18;

/// The device gave up on us, or we on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Broken;

/// A device's page of registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Device {
    page: u64,
}

impl Device {
    /// The device at this page, and its number in the standard; `None` if there is none.
    pub(crate) fn find<D: Doorbell>(host: &mut Host<D>, page: u64) -> Option<(Self, u32)> {
        let device = Self { page };
        let found = device.read(host, reg::MAGIC) == MAGIC && device.read(host, reg::VERSION) == 2;
        let id = if found { device.read(host, reg::DEVICE_ID) } else { 0 };
        (id != 0).then_some((device, id))
    }

    /// Resets it and settles on those of the features `wanted` that it has.
    pub(crate) fn begin<D: Doorbell>(self, host: &mut Host<D>, wanted: u64) -> Result<u64, Broken> {
        self.write(host, reg::STATUS, 0);
        self.write(host, reg::STATUS, ACKNOWLEDGE);
        self.write(host, reg::STATUS, ACKNOWLEDGE | DRIVER);
        let mut offered = 0;
        for page in 0..2 {
            self.write(host, reg::DEVICE_FEATURES_SEL, page);
            offered |= u64::from(self.read(host, reg::DEVICE_FEATURES)) << (32 * page);
        }
        let features = offered & (wanted | F_VERSION_1);
        for page in 0..2 {
            self.write(host, reg::DRIVER_FEATURES_SEL, page);
            self.write(host, reg::DRIVER_FEATURES, (features >> (32 * page)) as u32);
        }
        self.write(host, reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if features & F_VERSION_1 == 0 || self.read(host, reg::STATUS) & FEATURES_OK == 0 {
            self.write(host, reg::STATUS, FAILED);
            return Err(Broken);
        }
        Ok(features)
    }

    /// The queues are there: the device may work.
    pub(crate) fn ready<D: Doorbell>(self, host: &mut Host<D>) {
        self.write(host, reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Acknowledges what the device interrupted for.
    pub(crate) fn acknowledge<D: Doorbell>(self, host: &mut Host<D>) {
        let status = self.read(host, reg::INTERRUPT_STATUS);
        if status != 0 {
            self.write(host, reg::INTERRUPT_ACK, status);
        }
    }

    /// A word of its configuration.
    pub(crate) fn config<D: Doorbell>(self, host: &mut Host<D>, offset: u64) -> u32 {
        self.read(host, reg::CONFIG + offset)
    }

    /// Two words that belong together.
    pub(crate) fn config_long<D: Doorbell>(self, host: &mut Host<D>, offset: u64) -> u64 {
        loop {
            let before = self.read(host, reg::GENERATION);
            let (low, high) = (self.config(host, offset), self.config(host, offset + 4));
            if self.read(host, reg::GENERATION) == before {
                return u64::from(low) | u64::from(high) << 32;
            }
        }
    }

    /// Writes a word of its configuration.
    pub(crate) fn set_config<D: Doorbell>(self, host: &mut Host<D>, offset: u64, value: u32) {
        self.write(host, reg::CONFIG + offset, value);
    }

    fn read<D: Doorbell>(self, host: &mut Host<D>, register: u64) -> u32 {
        host.read_register(self.page + register)
    }

    fn write<D: Doorbell>(self, host: &mut Host<D>, register: u64, value: u32) {
        host.write_register(self.page + register, value);
    }

    fn write_long<D: Doorbell>(self, host: &mut Host<D>, register: u64, value: u64) {
        self.write(host, register, value as u32);
        self.write(host, register + 4, (value >> 32) as u32);
    }
}

/// A stretch of memory for the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffer {
    /// Guest-physical address.
    pub(crate) address: u64,
    pub(crate) bytes: u32,
    /// For the device to write.
    pub(crate) writable: bool,
}

/// A queue with at most one request under way.
#[derive(Debug)]
pub(crate) struct Queue {
    device: Device,
    index: u32,
    size: u16,
    /// Address of the block, which the queue owns forever.
    base: u64,
    /// Requests made so far.
    made: u16,
}

impl Queue {
    /// Sets a queue up; between [`Device::begin`] and [`Device::ready`]. `polled`: the device need
    /// not interrupt.
    pub(crate) fn new<D: Doorbell>(
        device: Device,
        memory: &mut Memory<'_, D>,
        index: u32,
        polled: bool,
    ) -> Result<Self, Broken> {
        device.write(&mut memory.host, reg::QUEUE_SEL, index);
        let size = device.read(&mut memory.host, reg::QUEUE_SIZE_MAX).min(SIZE);
        if !size.is_power_of_two() {
            return Err(Broken);
        }
        let block = memory.take(BLOCK).map_err(|_: Refusal| Broken)?;
        for frame in block.frame().0..block.frame().0 + BLOCK.frames() {
            // SAFETY: in the block that was just taken, and that is never given back.
            let page = unsafe { memory.page(FrameId(frame)) };
            for word in 0..PAGE_WORDS {
                page.store(word, 0);
            }
        }
        let base = memory.ram().address(block.frame());
        let queue = Self { device, index, size: size as u16, base, made: 0 };
        if polled {
            queue.half(AVAILABLE).store(NO_INTERRUPT, Ordering::Relaxed);
        }
        let host = &mut memory.host;
        device.write(host, reg::QUEUE_SIZE, size);
        device.write_long(host, reg::QUEUE_DESC, base);
        device.write_long(host, reg::QUEUE_DRIVER, base + AVAILABLE);
        device.write_long(host, reg::QUEUE_DEVICE, base + USED);
        device.write(host, reg::QUEUE_READY, 1);
        Ok(queue)
    }

    /// Address of the page for requests' contents.
    pub(crate) const fn contents(&self) -> u64 {
        self.base + CONTENTS
    }

    /// Writes a 32-bit word there, `index` below 1024.
    pub(crate) fn set_word(&mut self, index: usize, value: u32) {
        assert!(index < 1024);
        self.word(CONTENTS + 4 * index as u64).store(value, Ordering::Relaxed);
    }

    /// Writes a 16-bit word there, `index` below 2048.
    pub(crate) fn set_half(&mut self, index: usize, value: u16) {
        assert!(index < 2048);
        self.half(CONTENTS + 2 * index as u64).store(value, Ordering::Relaxed);
    }

    /// Reads a 16-bit word there, `index` below 2048.
    pub(crate) fn get_half(&self, index: usize) -> u16 {
        assert!(index < 2048);
        self.half(CONTENTS + 2 * index as u64).load(Ordering::Relaxed)
    }

    /// Whether the device is done with what was asked.
    pub(crate) fn is_done(&self) -> bool {
        // Acquire: a reader that sees the request used sees what the device wrote into it.
        self.half(USED + 2).load(Ordering::Acquire) == self.made
    }

    /// Makes a request of at most a queue's worth of buffers, while none is under way.
    pub(crate) fn ask<D: Doorbell>(&mut self, host: &mut Host<D>, buffers: &[Buffer]) {
        assert!(!buffers.is_empty() && buffers.len() <= usize::from(self.size));
        for (i, buffer) in buffers.iter().enumerate() {
            let descriptor = 16 * i as u64;
            let next = i + 1 < buffers.len();
            let flags = if next { NEXT } else { 0 } | if buffer.writable { WRITE } else { 0 };
            self.long(descriptor).store(buffer.address, Ordering::Relaxed);
            self.word(descriptor + 8).store(buffer.bytes, Ordering::Relaxed);
            self.half(descriptor + 12).store(flags, Ordering::Relaxed);
            self.half(descriptor + 14).store(if next { i as u16 + 1 } else { 0 }, Ordering::Relaxed);
        }
        let slot = u64::from(self.made % self.size);
        self.half(AVAILABLE + 4 + 2 * slot).store(0, Ordering::Relaxed);
        self.made = self.made.wrapping_add(1);
        // Release: a device that sees the request sees its descriptors and contents.
        self.half(AVAILABLE + 2).store(self.made, Ordering::Release);
        fence(Ordering::SeqCst);
        self.device.write(host, reg::QUEUE_NOTIFY, self.index);
    }

    /// Makes a request and waits until the device is done with it.
    pub(crate) fn call<D: Doorbell>(&mut self, host: &mut Host<D>, buffers: &[Buffer]) -> Result<(), Broken> {
        self.ask(host, buffers);
        loop {
            for _ in 0..PATIENCE {
                if self.is_done() {
                    return Ok(());
                }
                core::hint::spin_loop();
            }
            if self.device.read(host, reg::STATUS) & NEEDS_RESET != 0 {
                return Err(Broken);
            }
        }
    }

    fn half(&self, offset: u64) -> &AtomicU16 {
        assert!(offset + 2 <= BLOCK.bytes());
        // SAFETY: in the queue's own block by the line above; it is mapped, aligned as all offsets
        // here are, and only ever accessed atomically, as the device does too.
        unsafe { AtomicU16::from_ptr(with_exposed_provenance_mut((self.base + offset) as usize)) }
    }

    fn word(&self, offset: u64) -> &AtomicU32 {
        assert!(offset + 4 <= BLOCK.bytes());
        // SAFETY: as for `half`.
        unsafe { AtomicU32::from_ptr(with_exposed_provenance_mut((self.base + offset) as usize)) }
    }

    fn long(&self, offset: u64) -> &AtomicU64 {
        assert!(offset + 8 <= BLOCK.bytes());
        // SAFETY: as for `half`.
        unsafe { AtomicU64::from_ptr(with_exposed_provenance_mut((self.base + offset) as usize)) }
    }
}

/// The number of a frame as devices count: guest-physical.
pub(crate) fn page_number(ram: Ram, frame: FrameId) -> u32 {
    (ram.address(frame) / FRAME_SIZE) as u32
}
