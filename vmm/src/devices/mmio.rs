//! [`Transport`]: the registers of one device and its queues, as virtio-mmio version 2 has them.
//!
//! vCPUs read and write registers; the device's thread serves queues. One lock guards both, held for one
//! register access or one request. A request that waits for the host is carried out without it, by helper
//! threads, several at once: only a driver that resets the device waits for those, as the device must not touch
//! memory afterwards. What an interrupt handler or a status needs does not take the lock. The steps of the
//! initialisation are checked: a step out of order changes nothing, is counted, and makes the device ask for a
//! reset. Until it is reset, it serves nothing.

use super::irq::{CONFIG_CHANGE, Irq, Notifier, USED_BUFFER};
use super::outside::{Job, Outside};
use super::request::Request;
use super::state::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET, State, Step};
use super::{DriverError, Notes, Source, VirtioDevice};
use llfree_base::RateLimit;
use llfree_base::counters::{DriverCounters, DriverCounts};
use llfree_base::lock;
use llfree_base::thread::Role;
use llfree_monitor::memory::GuestRam;
use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
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

/// The steps of an initialisation, in order.
const STEPS: [u32; 4] = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];

/// One device on the bus.
pub struct Transport {
    name: &'static str,
    /// Held by a thread that waits for the state.
    turn: Mutex<()>,
    state: Mutex<State>,
    outside: Outside,
    /// A copy of what the state says, for who must not wait.
    live: AtomicBool,
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
        let name = device.name();
        let state = State::new(device);
        let events =
            state.queues.iter().map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)).collect::<io::Result<_>>()?;
        Ok(Self {
            name,
            turn: Mutex::new(()),
            state: Mutex::new(state),
            outside: Outside::default(),
            live: AtomicBool::new(false),
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
        self.live.load(Ordering::Relaxed)
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
        if data == [0; 4] && [reg::VIRTIO_MMIO_STATUS, reg::VIRTIO_MMIO_QUEUE_READY].map(u64::from).contains(&offset) {
            state = self.drain(state);
        }
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

    /// Waits until nothing is in flight, or the VM ends: a driver may use its memory for something else once
    /// its device has been reset.
    fn drain<'a>(&'a self, mut state: Held<'a>) -> Held<'a> {
        // Nothing more is begun meanwhile.
        state.draining += 1;
        drop(state);
        self.outside.wait_until_idle();
        let mut state = self.lock();
        state.draining -= 1;
        if state.draining == 0 {
            self.notify_starved(&mut state);
        }
        state
    }

    /// Waits until nothing is in flight, as long as `go_on` says so; true if so.
    pub fn wait_until_idle(&self, go_on: impl Fn() -> bool) -> bool {
        self.outside.wait_until_idle_while(go_on)
    }

    /// The threads that its device wants for its requests; each of them calls [`help`](Self::help).
    #[must_use]
    pub fn helpers(&self) -> u32 {
        self.lock().device.helpers()
    }

    /// The helpers that are there.
    #[cfg(test)]
    pub(super) fn helping(&self) -> u32 {
        self.outside.helpers()
    }

    /// Whether somebody has its lock.
    #[cfg(test)]
    pub(super) fn is_locked(&self) -> bool {
        self.state.try_lock().is_err()
    }

    /// A helper's work, until the VM [ends](Self::release).
    pub fn help(&self) {
        self.outside.add_helper();
        while let Some(job) = self.outside.next() {
            self.carry_out(job);
        }
    }

    /// Ends the helpers after their current requests, and lets go of vCPUs that wait for those: the VM ends.
    /// Waits for no request.
    pub fn release(&self) {
        self.outside.release();
    }

    /// Carries out a job without the lock, and gives its request back.
    fn carry_out(&self, job: Job) {
        let Job { queue, head, buffers, task } = job;
        let done = task(&Request::again(self.ram.guest_memory(), head, buffers));
        let mut state = self.lock();
        let given_back = done.and_then(|bytes| state.give_back(queue, head, bytes, &self.ram));
        self.outside.done();
        self.notify_starved(&mut state);
        match given_back {
            Ok(interrupt) => {
                drop(state);
                if interrupt {
                    self.irq.trigger(USED_BUFFER);
                }
            }
            Err(error) => self.driver_erred(state, &error),
        }
    }

    /// Has queues served again that had to wait for a helper.
    fn notify_starved(&self, state: &mut State) {
        for queue in std::mem::take(&mut state.starved) {
            // It fails only if the event is full, and then the thread is awake.
            self.events.get(queue).map(|event| event.write(1).ok());
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
            match state.serve_one(queue, &self.ram, &self.outside) {
                Ok(Step::Nothing) => return false,
                Ok(Step::Job(job)) => {
                    let unaided = self.outside.begin(job);
                    drop(state);
                    if let Some(job) = unaided {
                        self.carry_out(job);
                    }
                }
                Ok(Step::Served { interrupt }) => {
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
    fn driver_erred(&self, mut state: Held<'_>, error: &DriverError) {
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

    fn lock(&self) -> Held<'_> {
        // Mutexes are unfair: a thread that serves one request after the other would retake the state's
        // lock before a waiting vCPU is awake. It has to wait for this lock first, though.
        let _turn = lock(&self.turn);
        // A panic under the lock would end the process.
        Held { transport: self, state: Some(lock(&self.state)) }
    }
}

/// The state, locked. Letting go of it says what the device had to say.
struct Held<'a> {
    transport: &'a Transport,
    /// `None` only once it goes.
    state: Option<MutexGuard<'a, State>>,
}

impl Deref for Held<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        self.state.as_ref().expect("it is there until this is dropped")
    }
}

impl DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut State {
        self.state.as_mut().expect("it is there until this is dropped")
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let Some(mut state) = self.state.take() else { return };
        self.transport.live.store(state.is_live(), Ordering::Relaxed);
        let notes = state.device.notes().map(Notes::take);
        drop(state);
        if let Some(notes) = notes {
            notes.log();
        }
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
