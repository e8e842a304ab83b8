//! virtio-net (virtio 1.3, 5.1) on a tap: frames between the guest and a network of the host.
//!
//! No offloads: each frame is whole, with its checksums, at most [`MAX_FRAME`] bytes. The header before
//! it carries no information then, so what the guest writes there never reaches the host's kernel, and
//! what the kernel writes there never reaches the guest. A frame that cannot be passed on is dropped and
//! counted; frames that the tap itself dropped are counted by its interface (`ip -s link`).

mod config;
mod frame;
mod tap;

#[cfg(test)]
mod tests;

pub use config::{MOST_NETS, MacAddr, NAME_BYTES, NetConfig, NetConfigError, check_nets};
pub use frame::MAX_FRAME;
pub use tap::NetError;

use super::request::Request;
use super::{DriverError, Notes, Served, Source, VirtioDevice};
use crate::roles;
use frame::HEADER_BYTES;
use llfree_base::RateLimit;
use llfree_base::counters::FrameCounters;
use llfree_base::thread::Role;
use llfree_control::report::NetStatus;
use log::Level;
use rustix::io::{Errno, retry_on_intr};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use tap::Tap;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP, virtio_net_hdr_v1,
};

/// Offset in a header of the number of buffers: the one field that the guest reads.
const NUM_BUFFERS: usize = std::mem::offset_of!(virtio_net_hdr_v1, num_buffers);

const QUEUE_SIZE: u16 = 256;
const TO_GUEST: usize = 0;

/// What one device moved and dropped.
#[derive(Default, Debug)]
pub struct NetCounters {
    to_guest: FrameCounters,
    from_guest: FrameCounters,
}

impl NetCounters {
    /// Their current values.
    #[must_use]
    pub fn status(&self) -> NetStatus {
        NetStatus { to_guest: self.to_guest.counts(), from_guest: self.from_guest.counts() }
    }
}

fn moved(counters: &FrameCounters, bytes: usize) {
    counters.frames.inc();
    counters.bytes.add(bytes as u64);
}

/// The device.
pub struct Net {
    tap: OwnedFd,
    mac: MacAddr,
    mtu: u16,
    /// Room for a header and a frame, and one more byte, by which a longer one is detected.
    frame: Vec<u8>,
    counters: Arc<NetCounters>,
    failures: RateLimit,
    notes: Notes,
}

impl Net {
    /// A device on the tap that `config` names.
    ///
    /// # Errors
    /// Why the tap is not available, and what to do.
    pub fn open(config: &NetConfig) -> Result<Self, NetError> {
        let tap = Tap::open(config)?;
        Ok(Self::with(tap.fd, config.mac, tap.mtu))
    }

    /// A device over a descriptor that reads and writes one frame with its header at a time, as a tap with
    /// `IFF_VNET_HDR` or a datagram socket does. Packets in frames have at most `mtu` bytes.
    ///
    /// # Errors
    /// It cannot be made non-blocking.
    pub fn over(frames: OwnedFd, mac: MacAddr, mtu: u16) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&frames, true)?;
        Ok(Self::with(frames, mac, mtu))
    }

    fn with(tap: OwnedFd, mac: MacAddr, mtu: u16) -> Self {
        let frame = vec![0; HEADER_BYTES + MAX_FRAME + 1];
        Self { tap, mac, mtu, frame, counters: Arc::default(), failures: RateLimit::default(), notes: Notes::default() }
    }

    /// Its counters, for reports.
    #[must_use]
    pub fn counters(&self) -> Arc<NetCounters> {
        self.counters.clone()
    }

    fn receive(&mut self, request: &Request<'_>) -> Result<Served, DriverError> {
        let counts = &self.counters.to_guest;
        let bytes = match retry_on_intr(|| rustix::io::read(&self.tap, &mut self.frame)) {
            Ok(0) | Err(Errno::AGAIN) => return Ok(Served::Later),
            Err(error) => {
                // The tap went away or is being reconfigured: the next frame is a new event.
                counts.errors.inc();
                self.failed("read", error);
                return Ok(Served::Later);
            }
            Ok(bytes) => bytes,
        };
        if bytes <= HEADER_BYTES || bytes > HEADER_BYTES + MAX_FRAME || bytes as u64 > request.bytes(true) {
            // One request per frame, so that a peer that sends too much cannot keep the thread here.
            // Linux counts an empty request as a length error.
            counts.dropped.inc();
            return Ok(Served::Done(0));
        }
        let frame = &mut self.frame[..bytes];
        frame[..HEADER_BYTES].fill(0);
        frame[NUM_BUFFERS] = 1;
        let written = request.write(frame)?;
        moved(counts, bytes - HEADER_BYTES);
        Ok(Served::Done(written))
    }

    fn transmit(&mut self, request: &Request<'_>) -> Result<Served, DriverError> {
        let mut frame = request.readable(HEADER_BYTES + MAX_FRAME)?;
        if frame.len() <= HEADER_BYTES {
            return Err(DriverError::Length { bytes: frame.len() as u64, allowed: "not a frame with its header" });
        }
        frame[..HEADER_BYTES].fill(0);
        let counts = &self.counters.from_guest;
        match retry_on_intr(|| rustix::io::write(&self.tap, &frame)) {
            Ok(_) => moved(counts, frame.len() - HEADER_BYTES),
            // Its readers are slower than the guest.
            Err(Errno::AGAIN) => counts.dropped.inc(),
            Err(error) => {
                counts.errors.inc();
                self.failed("write", error);
            }
        }
        Ok(Served::Done(0))
    }

    fn failed(&mut self, step: &str, error: Errno) {
        if let Some(number) = self.failures.tick() {
            let line = format!("virtio-net could not {step} a frame ({number} failures so far): {error}");
            self.notes.add(Level::Warn, line);
        }
    }
}

impl VirtioDevice for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn name(&self) -> &'static str {
        "virtio-net"
    }

    fn role(&self) -> Role {
        roles::STREAM
    }

    fn notes(&mut self) -> Option<&mut Notes> {
        Some(&mut self.notes)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS | 1 << VIRTIO_NET_F_MTU
    }

    fn start(&mut self, _: u64) {}

    fn reset(&mut self) {}

    fn config(&self) -> Vec<u8> {
        // mac, status, max_virtqueue_pairs, mtu. The link is up whether or not the tap is.
        let words = [VIRTIO_NET_S_LINK_UP as u16, 1, self.mtu];
        self.mac.0.into_iter().chain(words.into_iter().flat_map(u16::to_le_bytes)).collect()
    }

    fn write_config(&mut self, _: u64, _: &[u8]) -> bool {
        false
    }

    fn serve(&mut self, queue: usize, request: &Request<'_>) -> Result<Served, DriverError> {
        if queue == TO_GUEST { self.receive(request) } else { self.transmit(request) }
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source { fd: self.tap.as_raw_fd(), queue: TO_GUEST }]
    }
}
