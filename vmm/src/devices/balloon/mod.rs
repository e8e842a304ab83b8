//! The balloon (virtio 1.3, 5.5): the guest's driver gives pages away by number, and the host discards
//! them; the driver takes pages back likewise, and they read as zeroes when they are touched.
//!
//! The device keeps its own accounting, one bit per page: a page that is given twice, or taken back
//! without having been given, is counted and otherwise ignored. So the balloon is never larger than RAM,
//! whatever a driver says; but a driver that keeps using what it gave away gets memory for it from the
//! host's kernel, undetected. That is the nature of balloons.
//!
//! The page numbers of one request are sorted and neighbours joined, so that a run of them costs one
//! system call; Firecracker and crosvm join neighbours too. QEMU makes one call per page, as does
//! `coalesce: false`. With 4 KiB pages the kernel splits huge pages on the way; the huge variant
//! ([`BALLOON_F_HUGE`]) has 2 MiB blocks instead.

mod state;

#[cfg(test)]
mod tests;

pub use state::{BalloonControl, GuestStats};

use super::request::Request;
use super::{DriverError, Notes, Served, VirtioDevice};
use guest_abi::devices::BALLOON_F_HUGE;
use llfree_base::RateLimit;
use llfree_base::error_line;
use llfree_monitor::Monitor;
use llfree_monitor::memory::GuestRam;
use log::Level;
use shared_layout::{FRAME_SIZE, FRAMES_PER_HUGE};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

/// Feature bits of the standard.
const F_STATS_VQ: u32 = 1;
const F_DEFLATE_ON_OOM: u32 = 2;
const F_PAGE_POISON: u32 = 4;
const F_REPORTING: u32 = 5;

/// Offset in the configuration of the byte pattern that the driver fills free pages with.
const POISON_OFFSET: u64 = 12;

/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 256;
/// Bytes of page numbers in one request: 4096 numbers; Linux sends 256.
const MOST_NUMBERS: usize = 16 << 10;
/// Bytes of statistics in one request; Linux sends 100 to 160.
const MOST_STATS: usize = 4 << 10;
/// Bytes that one request may report as free; Linux reports 32 blocks of 4 MiB.
const MOST_REPORTED: u64 = 1 << 30;

/// The kind of balloon.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BalloonConfig {
    /// Blocks of 2 MiB instead of pages.
    pub huge: bool,
    /// The guest may take pages back when it runs out of memory.
    pub deflate_on_oom: bool,
    /// The guest reports free memory, which is discarded but stays the guest's. `None` means off.
    pub reporting: Option<bool>,
    /// Joins neighbours of one request into one discard.
    pub coalesce: bool,
    /// How often to ask for statistics.
    pub stats: Option<Duration>,
}

/// What a queue is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Reporting,
}

/// The device.
pub struct Balloon {
    config: BalloonConfig,
    ram: Arc<GuestRam>,
    control: Arc<BalloonControl>,
    /// One bit per page or block, set if the guest gave it away.
    given: Vec<u64>,
    features: u64,
    /// What the driver says each byte of its free pages holds.
    poison: u32,
    /// The head of the statistics request that waits for its time, and its queue.
    stats_request: Option<(usize, u16)>,
    failures: RateLimit,
    poisoned: RateLimit,
    small_blocks: RateLimit,
    /// The owner of a table that may turn out to serve instead.
    table: Option<Arc<Monitor>>,
    /// Whether what the driver asks for is carried out.
    serves: bool,
    notes: Notes,
}

impl Balloon {
    /// A balloon for `ram`, controlled and watched through `control`.
    #[must_use]
    pub fn new(config: BalloonConfig, ram: Arc<GuestRam>, control: Arc<BalloonControl>) -> Self {
        let mut balloon = Self {
            config,
            ram,
            control,
            given: Vec::new(),
            features: 0,
            poison: 0,
            stats_request: None,
            failures: RateLimit::default(),
            poisoned: RateLimit::default(),
            small_blocks: RateLimit::default(),
            table: None,
            serves: false,
            notes: Notes::default(),
        };
        balloon.control.expect_stats(config.stats);
        balloon.reset();
        balloon
    }

    /// The same for a guest that may share its table: then there is no balloon. Else its memory is
    /// [left](Monitor::leave_to_device) to this device as soon as a driver is ready.
    #[must_use]
    pub fn instead_of_table(self, monitor: Arc<Monitor>) -> Self {
        Self { table: Some(monitor), ..self }
    }

    /// Pages that one page number stands for.
    fn unit(&self) -> u64 {
        if self.is_huge() { FRAMES_PER_HUGE } else { 1 }
    }

    fn is_huge(&self) -> bool {
        self.features & 1 << BALLOON_F_HUGE != 0
    }

    /// What a queue is for. The standard numbers queues regardless of features; Linux, and so everybody
    /// else, leaves out those that are not negotiated. There is no queue of free-page hints here, so the
    /// standard's numbers and Linux's do not collide.
    fn role(&self, queue: usize) -> Option<Role> {
        let has = |bit: u32| self.features & 1 << bit != 0;
        match queue {
            0 => Some(Role::Inflate),
            1 => Some(Role::Deflate),
            2 if has(F_STATS_VQ) => Some(Role::Stats),
            2..=4 if has(F_REPORTING) => Some(Role::Reporting),
            _ => None,
        }
    }

    /// The blocks of a request that are in RAM and aligned, as indices into the bit map, which counts
    /// in offsets. The others are counted as bad.
    fn blocks(&self, request: &Request<'_>) -> Result<Vec<u64>, DriverError> {
        let bytes = request.readable(MOST_NUMBERS)?;
        let (numbers, rest) = bytes.as_chunks::<4>();
        if !rest.is_empty() {
            return Err(DriverError::Length {
                bytes: bytes.len() as u64,
                allowed: "not a whole number of page numbers",
            });
        }
        let (unit, map) = (self.unit() * FRAME_SIZE, self.ram.map());
        let block = |number: &[u8; 4]| {
            let address = u64::from(u32::from_le_bytes(*number)) * FRAME_SIZE;
            // Parts of RAM start and end at multiples of 2 MiB, so the offset is aligned as well.
            let offset = map.offset(address, unit).filter(|_| address.is_multiple_of(unit))?;
            Some(offset / unit)
        };
        let blocks: Vec<u64> = numbers.iter().filter_map(block).collect();
        let bad = numbers.len() - blocks.len();
        self.control.counters.bad_pages.add(bad as u64);
        Ok(blocks)
    }

    /// Marks a block as given or as taken back; false, and counted, if it already was.
    fn note(&mut self, block: u64, given: bool) -> bool {
        let (word, bit) = (&mut self.given[(block / 64) as usize], 1 << (block % 64));
        if (*word & bit != 0) == given {
            self.control.counters.repeated_pages.inc();
            return false;
        }
        *word ^= bit;
        true
    }

    fn inflate(&mut self, request: &Request<'_>) -> Result<(), DriverError> {
        let mut blocks = self.blocks(request)?;
        blocks.sort_unstable();
        blocks.retain(|block| self.note(*block, true));
        let unit = self.unit() * FRAME_SIZE;
        let joins = self.config.coalesce;
        for run in blocks.chunk_by(|left, right| joins && left + 1 == *right) {
            self.discard(run[0] * unit..(run[0] + run.len() as u64) * unit);
        }
        self.control.counters.inflate_requests.inc();
        self.control.moved(blocks.len() as i64 * self.unit() as i64);
        Ok(())
    }

    fn deflate(&mut self, request: &Request<'_>) -> Result<(), DriverError> {
        let blocks = self.blocks(request)?;
        let back = blocks.into_iter().filter(|block| self.note(*block, false)).count();
        self.control.counters.deflate_requests.inc();
        self.control.moved(-(back as i64 * self.unit() as i64));
        Ok(())
    }

    /// Discards what the guest reports as free; it stays the guest's. Does nothing if the guest relies on
    /// contents of its free pages other than the zeroes that a discard leaves.
    fn report(&mut self, request: &Request<'_>) -> Result<(), DriverError> {
        let bytes: u64 = request.buffers().iter().map(|buffer| u64::from(buffer.bytes)).sum();
        if bytes > MOST_REPORTED {
            return Err(DriverError::Length { bytes, allowed: "more than one request may report" });
        }
        for buffer in request.buffers() {
            let (address, bytes) = (buffer.address, u64::from(buffer.bytes));
            if !address.is_multiple_of(FRAME_SIZE) || !bytes.is_multiple_of(FRAME_SIZE) {
                return Err(DriverError::Length { bytes, allowed: "reported, but not whole pages" });
            }
            let start =
                self.ram.map().offset(address, bytes).ok_or(DriverError::Buffer { address, bytes: buffer.bytes })?;
            if self.features & 1 << F_PAGE_POISON == 0 || self.poison == 0 {
                self.discard(start..start + bytes);
            }
        }
        self.control.counters.reported_bytes.add(bytes);
        Ok(())
    }

    /// Discards a range of offsets.
    fn discard(&mut self, bytes: Range<u64>) {
        let counters = &self.control.counters;
        counters.discards.inc();
        match self.ram.discard_bytes(bytes.clone()) {
            Ok(()) => counters.discarded_bytes.add(bytes.end - bytes.start),
            // The guest gave it away all the same; only the host does not gain from it.
            Err(error) => {
                counters.failed_discards.inc();
                if let Some(number) = self.failures.tick() {
                    let line = format!("the balloon could not discard ({number} so far): {}", error_line(&error));
                    self.notes.add(Level::Warn, line);
                }
            }
        }
    }
}

impl VirtioDevice for Balloon {
    fn id(&self) -> u32 {
        match &self.table {
            // An empty place, which drivers pass over.
            Some(monitor) if monitor.is_shared() => 0,
            _ => VIRTIO_ID_BALLOON,
        }
    }

    fn name(&self) -> &'static str {
        "balloon"
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 5]
    }

    fn features(&self) -> u64 {
        let config = &self.config;
        [
            (F_STATS_VQ, config.stats.is_some()),
            (F_DEFLATE_ON_OOM, config.deflate_on_oom),
            // A Linux that clears or fills free pages reports none without this.
            (F_PAGE_POISON, config.reporting == Some(true)),
            (F_REPORTING, config.reporting == Some(true)),
            (BALLOON_F_HUGE, config.huge),
        ]
        .into_iter()
        .fold(0, |features, (bit, offered)| features | u64::from(offered) << bit)
    }

    fn start(&mut self, features: u64) {
        self.features = features;
        let is_first = self.table.as_ref().is_some_and(|monitor| monitor.is_booting());
        self.serves = self.table.as_ref().is_none_or(|monitor| monitor.leave_to_device());
        if self.serves && is_first {
            let line = "the guest has a driver for its balloon, and did not say that it shares its free memory: the balloon serves";
            self.notes.add(Level::Info, line.to_owned());
        }
        self.given = vec![0; (self.ram.bytes() / FRAME_SIZE / self.unit()).div_ceil(64) as usize];
        self.control.started(features & 1 << F_DEFLATE_ON_OOM != 0);
        if features & 1 << F_PAGE_POISON != 0 && self.poison != 0 && self.poisoned.tick().is_some() {
            let line = format!(
                "the guest fills free pages with {:#x}, so the pages that it reports as free stay with it",
                self.poison
            );
            self.notes.add(Level::Warn, line);
        }
        // A guest may start its driver as often as it likes.
        if self.config.huge
            && !self.is_huge()
            && let Some(number) = self.small_blocks.tick()
        {
            let line = format!(
                "the guest's balloon driver does not support 2 MiB blocks; it works with 4 KiB pages (started {number} \
                 times so far)"
            );
            self.notes.add(Level::Warn, line);
        }
    }

    fn reset(&mut self) {
        // A driver that starts over has all its pages.
        (self.features, self.poison, self.stats_request) = (0, 0, None);
        self.given.clear();
        self.control.emptied();
    }

    fn config(&self) -> Vec<u8> {
        let control = &self.control;
        // num_pages, actual, free_page_hint_cmd_id of a feature that is not offered, poison_val.
        [control.target_pages(), control.claimed_pages(), 0, self.poison]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect()
    }

    fn write_config(&mut self, offset: u64, bytes: &[u8]) -> bool {
        let Ok(word) = <[u8; 4]>::try_from(bytes).map(u32::from_le_bytes) else { return false };
        match offset {
            4 => self.control.claim(word),
            POISON_OFFSET if self.features() & 1 << F_PAGE_POISON != 0 => self.poison = word,
            _ => return false,
        }
        true
    }

    fn serve(&mut self, queue: usize, request: &Request<'_>) -> Result<Served, DriverError> {
        if !self.serves {
            // It set the device up while it said that it shares its table.
            return Err(DriverError::Withdrawn);
        }
        match self.role(queue) {
            Some(Role::Inflate) => self.inflate(request)?,
            Some(Role::Deflate) => self.deflate(request)?,
            Some(Role::Reporting) => self.report(request)?,
            Some(Role::Stats) => {
                self.control.set_stats(GuestStats::parse(&request.readable(MOST_STATS)?));
                let before = self.stats_request.replace((queue, request.head()));
                return Ok(Served::Kept { instead_of: before.map(|(_, head)| head) });
            }
            None => return Err(DriverError::Available { queue }),
        }
        Ok(Served::Done(0))
    }

    fn notes(&mut self) -> Option<&mut Notes> {
        Some(&mut self.notes)
    }

    fn interval(&self) -> Option<Duration> {
        self.config.stats
    }

    fn tick(&mut self) -> Option<(usize, u16)> {
        self.stats_request.take()
    }
}
