//! [`Worker`]: the thread on which a device serves its queues, so that no vCPU waits for it.
//!
//! It sleeps until a queue is notified, a source of the device fires or a tick is due. A queue that
//! always has more takes turns with the others and with the order to stop.
//!
//! No wake-up is lost, and at most one in a row is spurious:
//! - Notifications are level-triggered events that the thread clears *before* it looks at the queue.
//!   One that comes after that wakes it again.
//! - Sources are edge-triggered: a device without requests to fill leaves them readable, and must
//!   not be woken for that repeatedly. An edge that finds requests waiting is followed by reads
//!   until `WouldBlock`, and what arrives after that is a new edge. An edge that finds the queue
//!   empty arms the driver's notifications and looks once more (`State::serve_one`), so the next
//!   request brings a notification, and that one finds the source still readable. An edge that finds
//!   the device stopped is made up for when the driver starts it, which notifies all queues.
//! - A queue that had its turn and may have more is notified by the thread itself, so the rest of a
//!   source does not depend on another edge.
//!
//! A device is **quiesced** while its thread is parked: between two requests and with none in the hands of a
//! helper, so that no queue is served, the device gets no tick, and guest memory is neither read nor written. When it resumes, the thread
//! notifies all queues itself, because a notification or an edge may have been cleared just before the
//! order came, without its requests having been served.

use super::mmio::Transport;
use crate::parking::{EndsWith, Order, Parking};
use llfree_base::thread::Spawner;
use std::cell::Cell;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

const ORDER: u64 = u64::MAX;
/// Set in the number of a queue that one of the device's sources has work for.
const SOURCE: u64 = 1 << 32;

/// How long all threads together may take to finish their current requests when they are told to end.
const LAST_REQUESTS: Duration = Duration::from_secs(5);

/// The orders of a device's thread, and what wakes it for them.
pub struct WorkerControl {
    name: &'static str,
    parking: Parking,
    event: EventFd,
}

impl WorkerControl {
    fn give(&self, order: Order) {
        self.parking.give(order);
        // Fails only if the event is full, and then the thread is awake.
        let _ = self.event.write(1);
    }
}

/// Quiesces devices, all at once. They finish their current requests first, by `deadline` at the latest.
///
/// # Errors
/// The name of the first device whose request did not finish by then. All have been given the order;
/// [`resume`] takes it back.
pub fn quiesce(devices: &[Arc<WorkerControl>], deadline: Instant) -> Result<(), &'static str> {
    devices.iter().for_each(|device| device.give(Order::Pause));
    match devices.iter().find(|device| !device.parking.wait_settled(deadline)) {
        Some(late) => Err(late.name),
        None => Ok(()),
    }
}

/// Makes quiesced devices serve their queues again, including what came in the meantime.
pub fn resume(devices: &[Arc<WorkerControl>]) {
    devices.iter().for_each(|device| device.give(Order::Run));
}

/// A device's thread. Dropping it ends the thread, after its current request. A thread whose request
/// does not finish, because the host's storage does not answer, is left behind: it owns all it uses.
pub struct Worker {
    device: Arc<Transport>,
    control: Arc<WorkerControl>,
    /// The one that serves the queues, and those that help it.
    threads: Vec<JoinHandle<()>>,
}

impl Worker {
    /// Starts serving.
    ///
    /// # Errors
    /// The host cannot start a thread or create an event.
    pub fn start(device: Arc<Transport>, threads: &Spawner) -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let control = Arc::new(WorkerControl { name: device.name(), parking: Parking::default(), event });
        let epoll = Epoll::new()?;
        let add = |fd: RawFd, events: EventSet, number: u64| {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, number))
        };
        add(control.event.as_raw_fd(), EventSet::IN, ORDER)?;
        for (queue, event) in device.events().iter().enumerate() {
            add(event.as_raw_fd(), EventSet::IN, queue as u64)?;
        }
        let sources = device.sources();
        for source in &sources {
            add(source.fd, EventSet::IN | EventSet::EDGE_TRIGGERED, SOURCE | source.queue as u64)?;
        }
        let descriptors = 1 + device.events().len() + sources.len();
        // Asked before there is a thread that may be in the middle of a request.
        let (name, role, helpers) = (device.name(), device.role(), device.helpers());
        // Ends those that run if another one cannot start.
        let mut worker = Self { device, control, threads: Vec::new() };
        let (device, told) = (worker.device.clone(), worker.control.clone());
        worker.threads.push(threads.spawn(name, role, move || {
            let _end = EndsWith(&told.parking);
            run(&device, &epoll, descriptors, &told);
        })?);
        for _ in 0..helpers {
            let device = worker.device.clone();
            worker.threads.push(threads.spawn(format!("{name}-io"), role, move || device.help())?);
        }
        Ok(worker)
    }

    /// The handle that quiesces it.
    #[must_use]
    pub fn control(&self) -> Arc<WorkerControl> {
        self.control.clone()
    }

    fn tell(&self) {
        self.control.give(Order::Stop);
        self.device.release();
    }

    fn wait(&mut self, deadline: Instant) {
        for thread in self.threads.drain(..) {
            while !thread.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_micros(200));
            }
            if !thread.is_finished() {
                let name = thread.thread().name().unwrap_or("device");
                log::warn!("{name}: a request did not finish in time; the VM ends without it");
            } else if thread.join().is_err() {
                log::error!("a device's thread panicked");
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.tell();
        self.wait(Instant::now() + LAST_REQUESTS);
    }
}

/// Ends all of these at once. A request that does not finish, because the host does not answer, is waited for for some
/// seconds in all.
pub fn end(workers: Vec<Worker>) {
    end_within(workers, LAST_REQUESTS);
}

/// The same with another limit.
pub(super) fn end_within(mut workers: Vec<Worker>, patience: Duration) {
    workers.iter().for_each(Worker::tell);
    let deadline = Instant::now() + patience;
    workers.iter_mut().for_each(|worker| worker.wait(deadline));
}

fn run(device: &Transport, epoll: &Epoll, descriptors: usize, control: &WorkerControl) {
    // Something may be left that no new event will announce.
    let interrupted = Cell::new(false);
    let told_otherwise = || {
        let told = control.parking.order() != Order::Run;
        interrupted.set(interrupted.get() || told);
        told
    };
    let interval = device.interval();
    let mut due = interval.map(|interval| Instant::now() + interval);
    let mut ready = vec![EpollEvent::default(); descriptors];
    loop {
        match control.parking.order() {
            Order::Run if interrupted.take() => notify_all(device),
            Order::Run => {}
            Order::Pause => {
                interrupted.set(true);
                // Requests at work are finished first.
                if device.wait_until_idle(|| control.parking.order() == Order::Pause) {
                    control.parking.park();
                }
                continue;
            }
            Order::Stop => return,
        }
        let timeout = due.map_or(-1, |due| {
            let left = due.saturating_duration_since(Instant::now());
            // Rounded up, so that it does not wake just before.
            i32::try_from(left.as_millis()).map_or(i32::MAX, |millis| millis.saturating_add(1))
        });
        let count = match epoll.wait(timeout, &mut ready) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => {
                log::error!("{}: its thread ends, as it cannot wait for its queues: {error}", device.name());
                return;
            }
        };
        for event in &ready[..count] {
            if event.data() == ORDER {
                let _ = control.event.read();
                continue;
            }
            let queue = (event.data() & !SOURCE) as usize;
            let Some(notified) = device.events().get(queue) else { continue };
            if event.data() & SOURCE == 0 {
                let _ = notified.read();
            }
            if device.serve(queue, told_otherwise) {
                let _ = notified.write(1);
            }
        }
        if let (Some(time), Some(interval)) = (due, interval)
            && Instant::now() >= time
            && !told_otherwise()
        {
            device.tick();
            due = Some(Instant::now() + interval);
        }
    }
}

fn notify_all(device: &Transport) {
    for event in device.events() {
        // Fails only if the event is full, and then the queue is served anyway.
        let _ = event.write(1);
    }
}
