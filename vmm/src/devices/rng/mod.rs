//! virtio-rng (virtio 1.3, 5.4): random numbers of the host's kernel, so that a guest need not wait
//! for entropy of its own when it boots.
//!
//! A request gets at most [`MOST_BYTES`], however much room it has: a guest that wants more asks
//! again, and the host spends a bounded time on each request.

#[cfg(test)]
mod tests;

use super::request::Request;
use super::{DriverError, Notes, Served, VirtioDevice};
use crate::roles;
use llfree_base::RateLimit;
use llfree_base::thread::Role;
use log::Level;
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

const QUEUE_SIZE: u16 = 64;
/// Bytes that one request gets. Linux asks for 64 at a time.
pub const MOST_BYTES: usize = 4096;

/// The device.
#[derive(Default, Debug)]
pub struct Rng {
    failures: RateLimit,
    notes: Notes,
}

impl Rng {
    /// Fills `bytes`; returns how many of them.
    fn fill(&mut self, bytes: &mut [u8]) -> usize {
        let mut filled = 0;
        while filled < bytes.len() {
            // Blocks only in the first seconds after the host boots.
            match rustix::io::retry_on_intr(|| getrandom(&mut bytes[filled..], GetRandomFlags::empty())) {
                Ok(more) if more > 0 => filled += more,
                other => {
                    if let Some(number) = self.failures.tick() {
                        let line = format!("virtio-rng: the host gave no random numbers ({number} so far): {other:?}");
                        self.notes.add(Level::Error, line);
                    }
                    break;
                }
            }
        }
        filled
    }
}

impl VirtioDevice for Rng {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn name(&self) -> &'static str {
        "virtio-rng"
    }

    fn role(&self) -> Role {
        roles::STREAM
    }

    fn notes(&mut self) -> Option<&mut Notes> {
        Some(&mut self.notes)
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
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
        let room = request.bytes(true).min(MOST_BYTES as u64);
        if room == 0 {
            return Err(DriverError::Length { bytes: 0, allowed: "too little for random numbers" });
        }
        let mut bytes = [0; MOST_BYTES];
        // At most MOST_BYTES.
        let filled = self.fill(&mut bytes[..room as usize]);
        request.write(&bytes[..filled]).map(Served::Done)
    }
}
