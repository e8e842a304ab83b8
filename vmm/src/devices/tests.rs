//! Promises of the transport: the order of the initialisation, garbage in rings and registers, and
//! that nothing a driver does panics or goes on for ever.

use super::balloon::{Balloon, BalloonConfig, BalloonControl};
use super::blk::{Blk, DiskConfig};
use super::console::Console;
use super::driver::{CONTENTS, DRIVER_OK, Driver, Echo, NEEDS_RESET, SIZE};
use super::mem::{Mem, MemControl};
use super::net::{MacAddr, Net};
use super::request::Buffer;
use super::rng::Rng;
use super::worker::Worker;
use super::{Devices, VirtioDevice};
use guest_abi::devices::DEVICE_BYTES;
use llfree_base::thread::Spawner;
use llfree_monitor::memory::{AddressMap, Backing, GuestRam};
use proptest::prelude::*;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress};

fn echo() -> Driver {
    Driver::new(4, |_| Box::new(Echo))
}

fn buffer(address: u64, bytes: u32) -> Buffer {
    Buffer { address, bytes, writable: false }
}

#[test]
fn a_device_introduces_itself() {
    let driver = echo();
    assert_eq!(driver.read(reg::VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!((driver.read(reg::VIRTIO_MMIO_VERSION), driver.read(reg::VIRTIO_MMIO_DEVICE_ID)), (2, 42));
    assert_eq!(driver.offered() & 1, 1, "the device's own feature");
    assert_eq!(driver.offered() >> 32 & 1, 1, "VERSION_1");
    assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 16);
    driver.write(reg::VIRTIO_MMIO_QUEUE_SEL, 2);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 0, "there is no third queue");
    assert_eq!(driver.config(0), 0x0403_0201);
    assert_eq!(driver.config(4), 0x0605, "zeroes past its end");
    assert_eq!(driver.read(0x200), 0);
    assert_eq!(driver.device.driver_errors(), 0);
}

#[test]
fn a_request_is_served_and_the_driver_hears_of_it() {
    let mut driver = echo();
    driver.start(0, 2);
    let words = driver.words(&[1, 2, 3]);
    driver.send(1, &[words, buffer(CONTENTS, 4)]);
    assert_eq!((driver.used(0), driver.used(1)), (0, 1));
    let element: [u32; 2] = driver.ram.guest_memory().read_obj(GuestAddress(Driver::rings(1)[2] + 4)).expect("in RAM");
    assert_eq!(element, [0, 16]);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    driver.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    assert_eq!(driver.interrupts.load(Ordering::Relaxed), 1);
    // A driver that polls can ask not to be interrupted.
    driver.put(Driver::rings(1)[1], &1u16.to_le_bytes());
    driver.send(1, &[words]);
    assert_eq!((driver.used(1), driver.interrupts.load(Ordering::Relaxed)), (2, 1));
    assert_eq!(driver.device.driver_errors(), 0);
}

#[test]
fn the_thread_serves_what_is_notified() {
    let mut driver = echo();
    driver.start(0, 2);
    let worker = Worker::start(driver.device.clone(), &Spawner::default()).expect("a thread");
    let words = driver.words(&[7]);
    driver.descriptor(0, 0, words, 0, 0);
    driver.put(Driver::rings(0)[1] + 4, &0u16.to_le_bytes());
    driver.put(Driver::rings(0)[1] + 2, &1u16.to_le_bytes());
    driver.device.events()[0].write(1).expect("an event");
    let start = Instant::now();
    while driver.used(0) == 0 && start.elapsed() < Duration::from_secs(60) {
        std::thread::yield_now();
    }
    assert_eq!(driver.used(0), 1);
    drop(worker);
}

#[test]
fn steps_out_of_order_ask_for_a_reset() {
    for bad in [2, 4, 8, 1 | 8, 3 | 4, 16, 0x100, u32::MAX] {
        let driver = echo();
        driver.write(reg::VIRTIO_MMIO_STATUS, bad);
        driver.assert_driver_errors(1);
        assert_eq!(driver.status() & !NEEDS_RESET, 0, "status {bad:#x} changed nothing");
        driver.write(reg::VIRTIO_MMIO_STATUS, 0);
        assert_eq!(driver.status(), 0);
    }
    // What is set cannot be taken back but by a reset.
    let driver = echo();
    driver.negotiate(0);
    driver.write(reg::VIRTIO_MMIO_STATUS, 3);
    driver.assert_driver_errors(1);
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let driver = echo();
    driver.negotiate(1 << 7);
    assert_eq!(driver.status(), 3, "FEATURES_OK does not stick");
    // Without VERSION_1 it would be the legacy interface.
    driver.write(reg::VIRTIO_MMIO_STATUS, 0);
    driver.write(reg::VIRTIO_MMIO_STATUS, 1);
    driver.write(reg::VIRTIO_MMIO_STATUS, 3);
    driver.write(reg::VIRTIO_MMIO_STATUS, 11);
    assert_eq!(driver.status(), 3);
    assert_eq!(driver.device.driver_errors(), 0, "the driver is free to ask");
    // Too late to change them.
    driver.negotiate(1);
    driver.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, 0);
    driver.assert_driver_errors(1);
}

#[test]
fn rings_outside_ram_are_refused() {
    let good = Driver::rings(0);
    let ram = 4 << 20;
    let bad = [
        [ram, good[1], good[2]],
        [ram - 16, good[1], good[2]],
        [!15, good[1], good[2]],
        [good[0], ram - 2, good[2]],
        [good[0], 0, good[2]],
        [good[0], good[1], ram - 8],
        [good[0], good[1], 1 << 40],
    ];
    for rings in bad {
        let driver = echo();
        driver.negotiate(0);
        driver.set_queue(0, rings);
        driver.assert_driver_errors(1);
        assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_READY), 0, "{rings:x?}");
    }
    for misaligned in
        [[good[0] + 8, good[1], good[2]], [good[0], good[1] + 1, good[2]], [good[0], good[1], good[2] + 2]]
    {
        let driver = echo();
        driver.negotiate(0);
        driver.set_queue(0, misaligned);
        assert!(driver.device.driver_errors() >= 1);
    }
}

#[test]
fn registers_are_refused_in_the_wrong_state() {
    let driver = echo();
    driver.write(reg::VIRTIO_MMIO_QUEUE_NUM, 8);
    driver.assert_driver_errors(1);
    let mut driver = echo();
    driver.start(0, 1);
    driver.write(reg::VIRTIO_MMIO_QUEUE_SEL, 0);
    driver.write(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, 0);
    driver.assert_driver_errors(1);
    for (register, value) in [(reg::VIRTIO_MMIO_QUEUE_NUM, 3), (reg::VIRTIO_MMIO_QUEUE_NUM, 32), (0x3fc, 1)] {
        let driver = echo();
        driver.negotiate(0);
        driver.write(register, value);
        driver.assert_driver_errors(1);
    }
    // Neither bytes nor straddling words are registers; reads of them are zero.
    let driver = echo();
    driver.device.write(reg::VIRTIO_MMIO_STATUS.into(), &[1]);
    driver.device.write(u64::from(reg::VIRTIO_MMIO_STATUS) + 2, &[1, 0, 0, 0]);
    assert_eq!(driver.device.driver_errors(), 2);
    let mut byte = [9];
    driver.device.read(0, &mut byte);
    assert_eq!(byte, [0]);
    driver.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, 99);
    assert_eq!(driver.device.driver_errors(), 3);
}

#[test]
fn chains_that_loop_or_lead_nowhere_are_faults() {
    let words = buffer(CONTENTS, 4);
    let next = 1;
    let indirect = 4;
    let build: [&dyn Fn(&Driver); 6] = [
        // To itself, to and fro, and out of the table.
        &|d| d.descriptor(0, 0, words, next, 0),
        &|d| {
            d.descriptor(0, 0, words, next, 1);
            d.descriptor(0, 1, words, next, 0);
        },
        &|d| d.descriptor(0, 0, words, next, SIZE),
        // Indirect tables: of no whole descriptors, outside RAM, and one in the other.
        &|d| d.descriptor(0, 0, buffer(CONTENTS, 17), indirect, 0),
        &|d| d.descriptor(0, 0, buffer(1 << 40, 16), indirect, 0),
        &|d| {
            d.descriptor(0, 0, buffer(Driver::rings(0)[0] + 16, 16), indirect, 0);
            d.descriptor(0, 1, buffer(CONTENTS, 16), indirect, 0);
        },
    ];
    for (i, build) in build.iter().enumerate() {
        let mut driver = echo();
        driver.start(0, 1);
        build(&driver);
        driver.offer(0, 0);
        driver.assert_driver_errors(1);
        assert_eq!(driver.used(0), 0, "case {i}");
        // It serves nothing more, and all is well after a reset.
        driver.send(0, &[words]);
        assert_eq!((driver.used(0), driver.device.driver_errors()), (0, 1), "case {i}");
        driver.start(0, 1);
        driver.send(0, &[words]);
        assert_eq!((driver.used(0), driver.status()), (1, DRIVER_OK), "case {i}");
    }
}

#[test]
fn buffers_and_rings_that_make_no_sense_are_faults() {
    let ram = 4 << 20;
    for bad in
        [buffer(ram, 1), buffer(ram - 1, 2), buffer(u64::MAX, 1), buffer(u64::MAX, u32::MAX), buffer(0, u32::MAX)]
    {
        let mut driver = echo();
        driver.start(0, 1);
        driver.send(0, &[bad]);
        driver.assert_driver_errors(1);
    }
    // A head that is not a descriptor, and more requests than there can be.
    let mut driver = echo();
    driver.start(0, 1);
    driver.offer(0, SIZE);
    driver.assert_driver_errors(1);
    driver.start(0, 1);
    driver.put(Driver::rings(0)[1] + 2, &(SIZE + 1).to_le_bytes());
    driver.device.serve(0, || false);
    driver.assert_driver_errors(2);
    // More to read than the device takes in one request.
    driver.start(0, 1);
    driver.send(0, &[buffer(0, 1 << 20), buffer(0, 1)]);
    driver.assert_driver_errors(3);
}

#[test]
fn an_empty_buffer_is_no_fault() {
    let mut driver = echo();
    driver.start(0, 1);
    driver.send(0, &[buffer(CONTENTS, 0)]);
    assert_eq!((driver.used(0), driver.device.driver_errors()), (1, 0));
}

#[test]
fn devices_answer_on_their_own_pages_only() {
    let (one, two) = (echo(), echo());
    let base = 0x4000_0000;
    let devices = Devices::new(base, vec![one.device.clone(), two.device.clone()]);
    let mut word = [0; 4];
    assert!(devices.read(base + DEVICE_BYTES, &mut word) && word == *b"virt");
    assert!(!devices.read(base + 2 * DEVICE_BYTES, &mut word) && !devices.read(base - 4, &mut word));
    assert!(devices.write(base + DEVICE_BYTES + u64::from(reg::VIRTIO_MMIO_STATUS), &1u32.to_le_bytes()));
    assert_eq!((one.status(), two.status()), (0, 1));
}

/// One step of a driver that is out of its mind.
#[derive(Clone, Debug)]
enum Step {
    Write(u16, u32),
    Narrow(u16, u8),
    Start(u64),
    Bytes(usize, u16, Vec<u8>),
    Serve(usize),
    Tick,
}

fn step() -> impl Strategy<Value = Step> {
    let register = prop_oneof![(0u16..0x48).prop_map(|r| r * 4), any::<u16>()];
    let value = prop_oneof![0u32..20, any::<u32>(), (0u32..4).prop_map(|mib| mib << 20)];
    prop_oneof![
        (register, value).prop_map(|(register, value)| Step::Write(register, value)),
        (any::<u16>(), any::<u8>()).prop_map(|(register, value)| Step::Narrow(register, value)),
        prop_oneof![Just(0u64), any::<u64>()].prop_map(Step::Start),
        (0usize..5, 0u16..0x2c00, prop::collection::vec(prop_oneof![0u8..9, any::<u8>()], 1..64))
            .prop_map(|(queue, at, bytes)| Step::Bytes(queue, at, bytes)),
        (0usize..6).prop_map(Step::Serve),
        Just(Step::Tick),
    ]
}

/// Plays the driver; `host` is what the world outside does to the device at each tick.
fn run(mut driver: Driver, queues: usize, steps: &[Step], host: impl Fn()) {
    for step in steps {
        match step {
            Step::Write(register, value) => driver.write((*register).into(), *value),
            Step::Narrow(register, value) => driver.device.write((*register).into(), &[*value]),
            // Of all bits, those that were offered: most random sets would not be accepted.
            Step::Start(features) => driver.start(features & driver.offered(), queues),
            Step::Bytes(queue, at, bytes) => driver.put(Driver::rings(*queue)[0] + u64::from(*at), bytes),
            Step::Serve(queue) => {
                driver.device.serve(*queue, || false);
            }
            Step::Tick => {
                host();
                driver.device.tick();
            }
        }
    }
    // However it went: a driver that starts over finds a device that works.
    driver.start(0, queues);
    driver.send(0, &[buffer(CONTENTS, 0)]);
    assert!(driver.status() == DRIVER_OK || driver.device.driver_errors() > 0);
}

fn balloon(ram: Arc<GuestRam>) -> Box<dyn VirtioDevice> {
    let config = BalloonConfig {
        huge: true,
        deflate_on_oom: true,
        reporting: Some(true),
        coalesce: true,
        stats: Some(Duration::from_secs(1)),
    };
    Box::new(Balloon::new(config, ram, Arc::new(BalloonControl::default())))
}

fn mem(ram: Arc<GuestRam>) -> Box<dyn VirtioDevice> {
    let control = Arc::new(MemControl::new(ram.bytes(), 2 << 20));
    Box::new(Mem::new(ram, control))
}

fn disk() -> Box<dyn VirtioDevice> {
    let file = tempfile::NamedTempFile::new().expect("a scratch file");
    file.as_file().set_len(64 << 10).expect("room for 64 KiB");
    let config = DiskConfig { path: file.path().into(), read_only: false, serial: None };
    // The name goes, the disk stays.
    Box::new(Blk::open(&config).expect("a disk"))
}

/// 4 MiB, half of it above the hole of a PC.
fn with_hole() -> GuestRam {
    let map = AddressMap::with_hole(4 << 20, 2 << 20);
    GuestRam::with_map(4 << 20, Backing::Anon, map).expect("small")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_driver_makes_a_device_panic_or_hang(steps in prop::collection::vec(step(), 1..200)) {
        let idle = || ();
        run(Driver::new(4, balloon), 5, &steps, idle);
        run(Driver::new(4, mem), 1, &steps, idle);
        run(Driver::over(with_hole(), balloon), 5, &steps, idle);
        run(Driver::over(with_hole(), mem), 1, &steps, idle);
        run(Driver::new(4, |_| disk()), 1, &steps, idle);
        run(Driver::new(4, |_| Box::new(Rng::default())), 1, &steps, idle);
        run(echo(), 2, &steps, idle);
        let (console, port) = Console::new().expect("events");
        run(Driver::new(4, |_| Box::new(console)), 4, &steps, || {
            // Someone opened it; both sides write more than the other reads.
            if !port.is_open() {
                port.open();
            }
            let _ = port.send(&[1; 1000]);
            let _ = port.receive(&mut [0; 10], Instant::now() + Duration::from_micros(100));
        });
        let (ours, theirs) = UnixDatagram::pair().expect("sockets");
        theirs.set_nonblocking(true).expect("not to block");
        let net = Net::over(ours.into(), MacAddr([2, 0, 0, 0, 0, 1]), 1500).expect("a descriptor");
        run(Driver::new(4, |_| Box::new(net)), 2, &steps, || {
            let _ = theirs.send(&[1; 1000]);
            let _ = theirs.recv(&mut [0; 10]);
        });
    }
}
