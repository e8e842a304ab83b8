//! Promises of the port: Linux's driver finds it by its name, bytes go both ways in order, and what a
//! guest does not read or never stops to write is bounded.

use super::*;
use crate::devices::driver::{CONTENTS, DRIVER_OK, Driver, NEEDS_RESET};
use crate::devices::request::Buffer;
use crate::devices::worker::Worker;
use llfree_base::thread::Spawner;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

const IN: Buffer = Buffer { address: CONTENTS, bytes: 4096, writable: true };

fn console() -> (Driver, Arc<Port>) {
    let mut end = None;
    let mut driver = Driver::new(4, |_| {
        let (console, port) = Console::new().expect("events");
        end = Some(port);
        Box::new(console)
    });
    driver.start(F_MULTIPORT, 4);
    (driver, end.expect("made"))
}

/// A control message of the driver's.
fn tell(driver: &mut Driver, id: u32, event: u16, value: u16) {
    let words = driver.words(&[id, u32::from(event) | u32::from(value) << 16]);
    driver.send(CONTROL_FROM_GUEST, &[words]);
}

/// What the device wrote into the last request of a queue.
fn answer(driver: &Driver, queue: usize) -> Vec<u8> {
    let last = u64::from((driver.used(queue) - 1) % crate::devices::driver::SIZE);
    let element: [u32; 2] =
        driver.ram.guest_memory().read_obj(GuestAddress(Driver::rings(queue)[2] + 4 + 8 * last)).expect("in RAM");
    let mut bytes = vec![0; element[1] as usize];
    driver.ram.guest_memory().read_slice(&mut bytes, GuestAddress(CONTENTS)).expect("in RAM");
    bytes
}

/// The program in the guest that opens and closes the port.
fn open(driver: &mut Driver, value: u16) {
    tell(driver, PORT, event::PORT_OPEN, value);
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

#[test]
fn the_driver_hears_of_the_port_its_name_and_that_the_host_has_it_open() {
    let (mut driver, port) = console();
    assert_eq!((driver.offered() & F_MULTIPORT, driver.config(4)), (F_MULTIPORT, 1), "one port");
    // As Linux does it: buffers for messages first.
    driver.send(CONTROL_TO_GUEST, &[IN]);
    assert_eq!(driver.used(CONTROL_TO_GUEST), 0, "nothing is said unasked");
    tell(&mut driver, u32::MAX, event::DEVICE_READY, 1);
    driver.device.serve(CONTROL_TO_GUEST, || false);
    assert_eq!(answer(&driver, CONTROL_TO_GUEST), [0, 0, 0, 0, 1, 0, 1, 0]);
    tell(&mut driver, PORT, event::PORT_READY, 1);
    driver.send(CONTROL_TO_GUEST, &[IN]);
    assert_eq!(answer(&driver, CONTROL_TO_GUEST), [&[0, 0, 0, 0, 7, 0, 1, 0][..], b"org.llfree.agent"].concat());
    driver.send(CONTROL_TO_GUEST, &[IN]);
    assert_eq!(answer(&driver, CONTROL_TO_GUEST), [0, 0, 0, 0, 6, 0, 1, 0]);
    driver.send(CONTROL_TO_GUEST, &[IN]);
    assert_eq!(driver.used(CONTROL_TO_GUEST), 3, "and no more");
    assert!(!port.is_open());
    open(&mut driver, 1);
    assert!(port.is_open());
    assert_eq!(driver.device.driver_errors(), 0);
}

#[test]
fn a_driver_that_asks_again_and_again_costs_no_memory() {
    let (mut driver, _) = console();
    for _ in 0..1000 {
        tell(&mut driver, u32::MAX, event::DEVICE_READY, 1);
        tell(&mut driver, PORT, event::PORT_READY, 1);
    }
    for _ in 0..4 {
        driver.send(CONTROL_TO_GUEST, &[IN]);
    }
    assert_eq!((driver.used(CONTROL_TO_GUEST), driver.device.driver_errors()), (3, 0));
}

#[test]
fn bytes_go_both_ways_in_order() {
    let (mut driver, port) = console();
    assert_eq!(port.send(b"early"), Err(PortError::Closed), "Linux would throw it away");
    open(&mut driver, 1);
    driver.send(TO_GUEST, &[IN]);
    assert_eq!(driver.used(TO_GUEST), 0);
    port.send(b"one ").expect("room");
    port.send(b"two").expect("room");
    driver.device.serve(TO_GUEST, || false);
    assert_eq!(answer(&driver, TO_GUEST), b"one two");
    // In pieces, where the driver's buffers are small.
    port.send(b"three").expect("room");
    for piece in [&b"thr"[..], b"ee"] {
        driver.send(TO_GUEST, &[Buffer { bytes: 3, ..IN }]);
        assert_eq!(answer(&driver, TO_GUEST), piece);
    }
    for words in [[0x0403_0201], [0x0807_0605]] {
        let words = driver.words(&words);
        driver.send(FROM_GUEST, &[words]);
    }
    let mut bytes = [0; 8];
    assert_eq!(port.receive(&mut bytes, soon()), Ok(1));
    assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(driver.device.driver_errors(), 0);
}

#[test]
fn each_opening_starts_a_new_stream() {
    let (mut driver, port) = console();
    open(&mut driver, 1);
    port.send(b"unread").expect("room");
    let words = driver.words(&[1]);
    driver.send(FROM_GUEST, &[words]);
    open(&mut driver, 0);
    assert_eq!(port.send(b"x"), Err(PortError::Closed));
    assert_eq!(port.receive(&mut [0; 5], soon()), Err(PortError::Closed), "there are but four");
    // Linux takes no bytes of a closed port, another guest may try.
    driver.send(FROM_GUEST, &[words]);
    open(&mut driver, 1);
    assert_eq!((port.connection(), port.ignored_bytes()), (2, 8));
    driver.send(TO_GUEST, &[IN]);
    assert_eq!(driver.used(TO_GUEST), 0, "what was for the last one");
    driver.send(FROM_GUEST, &[words]);
    assert_eq!(port.receive(&mut [0; 4], soon()), Ok(2));
    driver.start(F_MULTIPORT, 4);
    assert!(!port.is_open(), "a reset closes it");
}

#[test]
fn a_guest_that_does_not_read_fills_one_buffer() {
    let (mut driver, port) = console();
    open(&mut driver, 1);
    for _ in 0..BUFFER_BYTES / 1024 {
        port.send(&[7; 1024]).expect("room");
    }
    assert_eq!(port.send(&[7]), Err(PortError::Full));
    driver.send(TO_GUEST, &[IN]);
    port.send(&[7; 4096]).expect("room again");
}

#[test]
fn a_guest_that_never_stops_to_write_waits() {
    let (mut driver, port) = console();
    open(&mut driver, 1);
    let worker = Worker::start(driver.device.clone(), &Spawner::default()).expect("a thread");
    let piece = Buffer { address: CONTENTS, bytes: 48 << 10, writable: false };
    driver.put(CONTENTS, &[1; 48 << 10]);
    for index in 0..4 {
        driver.descriptor(FROM_GUEST, index, piece, 0, 0);
        driver.offer(FROM_GUEST, index);
    }
    // Two pieces fill it; the third comes once the others were taken, without a notification.
    let used = driver.used(FROM_GUEST);
    assert_eq!(used, 2);
    let mut bytes = vec![0; 48 << 10];
    for _ in 0..4 {
        assert_eq!(port.receive(&mut bytes, soon()), Ok(1));
    }
    drop(worker);
    assert_eq!((driver.used(FROM_GUEST), port.ignored_bytes(), driver.device.driver_errors()), (4, 0, 0));
    // What could never fit is dropped.
    driver.send(FROM_GUEST, &[Buffer { bytes: (64 << 10) + 1, ..piece }]);
    assert_eq!((driver.used(FROM_GUEST), port.ignored_bytes()), (5, (64 << 10) + 1));
}

#[test]
fn who_waits_is_woken_by_bytes_by_the_end_and_by_time() {
    let (mut driver, port) = console();
    open(&mut driver, 1);
    assert_eq!(port.receive(&mut [0], Instant::now()), Err(PortError::TimedOut));
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| port.receive(&mut [0; 4], soon()));
        let words = driver.words(&[1]);
        driver.send(FROM_GUEST, &[words]);
        assert_eq!(waits.join().expect("no panic"), Ok(1));
        let waits = scope.spawn(|| port.receive(&mut [0], soon()));
        open(&mut driver, 0);
        assert_eq!(waits.join().expect("no panic"), Err(PortError::Closed));
        open(&mut driver, 1);
        let waits = scope.spawn(|| port.receive(&mut [0], soon()));
        port.stop();
        assert_eq!(waits.join().expect("no panic"), Err(PortError::Stopped));
    });
    assert_eq!(port.send(&[0]), Err(PortError::Stopped));
}

#[test]
fn messages_that_make_no_sense_are_faults_or_ignored() {
    let (mut driver, port) = console();
    for (id, event, value) in [(0, 99, 1), (1, event::PORT_READY, 1), (7, event::PORT_OPEN, 1), (0, 3, 0), (0, 1, 1)] {
        tell(&mut driver, id, event, value);
    }
    driver.send(CONTROL_TO_GUEST, &[IN]);
    assert_eq!((driver.used(CONTROL_TO_GUEST), port.is_open(), driver.device.driver_errors()), (0, false, 0));
    for words in [&[0][..], &[0; 3]] {
        driver.start(F_MULTIPORT, 4);
        let before = driver.device.driver_errors();
        let words = driver.words(words);
        driver.send(CONTROL_FROM_GUEST, &[words]);
        driver.assert_driver_errors(before + 1);
    }
    // A buffer that is too small for a message.
    driver.start(F_MULTIPORT, 4);
    tell(&mut driver, u32::MAX, event::DEVICE_READY, 1);
    driver.send(CONTROL_TO_GUEST, &[Buffer { bytes: 7, ..IN }]);
    assert_eq!(driver.status(), DRIVER_OK | NEEDS_RESET);
    // Without ports there is nothing to open.
    driver.start(0, 2);
    let words = driver.words(&[1]);
    driver.send(FROM_GUEST, &[words]);
    assert_eq!((driver.used(FROM_GUEST), port.ignored_bytes()), (1, 4));
}
