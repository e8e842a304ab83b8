//! The driver of virtio-mem: brings plugged blocks of 2 MiB to the allocator, and takes free ones
//! away from it to unplug them.
//!
//! Blocks of the device's region belong to this driver until it plugged and freed them. There is no
//! migration: a block of which the guest uses a single page stays. As in Linux, neighbours within
//! 128 MiB go in one request.

use crate::host::Doorbell;
use crate::memory::Memory;
use crate::shared::{PAGE_WORDS, Page};
use crate::virtio::{Broken, Buffer, Device, Queue};
use llfree::Allocation;
use shared_layout::{FRAME_SIZE, FRAMES_PER_HUGE, FrameId, HUGE_SIZE, HugeId, Order};

/// Its number in the standard.
pub(crate) const ID: u32 = 24;

/// Configuration words.
const ADDRESS: u64 = 16;
const REGION_SIZE: u64 = 24;
const REQUESTED_SIZE: u64 = 48;

/// The possible requests.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const ACK: u16 = 0;

/// Blocks of what Linux calls a memory block.
const GROUP: u32 = 64;
/// A request: type and padding, address, number of blocks and padding.
const REQUEST_BYTES: u32 = 24;
/// The place of the answer, in halves of words.
const ANSWER: usize = 16;
const ANSWER_BYTES: u32 = 10;

/// A virtio-mem device at work.
#[derive(Debug)]
pub(crate) struct Mem {
    device: Device,
    queue: Queue,
    /// First huge frame of the region, and how many there are.
    first: u32,
    blocks: u32,
    /// Blocks that are plugged and the allocator's.
    plugged: u32,
    /// Blocks that the host wants plugged.
    target: u32,
    /// Frame of a bitmap, a bit a block: is it plugged?
    map: FrameId,
}

impl Mem {
    /// Brings the device up; all is unplugged.
    pub(crate) fn new<D: Doorbell>(device: Device, memory: &mut Memory<'_, D>) -> Result<Self, Broken> {
        device.begin(&mut memory.host, 0)?;
        let queue = Queue::new(device, memory, 0, true)?;
        device.ready(&mut memory.host);
        let address = device.config_long(&mut memory.host, ADDRESS);
        let bytes = device.config_long(&mut memory.host, REGION_SIZE);
        let (first, blocks) = ((address / HUGE_SIZE) as u32, (bytes / HUGE_SIZE) as u32);
        let order = crate::reported::Reported::order(blocks);
        let map = memory.take(order).map_err(|_| Broken)?.frame();
        let mut mem = Self { device, queue, first, blocks, plugged: 0, target: 0, map };
        for frame in map.0..map.0 + order.frames() {
            let page = mem.page(memory, FrameId(frame));
            (0..PAGE_WORDS).for_each(|word| page.store(word, 0));
        }
        mem.ask(memory, UNPLUG_ALL, 0, 0)?;
        Ok(mem)
    }

    /// The device has news.
    pub(crate) fn wake<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>) {
        self.device.acknowledge(&mut memory.host);
        let bytes = self.device.config_long(&mut memory.host, REQUESTED_SIZE);
        self.target = ((bytes / HUGE_SIZE) as u32).min(self.blocks);
    }

    /// One request or a few towards the target; false if there is nothing to do, or nothing that
    /// could be unplugged.
    pub(crate) fn step<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>) -> Result<bool, Broken> {
        let before = self.plugged;
        if self.plugged < self.target {
            self.plug(memory)?;
        } else if self.plugged > self.target {
            self.unplug(memory)?;
        }
        Ok(self.plugged != before)
    }

    /// Plugs one run of blocks, the lowest that are not.
    fn plug<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>) -> Result<(), Broken> {
        let Some(start) = (0..self.blocks).find(|block| !self.is_plugged(memory, *block)) else { return Ok(()) };
        let most = self.blocks.min(start + (self.target - self.plugged)).min(group_end(start));
        let end = (start..most).find(|block| self.is_plugged(memory, *block)).unwrap_or(most);
        if !self.ask(memory, PLUG, start, end - start)? {
            return Ok(());
        }
        for block in start..end {
            self.set_plugged(memory, block, true);
            memory.give(self.frame(block), Order::HUGE);
        }
        Ok(())
    }

    /// Unplugs whatever is available of the highest group that has anything available.
    fn unplug<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>) -> Result<(), Broken> {
        memory.drain();
        let before = self.plugged;
        let mut end = self.blocks;
        while end > 0 && self.plugged == before {
            let start = (end - 1) / GROUP * GROUP;
            let mut run = 0;
            // Downwards; a run ends at a block that cannot be had.
            for block in (start..end).rev() {
                let enough = self.plugged - self.target <= run;
                if !enough && self.is_plugged(memory, block) && self.take(memory, block) {
                    run += 1;
                    continue;
                }
                self.unplug_run(memory, block + 1, run)?;
                run = 0;
                if self.plugged == self.target {
                    return Ok(());
                }
            }
            self.unplug_run(memory, start, run)?;
            end = start;
        }
        Ok(())
    }

    /// Unplugs blocks that were taken from the allocator.
    fn unplug_run<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>, start: u32, count: u32) -> Result<(), Broken> {
        if count == 0 {
            return Ok(());
        }
        let granted = self.ask(memory, UNPLUG, start, count)?;
        for block in start..start + count {
            if granted {
                self.set_plugged(memory, block, false);
            } else {
                memory.give(self.frame(block), Order::HUGE);
            }
        }
        Ok(())
    }

    /// Takes a block from the allocator, if it is wholly free.
    fn take<D: Doorbell>(&self, memory: &mut Memory<'_, D>, block: u32) -> bool {
        match memory.tenant().alloc_at(self.frame(block), Order::HUGE) {
            Ok(Allocation::Ready(_)) => true,
            Ok(Allocation::Evicted(block)) => {
                let (frame, order) = block.release();
                memory.give(frame, order);
                false
            }
            Err(_) => false,
        }
    }

    /// Asks the device; true if it grants.
    fn ask<D: Doorbell>(
        &mut self,
        memory: &mut Memory<'_, D>,
        what: u16,
        start: u32,
        count: u32,
    ) -> Result<bool, Broken> {
        let address = memory.ram().address(self.frame(start));
        let queue = &mut self.queue;
        (0..12).for_each(|half| queue.set_half(half, 0));
        queue.set_half(0, what);
        (0..4).for_each(|half| queue.set_half(4 + half, (address >> (16 * half)) as u16));
        queue.set_half(8, count as u16);
        let contents = queue.contents();
        let request = Buffer { address: contents, bytes: REQUEST_BYTES, writable: false };
        let answer = Buffer { address: contents + 2 * ANSWER as u64, bytes: ANSWER_BYTES, writable: true };
        queue.call(&mut memory.host, &[request, answer])?;
        let granted = queue.get_half(ANSWER) == ACK;
        if granted {
            match what {
                PLUG => self.plugged += count,
                UNPLUG => self.plugged -= count,
                _ => self.plugged = 0,
            }
        }
        Ok(granted)
    }

    fn frame(&self, block: u32) -> FrameId {
        HugeId(self.first + block).first_frame()
    }

    fn is_plugged<D: Doorbell>(&self, memory: &Memory<'_, D>, block: u32) -> bool {
        let (page, word, bit) = self.place(memory, block);
        page.load(word) & bit != 0
    }

    fn set_plugged<D: Doorbell>(&self, memory: &Memory<'_, D>, block: u32, plugged: bool) {
        let (page, word, bit) = self.place(memory, block);
        let others = page.load(word) & !bit;
        page.store(word, if plugged { others | bit } else { others });
    }

    fn place<D: Doorbell>(&self, memory: &Memory<'_, D>, block: u32) -> (Page, usize, u64) {
        let per_page = FRAME_SIZE as u32 * 8;
        let page = self.page(memory, FrameId(self.map.0 + u64::from(block / per_page)));
        (page, (block % per_page / 64) as usize, 1 << (block % 64))
    }

    fn page<D: Doorbell>(&self, memory: &Memory<'_, D>, frame: FrameId) -> Page {
        // SAFETY: in the bitmap's block, which was taken when the device came up and is never given
        // back; callers stay inside it.
        unsafe { memory.page(frame) }
    }
}

/// The end of a block's group, counted from the start of the region.
const fn group_end(block: u32) -> u32 {
    (block / GROUP + 1) * GROUP
}

const _: () = assert!(GROUP as u64 * FRAMES_PER_HUGE * FRAME_SIZE == 128 << 20);
