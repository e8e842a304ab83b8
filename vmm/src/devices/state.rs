//! [`State`]: what lies behind the registers of a device, under the lock of its [`Transport`](super::mmio).
//!
//! The device, its queues, the steps of its initialisation, and the requests that are carried out elsewhere
//! meanwhile ([`Outside`]). Nothing here waits, writes to the log or makes a system call beyond what a device
//! does while it serves a request.

use super::outside::{Job, Outside};
use super::request::{Request, in_memory};
use super::{DriverError, Served, VirtioDevice};
use llfree_monitor::memory::GuestRam;
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use virtio_bindings::virtio_config as config;
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

pub(super) const ACKNOWLEDGE: u32 = config::VIRTIO_CONFIG_S_ACKNOWLEDGE;
pub(super) const DRIVER: u32 = config::VIRTIO_CONFIG_S_DRIVER;
pub(super) const FEATURES_OK: u32 = config::VIRTIO_CONFIG_S_FEATURES_OK;
pub(super) const DRIVER_OK: u32 = config::VIRTIO_CONFIG_S_DRIVER_OK;
pub(super) const NEEDS_RESET: u32 = config::VIRTIO_CONFIG_S_NEEDS_RESET;
pub(super) const FAILED: u32 = config::VIRTIO_CONFIG_S_FAILED;

/// What this transport adds to a device's own features.
const FEATURES: u64 = 1 << config::VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What serving a queue came to.
pub(super) enum Step {
    /// Nothing was served.
    Nothing,
    /// A request was; whether the driver wants an interrupt.
    Served { interrupt: bool },
    /// One is to be carried out.
    Job(Job),
}

/// All that changes about a device.
pub(super) struct State {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) queues: Vec<Queue>,
    pub(super) status: u32,
    pub(super) device_page: u32,
    pub(super) driver_page: u32,
    pub(super) driver_features: u64,
    pub(super) queue: u32,
    pub(super) generation: u32,
    /// Queues that have requests and no helper for them.
    pub(super) starved: BTreeSet<usize>,
    /// Threads that wait until nothing is in flight: no more comes meanwhile.
    pub(super) draining: u32,
}

impl State {
    pub(super) fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self {
            queues: fresh_queues(&*device),
            device,
            status: 0,
            device_page: 0,
            driver_page: 0,
            driver_features: 0,
            queue: 0,
            generation: 0,
            starved: BTreeSet::new(),
            draining: 0,
        }
    }

    pub(super) fn offered(&self) -> u64 {
        self.device.features() | FEATURES
    }

    pub(super) fn features_fit(&self) -> bool {
        let version_1 = 1 << config::VIRTIO_F_VERSION_1;
        self.driver_features & !self.offered() == 0 && self.driver_features & version_1 != 0
    }

    pub(super) fn is_live(&self) -> bool {
        self.status & DRIVER_OK != 0 && self.status & (NEEDS_RESET | FAILED) == 0
    }

    pub(super) fn selected(&self) -> Option<&Queue> {
        self.queues.get(self.queue as usize)
    }

    pub(super) fn reset(&mut self) {
        self.device.reset();
        self.queues = fresh_queues(&*self.device);
        (self.status, self.device_page, self.driver_page, self.driver_features, self.queue) = (0, 0, 0, 0, 0);
    }

    pub(super) fn set_queue_register(&mut self, register: u32, value: u32, ram: &GuestRam) -> Result<(), DriverError> {
        let refused = || DriverError::Register { register: register.into(), value };
        // Only while the queues are set up; the exceptions follow.
        let setting_up = self.status & (FEATURES_OK | DRIVER_OK) == FEATURES_OK;
        let index = self.queue as usize;
        let queue = self.queues.get_mut(index).ok_or_else(refused)?;
        if register == reg::VIRTIO_MMIO_QUEUE_READY {
            match value {
                0 => queue.set_ready(false),
                1 if setting_up => {
                    if !rings_fit(queue, ram) {
                        return Err(DriverError::Ring { queue: index });
                    }
                    queue.set_ready(true);
                }
                _ => return Err(refused()),
            }
            return Ok(());
        }
        if !setting_up || queue.ready() {
            return Err(refused());
        }
        // An address comes in two halves. The alignment of both is that of the lower one.
        let (descriptors, available, used) = (queue.desc_table(), queue.avail_ring(), queue.used_ring());
        let low = |address: u64| GuestAddress(address & !0xffff_ffff | u64::from(value));
        let high = |address: u64| GuestAddress(address & 0xffff_ffff | u64::from(value) << 32);
        match register {
            reg::VIRTIO_MMIO_QUEUE_NUM => {
                u16::try_from(value).ok().and_then(|size| queue.try_set_size(size).ok()).ok_or_else(refused)
            }
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => {
                queue.try_set_desc_table_address(low(descriptors)).map_err(|_| refused())
            }
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                queue.try_set_desc_table_address(high(descriptors)).map_err(|_| refused())
            }
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.try_set_avail_ring_address(low(available)).map_err(|_| refused()),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                queue.try_set_avail_ring_address(high(available)).map_err(|_| refused())
            }
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => queue.try_set_used_ring_address(low(used)).map_err(|_| refused()),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => queue.try_set_used_ring_address(high(used)).map_err(|_| refused()),
            _ => Err(refused()),
        }
    }

    /// Serves one request, or finds out who is to.
    pub(super) fn serve_one(&mut self, index: usize, ram: &GuestRam, outside: &Outside) -> Result<Step, DriverError> {
        if !self.is_live() || self.draining > 0 {
            return Ok(Step::Nothing);
        }
        if !outside.has_place() {
            // The end of one of them notifies the queue.
            self.starved.insert(index);
            return Ok(Step::Nothing);
        }
        let Some(queue) = self.queues.get_mut(index).filter(|queue| queue.ready()) else { return Ok(Step::Nothing) };
        let available = || DriverError::Available { queue: index };
        let memory = ram.guest_memory();
        let Some(chain) = queue.iter(memory).map_err(|_| available())?.next() else {
            // Arms the driver's notifications again and looks once more, but in the next round, so that
            // a driver whose index flips back and forth cannot keep the thread here.
            let again = queue.enable_notification(memory).map_err(|_| available())?;
            return Ok(if again { Step::Served { interrupt: false } } else { Step::Nothing });
        };
        if chain.head_index() >= queue.size() {
            return Err(available());
        }
        let request = Request::read(memory, chain)?;
        let (head, bytes) = match self.device.serve(index, &request)? {
            Served::Done(bytes) => (request.head(), bytes),
            Served::Kept { instead_of: Some(head) } => (head, 0),
            Served::Kept { instead_of: None } => return Ok(Step::Served { interrupt: false }),
            Served::Outside(task) => {
                let (head, buffers) = request.into_parts();
                return Ok(Step::Job(Job { queue: index, head, buffers, task }));
            }
            Served::Later => {
                // Nothing was given back, so there is nothing to interrupt for. Notifications are
                // not armed: more requests after one that cannot be served change nothing.
                if let Some(queue) = self.queues.get_mut(index) {
                    queue.go_to_previous_position();
                }
                return Ok(Step::Nothing);
            }
        };
        self.give_back(index, head, bytes, ram).map(|interrupt| Step::Served { interrupt })
    }

    /// Gives a request back; returns whether the driver wants an interrupt.
    pub(super) fn give_back(
        &mut self,
        index: usize,
        head: u16,
        bytes: u32,
        ram: &GuestRam,
    ) -> Result<bool, DriverError> {
        let ring = |_| DriverError::Ring { queue: index };
        let Some(queue) = self.queues.get_mut(index).filter(|queue| queue.ready()) else { return Ok(false) };
        let memory = ram.guest_memory();
        queue.add_used(memory, head, bytes).map_err(ring)?;
        let wanted = queue.needs_notification(memory).map_err(ring)?;
        if queue.event_idx_enabled() {
            return Ok(wanted);
        }
        // The queue's crate leaves this flag to its users.
        let flags: u16 = memory
            .load(GuestAddress(queue.avail_ring()), Ordering::Acquire)
            .map_err(|_| DriverError::Ring { queue: index })?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}

fn fresh_queues(device: &dyn VirtioDevice) -> Vec<Queue> {
    // Our devices' sizes are constants, all powers of two.
    let queue = |size: &u16| Queue::new(*size).expect("a queue's size is a power of two");
    device.queue_sizes().iter().map(queue).collect()
}

/// Whether all three rings lie in RAM, aligned as the standard wants them.
fn rings_fit(queue: &Queue, ram: &GuestRam) -> bool {
    let size = usize::from(queue.size());
    // Each with the event word at its end.
    let rings =
        [(queue.desc_table(), 16 * size), (queue.avail_ring(), 6 + 2 * size), (queue.used_ring(), 6 + 8 * size)];
    let memory = ram.guest_memory();
    queue.avail_ring() != 0 && rings.into_iter().all(|(address, bytes)| in_memory(memory, address, bytes))
}
