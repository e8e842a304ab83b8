//! Promises of the network: frames go both ways whole, what is in their headers stays on its side,
//! what does not fit is dropped and counted; and the same over a real tap, where one can be made.

use super::*;
use crate::devices::console::Console;
use crate::devices::driver::{CONTENTS, Driver, SIZE};
use crate::devices::request::Buffer;
use crate::devices::worker::Worker;
use crate::roles;
use llfree_base::counters::FrameCounts;
use llfree_base::thread::Spawner;
use llfree_harden::{Needs, Sandbox, Seccomp};
use rustix::thread::{CapabilitySet, CapabilitySets};
use std::net::UdpSocket;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::{Duration, Instant};
use test_support::skipped;
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};

const FROM_GUEST: usize = 1;
const MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 7]);
/// Bytes of a driver's buffer, as Linux's for packets of 1500.
const ROOM: u32 = 1530;

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}: not within a minute");
        std::thread::yield_now();
    }
}

fn driver(net: Net) -> (Driver, Arc<NetCounters>) {
    let counters = net.counters();
    let mut driver = Driver::new(4, |_| Box::new(net));
    driver.start(1 << VIRTIO_NET_F_MAC, 2);
    (driver, counters)
}

/// A device, and a socket that stands in for the host's network.
fn net() -> (Driver, UnixDatagram, Arc<NetCounters>) {
    let (ours, theirs) = UnixDatagram::pair().expect("sockets");
    theirs.set_nonblocking(true).expect("not to block");
    let (driver, counters) = driver(Net::over(ours.into(), MAC, 1500).expect("a descriptor"));
    (driver, theirs, counters)
}

/// A header of garbage and a frame.
fn with_header(frame: &[u8]) -> Vec<u8> {
    [&[0xee; HEADER_BYTES][..], frame].concat()
}

fn place(index: u16) -> Buffer {
    Buffer { address: CONTENTS + u64::from(index) * 0x1000, bytes: ROOM, writable: true }
}

/// Has the guest send a frame.
fn send(driver: &mut Driver, bytes: &[u8]) {
    driver.put(CONTENTS, bytes);
    driver.send(FROM_GUEST, &[Buffer { address: CONTENTS, bytes: bytes.len() as u32, writable: false }]);
}

/// What is in the `number`th request of the guest that the device filled, header and all.
fn received(driver: &Driver, number: u16) -> Vec<u8> {
    let at = Driver::rings(TO_GUEST)[2] + 4 + 8 * u64::from(number % SIZE);
    let [head, length]: [u32; 2] = driver.ram.guest_memory().read_obj(GuestAddress(at)).expect("in RAM");
    let mut bytes = vec![0; length as usize];
    let from = GuestAddress(place(head as u16).address);
    driver.ram.guest_memory().read_slice(&mut bytes, from).expect("in RAM");
    bytes
}

#[test]
fn the_card_says_its_address_and_how_large_packets_are() {
    let (driver, ..) = net();
    assert_eq!(
        (driver.read(0x8), driver.offered() & 0xffff_ffff & !(1 << 28 | 1 << 29)),
        (1, 1 << 3 | 1 << 5 | 1 << 16)
    );
    assert_eq!([0, 4, 8].map(|at| driver.config(at)), [0x0000_0002, 0x0001_0700, 0x05dc_0001]);
}

#[test]
fn frames_go_both_ways_and_headers_do_not() {
    let (mut driver, host, counters) = net();
    driver.send(TO_GUEST, &[place(0)]);
    assert_eq!(driver.used(TO_GUEST), 0);
    host.send(&with_header(b"to the guest")).expect("room");
    driver.device.serve(TO_GUEST, || false);
    let header: [u8; HEADER_BYTES] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    assert_eq!(received(&driver, 0), [&header[..], b"to the guest"].concat());
    send(&mut driver, &with_header(b"to the host"));
    let mut bytes = [9; 100];
    let count = host.recv(&mut bytes).expect("a frame");
    assert_eq!(bytes[..count], [&[0; HEADER_BYTES][..], b"to the host"].concat());
    let counts = |bytes| FrameCounts { frames: 1, bytes, dropped: 0, errors: 0 };
    assert_eq!(counters.status(), NetStatus { to_guest: counts(12), from_guest: counts(11) });
    assert_eq!(driver.device.driver_errors(), 0);
}

#[test]
fn frames_that_do_not_fit_are_dropped_and_counted() {
    let (mut driver, host, counters) = net();
    let largest = vec![5; ROOM as usize - HEADER_BYTES];
    for frame in [&[5; ROOM as usize][..], b"", &largest] {
        host.send(&with_header(frame)).expect("room");
        driver.send(TO_GUEST, &[place(0)]);
    }
    let lengths = [0, 1, 2].map(|number| received(&driver, number).len());
    assert_eq!(lengths, [0, 0, ROOM as usize]);
    let status = counters.status().to_guest;
    assert_eq!((status.frames, status.dropped, driver.device.driver_errors()), (1, 2, 0));
    // A host that does not read.
    while counters.status().from_guest.dropped == 0 {
        send(&mut driver, &with_header(&[6; 1000]));
        assert!(counters.status().from_guest.frames < 100_000, "sockets have an end");
    }
    assert_eq!(counters.status().from_guest.dropped, 1);
    // And one that is gone, once no program that another test is about to start has the socket as well.
    drop(host);
    let patience = Instant::now() + Duration::from_secs(60);
    while counters.status().from_guest.errors == 0 {
        send(&mut driver, &with_header(b"x"));
        assert!(Instant::now() < patience, "a socket without another end takes frames");
    }
    assert_eq!((counters.status().from_guest.errors, driver.device.driver_errors()), (1, 0));
}

#[test]
fn the_largest_frame_goes_through_and_a_larger_one_is_a_fault() {
    let (mut driver, host, _) = net();
    send(&mut driver, &with_header(&vec![1; MAX_FRAME]));
    assert_eq!(host.recv(&mut vec![0; 1 << 17]).expect("a frame"), HEADER_BYTES + MAX_FRAME);
    send(&mut driver, &with_header(&vec![1; MAX_FRAME + 1]));
    driver.assert_driver_errors(1);
    for short in [0, 1, HEADER_BYTES] {
        driver.start(0, 2);
        let before = driver.device.driver_errors();
        send(&mut driver, &vec![0; short]);
        driver.assert_driver_errors(before + 1);
    }
    // From the host: cut by the read, and known by that.
    driver.start(0, 2);
    let whole = Buffer { bytes: 1 << 18, ..place(0) };
    for (frame, bytes) in [(MAX_FRAME, HEADER_BYTES + MAX_FRAME), (MAX_FRAME + 1, 0)] {
        host.send(&with_header(&vec![1; frame])).expect("room");
        driver.send(TO_GUEST, &[whole]);
        assert_eq!(received(&driver, driver.used(TO_GUEST) - 1).len(), bytes);
    }
}

#[test]
fn no_frame_is_lost_while_the_driver_has_buffers() {
    const FRAMES: u16 = 2000;
    let (mut driver, host, counters) = net();
    driver.start(1 << VIRTIO_RING_F_EVENT_IDX, 2);
    host.set_nonblocking(false).expect("to block");
    let worker = Worker::start(driver.device.clone(), &Spawner::default()).expect("a thread");
    let sender = std::thread::spawn(move || {
        for number in 0..FRAMES {
            host.send(&with_header(&number.to_le_bytes())).expect("the device lives");
        }
        host
    });
    for slot in 0..SIZE {
        driver.descriptor(TO_GUEST, slot, place(slot), 0, 0);
    }
    let mut made = 0;
    for seen in 0..FRAMES {
        while made < seen + SIZE {
            driver.add(TO_GUEST, made % SIZE);
            made += 1;
            driver.kick_if_wanted(TO_GUEST);
        }
        wait_until("a frame comes", || driver.used(TO_GUEST) != seen);
        assert_eq!(received(&driver, seen)[HEADER_BYTES..], seen.to_le_bytes());
    }
    drop(worker);
    drop(sender.join().expect("no panic"));
    assert_eq!((counters.status().to_guest.frames, driver.device.driver_errors()), (FRAMES.into(), 0));
}

/// Runs `test` in a network namespace of its own, if this user may create one and taps in it.
fn in_a_network_of_its_own(test: fn()) {
    if let Err(error) = std::fs::File::open("/dev/net/tun") {
        return skipped(format!("no /dev/net/tun: {error}"));
    }
    if let Err(error) = Command::new("ip").arg("-V").output() {
        return skipped(format!("no ip command: {error}"));
    }
    let run = move || {
        // SAFETY: it affects only this thread and those that it starts.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return Err(io::Error::last_os_error());
        }
        test();
        Ok(())
    };
    if let Err(error) = std::thread::spawn(run).join().expect("no panic") {
        skipped(format!("no network of its own: {error}"));
    }
}

/// `ip` with these words, which must work.
fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status();
    assert!(status.as_ref().is_ok_and(std::process::ExitStatus::success), "ip {words}: {status:?}");
}

fn config(text: &str) -> NetConfig {
    text.parse().expect("good")
}

#[test]
fn packets_go_between_a_guest_and_a_tap_of_the_host() {
    in_a_network_of_its_own(|| {
        const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xaa];
        ip("tuntap add dev tap0 mode tap");
        ip("link set tap0 address 02:00:00:00:00:aa mtu 4000 up");
        ip("addr add 192.0.2.1/24 dev tap0");
        ip("neigh add 192.0.2.2 lladdr 02:00:00:00:00:07 dev tap0");
        let net = Net::open(&config("tap=tap0,mac=02:00:00:00:00:07")).expect("a tap");
        let (mut driver, counters) = driver(net);
        assert_eq!(driver.config(8) >> 16, 4000, "the tap's MTU");
        let worker = Worker::start(driver.device.clone(), &Spawner::default()).expect("a thread");
        driver.descriptor(TO_GUEST, 0, place(0), 0, 0);
        driver.offer(TO_GUEST, 0);
        let host = UdpSocket::bind("192.0.2.1:4000").expect("a socket");
        host.set_read_timeout(Some(Duration::from_secs(60))).expect("a time");

        // To the guest. The host's kernel says things of its own, to other addresses; and it takes a
        // moment to see that the tap has a carrier, before which it drops what is sent.
        let start = Instant::now();
        let mut seen = 0;
        let packet = loop {
            assert!(start.elapsed() < Duration::from_secs(60), "no packet within a minute");
            host.send_to(b"to the guest", "192.0.2.2:4001").expect("a route");
            if driver.used(TO_GUEST) == seen {
                std::thread::sleep(Duration::from_millis(5));
                continue;
            }
            let frame = received(&driver, seen).split_off(HEADER_BYTES);
            seen += 1;
            if frame[..6] == MAC.0 {
                break frame;
            }
            driver.offer(TO_GUEST, 0);
        };
        assert_eq!((&packet[6..12], &packet[12..14]), (&HOST_MAC[..], &[8, 0][..]));
        assert_eq!(&packet[14 + 20 + 8..][..12], b"to the guest");
        assert_eq!(checksum(&packet[14..34]), 0, "an IP header as it goes over a wire");
        let pseudo = [&packet[26..34], &[0, 17], &packet[38..40], &packet[34..]].concat();
        assert_eq!(checksum(&pseudo), 0, "no checksum is left to an offload");

        // And back: the same packet, turned round.
        let mut frame = packet.clone();
        frame[..6].copy_from_slice(&HOST_MAC);
        frame[6..12].copy_from_slice(&MAC.0);
        for (at, bytes) in [(26, 4), (34, 2)] {
            let (from, to) = frame[at..at + 2 * bytes].split_at_mut(bytes);
            from.swap_with_slice(to);
        }
        send(&mut driver, &with_header(&frame));
        let mut bytes = [0; 100];
        let (count, from) = host.recv_from(&mut bytes).expect("a packet");
        assert_eq!((&bytes[..count], from.to_string().as_str()), (&b"to the guest"[..], "192.0.2.2:4001"));
        drop(worker);
        let status = counters.status();
        assert!(status.to_guest.frames >= 1 && status.to_guest.errors == 0, "{status:?}");
        assert_eq!((status.from_guest.frames, status.from_guest.errors, driver.device.driver_errors()), (1, 0, 0));
    });
}

/// The Internet checksum; 0 over what has a right one.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !(((sum & 0xffff) + (sum >> 16)) as u16)
}

#[test]
fn a_tap_that_is_not_to_be_had_is_refused_with_what_to_do() {
    in_a_network_of_its_own(|| {
        let first = Net::open(&config("tap=tap0")).expect("made as it was not there");
        let line = |text: &str| match Net::open(&config(text)) {
            Ok(_) => panic!("{text} was opened"),
            Err(error) => error.to_string(),
        };
        assert!(line("tap=tap0").contains("'tap0' is in use by another process"), "{}", line("tap=tap0"));
        assert!(line("tap=lo").contains("'lo' is not a tap"), "{}", line("tap=lo"));
        drop(first);
        // Not at once: a process that another test starts has all our descriptors until it becomes another
        // program.
        wait_until("the tap is free again", || Net::open(&config("tap=tap0")).is_ok());
        // Of this thread alone, which ends here.
        let none = CapabilitySet::empty();
        let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
        rustix::thread::set_capabilities(None, none).expect("to give them up");
        let refused = line("tap=tap1");
        assert!(refused.contains("ip tuntap add dev tap1 mode tap user $USER"), "{refused}");
    });
}

const CHILD: &str = "LLFREE_VMM_TEST_STREAM";

/// Not a test of its own: what the next one starts in a process of its own.
#[test]
fn a_stream_on_a_bounded_thread() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let (mut card, host, counters) = net();
    let (console, port) = Console::new().expect("events");
    let mut channel = Driver::new(4, |_| Box::new(console));
    channel.start(1 << 1, 4);
    let sandbox = Sandbox::prepare(Seccomp::On, &Needs::default(), roles::ALL).expect("filters compile");
    let threads = sandbox.spawner();
    // They enter their role by themselves.
    let workers = [&card, &channel].map(|driver| Worker::start(driver.device.clone(), &threads).expect("a thread"));
    let notify = |driver: &mut Driver, queue: usize, buffer: Buffer| {
        let before = driver.used(queue);
        driver.descriptor(queue, 0, buffer, 0, 0);
        driver.add(queue, 0);
        driver.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, queue as u32);
        before
    };
    let before = notify(&mut card, TO_GUEST, place(0));
    host.send(&with_header(b"frame")).expect("room");
    wait_until("a frame comes", || card.used(TO_GUEST) != before);
    card.put(CONTENTS, &with_header(b"frame"));
    notify(&mut card, FROM_GUEST, Buffer { address: CONTENTS, bytes: 17, writable: false });
    wait_until("a frame goes", || counters.status().from_guest.frames == 1);
    // Errors are logged from there, too.
    drop(host);
    notify(&mut card, FROM_GUEST, Buffer { address: CONTENTS, bytes: 17, writable: false });
    wait_until("a frame fails", || counters.status().from_guest.errors == 1);

    let open = channel.words(&[0, 6 | 1 << 16]);
    notify(&mut channel, 3, open);
    wait_until("the port opens", || port.is_open());
    let before = notify(&mut channel, 0, place(0));
    port.send(b"to the guest").expect("room");
    wait_until("bytes come", || channel.used(0) != before);
    notify(&mut channel, 1, Buffer { address: CONTENTS, bytes: 4, writable: false });
    assert_eq!(port.receive(&mut [0; 4], Instant::now() + Duration::from_secs(60)), Ok(1));
    drop(workers);
}

#[test]
fn threads_of_network_and_port_need_no_more_than_their_filter_allows() {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc is mounted");
    if !status.contains("Seccomp:") {
        return skipped("this kernel has no seccomp");
    }
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["--exact", "devices::net::tests::a_stream_on_a_bounded_thread", "--nocapture"]).env(CHILD, "1");
    let output = command.output().expect("it starts");
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "it ran: {output:?}");
}
