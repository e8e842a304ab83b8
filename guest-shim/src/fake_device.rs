//! A balloon in a test's process: registers in a struct, and queues that are served in the very
//! write that notifies them.

use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::collections::BTreeSet;
use std::ptr::with_exposed_provenance_mut;
use std::vec::Vec;

const FEATURES: [u32; 2] = [1 << 1 | 1 << 2 | 1 << 5, 1];
const DRIVER_OK: u32 = 15;
const QUEUES: usize = 5;

/// The device's half of a balloon.
#[derive(Default)]
pub(crate) struct FakeBalloon {
    status: u32,
    page: u32,
    queue: u32,
    /// Of each queue: the addresses of its rings, and requests served.
    rings: [[u64; 3]; QUEUES],
    served: [u16; QUEUES],
    /// Another feature bit to offer.
    pub(crate) extra: u32,
    /// Pages that the host wants, in the driver's configuration.
    pub(crate) num_pages: u32,
    /// The driver's status.
    pub(crate) actual: u32,
    /// Numbers that are given away, of pages or of blocks.
    pub(crate) given: BTreeSet<u32>,
    /// Lengths of all requests to inflate.
    pub(crate) requests: Vec<usize>,
    /// Addresses of blocks that were reported as free.
    pub(crate) reported: Vec<u64>,
    /// Statistics that came.
    pub(crate) statistics: u32,
}

impl FakeBalloon {
    pub(crate) fn read(&self, offset: u64) -> u32 {
        match offset {
            0 => u32::from_le_bytes(*b"virt"),
            4 => 2,
            8 => 5,
            0x10 => FEATURES[self.page as usize] | if self.page == 0 { self.extra } else { 0 },
            0x34 => 256,
            0x70 => self.status,
            0x100 => self.num_pages,
            _ => 0,
        }
    }

    pub(crate) fn write(&mut self, offset: u64, value: u32) {
        match offset {
            0x14 => self.page = value,
            0x30 => self.queue = value,
            0x70 => self.status = value,
            0x80..0xb0 => {
                let address = &mut self.rings[self.queue as usize][(offset as usize - 0x80) / 16];
                let shift = if offset.is_multiple_of(16) { 0 } else { 32 };
                *address |= u64::from(value) << shift;
            }
            0x50 => {
                assert_eq!(self.status, DRIVER_OK);
                self.serve(value as usize);
            }
            0x104 => self.actual = value,
            _ => {}
        }
    }

    fn serve(&mut self, queue: usize) {
        let [descriptors, available, used] = self.rings[queue];
        let made = half(available + 2).load(Ordering::Acquire);
        assert_eq!(made, self.served[queue].wrapping_add(1), "one request at a time");
        let head = half(available + 4 + 2 * u64::from(self.served[queue] % 256)).load(Ordering::Relaxed);
        let mut buffers = Vec::new();
        let mut next = Some(head);
        while let Some(index) = next {
            let at = descriptors + 16 * u64::from(index);
            buffers.push((long(at).load(Ordering::Relaxed), word(at + 8).load(Ordering::Relaxed)));
            let more = half(at + 12).load(Ordering::Relaxed) & 1 != 0;
            next = more.then(|| half(at + 14).load(Ordering::Relaxed));
        }
        let (address, bytes) = buffers[0];
        let numbers = (0..u64::from(bytes / 4)).map(|i| word(address + 4 * i).load(Ordering::Relaxed));
        match queue {
            0 => {
                self.requests.push(bytes as usize / 4);
                numbers.for_each(|number| assert!(self.given.insert(number), "given twice"));
            }
            1 => numbers.for_each(|number| assert!(self.given.remove(&number), "never given")),
            2 => {
                // Kept until somebody asks for more.
                self.statistics += 1;
                return;
            }
            _ => self.reported.extend(buffers.iter().map(|(address, _)| *address)),
        }
        self.served[queue] = made;
        half(used + 2).store(made, Ordering::Release);
    }
}

fn half(address: u64) -> &'static AtomicU16 {
    // SAFETY: a driver's ring or buffer, which lies in the table's RAM; tests keep that alive.
    unsafe { AtomicU16::from_ptr(with_exposed_provenance_mut(address as usize)) }
}

fn word(address: u64) -> &'static AtomicU32 {
    // SAFETY: as above.
    unsafe { AtomicU32::from_ptr(with_exposed_provenance_mut(address as usize)) }
}

fn long(address: u64) -> &'static AtomicU64 {
    // SAFETY: as above.
    unsafe { AtomicU64::from_ptr(with_exposed_provenance_mut(address as usize)) }
}
