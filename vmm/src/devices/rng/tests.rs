//! Promises of the source of random numbers.

use super::super::driver::{CONTENTS, Driver};
use super::super::request::Buffer;
use super::*;
use vm_memory::{Bytes, GuestAddress};

fn started() -> Driver {
    let mut driver = Driver::new(4, |_| Box::new(Rng::default()));
    driver.start(0, 1);
    driver
}

fn room(bytes: u32) -> Buffer {
    Buffer { address: CONTENTS, bytes, writable: true }
}

/// How many bytes the device says it wrote for the first request.
fn written(driver: &Driver) -> u32 {
    let [head, bytes]: [u32; 2] =
        driver.ram.guest_memory().read_obj(GuestAddress(Driver::rings(0)[2] + 4)).expect("in RAM");
    assert_eq!(head, 0);
    bytes
}

#[test]
fn a_request_is_filled_with_random_bytes() {
    let mut driver = started();
    driver.send(0, &[room(64)]);
    assert_eq!((driver.used(0), written(&driver)), (1, 64));
    let first: [u64; 8] = driver.ram.guest_memory().read_obj(GuestAddress(CONTENTS)).expect("in RAM");
    let after: [u64; 8] = driver.ram.guest_memory().read_obj(GuestAddress(CONTENTS + 64)).expect("in RAM");
    assert_ne!(first, [0; 8], "one of 2^512");
    assert_eq!(after, [0; 8], "and no more than that");
    driver.send(0, &[room(64)]);
    let second: [u64; 8] = driver.ram.guest_memory().read_obj(GuestAddress(CONTENTS)).expect("in RAM");
    assert_ne!(first, second);
    assert_eq!(driver.device.driver_errors(), 0);
}

#[test]
fn a_large_request_gets_a_bounded_part() {
    let mut driver = started();
    driver.send(0, &[room(1000), room(1 << 20)]);
    assert_eq!(written(&driver), MOST_BYTES as u32);
    assert_eq!(driver.device.driver_errors(), 0);
}

#[test]
fn a_request_without_room_is_a_fault() {
    let mut driver = started();
    driver.send(0, &[Buffer { writable: false, ..room(64) }]);
    driver.assert_driver_errors(1);
}
