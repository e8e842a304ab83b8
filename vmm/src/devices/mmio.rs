//! [`Transport`]: the registers of one device and its queues, as virtio-mmio version 2 has them.
//!
//! vCPUs read and write registers; the device's thread serves queues. One lock guards both, held for one
//! register access or one request, so that a driver that resets its device waits for at most one request;
//! what an interrupt handler needs does not take the lock. The steps of the initialisation are checked:
//! a step out of order changes nothing, is counted, and makes the device ask for a reset. Until it is
//! reset, it serves nothing.

use super::irq::{CONFIG_CHANGE, Irq, Notifier, USED_BUFFER};
use super::request::{Request, in_memory};
use super::{DriverError, Served, Source, VirtioDevice};
use llfree_base::RateLimit;
use llfree_base::counters::{DriverCounters, DriverCounts};
use llfree_base::lock;
use llfree_base::thread::Role;
use llfree_monitor::memory::GuestRam;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use virtio_bindings::virtio_config as config;
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// How many requests of one queue are served before the others get their turn.
const MOST_REQUESTS: u32 = 256;

/// `virt` in memory order.
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// The version without the legacy interface.
const VERSION: u32 = 2;
/// `LLFR` in memory order; drivers do not care.
const VENDOR: u32 = u32::from_le_bytes(*b"LLFR");
/// Offset of the register that a driver writes a queue's number to; an ioeventfd is registered there.
pub const QUEUE_NOTIFY: u64 = reg::VIRTIO_MMIO_QUEUE_NOTIFY as u64;
/// Where the device's own configuration starts.
const CONFIG: u64 = reg::VIRTIO_MMIO_CONFIG as u64;
/// Bytes of a shared memory region that does not exist.
const NO_REGION: u32 = u32::MAX;

const ACKNOWLEDGE: u32 = config::VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = config::VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = config::VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = config::VIRTIO_CONFIG_S_DRIVER_OK;
const NEEDS_RESET: u32 = config::VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = config::VIRTIO_CONFIG_S_FAILED;
/// The steps of an initialisation, in order.
const STEPS: [u32; 4] = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];

/// What this transport adds to a device's own features.
const FEATURES: u64 = 1 << config::VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

struct State {
    device: Box<dyn VirtioDevice>,
    queues: Vec<Queue>,
    status: u32,
    device_page: u32,
    driver_page: u32,
    driver_features: u64,
    queue: u32,
    generation: u32,
}

/// One device on the bus.
pub struct Transport {
    name: &'static str,
    /// Held by a thread that waits for the state.
    turn: Mutex<()>,
    state: Mutex<State>,
    ram: Arc<GuestRam>,
    irq: Irq,
    events: Vec<EventFd>,
    counters: DriverCounters,
    errors_logged: RateLimit,
}

impl Transport {
    /// A device at rest. `notifier` is called at each of its interrupts.
    ///
    /// # Errors
    /// The host cannot create events.
    pub fn new(device: Box<dyn VirtioDevice>, ram: Arc<GuestRam>, notifier: Notifier) -> io::Result<Self> {
        let queues = fresh_queues(&*device);
        let events = queues.iter().map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)).collect::<io::Result<_>>()?;
        let name = device.name();
        let state = State {
            device,
            queues,
            status: 0,
            device_page: 0,
            driver_page: 0,
            driver_features: 0,
            queue: 0,
            generation: 0,
        };
        Ok(Self {
            name,
            turn: Mutex::new(()),
            state: Mutex::new(state),
            ram,
            irq: Irq::new(notifier)?,
            events,
            counters: DriverCounters::default(),
            errors_logged: RateLimit::default(),
        })
    }

    /// A short name for logs and threads.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The rights of its thread.
    #[must_use]
    pub fn role(&self) -> Role {
        self.lock().device.role()
    }

    /// One event per queue, written when the driver notifies it.
    #[must_use]
    pub fn events(&self) -> &[EventFd] {
        &self.events
    }

    /// The device's interrupt.
    #[must_use]
    pub fn irq(&self) -> &Irq {
        &self.irq
    }

    /// How many violations its driver committed.
    #[must_use]
    pub fn driver_errors(&self) -> u64 {
        self.counters.errors.get()
    }

    /// The counters about its driver.
    #[must_use]
    pub fn counts(&self) -> DriverCounts {
        self.counters.counts()
    }

    /// Whether a driver is using it.
    #[must_use]
    pub fn is_driven(&self) -> bool {
        self.lock().is_live()
    }

    /// How often [`tick`](Self::tick) is due.
    #[must_use]
    pub fn interval(&self) -> Option<Duration> {
        self.lock().device.interval()
    }

    /// What its thread waits for in addition to notifications.
    #[must_use]
    pub fn sources(&self) -> Vec<Source> {
        self.lock().device.sources()
    }

    /// The device's configuration changed from the host's side: tells the driver.
    pub fn config_changed(&self) {
        let mut state = self.lock();
        state.generation = state.generation.wrapping_add(1);
        let driven = state.status & DRIVER_OK != 0;
        drop(state);
        if driven {
            self.irq.trigger(CONFIG_CHANGE);
        }
    }

    /// A vCPU reads a register. Unknown registers and accesses of another width read as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(CONFIG) {
            let config = self.lock().device.config();
            for (to, from) in data.iter_mut().zip(config.iter().skip(at as usize)) {
                *to = *from;
            }
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            *word = self.register(offset as u32).to_le_bytes();
        }
    }

    fn register(&self, offset: u32) -> u32 {
        // Every interrupt handler reads this, and must not wait for the current request.
        if offset == reg::VIRTIO_MMIO_INTERRUPT_STATUS {
            return self.irq.status();
        }
        let state = self.lock();
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => state.device.id(),
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => page(state.offered(), state.device_page),
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => state.selected().map_or(0, |queue| u32::from(queue.max_size())),
            reg::VIRTIO_MMIO_QUEUE_READY => state.selected().map_or(0, |queue| u32::from(queue.ready())),
            reg::VIRTIO_MMIO_STATUS => state.status,
            reg::VIRTIO_MMIO_SHM_LEN_LOW
            | reg::VIRTIO_MMIO_SHM_LEN_HIGH
            | reg::VIRTIO_MMIO_SHM_BASE_LOW
            | reg::VIRTIO_MMIO_SHM_BASE_HIGH => NO_REGION,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => state.generation,
            _ => 0,
        }
    }

    /// A vCPU writes a register. Unknown registers and writes of another width are driver errors.
    pub fn write(&self, offset: u64, data: &[u8]) {
        // As often as interrupts: this must not wait for the current request, either.
        if let Ok(word) = <[u8; 4]>::try_from(data)
            && offset == u64::from(reg::VIRTIO_MMIO_INTERRUPT_ACK)
        {
            self.irq.acknowledge(u32::from_le_bytes(word));
            return;
        }
        let mut state = self.lock();
        let result = if let Some(at) = offset.checked_sub(CONFIG) {
            let written = state.device.write_config(at, data);
            if written { Ok(()) } else { Err(DriverError::Register { register: offset, value: 0 }) }
        } else if let Ok(word) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.set_register(&mut state, offset as u32, u32::from_le_bytes(word))
        } else {
            Err(DriverError::Register { register: offset, value: 0 })
        };
        if let Err(error) = result {
            self.driver_erred(state, &error);
        }
    }

    fn set_register(&self, state: &mut State, offset: u32, value: u32) -> Result<(), DriverError> {
        let refused = DriverError::Register { register: offset.into(), value };
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => state.device_page = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => state.driver_page = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => {
                if state.status & (DRIVER | FEATURES_OK) != DRIVER {
                    return Err(refused);
                }
                match state.driver_page {
                    0 => state.driver_features = state.driver_features & !0xffff_ffff | u64::from(value),
                    1 => state.driver_features = state.driver_features & 0xffff_ffff | u64::from(value) << 32,
                    // Undefined bits: a driver may clear them, but not set them.
                    _ if value == 0 => {}
                    _ => return Err(refused),
                }
            }
            reg::VIRTIO_MMIO_QUEUE_SEL => state.queue = value,
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => match self.events.get(value as usize) {
                // Normally KVM signals the event; this is the fallback. The write can only fail if the
                // event is full, and then the thread is awake.
                Some(event) => drop(event.write(1)),
                None => return Err(refused),
            },
            reg::VIRTIO_MMIO_STATUS => return self.set_status(state, value),
            reg::VIRTIO_MMIO_SHM_SEL => {}
            _ => return state.set_queue_register(offset, value, &self.ram),
        }
        Ok(())
    }

    fn set_status(&self, state: &mut State, value: u32) -> Result<(), DriverError> {
        if value == 0 {
            state.reset();
            self.irq.acknowledge(u32::MAX);
            return Ok(());
        }
        let from = state.status;
        let refused = DriverError::Status { from, to: value };
        let keeps_all = value & from & !NEEDS_RESET == from & !NEEDS_RESET;
        let known = STEPS.iter().fold(FAILED | NEEDS_RESET, |bits, step| bits | step);
        // Each step that is set needs the one before it.
        let in_order = STEPS.windows(2).all(|pair| value & pair[1] == 0 || value & pair[0] != 0);
        if !keeps_all || value & !known != 0 || !in_order {
            return Err(refused);
        }
        let new = value & !from;
        let mut accepted = value & !NEEDS_RESET | from & NEEDS_RESET;
        if new & FEATURES_OK != 0 && !state.features_fit() {
            // Not an error: the driver reads the bit back, and sees that it may not go on.
            accepted &= !(FEATURES_OK | DRIVER_OK);
        }
        state.status = accepted;
        if new & accepted & FEATURES_OK != 0 {
            let event_idx = state.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
            state.queues.iter_mut().for_each(|queue| queue.set_event_idx(event_idx));
        }
        if new & accepted & DRIVER_OK != 0 {
            let features = state.driver_features;
            state.device.start(features);
            // Requests may be waiting whose notifications came before the device was live.
            self.events.iter().for_each(|event| drop(event.write(1)));
        }
        Ok(())
    }

    /// Serves the requests of a queue until it is empty, the device can do no more now, a queue's worth
    /// was served, or `stopping` says so. True if there may be more that can be served at once.
    pub fn serve(&self, queue: usize, stopping: impl Fn() -> bool) -> bool {
        for _ in 0..MOST_REQUESTS {
            if stopping() {
                return false;
            }
            let mut state = self.lock();
            match state.serve_one(queue, &self.ram) {
                Ok(None) => return false,
                Ok(Some(interrupt)) => {
                    drop(state);
                    if interrupt {
                        self.irq.trigger(USED_BUFFER);
                    }
                }
                Err(error) => {
                    self.driver_erred(state, &error);
                    return false;
                }
            }
        }
        true
    }

    /// Lets the device do what is due.
    pub fn tick(&self) {
        let mut state = self.lock();
        if !state.is_live() {
            return;
        }
        let Some((queue, head)) = state.device.tick() else { return };
        match state.give_back(queue, head, 0, &self.ram) {
            Ok(interrupt) => {
                drop(state);
                if interrupt {
                    self.irq.trigger(USED_BUFFER);
                }
            }
            Err(error) => self.driver_erred(state, &error),
        }
    }

    /// Counts an error of the driver and asks for a reset.
    fn driver_erred(&self, mut state: MutexGuard<'_, State>, error: &DriverError) {
        let had_it = state.status & NEEDS_RESET != 0;
        state.status |= NEEDS_RESET;
        let tell = !had_it && state.status & DRIVER_OK != 0;
        drop(state);
        self.counters.errors.inc();
        if let Some(number) = self.errors_logged.tick() {
            let name = self.name;
            log::warn!("{name}: driver error ({number} so far), the device needs a reset: {error}");
        }
        if tell {
            self.irq.trigger(CONFIG_CHANGE);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Mutexes are unfair: a thread that serves one request after the other would retake the state's
        // lock before a waiting vCPU is awake. It has to wait for this lock first, though.
        let _turn = lock(&self.turn);
        // A panic under the lock would end the process.
        lock(&self.state)
    }
}

impl State {
    fn offered(&self) -> u64 {
        self.device.features() | FEATURES
    }

    fn features_fit(&self) -> bool {
        let version_1 = 1 << config::VIRTIO_F_VERSION_1;
        self.driver_features & !self.offered() == 0 && self.driver_features & version_1 != 0
    }

    fn is_live(&self) -> bool {
        self.status & DRIVER_OK != 0 && self.status & (NEEDS_RESET | FAILED) == 0
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(self.queue as usize)
    }

    fn reset(&mut self) {
        self.device.reset();
        self.queues = fresh_queues(&*self.device);
        (self.status, self.device_page, self.driver_page, self.driver_features, self.queue) = (0, 0, 0, 0, 0);
    }

    fn set_queue_register(&mut self, register: u32, value: u32, ram: &GuestRam) -> Result<(), DriverError> {
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

    /// Serves one request; returns whether the driver wants an interrupt, or `None` if no request was
    /// served.
    fn serve_one(&mut self, index: usize, ram: &GuestRam) -> Result<Option<bool>, DriverError> {
        if !self.is_live() {
            return Ok(None);
        }
        let Some(queue) = self.queues.get_mut(index).filter(|queue| queue.ready()) else { return Ok(None) };
        let available = || DriverError::Available { queue: index };
        let memory = ram.guest_memory();
        let Some(chain) = queue.iter(memory).map_err(|_| available())?.next() else {
            // Arms the driver's notifications again and looks once more, but in the next round, so that
            // a driver whose index flips back and forth cannot keep the thread here.
            let again = queue.enable_notification(memory).map_err(|_| available())?;
            return Ok(again.then_some(false));
        };
        if chain.head_index() >= queue.size() {
            return Err(available());
        }
        let request = Request::read(memory, chain)?;
        let (head, bytes) = match self.device.serve(index, &request)? {
            Served::Done(bytes) => (request.head(), bytes),
            Served::Kept { instead_of: Some(head) } => (head, 0),
            Served::Kept { instead_of: None } => return Ok(Some(false)),
            Served::Later => {
                // Nothing was given back, so there is nothing to interrupt for. Notifications are
                // not armed: more requests after one that cannot be served change nothing.
                if let Some(queue) = self.queues.get_mut(index) {
                    queue.go_to_previous_position();
                }
                return Ok(None);
            }
        };
        self.give_back(index, head, bytes, ram).map(Some)
    }

    /// Gives a request back; returns whether the driver wants an interrupt.
    fn give_back(&mut self, index: usize, head: u16, bytes: u32, ram: &GuestRam) -> Result<bool, DriverError> {
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

/// Half of a set of feature bits.
fn page(features: u64, page: u32) -> u32 {
    match page {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
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
