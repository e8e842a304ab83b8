//! virtio-mem (virtio 1.3, 5.15): the tail of RAM in blocks of 2 MiB that the guest's driver plugs
//! and unplugs, towards a size that the host requests.
//!
//! The region is part of the one mapping of RAM: from the end of the boot part, which always stays with
//! the guest, to the end of RAM. For the guest it is one range of addresses. All of it is unplugged at
//! first; a driver plugs what is requested. An unplugged block is discarded. As with most hypervisors,
//! nothing keeps a guest from touching blocks that it unplugged: it gets memory for them from the host's
//! kernel, undetected. The usable region is always the whole region.

mod state;

#[cfg(test)]
mod tests;

pub use state::MemControl;

use super::request::Request;
use super::{DriverError, Notes, Served, VirtioDevice};
use llfree_base::RateLimit;
use llfree_base::error_line;
use llfree_monitor::memory::GuestRam;
use log::Level;
use shared_layout::{HUGE_SIZE, HugeId, HugeRange};
use std::ops::Range;
use std::sync::Arc;
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;

const QUEUE_SIZE: u16 = 128;
/// Bytes of a request: type, padding, and the largest of its bodies.
const REQUEST_BYTES: usize = 24;

/// The requests of a driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ask {
    Plug,
    Unplug,
    UnplugAll,
    State,
}

/// The answers to them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
enum Answer {
    Ack = 0,
    /// Not now: more than the host requested.
    Nack = 1,
    /// Never: a range that makes no sense.
    Error = 3,
}

/// The state of a range of blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
enum Plugged {
    All = 0,
    None = 1,
    Some = 2,
}

/// The device.
pub struct Mem {
    ram: Arc<GuestRam>,
    control: Arc<MemControl>,
    /// First huge frame of the region.
    first: u32,
    /// For each block, whether it is plugged.
    plugged: Vec<bool>,
    failures: RateLimit,
    notes: Notes,
}

impl Mem {
    /// A device for the part of `ram` after the boot part that `control` states, as far as the guest
    /// sees it in one piece.
    #[must_use]
    pub fn new(ram: Arc<GuestRam>, control: Arc<MemControl>) -> Self {
        // The boot part is at most RAM, whose huge frames fit a u32.
        let first = (control.boot_bytes() / HUGE_SIZE) as u32;
        let start = HugeId(first).byte_offset();
        let piece = ram.map().parts().find(|part| (part.offset..part.offset + part.bytes).contains(&start));
        let blocks = piece.map_or(0, |part| (part.offset + part.bytes - start) / HUGE_SIZE);
        let plugged = vec![false; blocks as usize];
        Self { ram, control, first, plugged, failures: RateLimit::default(), notes: Notes::default() }
    }

    /// The blocks of a request; `None` if there are none, or not all of them are in the region.
    fn blocks(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = self.ram.map().offset(address, u64::from(count) * HUGE_SIZE)?;
        let first = (offset / HUGE_SIZE).checked_sub(u64::from(self.first))? as usize;
        let end = first.checked_add(usize::from(count))?;
        (offset.is_multiple_of(HUGE_SIZE) && count > 0 && end <= self.plugged.len()).then_some(first..end)
    }

    fn state(&self, blocks: &Range<usize>) -> Plugged {
        let plugged = self.plugged[blocks.clone()].iter().filter(|plugged| **plugged).count();
        match plugged {
            0 => Plugged::None,
            all if all == blocks.len() => Plugged::All,
            _ => Plugged::Some,
        }
    }

    fn plug(&mut self, blocks: &Range<usize>) -> Answer {
        let after = self.control.plugged_bytes() + blocks.len() as u64 * HUGE_SIZE;
        match self.state(blocks) {
            _ if after > self.control.requested_bytes() => Answer::Nack,
            Plugged::None => {
                // Memory comes when it is touched.
                self.plugged[blocks.clone()].fill(true);
                self.control.moved(blocks.len() as i64);
                Answer::Ack
            }
            _ => Answer::Error,
        }
    }

    fn unplug(&mut self, blocks: &Range<usize>) -> Answer {
        if self.state(blocks) != Plugged::All {
            return Answer::Error;
        }
        self.plugged[blocks.clone()].fill(false);
        self.discard(blocks);
        self.control.moved(-(blocks.len() as i64));
        Answer::Ack
    }

    fn unplug_all(&mut self) {
        let all = 0..self.plugged.len();
        let plugged = self.plugged.iter().filter(|plugged| **plugged).count();
        self.plugged.fill(false);
        self.discard(&all);
        self.control.moved(-(plugged as i64));
    }

    fn discard(&mut self, blocks: &Range<usize>) {
        let counters = &self.control.counters;
        counters.discards.inc();
        // At most the huge frames of RAM, which fit a u32.
        let (first, count) = (HugeId(self.first + blocks.start as u32), blocks.len() as u32);
        if let Err(error) = self.ram.discard(HugeRange::saturating(first, count)) {
            counters.failed_discards.inc();
            if let Some(number) = self.failures.tick() {
                let line = format!("virtio-mem could not discard ({number} so far): {}", error_line(&error));
                self.notes.add(Level::Warn, line);
            }
        }
    }
}

impl VirtioDevice for Mem {
    fn id(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn name(&self) -> &'static str {
        "virtio-mem"
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn start(&mut self, _: u64) {}

    /// Plugged blocks stay plugged: a new driver asks for their state, or unplugs all.
    fn reset(&mut self) {}

    fn config(&self) -> Vec<u8> {
        let control = &self.control;
        let region = self.plugged.len() as u64 * HUGE_SIZE;
        // block_size; node_id and padding; addr; region_size; usable_region_size; plugged_size;
        // requested_size.
        let start = self.ram.map().gpa(HugeId(self.first).byte_offset());
        let words = [HUGE_SIZE, 0, start, region, region, control.plugged_bytes(), control.requested_bytes()];
        words.into_iter().flat_map(u64::to_le_bytes).collect()
    }

    fn write_config(&mut self, _: u64, _: &[u8]) -> bool {
        false
    }

    fn notes(&mut self) -> Option<&mut Notes> {
        Some(&mut self.notes)
    }

    fn serve(&mut self, _: usize, request: &Request<'_>) -> Result<Served, DriverError> {
        let bytes = request.readable(REQUEST_BYTES)?;
        let short = DriverError::Length { bytes: bytes.len() as u64, allowed: "not a virtio-mem request" };
        let bytes: [u8; REQUEST_BYTES] = bytes.try_into().map_err(|_| short)?;
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let [_, address, _] = std::array::from_fn(|i| {
            let word = &bytes[8 * i..8 * i + 8];
            word.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
        });
        let ask = match word(0) {
            0 => Some(Ask::Plug),
            1 => Some(Ask::Unplug),
            2 => Some(Ask::UnplugAll),
            3 => Some(Ask::State),
            _ => None,
        };
        let (answer, state) = match (ask, self.blocks(address, word(16))) {
            (Some(Ask::UnplugAll), _) => {
                self.unplug_all();
                (Answer::Ack, 0)
            }
            (Some(Ask::Plug), Some(blocks)) => (self.plug(&blocks), 0),
            (Some(Ask::Unplug), Some(blocks)) => (self.unplug(&blocks), 0),
            (Some(Ask::State), Some(blocks)) => (Answer::Ack, self.state(&blocks) as u16),
            _ => (Answer::Error, 0),
        };
        self.control.answered(ask == Some(Ask::Plug), answer == Answer::Ack);
        let reply = [answer as u16, 0, 0, 0, state];
        let reply: Vec<u8> = reply.into_iter().flat_map(u16::to_le_bytes).collect();
        request.write(&reply).map(Served::Done)
    }
}
