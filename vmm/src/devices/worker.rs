//! [`Worker`]: the thread on which a device serves its queues, so that no vCPU waits for it.
//!
//! It sleeps until a queue is notified, a source of the device fires or time is due. A queue that
//! always has more is served in turns with the others and with the order to stop.
//!
//! No wake-up is lost, and none is for nothing twice:
//! - Notifications are level-triggered events that the thread takes back *before* it looks at the
//!   queue. One that comes after that wakes it again.
//! - Sources are edge-triggered: a device without requests to fill leaves them readable, and must
//!   not be woken for that again and again. An edge that finds requests waiting is followed by reads
//!   until `WouldBlock`, and what arrives after that is a new edge. An edge that finds the queue
//!   empty arms the driver's notifications and looks once more (`State::serve_one`), so the next
//!   request brings a notification, and that one finds the source still readable. An edge that finds
//!   the device at rest is made up for when the driver starts it, which notifies all queues.
//! - A queue that had its turn and may have more is notified by the thread itself, so the rest of a
//!   source does not depend on another edge.

use super::mmio::Transport;
use llfree_base::thread::Spawner;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Requests of one queue before the others get their turn.
pub(super) const MOST_REQUESTS: u32 = 256;

const STOP: u64 = u64::MAX;
/// Set in the number of a queue that one of the device's sources has work for.
const SOURCE: u64 = 1 << 32;

/// How long the requests that threads are at may take when they are to end, together.
const LAST_REQUESTS: Duration = Duration::from_secs(5);

/// A device's thread. Dropping it ends the thread, after the request that it is at. One whose request
/// does not end, because the host's storage does not answer, is left behind: it owns all it uses.
pub struct Worker {
    stop: Arc<(AtomicBool, EventFd)>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts serving.
    ///
    /// # Errors
    /// If the host has no thread or no event to give.
    pub fn start(device: Arc<Transport>, threads: &Spawner) -> io::Result<Self> {
        let stop = Arc::new((AtomicBool::new(false), EventFd::new(EFD_NONBLOCK)?));
        let epoll = Epoll::new()?;
        let add = |fd: RawFd, events: EventSet, number: u64| {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, number))
        };
        add(stop.1.as_raw_fd(), EventSet::IN, STOP)?;
        for (queue, event) in device.events().iter().enumerate() {
            add(event.as_raw_fd(), EventSet::IN, queue as u64)?;
        }
        let sources = device.sources();
        for source in &sources {
            add(source.fd, EventSet::IN | EventSet::EDGE_TRIGGERED, SOURCE | source.queue as u64)?;
        }
        let descriptors = 1 + device.events().len() + sources.len();
        let told = stop.clone();
        let (name, role) = (device.name().to_owned(), device.role());
        let thread = threads.spawn(name, role, move || run(&device, &epoll, descriptors, &told.0))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Worker {
    fn tell(&self) {
        self.stop.0.store(true, Ordering::Release);
        // It can only be full, and then the thread is awake.
        let _ = self.stop.1.write(1);
    }

    fn wait(&mut self, deadline: Instant) {
        let Some(thread) = self.thread.take() else { return };
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(200));
        }
        if !thread.is_finished() {
            let name = thread.thread().name().unwrap_or("device");
            log::warn!("{name}: a request did not end within {LAST_REQUESTS:?}; the VM ends without it");
        } else if thread.join().is_err() {
            log::error!("a device's thread panicked");
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.tell();
        self.wait(Instant::now() + LAST_REQUESTS);
    }
}

/// Ends all of these at once.
pub fn end(mut workers: Vec<Worker>) {
    workers.iter().for_each(Worker::tell);
    let deadline = Instant::now() + LAST_REQUESTS;
    workers.iter_mut().for_each(|worker| worker.wait(deadline));
}

fn run(device: &Transport, epoll: &Epoll, descriptors: usize, stop: &AtomicBool) {
    let stopping = || stop.load(Ordering::Acquire);
    let interval = device.interval();
    let mut due = interval.map(|interval| Instant::now() + interval);
    let mut ready = vec![EpollEvent::default(); descriptors];
    while !stopping() {
        let timeout = due.map_or(-1, |due| {
            let left = due.saturating_duration_since(Instant::now());
            // Up, so that it does not wake just before.
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
            if event.data() == STOP {
                continue;
            }
            let queue = (event.data() & !SOURCE) as usize;
            let Some(notified) = device.events().get(queue) else { continue };
            if event.data() & SOURCE == 0 {
                let _ = notified.read();
            }
            if device.serve(queue, stopping) {
                let _ = notified.write(1);
            }
        }
        if let (Some(time), Some(interval)) = (due, interval)
            && Instant::now() >= time
        {
            device.tick();
            due = Some(Instant::now() + interval);
        }
    }
}
