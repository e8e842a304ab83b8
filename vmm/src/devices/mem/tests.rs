//! Promises of virtio-mem.

use super::super::driver::{CONTENTS, Driver};
use super::super::request::Buffer;
use super::*;
use llfree_monitor::memory::{AddressMap, Backing, HOLE_END};
use shared_layout::HugeRange;
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: [u16; 2] = [0, 0];
const NACK: [u16; 2] = [1, 0];
const ERROR: [u16; 2] = [3, 0];

/// 16 MiB, of which the first 4 are not the device's.
fn started() -> (Driver, Arc<MemControl>) {
    let control = Arc::new(MemControl::new(16 * MIB, 4 * MIB));
    let of_device = control.clone();
    let mut driver = Driver::new(16, |ram| Box::new(Mem::new(ram, of_device)));
    driver.start(0, 1);
    (driver, control)
}

/// Asks; what was answered, and the state.
fn ask(driver: &mut Driver, what: u16, address: u64, blocks: u16) -> [u16; 2] {
    let mut bytes = [0; REQUEST_BYTES];
    bytes[..2].copy_from_slice(&what.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
    driver.put(CONTENTS, &bytes);
    let request = Buffer { address: CONTENTS, bytes: REQUEST_BYTES as u32, writable: false };
    let answer = Buffer { address: CONTENTS + 64, bytes: 10, writable: true };
    driver.send(0, &[request, answer]);
    let words: [u16; 5] = driver.ram.guest_memory().read_obj(GuestAddress(CONTENTS + 64)).expect("in RAM");
    [words[0], words[4]]
}

fn resident(driver: &Driver) -> u64 {
    driver.ram.residency().expect("the kernel answers").resident_bytes
}

#[test]
fn the_region_is_what_lies_behind_the_boot_part() {
    let (driver, control) = started();
    let long = |offset: u32| u64::from(driver.config(offset)) | u64::from(driver.config(offset + 4)) << 32;
    assert_eq!((long(0), long(16), long(24), long(32)), (2 * MIB, 4 * MIB, 12 * MIB, 12 * MIB));
    assert_eq!((long(40), long(48)), (0, 12 * MIB), "nothing is plugged, all is requested");
    control.request(6 * MIB);
    assert_eq!(long(48), 6 * MIB);
}

#[test]
fn unplugged_blocks_leave_the_host() {
    let (mut driver, control) = started();
    assert_eq!(ask(&mut driver, PLUG, 4 * MIB, 6), ACK);
    assert_eq!(control.plugged_bytes(), 12 * MIB);
    driver.ram.populate(HugeRange::saturating(HugeId(2), 6)).expect("12 MiB");
    let before = resident(&driver);
    assert_eq!(ask(&mut driver, UNPLUG, 6 * MIB, 3), ACK);
    assert_eq!((control.plugged_bytes(), before - resident(&driver)), (6 * MIB, 6 * MIB));
    assert_eq!(ask(&mut driver, STATE, 4 * MIB, 1), [0, 0]);
    assert_eq!(ask(&mut driver, STATE, 6 * MIB, 3), [0, 1]);
    assert_eq!(ask(&mut driver, STATE, 4 * MIB, 6), [0, 2]);
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), ACK);
    assert_eq!((control.plugged_bytes(), before - resident(&driver)), (0, 12 * MIB));
}

#[test]
fn a_region_behind_the_hole_counts_guest_addresses() {
    for backing in [Backing::Anon, Backing::Memfd] {
        let control = Arc::new(MemControl::new(64 * MIB, 32 * MIB));
        let of_device = control.clone();
        let map = AddressMap::with_hole(64 * MIB, 32 * MIB);
        let ram = GuestRam::with_map(64 * MIB, backing, map).expect("small");
        let mut driver = Driver::over(ram, |ram| Box::new(Mem::new(ram, of_device)));
        driver.start(0, 1);
        let long = |offset: u32| u64::from(driver.config(offset)) | u64::from(driver.config(offset + 4)) << 32;
        assert_eq!((long(16), long(24), long(32)), (HOLE_END, 32 * MIB, 32 * MIB));
        // Blocks come in any order.
        assert_eq!(ask(&mut driver, PLUG, HOLE_END + 16 * MIB, 8), ACK);
        assert_eq!(ask(&mut driver, PLUG, HOLE_END, 8), ACK);
        assert_eq!(control.plugged_bytes(), 32 * MIB);
        driver.ram.populate(HugeRange::saturating(HugeId(0), 32)).expect("64 MiB");
        driver.put(HOLE_END, b"stays");
        driver.put(30 * MIB, b"boot");
        assert_eq!(ask(&mut driver, UNPLUG, HOLE_END + 2 * MIB, 15), ACK);
        assert_eq!(resident(&driver), (64 - 30) * MIB, "{backing}");
        let read = |at| driver.ram.guest_memory().read_obj::<[u8; 5]>(GuestAddress(at)).expect("in RAM");
        assert_eq!((read(HOLE_END), read(30 * MIB)), (*b"stays", *b"boot\0"));
        // The boot part, the hole, both sides of it, and past RAM.
        for (address, blocks) in [(30 * MIB, 1), (32 * MIB, 1), (30 * MIB, 2), (HOLE_END - 2 * MIB, 2)] {
            assert_eq!(ask(&mut driver, PLUG, address, blocks), ERROR, "{address:#x}");
        }
        assert_eq!(ask(&mut driver, PLUG, HOLE_END + 30 * MIB, 2), ERROR);
        assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), ACK);
        assert_eq!((control.plugged_bytes(), resident(&driver)), (0, 32 * MIB));
        assert_eq!(driver.device.driver_errors(), 0);
    }
}

#[test]
fn a_region_is_what_the_guest_sees_in_one_piece() {
    // Boot part of 16 MiB, and the hole 16 MiB further on: what lies above it is out of reach.
    let map = AddressMap::with_hole(64 * MIB, 32 * MIB);
    let ram = Arc::new(GuestRam::with_map(64 * MIB, Backing::Anon, map).expect("small"));
    let device = Mem::new(ram, Arc::new(MemControl::new(64 * MIB, 16 * MIB)));
    let long = |at: usize| u64::from_le_bytes(device.config()[at..at + 8].try_into().expect("8 bytes"));
    assert_eq!((long(16), long(24)), (16 * MIB, 16 * MIB));
}

#[test]
fn no_more_is_plugged_than_requested() {
    let (mut driver, control) = started();
    control.request(4 * MIB);
    assert_eq!(ask(&mut driver, PLUG, 4 * MIB, 3), NACK);
    assert_eq!(ask(&mut driver, PLUG, 4 * MIB, 2), ACK);
    assert_eq!(ask(&mut driver, PLUG, 8 * MIB, 1), NACK);
    // Less is requested than plugged: what is plugged stays until the driver gives it up.
    control.request(0);
    assert_eq!(ask(&mut driver, STATE, 4 * MIB, 2), [0, 0]);
    assert_eq!(control.counters.refused_requests.get(), 2);
}

#[test]
fn ranges_that_make_no_sense_are_refused() {
    let (mut driver, control) = started();
    assert_eq!(ask(&mut driver, PLUG, 4 * MIB, 1), ACK);
    for what in [PLUG, UNPLUG, STATE, 9, u16::MAX] {
        for (address, blocks) in [(2 * MIB, 1), (4 * MIB + 4096, 1), (14 * MIB, 2), (6 * MIB, 0), (u64::MAX, 1), (0, 0)]
        {
            assert_eq!(ask(&mut driver, what, address, blocks), ERROR, "{what} {address:#x} {blocks}");
        }
    }
    // Plugged is plugged, and what is not cannot be unplugged.
    assert_eq!(ask(&mut driver, PLUG, 4 * MIB, 2), ERROR);
    assert_eq!(ask(&mut driver, UNPLUG, 4 * MIB, 2), ERROR);
    assert_eq!((control.plugged_bytes(), driver.device.driver_errors()), (2 * MIB, 0));
}

#[test]
fn requests_of_a_bad_length_are_faults() {
    let whole = Buffer { address: CONTENTS, bytes: 24, writable: false };
    let answer = Buffer { address: CONTENTS + 64, bytes: 10, writable: true };
    for bad in [
        [Buffer { bytes: 23, ..whole }, answer],
        [Buffer { bytes: 25, ..whole }, answer],
        [whole, Buffer { bytes: 9, ..answer }],
        [whole, Buffer { writable: false, bytes: 0, ..answer }],
    ] {
        let (mut driver, _) = started();
        driver.send(0, &bad);
        driver.assert_driver_errors(1);
    }
    // Its configuration is the host's.
    let (driver, _) = started();
    driver.write(virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG + 48, 0);
    driver.assert_driver_errors(1);
}

#[test]
fn a_reset_unplugs_nothing() {
    let (mut driver, control) = started();
    assert_eq!(ask(&mut driver, PLUG, 4 * MIB, 2), ACK);
    driver.start(0, 1);
    assert_eq!(control.plugged_bytes(), 4 * MIB);
    assert_eq!(ask(&mut driver, STATE, 4 * MIB, 2), [0, 0]);
}
