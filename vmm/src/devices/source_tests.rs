//! Promises about requests that wait for the host: each is served once its source has something,
//! however notifications, edges and requests fall together, and a thread that waits does no work.

use super::driver::{CONTENTS, Driver, Feed, SIZE};
use super::request::Buffer;
use super::worker::{self, Worker};
use llfree_base::thread::Spawner;
use rustix::io::ioctl_fionbio;
use std::io::{PipeWriter, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};

/// A device that a pipe feeds, the pipe's other end, and how often the device was asked.
fn feed() -> (Driver, PipeWriter, Arc<AtomicU32>) {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    ioctl_fionbio(&reader, true).expect("not to block");
    let asked = Arc::new(AtomicU32::new(0));
    let device = Feed { pipe: reader, asked: asked.clone() };
    (Driver::new(4, |_| Box::new(device)), writer, asked)
}

/// One byte for the device to write, a place for each descriptor.
fn place(index: u16) -> Buffer {
    Buffer { address: CONTENTS + u64::from(index), bytes: 1, writable: true }
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    for round in 0u64.. {
        if done() {
            return;
        }
        // Mostly without sleeping: what races with the device must be as quick as it is.
        if round % 1000 == 999 {
            assert!(start.elapsed() < Duration::from_secs(60), "{what}: not within a minute");
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_request_that_waits_is_served_later_and_interrupts_once() {
    for features in [0, 1 << VIRTIO_RING_F_EVENT_IDX] {
        let (mut driver, mut pipe, asked) = feed();
        driver.start(features, 1);
        driver.send(0, &[place(0)]);
        assert_eq!((driver.used(0), driver.interrupts.load(Ordering::Relaxed)), (0, 0), "nothing to give");
        assert!(!driver.device.serve(0, || false), "and nothing more to do");
        assert_eq!(asked.load(Ordering::Relaxed), 2, "each time asked once");
        pipe.write_all(&[7, 8]).expect("room");
        assert!(!driver.device.serve(0, || false));
        assert_eq!((driver.used(0), driver.interrupts.load(Ordering::Relaxed)), (1, 1));
        // The element is the request's own, and the next one is taken from where this one was.
        driver.send(0, &[place(1)]);
        let elements: [[u32; 2]; 2] = [0, 1].map(|i| {
            driver.ram.guest_memory().read_obj(GuestAddress(Driver::rings(0)[2] + 4 + 8 * i)).expect("in RAM")
        });
        assert_eq!((driver.used(0), elements), (2, [[0, 1], [0, 1]]));
        let bytes: [u8; 2] = driver.ram.guest_memory().read_obj(GuestAddress(CONTENTS)).expect("in RAM");
        assert_eq!((bytes, driver.device.driver_errors()), ([7, 8], 0));
    }
}

#[test]
fn a_reset_takes_back_a_request_that_waits() {
    let (mut driver, mut pipe, _) = feed();
    driver.start(0, 1);
    driver.send(0, &[place(0)]);
    driver.start(0, 1);
    pipe.write_all(&[7]).expect("room");
    driver.device.serve(0, || false);
    assert_eq!((driver.used(0), driver.device.driver_errors()), (0, 0), "what was offered before the reset is gone");
    driver.send(0, &[place(0)]);
    assert_eq!(driver.used(0), 1);
}

#[test]
fn no_wake_up_is_lost_between_a_source_and_a_queue() {
    const BYTES: u16 = 4000;
    let (mut driver, mut pipe, _) = feed();
    driver.start(1 << VIRTIO_RING_F_EVENT_IDX, 1);
    let worker = Worker::start(driver.device.clone(), &Spawner::default()).expect("a thread");
    let mut rng = fastrand::Rng::with_seed(5);
    let feeder = std::thread::spawn(move || {
        let mut rng = fastrand::Rng::with_seed(6);
        let mut next = 0;
        while next < BYTES {
            let count = rng.u16(1..=4).min(BYTES - next);
            let bytes: Vec<u8> = (next..next + count).map(|byte| byte as u8).collect();
            pipe.write_all(&bytes).expect("the reader lives");
            next += count;
            // At times the pipe runs dry, at times the queue.
            (0..rng.u32(..40)).for_each(|_| std::thread::yield_now());
        }
        pipe
    });
    for slot in 0..SIZE {
        driver.descriptor(0, slot, place(slot), 0, 0);
    }
    let (mut made, mut seen) = (0, 0);
    while seen < BYTES {
        let most = (seen + rng.u16(1..=SIZE)).min(BYTES);
        while made < most {
            driver.add(0, made % SIZE);
            made += 1;
            driver.kick_if_wanted(0);
        }
        wait_until("a request is served", || driver.used(0) != seen);
        while seen != driver.used(0) {
            let at = GuestAddress(CONTENTS + u64::from(seen % SIZE));
            let byte: u8 = driver.ram.guest_memory().read_obj(at).expect("in RAM");
            assert_eq!(byte, seen as u8, "bytes come in order, none is lost");
            seen += 1;
        }
    }
    drop(feeder.join().expect("no panic"));
    drop(worker);
    assert_eq!(driver.device.driver_errors(), 0);
}

#[test]
fn no_request_is_lost_that_comes_just_when_the_queue_is_found_empty() {
    const BYTES: u16 = 20_000;
    let (mut driver, mut pipe, _) = feed();
    driver.start(1 << VIRTIO_RING_F_EVENT_IDX, 1);
    // All of it at once: no new edge makes up for a notification that was lost.
    pipe.write_all(&vec![9; BYTES.into()]).expect("room");
    let worker = Worker::start(driver.device.clone(), &Spawner::default()).expect("a thread");
    driver.descriptor(0, 0, place(0), 0, 0);
    for seen in 0..BYTES {
        // The device is looking for the next one right now.
        driver.add(0, 0);
        driver.kick_if_wanted(0);
        wait_until("a request is served", || driver.used(0) != seen);
    }
    drop(worker);
    assert_eq!(driver.device.driver_errors(), 0);
}

#[test]
fn what_a_source_had_before_the_driver_came_is_not_forgotten() {
    let (mut driver, mut pipe, _) = feed();
    pipe.write_all(&[1]).expect("room");
    let worker = Worker::start(driver.device.clone(), &Spawner::default()).expect("a thread");
    // Its edge may be long gone when the driver starts, with a request already there.
    std::thread::sleep(Duration::from_millis(20));
    driver.negotiate(0);
    let rings = Driver::rings(0);
    rings.into_iter().for_each(|ring| driver.put(ring, &[0; 0x800]));
    driver.set_queue(0, rings);
    driver.descriptor(0, 0, place(0), 0, 0);
    driver.add(0, 0);
    driver.write(VIRTIO_MMIO_STATUS, super::driver::DRIVER_OK);
    wait_until("the request is served", || driver.used(0) == 1);
    drop(worker);
}

#[test]
fn a_source_that_stays_readable_keeps_no_thread_busy() {
    let (mut driver, pipe, asked) = feed();
    driver.start(0, 1);
    driver.descriptor(0, 0, place(0), 0, 0);
    driver.add(0, 0);
    // A pipe without a writer is at its end: readable for ever, with nothing to read.
    drop(pipe);
    let worker = Worker::start(driver.device.clone(), &Spawner::default()).expect("a thread");
    wait_until("the device is asked", || asked.load(Ordering::Relaxed) > 0);
    std::thread::sleep(Duration::from_millis(50));
    drop(worker);
    // At the start, for the end of the pipe, and for the notification of the start.
    assert!(asked.load(Ordering::Relaxed) <= 4, "asked {} times", asked.load(Ordering::Relaxed));
}

#[test]
fn a_request_that_does_not_end_keeps_no_vm_from_ending() {
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    let asked = Arc::new(AtomicU32::new(0));
    // Not kept from blocking: what a disk is whose storage does not answer.
    let device = Feed { pipe: reader, asked: asked.clone() };
    let mut driver = Driver::new(4, |_| Box::new(device));
    driver.start(0, 1);
    driver.descriptor(0, 0, place(0), 0, 0);
    driver.add(0, 0);
    let worker = Worker::start(driver.device.clone(), &Spawner::default()).expect("a thread");
    wait_until("the device is asked", || asked.load(Ordering::Relaxed) == 1);
    worker::end_within(vec![worker], Duration::from_millis(300));
    assert_eq!(driver.used(0), 0, "it is still working on it");
    // The thread has all that it needs, should the storage come back.
    writer.write_all(&[7]).expect("a reader");
    wait_until("the request is served", || driver.used(0) == 1);
}

#[test]
fn a_vcpu_waits_for_the_request_at_work_and_not_for_those_behind_it() {
    const REQUESTS: u16 = 2000;
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    let asked = Arc::new(AtomicU32::new(0));
    // Not kept from blocking: each request takes as long as a byte takes to come.
    let device = Feed { pipe: reader, asked: asked.clone() };
    let mut driver = Driver::new(4, |_| Box::new(device));
    // So that it interrupts rarely, as when a guest polls: nothing else is done between two requests.
    driver.start(1 << VIRTIO_RING_F_EVENT_IDX, 1);
    (0..SIZE).for_each(|index| driver.descriptor(0, index, place(index), 0, 0));
    let device = driver.device.clone();
    let worker = Worker::start(device.clone(), &Spawner::default()).expect("a thread");
    let enough = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Always as many as the queue holds.
            for made in 0..REQUESTS {
                driver.add(0, made % SIZE);
                driver.device.events()[0].write(1).expect("an event");
                if made >= SIZE && !enough.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                if made + 1 >= SIZE {
                    writer.write_all(&[0]).expect("a reader");
                    let answered = made + 2 - SIZE;
                    wait_until("a request is served", || driver.used(0) == answered);
                }
            }
            drop(writer);
        });
        // vCPUs of others keep all CPUs busy, and are more important than this one.
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while !enough.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        rustix::process::setpriority_process(None, 19).expect("always less");
        wait_until("the device is at work", || asked.load(Ordering::Relaxed) > 0);
        let start = asked.load(Ordering::Relaxed);
        (0..100).for_each(|_| device.read(VIRTIO_MMIO_STATUS.into(), &mut [0; 4]));
        let waited = asked.load(Ordering::Relaxed) - start;
        enough.store(true, Ordering::Relaxed);
        assert!(waited <= 120, "a hundred reads of a register took {waited} requests");
    });
    drop(worker);
}

#[test]
fn a_quiesced_device_serves_nothing_and_loses_no_notification() {
    let (mut driver, mut pipe, asked) = feed();
    let worker = Worker::start(driver.device.clone(), &Spawner::default()).expect("a thread");
    let control = [worker.control()];
    let deadline = || Instant::now() + Duration::from_secs(60);
    driver.start(1 << VIRTIO_RING_F_EVENT_IDX, 1);
    for round in 0..200u16 {
        // What comes just before the order may be cut short, what comes after it waits.
        let (early, late) = (round % 2 == 0, round % 3 == 0);
        let mut offer = |driver: &mut Driver| {
            driver.descriptor(0, round % SIZE, place(round % SIZE), 0, 0);
            driver.add(0, round % SIZE);
            driver.kick_if_wanted(0);
            pipe.write_all(&[1]).expect("room");
        };
        if early {
            offer(&mut driver);
        }
        worker::quiesce(&control, deadline()).expect("it comes");
        let then = (driver.used(0), asked.load(Ordering::Relaxed));
        if !early {
            offer(&mut driver);
        }
        if late {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!((driver.used(0), asked.load(Ordering::Relaxed)), then, "round {round}");
        worker::resume(&control);
        wait_until("what came meanwhile is served", || driver.used(0) == round + 1);
    }
    assert_eq!(driver.device.driver_errors(), 0);
}

#[test]
fn an_order_taken_back_at_once_loses_no_notification() {
    let (mut driver, mut pipe, _) = feed();
    let worker = Worker::start(driver.device.clone(), &Spawner::default()).expect("a thread");
    driver.start(1 << VIRTIO_RING_F_EVENT_IDX, 1);
    for round in 0..2000u16 {
        driver.descriptor(0, round % SIZE, place(round % SIZE), 0, 0);
        driver.add(0, round % SIZE);
        driver.kick_if_wanted(0);
        pipe.write_all(&[1]).expect("room");
        // It need not have come; it must not have missed anything, either.
        let _ = worker::quiesce(&[worker.control()], Instant::now());
        worker::resume(&[worker.control()]);
        wait_until("it is served", || driver.used(0) == round + 1);
    }
}

#[test]
fn a_quiesced_device_ends_at_once() {
    let (driver, _pipe, _) = feed();
    let worker = Worker::start(driver.device.clone(), &Spawner::default()).expect("a thread");
    worker::quiesce(&[worker.control()], Instant::now() + Duration::from_secs(60)).expect("it comes");
    let start = Instant::now();
    drop(worker);
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn a_device_that_does_not_come_is_named_and_serves_on() {
    let (reader, mut pipe) = std::io::pipe().expect("a pipe");
    // It blocks: a request takes as long as the host does.
    let mut driver = Driver::new(4, |_| Box::new(Feed { pipe: reader, asked: Arc::default() }));
    let worker = Worker::start(driver.device.clone(), &Spawner::default()).expect("a thread");
    driver.start(0, 1);
    driver.descriptor(0, 0, place(0), 0, 0);
    driver.add(0, 0);
    driver.write(virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    std::thread::sleep(Duration::from_millis(100));
    let control = [worker.control()];
    assert_eq!(worker::quiesce(&control, Instant::now() + Duration::from_millis(50)), Err("feed"));
    worker::resume(&control);
    pipe.write_all(&[7]).expect("room");
    wait_until("it is served", || driver.used(0) == 1);
    worker::quiesce(&control, Instant::now() + Duration::from_secs(60)).expect("now it comes");
    worker::resume(&control);
    drop(pipe);
}
