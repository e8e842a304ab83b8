//! What a driver and the host rely on, at the registers.

use super::*;
use crate::parking::{Order, Parking};
use llfree_base::thread::Spawner;
use std::io::{PipeReader, Read};
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::thread;

const MSR: u8 = 6;
const SCRATCH: u8 = 7;
const IIR: u8 = 2;
const IER_SENT: u8 = 2;
const IIR_NONE: u8 = 1;
const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_ALL: u8 = FCR_CLEAR_RECEIVED | 4;

/// Longer than any step takes on any machine that is alive.
const DEADLINE: Duration = Duration::from_secs(60);

fn port() -> (Arc<Serial>, PipeReader) {
    let (out, to) = io::pipe().expect("a pipe");
    (Arc::new(Serial::new(to.into(), &Spawner::default()).expect("a port")), out)
}

fn interrupts(serial: &Serial) -> u64 {
    serial.irq().read().unwrap_or(0)
}

/// What Linux's driver does to a port before it uses it (`serial8250_do_startup`).
fn start_up_as_linux(serial: &Serial) {
    for value in [FCR_ENABLE, FCR_ENABLE | FCR_CLEAR_ALL, 0] {
        serial.write(FCR, value);
    }
    let clear_interrupts = || [LSR, DATA, IIR, MSR].map(|register| serial.read(register));
    assert_eq!(clear_interrupts()[1], 0, "a FIFO that was cleared");
    serial.write(LCR, 3);
    serial.write(IER, IER_SENT);
    assert_eq!(serial.read(IIR) & IIR_NONE, 0, "an interrupt at once, as nothing is being sent");
    serial.write(IER, 0);
    serial.write(IER, IER_SENT);
    assert_eq!(serial.read(IIR) & IIR_NONE, 0, "and again: Linux would take the chip for a buggy one");
    serial.write(IER, 0);
    clear_interrupts();
    serial.write(IER, IER_RECEIVED | 4);
}

fn read_all(serial: &Serial) -> Vec<u8> {
    std::iter::from_fn(|| (serial.read(LSR) & LSR_READY != 0).then(|| serial.read(DATA))).collect()
}

/// Reads `bytes` bytes of the guest's output from a pipe.
fn expect(out: &mut PipeReader, bytes: usize) -> Vec<u8> {
    let mut got = vec![0; bytes];
    out.read_exact(&mut got).expect("output");
    got
}

/// The steps of `autoconfig` and `autoconfig_16550a` in drivers/tty/serial/8250/8250_port.c.
#[test]
fn linux_finds_a_16550a() {
    let (serial, _out) = port();
    serial.write(IER, 0);
    assert_eq!(serial.read(IER) & 0xf, 0);
    serial.write(IER, 0xf);
    assert_eq!(serial.read(IER) & 0xf, 0xf);
    serial.write(IER, 0);
    let control = serial.read(MCR);
    serial.write(MCR, MCR_LOOP | 0x0a);
    assert_eq!(serial.read(MSR) & 0xf0, 0x90, "the loopback test");
    serial.write(MCR, control);
    // Which chip: an extended feature register would read as 0, and the FIFO bits tell the rest.
    serial.write(LCR, 0xbf);
    assert_ne!(serial.read(IIR), 0);
    serial.write(LCR, 0);
    serial.write(FCR, FCR_ENABLE);
    assert_eq!(serial.read(IIR) >> 6, 3, "a 16550A");
    assert_eq!(serial.read(IIR) >> 5, 6, "no 16750");
    serial.write(LCR, 0xe0);
    assert_eq!(serial.read(IIR) & MCR_LOOP, 0, "no SuperIO bank");
    serial.write(LCR, 0);
    serial.write(IER, 0x40);
    assert_eq!(serial.read(IER) & 0x40, 0, "no XScale");
    for value in [0x00, 0x5a, 0xa5] {
        serial.write(SCRATCH, value);
        assert_eq!(serial.read(SCRATCH), value);
    }
    serial.write(LCR, LCR_DIVISOR | 3);
    serial.write(DATA, 1);
    serial.write(IER, 0);
    assert_eq!((serial.read(DATA), serial.read(IER)), (1, 0), "the divisor");
}

#[test]
fn output_comes_out_in_order_and_interrupts() {
    let (serial, mut out) = port();
    start_up_as_linux(&serial);
    serial.write(IER, IER_SENT);
    interrupts(&serial);
    serial.read(IIR);
    for byte in b"hello\r\n" {
        serial.write(DATA, *byte);
        assert_eq!(serial.read(IIR) & 0xf, 2, "it is sent");
    }
    assert_eq!(interrupts(&serial), 7);
    assert_eq!(expect(&mut out, 7), b"hello\r\n");
    assert_eq!(serial.finish(DEADLINE), 0);
}

#[test]
fn no_register_and_no_value_harms() {
    let (serial, mut out) = port();
    let drain = thread::spawn(move || out.read_to_end(&mut Vec::new()));
    let mut random = fastrand::Rng::with_seed(0x16550);
    for _ in 0..200_000 {
        let (register, value) = (random.u8(..), random.u8(..));
        match random.u8(..3) {
            0 => drop(serial.read(register % 9)),
            1 => serial.write(register % 9, value),
            _ => drop(serial.input(&[value; 3])),
        }
        assert!(serial.port().waiting.len() <= MOST_INPUT + FIFO);
    }
    drop(serial);
    drain.join().expect("no panic").expect("all of it");
}

#[test]
fn input_reaches_the_guest_with_an_interrupt() {
    let (serial, _out) = port();
    start_up_as_linux(&serial);
    interrupts(&serial);
    assert_eq!(serial.input(b"ls\n"), 3);
    assert_eq!(interrupts(&serial), 1);
    assert_eq!(serial.read(IIR) & 0xf, 4, "received data");
    assert_eq!(read_all(&serial), b"ls\n");
    assert_eq!(interrupts(&serial), 0);
}

#[test]
fn more_input_than_fits_waits_and_none_is_lost() {
    let (serial, _out) = port();
    start_up_as_linux(&serial);
    let sent: Vec<u8> = (0..3 * MOST_INPUT).map(|n| (n % 251) as u8).collect();
    let (mut taken, mut got) = (0, Vec::new());
    while taken < sent.len() {
        // Until it takes no more: what went into the FIFO made room once.
        while let more @ 1.. = serial.input(&sent[taken..]) {
            taken += more;
        }
        let full = taken < sent.len();
        assert!(serial.room().read().is_err(), "no room yet");
        // A driver that takes part of it, and never more than is there.
        for _ in 0..MOST_INPUT / 2 + FIFO {
            assert_ne!(serial.read(LSR) & LSR_READY, 0);
            got.push(serial.read(DATA));
        }
        assert_eq!(serial.room().read().is_ok(), full);
    }
    got.extend(read_all(&serial));
    assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
}

#[test]
fn what_comes_before_the_driver_waits_for_it() {
    let (serial, _out) = port();
    let early: Vec<u8> = (0..200).collect();
    assert_eq!(serial.input(&early), 200);
    start_up_as_linux(&serial);
    assert_ne!(interrupts(&serial), 0);
    assert_eq!(read_all(&serial), early);
}

#[test]
fn a_driver_that_empties_its_port_at_work_still_hears_of_input() {
    let (serial, _out) = port();
    start_up_as_linux(&serial);
    serial.write(FCR, FCR_ENABLE | FCR_CLEAR_ALL);
    interrupts(&serial);
    assert_eq!(serial.input(b"a"), 1);
    assert_ne!(interrupts(&serial), 0);
    assert_eq!(read_all(&serial), b"a");
}

#[test]
fn a_guest_that_polls_gets_its_input() {
    let (serial, _out) = port();
    serial.input(b"a");
    assert_eq!(read_all(&serial), b"a", "with no set-up at all");
    serial.write(FCR, 0xc7);
    serial.input(b"b");
    let ready = (0..=POLLS).find(|_| serial.read(LSR) & LSR_READY != 0);
    assert!(ready.is_some(), "after a set-up without interrupts");
    assert_eq!(read_all(&serial), b"b");
}

#[test]
fn loopback_is_no_input_and_no_output() {
    let (serial, mut out) = port();
    start_up_as_linux(&serial);
    serial.write(MCR, MCR_LOOP);
    serial.write(DATA, b'x');
    assert_eq!(serial.input(b"later"), 5);
    assert_eq!(serial.read(DATA), b'x');
    serial.write(DATA, b'y');
    serial.write(FCR, FCR_ENABLE | FCR_CLEAR_ALL);
    serial.write(MCR, 0);
    serial.write(IER, IER_RECEIVED);
    assert_eq!(read_all(&serial), b"later", "and nothing of what was thrown away");
    serial.write(DATA, b'z');
    assert_eq!(expect(&mut out, 1), b"z");
}

/// Sends until told to end; says at each byte how many it sent.
fn chatter(serial: &Arc<Serial>, bytes: usize) -> mpsc::Receiver<usize> {
    let (tell, sent) = mpsc::channel();
    let serial = serial.clone();
    thread::spawn(move || {
        for n in 0..bytes {
            serial.write(DATA, n as u8);
            // The receiver may be gone.
            let _ = tell.send(n + 1);
        }
    });
    sent
}

/// How far it got when nothing moves any more: the buffer, the pipe, what the thread is writing.
fn stuck_at(sent: &mpsc::Receiver<usize>) -> usize {
    let mut last = 0;
    while let Ok(n) = sent.recv_timeout(Duration::from_millis(200)) {
        last = n;
    }
    last
}

const MORE_THAN_ANY_BUFFER: usize = 8 << 20;

#[test]
fn nothing_is_lost_while_nobody_reads_and_the_registers_stay_open() {
    let (serial, mut out) = port();
    let total = 1 << 20;
    let sent = chatter(&serial, total);
    let stuck = stuck_at(&sent);
    assert!(stuck < total, "the buffer is bounded: {stuck}");
    // Another vCPU and the event loop go on.
    serial.read(LSR);
    assert_eq!(serial.input(b"still here"), 10);
    let got = expect(&mut out, total);
    assert!(got.iter().enumerate().all(|(n, byte)| *byte == n as u8));
    assert_eq!(serial.finish(DEADLINE), 0);
}

#[test]
fn a_vcpu_that_waits_for_room_goes_on_when_the_vm_stops() {
    let (serial, out) = port();
    let sent = chatter(&serial, MORE_THAN_ANY_BUFFER);
    assert!(stuck_at(&sent) < MORE_THAN_ANY_BUFFER);
    serial.stop();
    let last = sent.iter().last().expect("it goes on");
    assert_eq!(last, MORE_THAN_ANY_BUFFER);
    let lost = serial.finish(Duration::from_millis(10));
    // Two buffers and a pipe of 64 KiB each had room.
    assert!(lost > (last - (1 << 20)) as u64 && lost < last as u64, "{lost} of {last} lost");
    drop(out);
}

#[test]
fn a_vcpu_that_waits_for_room_comes_back_in_a_pause_and_loses_nothing() {
    let (serial, mut out) = port();
    let (total, parking) = (1 << 20, Parking::default());
    thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..total {
                while parking.order() == Order::Pause {
                    parking.park();
                }
                serial.write(DATA, n as u8);
            }
            parking.end();
        });
        for _ in 0..3 {
            // Nobody reads: it is stuck by then, somewhere.
            thread::sleep(Duration::from_millis(100));
            parking.give(Order::Pause);
            serial.pause();
            assert!(parking.wait_settled_for(DEADLINE), "it comes back");
            serial.resume();
            parking.give(Order::Run);
        }
        for (n, byte) in expect(&mut out, total).into_iter().enumerate() {
            assert_eq!(byte, n as u8, "byte {n}");
        }
    });
    assert_eq!(serial.finish(DEADLINE), 0);
}

#[test]
fn input_waits_outside_a_paused_guest() {
    let (serial, _out) = port();
    start_up_as_linux(&serial);
    interrupts(&serial);
    serial.pause();
    assert_eq!((serial.input(b"ls"), interrupts(&serial)), (0, 0));
    assert!(serial.room().read().is_err(), "not yet");
    serial.resume();
    assert!(serial.room().read().is_ok(), "the event loop tries its input again");
    assert_eq!(serial.input(b"ls"), 2);
    assert_eq!(read_all(&serial), b"ls");
}

#[test]
fn what_was_said_last_is_written_at_the_end() {
    let (serial, mut out) = port();
    for byte in b"reboot: Power down\r\n" {
        serial.write(DATA, *byte);
    }
    serial.stop();
    assert_eq!(serial.finish(DEADLINE), 0);
    drop(serial);
    let mut text = String::new();
    // To its end: the thread is over and has closed its side.
    out.read_to_string(&mut text).expect("text");
    assert_eq!(text, "reboot: Power down\r\n");
}

#[test]
fn what_is_said_after_the_end_is_lost_and_nobody_waits_for_it() {
    let (serial, _out) = port();
    assert_eq!(serial.finish(DEADLINE), 0);
    // The thread ends soon.
    let (told, ended) = mpsc::channel();
    thread::spawn(move || {
        let lost = loop {
            serial.write(DATA, b'.');
            let lost = serial.finish(Duration::MAX);
            if lost > 0 {
                break lost;
            }
        };
        let _ = told.send(lost);
    });
    assert_eq!(ended.recv_timeout(DEADLINE), Ok(1), "nobody waits for a thread that has ended");
}

#[test]
fn a_reader_that_goes_away_holds_up_nobody() {
    let (serial, out) = port();
    drop(out);
    let sent = chatter(&serial, MORE_THAN_ANY_BUFFER);
    assert_eq!(sent.iter().last(), Some(MORE_THAN_ANY_BUFFER));
    assert_eq!(serial.finish(DEADLINE), MORE_THAN_ANY_BUFFER as u64);
}

#[test]
fn a_descriptor_that_others_made_non_blocking_loses_nothing() {
    let (mut out, to) = io::pipe().expect("a pipe");
    rustix::io::ioctl_fionbio(to.as_fd(), true).expect("a pipe can be non-blocking");
    let serial = Arc::new(Serial::new(to.into(), &Spawner::default()).expect("a port"));
    let total = 1 << 20;
    let sent = chatter(&serial, total);
    assert!(stuck_at(&sent) < total);
    assert_eq!(expect(&mut out, total).len(), total);
    assert_eq!(serial.finish(DEADLINE), 0);
}
