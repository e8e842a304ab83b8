//! Requests that the host does not answer: nobody waits for them but a driver that resets its device.

use super::driver::{DRIVER_OK, Driver};
use super::mmio::Transport;
use super::request::{Buffer, Request};
use super::worker::{self, Worker};
use super::{DriverError, Notes, Served, VirtioDevice};
use llfree_base::lock;
use llfree_base::thread::Spawner;
use log::Level;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::ThreadId;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_mmio as reg;

const LONG: Duration = Duration::from_secs(60);
/// Long enough for a thread that does not wait.
const MOMENT: Duration = Duration::from_millis(50);
const ANSWER: u64 = 0x1a_0000;

/// The host's storage: it answers once it is open.
#[derive(Default)]
struct Storage {
    open: Mutex<bool>,
    changed: Condvar,
    asked: AtomicU32,
}

impl Storage {
    fn answer(&self) {
        *lock(&self.open) = true;
        self.changed.notify_all();
    }

    fn wait(&self) {
        self.asked.fetch_add(1, Ordering::Relaxed);
        drop(self.changed.wait_while(lock(&self.open), |open| !*open).expect("no panic"));
    }

    fn asked(&self) -> u32 {
        self.asked.load(Ordering::Relaxed)
    }
}

/// A device whose requests wait for its storage.
struct Slow(Arc<Storage>, Notes);

impl VirtioDevice for Slow {
    fn id(&self) -> u32 {
        42
    }
    fn name(&self) -> &'static str {
        "slow"
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }
    fn features(&self) -> u64 {
        0
    }
    fn start(&mut self, _: u64) {}
    fn reset(&mut self) {
        self.1.add(Level::Debug, "the slow device was reset".to_owned());
    }
    fn config(&self) -> Vec<u8> {
        vec![7; 4]
    }
    fn write_config(&mut self, _: u64, _: &[u8]) -> bool {
        false
    }
    fn helpers(&self) -> u32 {
        4
    }
    fn notes(&mut self) -> Option<&mut Notes> {
        Some(&mut self.1)
    }
    fn serve(&mut self, _: usize, _: &Request<'_>) -> Result<Served, DriverError> {
        let storage = self.0.clone();
        Ok(Served::Outside(Box::new(move |request| {
            storage.wait();
            request.write(b"!")
        })))
    }
}

/// A device that is served on its threads, its driver and its storage.
fn started() -> (Driver, Worker, Arc<Storage>) {
    let storage = Arc::new(Storage::default());
    let of_device = storage.clone();
    let mut driver = Driver::new(4, |_| Box::new(Slow(of_device, Notes::default())));
    let worker = Worker::start(driver.device.clone(), &Spawner::default()).expect("threads");
    eventually("its helpers are there", || driver.device.helping() == 4);
    driver.start(0, 1);
    (driver, worker, storage)
}

/// Makes `count` requests for one byte each available, and notifies the device.
fn ask(driver: &mut Driver, count: u16) {
    for head in 0..count {
        let buffer = Buffer { address: ANSWER + u64::from(head), bytes: 1, writable: true };
        driver.descriptor(0, head, buffer, 0, 0);
        driver.add(0, head);
    }
    driver.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
}

fn eventually(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LONG, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn several_requests_are_at_work_and_registers_do_not_wait_for_them() {
    let (mut driver, _worker, storage) = started();
    ask(&mut driver, 6);
    eventually("as many are at work as there are helpers", || storage.asked() == 4);
    // These would not return if they waited.
    assert_eq!((driver.status(), driver.config(0)), (DRIVER_OK, 0x0707_0707));
    assert!(driver.device.is_driven());
    driver.device.config_changed();
    std::thread::sleep(MOMENT);
    assert_eq!((storage.asked(), driver.used(0)), (4, 0), "the others wait for their turn");
    storage.answer();
    eventually("all are answered", || driver.used(0) == 6);
    assert_eq!(driver.device.driver_errors(), 0);
    // And the next, by itself.
    ask(&mut driver, 2);
    eventually("these too", || driver.used(0) == 8);
}

#[test]
fn a_reset_waits_for_requests_at_work_and_nothing_is_written_after_it() {
    let (mut driver, _worker, storage) = started();
    ask(&mut driver, 3);
    eventually("they are at work", || storage.asked() == 3);
    let device = driver.device.clone();
    let reset = std::thread::spawn(move || device.write(reg::VIRTIO_MMIO_STATUS.into(), &[0; 4]));
    std::thread::sleep(MOMENT);
    assert!(!reset.is_finished(), "the device may still write to the driver's memory");
    assert_eq!(driver.status(), DRIVER_OK, "others do not wait for it");
    storage.answer();
    reset.join().expect("no panic");
    assert_eq!((driver.status(), driver.used(0)), (0, 3));
    driver.put(ANSWER, &[0; 3]);
    // A driver that starts over finds a device that works.
    driver.start(0, 1);
    ask(&mut driver, 1);
    eventually("it is answered", || driver.used(0) == 1);
}

#[test]
fn a_device_is_quiesced_once_its_last_request_is_answered() {
    let (mut driver, worker, storage) = started();
    ask(&mut driver, 1);
    eventually("it is at work", || storage.asked() == 1);
    let control = [worker.control()];
    assert_eq!(worker::quiesce(&control, Instant::now() + MOMENT), Err("slow"));
    storage.answer();
    assert_eq!(worker::quiesce(&control, Instant::now() + LONG), Ok(()));
    assert_eq!(driver.used(0), 1);
    ask(&mut driver, 1);
    std::thread::sleep(MOMENT);
    assert_eq!(driver.used(0), 1, "it is paused");
    worker::resume(&control);
    eventually("it goes on", || driver.used(0) == 2);
}

#[test]
fn the_end_of_a_vm_lets_go_of_who_waits_for_storage_that_does_not_answer() {
    let (mut driver, worker, storage) = started();
    ask(&mut driver, 2);
    eventually("they are at work", || storage.asked() == 2);
    let device = driver.device.clone();
    let reset = std::thread::spawn(move || device.write(reg::VIRTIO_MMIO_STATUS.into(), &[0; 4]));
    let start = Instant::now();
    worker::end_within(vec![worker], Duration::from_millis(300));
    assert!(start.elapsed() < LONG / 2, "{:?}", start.elapsed());
    reset.join().expect("no panic");
    storage.answer();
    std::thread::sleep(MOMENT);
    assert_eq!(driver.used(0), 0, "what was reset gets no answers");
}

/// Looks, at each line of one thread, whether a device is locked.
struct Watcher(Mutex<Option<(ThreadId, Arc<Transport>)>>, Mutex<Vec<bool>>);

static WATCHER: Watcher = Watcher(Mutex::new(None), Mutex::new(Vec::new()));

impl log::Log for Watcher {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, _: &log::Record<'_>) {
        if let Some((thread, device)) = &*lock(&self.0)
            && std::thread::current().id() == *thread
        {
            lock(&self.1).push(device.is_locked());
        }
    }

    fn flush(&self) {}
}

#[test]
fn a_device_has_its_lines_written_once_its_lock_is_free() {
    log::set_logger(&WATCHER).expect("no other test has one");
    log::set_max_level(log::LevelFilter::Debug);
    // Nobody else uses it.
    let driver = Driver::new(4, |_| Box::new(Slow(Arc::default(), Notes::default())));
    *lock(&WATCHER.0) = Some((std::thread::current().id(), driver.device.clone()));
    driver.write(reg::VIRTIO_MMIO_STATUS, 0);
    assert_eq!(*lock(&WATCHER.1), [false], "one line, and no lock");
}
