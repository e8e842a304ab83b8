//! [`Request`]: one descriptor chain, copied out of guest memory and checked before a device sees it.
//!
//! A driver may change its descriptors at any time: each is read once, here, and only what was read
//! counts. A chain that loops, leads nowhere or names memory outside RAM is a [`DriverError`]; one that
//! is accepted has a bounded number of buffers, all of them in RAM.

use super::DriverError;
use std::ops::Deref;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, VolatileSlice};

/// Buffers in one request. A queue of ours has 256 descriptors; an indirect table may be longer.
pub const MAX_BUFFERS: usize = 1024;

/// A stretch of guest memory that the driver put into a request; it lies in RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Buffer {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub bytes: u32,
    /// For the device to write; otherwise to read.
    pub writable: bool,
}

/// One request of a driver.
#[derive(Debug)]
pub struct Request<'m> {
    memory: &'m GuestMemoryMmap<()>,
    head: u16,
    buffers: Vec<Buffer>,
}

impl<'m> Request<'m> {
    /// Reads a chain.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn read(
        memory: &'m GuestMemoryMmap<()>,
        mut chain: DescriptorChain<&'m GuestMemoryMmap<()>>,
    ) -> Result<Self, DriverError> {
        let head = chain.head_index();
        let mut buffers = Vec::new();
        // A chain that ends early ends silently: only the last descriptor tells.
        let mut ends = false;
        for descriptor in chain.by_ref() {
            let (address, bytes) = (descriptor.addr().0, descriptor.len());
            if !in_memory(memory, address, bytes as usize) {
                return Err(DriverError::Buffer { address, bytes });
            }
            if buffers.len() == MAX_BUFFERS {
                return Err(DriverError::Chain { head });
            }
            buffers.push(Buffer { address, bytes, writable: descriptor.is_write_only() });
            ends = !descriptor.has_next();
        }
        if ends { Ok(Self { memory, head, buffers }) } else { Err(DriverError::Chain { head }) }
    }

    /// The same request, read and checked before.
    pub(super) fn again(memory: &'m GuestMemoryMmap<()>, head: u16, buffers: Vec<Buffer>) -> Self {
        Self { memory, head, buffers }
    }

    /// Its number and its buffers, for [`again`](Self::again).
    pub(super) fn into_parts(self) -> (u16, Vec<Buffer>) {
        (self.head, self.buffers)
    }

    /// The number of its first descriptor, by which the driver identifies it.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Its buffers, in the driver's order.
    #[must_use]
    pub fn buffers(&self) -> &[Buffer] {
        &self.buffers
    }

    /// All that the driver wrote, in one piece.
    ///
    /// # Errors
    /// If that is more than `most` bytes.
    pub fn readable(&self, most: usize) -> Result<Vec<u8>, DriverError> {
        let buffers = || self.buffers.iter().filter(|buffer| !buffer.writable);
        let bytes: u64 = buffers().map(|buffer| u64::from(buffer.bytes)).sum();
        if bytes > most as u64 {
            return Err(DriverError::Length { bytes, allowed: "more than the device takes in one request" });
        }
        let mut all = vec![0; bytes as usize];
        let mut rest = all.as_mut_slice();
        for buffer in buffers() {
            let (part, after) = rest.split_at_mut(buffer.bytes as usize);
            self.memory
                .read_slice(part, GuestAddress(buffer.address))
                .map_err(|_| DriverError::Buffer { address: buffer.address, bytes: buffer.bytes })?;
            rest = after;
        }
        Ok(all)
    }

    /// How many bytes the device may write (or, if not `writable`, read) in all of its buffers together.
    #[must_use]
    pub fn bytes(&self, writable: bool) -> u64 {
        // At most 1024 times 4 GiB.
        self.buffers.iter().filter(|buffer| buffer.writable == writable).map(|buffer| u64::from(buffer.bytes)).sum()
    }

    /// The guest memory of `bytes` bytes, starting at `skip`, of what the device may write (or, if not
    /// `writable`, read), as if its buffers were contiguous: how a driver splits them does not matter.
    /// The guest may change it at any time. Shorter if the buffers end earlier.
    ///
    /// # Errors
    /// If a buffer is not all in RAM.
    pub fn slices(&self, writable: bool, mut skip: u64, mut bytes: u64) -> Result<Vec<VolatileSlice<'m>>, DriverError> {
        let mut slices = Vec::new();
        for buffer in self.buffers.iter().filter(|buffer| buffer.writable == writable) {
            let skipped = skip.min(buffer.bytes.into());
            let taken = bytes.min(u64::from(buffer.bytes) - skipped);
            (skip, bytes) = (skip - skipped, bytes - taken);
            if taken == 0 {
                continue;
            }
            // The sum is within the buffer, which lies in RAM.
            let at = GuestAddress(buffer.address + skipped);
            for slice in vm_memory::GuestMemoryBackend::get_slices(self.memory, at, taken as usize) {
                let outside = DriverError::Buffer { address: buffer.address, bytes: buffer.bytes };
                slices.push(slice.map_err(|_| outside)?);
            }
        }
        Ok(slices)
    }

    /// Writes `answer` into the buffers that the device may write; returns how many bytes those are.
    ///
    /// # Errors
    /// If there is less room.
    pub fn write(&self, answer: &[u8]) -> Result<u32, DriverError> {
        let mut rest = answer;
        for buffer in self.buffers.iter().filter(|buffer| buffer.writable) {
            let (part, after) = rest.split_at(rest.len().min(buffer.bytes as usize));
            self.memory
                .write_slice(part, GuestAddress(buffer.address))
                .map_err(|_| DriverError::Buffer { address: buffer.address, bytes: buffer.bytes })?;
            rest = after;
        }
        match rest.len() {
            0 => Ok(answer.len() as u32),
            missing => {
                Err(DriverError::Length { bytes: (answer.len() - missing) as u64, allowed: "too little for an answer" })
            }
        }
    }
}

/// Whether `bytes` from `address` on lie in guest memory.
pub(super) fn in_memory<M: Deref<Target = GuestMemoryMmap<()>>>(memory: M, address: u64, bytes: usize) -> bool {
    memory.check_range(GuestAddress(address), bytes, vm_memory::Permissions::ReadWrite)
}
