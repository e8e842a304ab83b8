//! virtio-blk (virtio 1.3, 5.2): a raw image or a block device of the host as a disk of the guest.
//!
//! One queue, served on the device's own thread, which hands each request to one of [`HELPERS`] threads: so
//! many are at work at once, in no order, and none holds the device's lock. Data goes straight
//! between guest memory and the file, through the host's page cache. A write is durable after a flush,
//! or at once for a driver that did not negotiate flushes. Where the host's file system can punch holes,
//! the guest may discard: the file gets smaller as the guest deletes. A failure of the host becomes the
//! guest's I/O error, counted and logged; a request that makes no sense fails with a status, or as a
//! [`DriverError`] if there is no place for the status.
//!
//! A request is bounded: [`MOST_BYTES`] of data, or ranges of [`MOST_CLEARED_SECTORS`]. A driver that resets its
//! device waits for those at work.

mod config;
mod file;
mod state;

#[cfg(test)]
mod tests;

pub use config::{DiskConfig, DiskConfigError, DiskError, MOST_DISKS, SERIAL_BYTES, check_disks};
pub use state::DiskControl;

use super::request::Request;
use super::{DriverError, Served, VirtioDevice};
use crate::roles;
use file::{Direction, DiskFile, SECTOR};
use llfree_base::thread::Role;
use llfree_base::{RateLimit, printable};
use std::io;
use std::sync::Arc;
use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

const QUEUE_SIZE: u16 = 256;
/// Requests at work at once, each on a thread.
pub const HELPERS: u32 = 4;
/// The most buffers of a request besides header and status, and bytes of each, as told to drivers.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
const SEGMENT_BYTES: u32 = 64 << 10;
/// Data of one request: the product of what drivers are told, however they cut it.
pub const MOST_BYTES: u64 = SEGMENTS as u64 * SEGMENT_BYTES as u64;
/// Ranges that one request may discard: 2 GiB together.
const DISCARDED_RANGES: u32 = 16;
/// Ranges that one request may fill with zeroes, which some file systems do by writing them.
const ZEROED_RANGES: u32 = 1;
/// Sectors of a range to discard or to fill with zeroes.
pub const MOST_CLEARED_SECTORS: u32 = 128 << 11;
/// Blocks of the host, for guests that align what they write: 2^3 sectors.
const BLOCK_EXPONENT: u8 = 3;

/// Type, a reserved word, first sector.
const HEADER_BYTES: u64 = 16;
/// A range to clear: first sector, count, flags.
const RANGE_BYTES: u64 = 16;
const UNMAP: u32 = blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

/// The device.
pub struct Blk {
    disk: Arc<Disk>,
    /// The driver did not negotiate flushes, so each write is flushed.
    write_through: bool,
}

/// What its threads share.
struct Disk {
    file: DiskFile,
    control: Arc<DiskControl>,
    serial: [u8; SERIAL_BYTES],
    errors: RateLimit,
    refusals: RateLimit,
}

/// What a request asks for.
#[derive(Clone, Copy)]
struct Ask {
    kind: u32,
    sector: u64,
    /// Bytes for the driver before the status.
    room: u64,
    /// A write is flushed at once.
    write_through: bool,
}

/// Why a request failed.
enum Failure {
    /// An error for the transport to handle.
    Driver(DriverError),
    /// A type of request that this disk does not support.
    Unsupported,
    /// A request that makes no sense.
    Refused(&'static str),
    /// The host could not do it.
    Host(io::Error),
}

impl From<DriverError> for Failure {
    fn from(error: DriverError) -> Self {
        Self::Driver(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

impl Blk {
    /// Opens, checks and locks a disk.
    ///
    /// # Errors
    /// Why the file cannot be a disk.
    pub fn open(disk: &DiskConfig) -> Result<Self, DiskError> {
        let path = printable(&disk.path.to_string_lossy());
        Ok(Self::new(DiskFile::open(disk)?, path, disk.read_only, disk.serial.as_deref().unwrap_or_default()))
    }

    fn new(file: DiskFile, path: String, read_only: bool, text: &str) -> Self {
        let mut serial = [0; SERIAL_BYTES];
        for (to, from) in serial.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        let control = DiskControl { path, bytes: file.bytes(), read_only, counters: Default::default() };
        let control = Arc::new(control);
        let disk = Disk { file, control, serial, errors: RateLimit::default(), refusals: RateLimit::default() };
        Self { disk: Arc::new(disk), write_through: true }
    }

    /// The host's side of the disk, which stays usable once the transport owns the device.
    #[must_use]
    pub fn control(&self) -> Arc<DiskControl> {
        self.disk.control.clone()
    }
}

impl Disk {
    /// Carries out a request and writes its status; returns how many bytes it wrote for the driver.
    fn serve(&self, ask: Ask, request: &Request<'_>) -> Result<u32, DriverError> {
        let room = ask.room;
        let (status, written) = match self.carry_out(ask, request) {
            Ok(written) => (blk::VIRTIO_BLK_S_OK, written),
            Err(failure) => (self.failed(failure)?, 0),
        };
        for slice in request.slices(true, room, 1)? {
            slice.copy_from(&[status as u8]);
        }
        // All bytes up to the status count as written only if they were.
        Ok(if written == room { (room + 1) as u32 } else { written as u32 })
    }

    /// Carries out a request; returns how many bytes it wrote for the driver before the status.
    fn carry_out(&self, ask: Ask, request: &Request<'_>) -> Result<u64, Failure> {
        let Ask { kind, sector, room, write_through } = ask;
        let payload = request.bytes(false) - HEADER_BYTES;
        match kind {
            blk::VIRTIO_BLK_T_IN => {
                let offset = self.range(sector, room)?;
                self.file.transfer(Direction::Read, &request.slices(true, 0, room)?, offset)?;
                self.control.counters.reads.inc();
                self.control.counters.read_bytes.add(room);
                Ok(room)
            }
            blk::VIRTIO_BLK_T_OUT => {
                self.may_write()?;
                let offset = self.range(sector, payload)?;
                self.file.transfer(Direction::Write, &request.slices(false, HEADER_BYTES, payload)?, offset)?;
                self.control.counters.writes.inc();
                self.control.counters.written_bytes.add(payload);
                self.settle(write_through)
            }
            blk::VIRTIO_BLK_T_FLUSH => {
                self.file.flush()?;
                self.control.counters.flushes.inc();
                Ok(0)
            }
            blk::VIRTIO_BLK_T_GET_ID => {
                let bytes = room.min(SERIAL_BYTES as u64);
                request.write(&self.serial[..bytes as usize])?;
                Ok(bytes)
            }
            blk::VIRTIO_BLK_T_DISCARD | blk::VIRTIO_BLK_T_WRITE_ZEROES if self.file.punches() => {
                self.clear(kind == blk::VIRTIO_BLK_T_DISCARD, request, payload)?;
                // What was discarded holds anything.
                if kind == blk::VIRTIO_BLK_T_DISCARD { Ok(0) } else { self.settle(write_through) }
            }
            // A read-only disk offers none of these, and says why it refuses them.
            blk::VIRTIO_BLK_T_DISCARD | blk::VIRTIO_BLK_T_WRITE_ZEROES => {
                self.may_write()?;
                Err(Failure::Unsupported)
            }
            _ => Err(Failure::Unsupported),
        }
    }

    /// Discards ranges, or fills them with zeroes.
    fn clear(&self, discard: bool, request: &Request<'_>, payload: u64) -> Result<(), Failure> {
        let most = if discard { DISCARDED_RANGES } else { ZEROED_RANGES };
        if payload == 0 || payload > u64::from(most) * RANGE_BYTES || !payload.is_multiple_of(RANGE_BYTES) {
            return Err(Failure::Refused("not a list of ranges to clear, or one that is too long"));
        }
        let mut list = [0; DISCARDED_RANGES as usize * RANGE_BYTES as usize];
        let list = &mut list[..payload as usize];
        read(request, HEADER_BYTES, list)?;
        let mut ranges = Vec::new();
        // All are checked before the first is cleared.
        for range in list.chunks_exact(RANGE_BYTES as usize) {
            let (sector, sectors, flags) = (word64(range, 0), word32(range, 8), word32(range, 12));
            if flags & !UNMAP != 0 || (discard && flags != 0) {
                return Err(Failure::Unsupported);
            }
            if sectors > MOST_CLEARED_SECTORS {
                return Err(Failure::Refused("a range to clear that is too long"));
            }
            let bytes = u64::from(sectors) * SECTOR;
            ranges.push((self.within(sector, bytes)?, bytes, discard || flags == UNMAP));
        }
        for (offset, bytes, give_back) in ranges.into_iter().filter(|(_, bytes, _)| *bytes > 0) {
            match give_back {
                true => self.file.punch(offset, bytes)?,
                false => self.file.zero(offset, bytes)?,
            }
            self.control.counters.cleared_bytes.add(bytes);
        }
        Ok(())
    }

    /// Flushes after a write if the driver cannot.
    fn settle(&self, write_through: bool) -> Result<u64, Failure> {
        if write_through {
            self.file.flush()?;
        }
        Ok(0)
    }

    fn may_write(&self) -> Result<(), Failure> {
        if self.control.read_only { Err(Failure::Refused("a write to a disk that is read-only")) } else { Ok(()) }
    }

    /// Where the data of a read or write lies in the file.
    fn range(&self, sector: u64, bytes: u64) -> Result<u64, Failure> {
        if !bytes.is_multiple_of(SECTOR) {
            return Err(Failure::Refused("data that is not whole sectors"));
        }
        if bytes > MOST_BYTES {
            return Err(Failure::Refused("more data than a request may have"));
        }
        self.within(sector, bytes)
    }

    fn within(&self, sector: u64, bytes: u64) -> Result<u64, Failure> {
        let offset = sector.checked_mul(SECTOR);
        let fits = |offset: &u64| offset.checked_add(bytes).is_some_and(|end| end <= self.file.bytes());
        offset.filter(fits).ok_or(Failure::Refused("sectors past the end of the disk"))
    }

    /// The status of a request that failed.
    fn failed(&self, failure: Failure) -> Result<u32, DriverError> {
        let path = &self.control.path;
        match failure {
            Failure::Driver(error) => return Err(error),
            Failure::Unsupported => return Ok(blk::VIRTIO_BLK_S_UNSUPP),
            Failure::Refused(what) => {
                self.control.counters.refused_requests.inc();
                if let Some(number) = self.refusals.tick() {
                    log::warn!("disk {path}: refused a guest request ({number} so far): {what}");
                }
            }
            Failure::Host(error) => {
                self.control.counters.io_errors.inc();
                if let Some(number) = self.errors.tick() {
                    log::error!("disk {path}: an I/O error, reported to the guest ({number} so far): {error}");
                }
            }
        }
        Ok(blk::VIRTIO_BLK_S_IOERR)
    }
}

/// Copies what the driver wrote, from `skip` on, as far as it fills `bytes`.
fn read(request: &Request<'_>, skip: u64, bytes: &mut [u8]) -> Result<(), DriverError> {
    let mut rest = bytes;
    for slice in request.slices(false, skip, rest.len() as u64)? {
        let (part, after) = rest.split_at_mut(rest.len().min(slice.len()));
        slice.copy_to(part);
        rest = after;
    }
    Ok(())
}

/// A little-endian word; bytes past the end read as zeroes.
fn word64(bytes: &[u8], at: usize) -> u64 {
    bytes.iter().skip(at).take(8).rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

fn word32(bytes: &[u8], at: usize) -> u32 {
    word64(bytes, at) as u32
}

impl VirtioDevice for Blk {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn name(&self) -> &'static str {
        "virtio-blk"
    }

    fn role(&self) -> Role {
        roles::DISK
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn helpers(&self) -> u32 {
        HELPERS
    }

    fn features(&self) -> u64 {
        [
            (blk::VIRTIO_BLK_F_SIZE_MAX, true),
            (blk::VIRTIO_BLK_F_SEG_MAX, true),
            (blk::VIRTIO_BLK_F_BLK_SIZE, true),
            (blk::VIRTIO_BLK_F_TOPOLOGY, true),
            (blk::VIRTIO_BLK_F_FLUSH, true),
            (blk::VIRTIO_BLK_F_RO, self.disk.control.read_only),
            (blk::VIRTIO_BLK_F_DISCARD, self.disk.file.punches()),
            (blk::VIRTIO_BLK_F_WRITE_ZEROES, self.disk.file.punches()),
        ]
        .into_iter()
        .fold(0, |features, (bit, offered)| features | u64::from(offered) << bit)
    }

    fn start(&mut self, features: u64) {
        self.write_through = features & 1 << blk::VIRTIO_BLK_F_FLUSH == 0;
    }

    fn reset(&mut self) {
        self.write_through = true;
    }

    fn config(&self) -> Vec<u8> {
        // capacity, size_max, seg_max; geometry, which is obsolete; blk_size; topology.
        let mut config = (self.disk.file.bytes() / SECTOR).to_le_bytes().to_vec();
        let word = |config: &mut Vec<u8>, word: u32| config.extend(word.to_le_bytes());
        [SEGMENT_BYTES, SEGMENTS, 0, SECTOR as u32].into_iter().for_each(|value| word(&mut config, value));
        // physical_block_exp, alignment_offset, min_io_size; opt_io_size; writeback, queues.
        config.extend([BLOCK_EXPONENT, 0, 1 << BLOCK_EXPONENT, 0]);
        [0, 0].into_iter().for_each(|value| word(&mut config, value));
        if self.disk.file.punches() {
            // Discards: sectors, ranges, alignment; zeroes: sectors, ranges, and that they may unmap.
            let alignment = 1 << BLOCK_EXPONENT;
            [MOST_CLEARED_SECTORS, DISCARDED_RANGES, alignment, MOST_CLEARED_SECTORS, ZEROED_RANGES, 1]
                .into_iter()
                .for_each(|value| word(&mut config, value));
        }
        config
    }

    fn write_config(&mut self, _: u64, _: &[u8]) -> bool {
        false
    }

    fn serve(&mut self, _: usize, request: &Request<'_>) -> Result<Served, DriverError> {
        let (readable, writable) = (request.bytes(false), request.bytes(true));
        if readable < HEADER_BYTES {
            return Err(DriverError::Length { bytes: readable, allowed: "too few for the header of a request" });
        }
        // The last byte is the status, however the driver splits its buffers.
        let Some(room) = writable.checked_sub(1) else {
            return Err(DriverError::Length { bytes: 0, allowed: "too few for the status of a request" });
        };
        let mut header = [0; HEADER_BYTES as usize];
        read(request, 0, &mut header)?;
        let (kind, sector) = (word32(&header, 0), word64(&header, 8));
        let (disk, ask) = (self.disk.clone(), Ask { kind, sector, room, write_through: self.write_through });
        Ok(Served::Outside(Box::new(move |request| disk.serve(ask, request))))
    }
}
