//! The driver of the balloon: allocates frames and tells the host that it may have them, in batches
//! of 256 as Linux does, and takes them back.
//!
//! The host only ever hears of frames that this driver took from the allocator, so nobody touches
//! them until they are back. Which they are is kept in records, like the blocks of the agent. Free
//! memory is reported likewise: a frame is taken while the host discards it, and free again after.

use crate::host::Doorbell;
use crate::memory::Memory;
use crate::records::{Record, Records};
use crate::reported::Reported;
use crate::stamp::Tag;
use crate::virtio::{Broken, Buffer, Device, Queue, page_number};
use guest_abi::devices::BALLOON_F_HUGE;
use llfree::Allocation;
use shared_layout::{FRAME_SIZE, FRAMES_PER_HUGE, FrameId, HUGE_SIZE, HugeId, Order};

/// Its number in the standard.
pub(crate) const ID: u32 = 5;

const F_STATS: u32 = 1;
const F_DEFLATE_ON_OOM: u32 = 2;
const F_REPORTING: u32 = 5;

/// Queues, by the standard.
const INFLATE: u32 = 0;
const DEFLATE: u32 = 1;
const STATS: u32 = 2;
const REPORTING: u32 = 4;

/// Configuration words.
const NUM_PAGES: u64 = 0;
const ACTUAL: u64 = 4;

/// Page numbers in one request.
const BATCH: usize = 256;
/// Free huge frames in one report.
const REPORT: usize = 32;

/// The subject of a statistics record.
const TAG_FREE: u16 = 4;
const TAG_TOTAL: u16 = 5;
const TAG_AVAILABLE: u16 = 6;
/// Bytes of a record: a tag and a value.
const RECORD_HALVES: usize = 5;

/// A balloon at work.
#[derive(Debug)]
pub(crate) struct Balloon {
    device: Device,
    inflate: Queue,
    deflate: Queue,
    stats: Option<Queue>,
    reporting: Option<Queue>,
    /// The frame at which the next report starts to look.
    cursor: u32,
    order: Order,
    on_oom: bool,
    /// The frames given away.
    given: Records,
    /// Blocks that the host wants to have.
    target: u64,
    /// The guest ran out of memory: what it took back is not given again until the host asks anew.
    relieved: bool,
}

impl Balloon {
    /// Brings the device up.
    pub(crate) fn new<D: Doorbell>(device: Device, memory: &mut Memory<'_, D>) -> Result<Self, Broken> {
        let wanted = [F_STATS, F_DEFLATE_ON_OOM, F_REPORTING, BALLOON_F_HUGE];
        let wanted = wanted.into_iter().fold(0, |features, bit| features | 1 << bit);
        let features = device.begin(&mut memory.host, wanted)?;
        let has = |bit: u32| features & 1 << bit != 0;
        let inflate = Queue::new(device, memory, INFLATE, true)?;
        let deflate = Queue::new(device, memory, DEFLATE, true)?;
        let stats = if has(F_STATS) { Some(Queue::new(device, memory, STATS, false)?) } else { None };
        let reporting = if has(F_REPORTING) { Some(Queue::new(device, memory, REPORTING, true)?) } else { None };
        device.ready(&mut memory.host);
        let order = if has(BALLOON_F_HUGE) { Order::HUGE } else { Order::BASE };
        let on_oom = has(F_DEFLATE_ON_OOM);
        let given = Records::new();
        let mut balloon = Self {
            device,
            inflate,
            deflate,
            stats,
            reporting,
            cursor: 0,
            order,
            on_oom,
            given,
            target: 0,
            relieved: false,
        };
        balloon.send_stats(memory);
        Ok(balloon)
    }

    /// Whether it reports free memory.
    pub(crate) const fn reports(&self) -> bool {
        self.reporting.is_some()
    }

    /// The device has news.
    pub(crate) fn wake<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>) {
        self.device.acknowledge(&mut memory.host);
        // Up: what is wanted is a number of pages.
        let pages = u64::from(self.device.config(&mut memory.host, NUM_PAGES));
        let target = pages.div_ceil(self.order.frames());
        if target != self.target {
            (self.target, self.relieved) = (target, false);
        }
        self.send_stats(memory);
    }

    /// One batch towards the target; false if there is nothing to do, or no memory to do it with.
    pub(crate) fn step<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>) -> Result<bool, Broken> {
        let given = self.given.len();
        let moved = if given > self.target {
            self.take_back(memory, given - self.target)?
        } else if given < self.target && !self.relieved {
            self.give_away(memory, self.target - given)?
        } else {
            0
        };
        Ok(moved > 0)
    }

    /// Takes a batch back because there is no other memory; false if there is none here either, or
    /// the host does not allow it.
    pub(crate) fn relieve<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>) -> Result<bool, Broken> {
        if !self.on_oom || self.given.len() == 0 {
            return Ok(false);
        }
        self.relieved = true;
        self.take_back(memory, BATCH as u64).map(|moved| moved > 0)
    }

    fn give_away<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>, most: u64) -> Result<usize, Broken> {
        let mut count = 0;
        while count < BATCH && (count as u64) < most {
            let Ok(block) = memory.take(self.order) else { break };
            let record = Record { frame: block.frame(), order: self.order, tag: Tag::new(0) };
            if self.given.push(memory, record).is_err() {
                memory.give(block.frame(), self.order);
                break;
            }
            self.inflate.set_word(count, page_number(memory.ram(), block.frame()));
            count += 1;
        }
        if count > 0 {
            self.inflate.call(&mut memory.host, &[numbers(&self.inflate, count)])?;
            self.tell_size(memory);
        }
        Ok(count)
    }

    fn take_back<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>, most: u64) -> Result<usize, Broken> {
        let mut frames = [FrameId(0); BATCH];
        let mut count = 0;
        while count < BATCH
            && (count as u64) < most
            && let Some(last) = self.given.len().checked_sub(1)
        {
            frames[count] = self.given.swap_remove(memory, last).frame;
            self.deflate.set_word(count, page_number(memory.ram(), frames[count]));
            count += 1;
        }
        if count > 0 {
            self.deflate.call(&mut memory.host, &[numbers(&self.deflate, count)])?;
            frames[..count].iter().for_each(|frame| memory.give(*frame, self.order));
            self.tell_size(memory);
        }
        Ok(count)
    }

    fn tell_size<D: Doorbell>(&self, memory: &mut Memory<'_, D>) {
        let pages = self.given.len() * self.order.frames();
        self.device.set_config(&mut memory.host, ACTUAL, pages as u32);
    }

    /// Sends statistics if the host asks for some, which it does by giving the last ones back.
    fn send_stats<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>) {
        let Some(queue) = &mut self.stats else { return };
        if !queue.is_done() {
            return;
        }
        let now = memory.stats();
        let total = (now.frames - self.given.len() * self.order.frames()) * FRAME_SIZE;
        let free = now.free_frames * FRAME_SIZE;
        let records = [(TAG_FREE, free), (TAG_TOTAL, total), (TAG_AVAILABLE, free)];
        for (i, (tag, value)) in records.into_iter().enumerate() {
            queue.set_half(RECORD_HALVES * i, tag);
            for half in 0..4 {
                queue.set_half(RECORD_HALVES * i + 1 + half, (value >> (16 * half)) as u16);
            }
        }
        let bytes = 2 * (RECORD_HALVES * records.len()) as u32;
        let buffer = Buffer { address: queue.contents(), bytes, writable: false };
        queue.ask(&mut memory.host, &[buffer]);
    }

    /// Reports up to a batch of free huge frames that the host does not know to be free; false when
    /// the end of RAM was reached.
    pub(crate) fn report<D: Doorbell>(
        &mut self,
        memory: &mut Memory<'_, D>,
        reported: &Reported,
    ) -> Result<bool, Broken> {
        let Some(queue) = &mut self.reporting else { return Ok(false) };
        let mut batch = [Buffer { address: 0, bytes: 0, writable: true }; REPORT];
        let mut taken = [FrameId(0); REPORT];
        let mut count = 0;
        while count < REPORT && self.cursor < memory.tenant().huge_frames() {
            let huge = HugeId(self.cursor);
            self.cursor += 1;
            let news = memory.tenant().entry(huge).is_some_and(|e| e.is_all_free()) && !reported.get(huge);
            if !news {
                continue;
            }
            let frame = huge.first_frame();
            match memory.tenant().alloc_at(frame, Order::HUGE) {
                Ok(Allocation::Ready(_)) => {
                    let address = memory.ram().address(frame);
                    batch[count] = Buffer { address, bytes: HUGE_SIZE as u32, writable: true };
                    taken[count] = frame;
                    count += 1;
                }
                // It is not backed, or somebody was faster.
                Ok(Allocation::Evicted(block)) => {
                    let (frame, order) = block.release();
                    memory.give(frame, order);
                }
                Err(_) => {}
            }
        }
        let told = if count > 0 { queue.call(&mut memory.host, &batch[..count]) } else { Ok(()) };
        for frame in &taken[..count] {
            // Before it is free: its next owner clears the mark again.
            reported.set(HugeId((frame.0 / FRAMES_PER_HUGE) as u32));
            memory.give(*frame, Order::HUGE);
        }
        told?;
        let more = self.cursor < memory.tenant().huge_frames();
        if !more {
            self.cursor = 0;
        }
        Ok(more)
    }
}

fn numbers(queue: &Queue, count: usize) -> Buffer {
    Buffer { address: queue.contents(), bytes: 4 * count as u32, writable: false }
}
