//! What comes from pipes and files reaches a guest's registers, byte for byte. Terminals have
//! processes of their own: `tests/console.rs`.

use super::Input;
use event_manager::{EventManager, SubscriberOps};
use llfree_base::thread::Spawner;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use vmm::devices::serial::Serial;

const DATA: u8 = 0;
const LSR: u8 = 5;
const READY: u8 = 1;

type Shared = Arc<Mutex<Input<fn()>>>;

struct Bed {
    serial: Arc<Serial>,
    input: Shared,
    manager: EventManager<Shared>,
}

impl Bed {
    fn new(from: BorrowedFd<'_>) -> Self {
        let out = File::create("/dev/null").expect("it is everywhere");
        let serial = Arc::new(Serial::new(out.into(), &Spawner::default()).expect("a port"));
        let left: fn() = || panic!("only a terminal has escapes");
        let input = Input::new(from, None, serial.clone(), left).expect("an input");
        let input = Arc::new(Mutex::new(input));
        let mut manager = EventManager::new().expect("a loop");
        manager.add_subscriber(input.clone());
        Self { serial, input, manager }
    }

    /// Lets the loop handle what there is now; gives how many rounds had something.
    fn settle(&mut self) -> usize {
        let mut rounds = 0;
        while self.manager.run_with_timeout(0).expect("it runs") > 0 {
            rounds += 1;
            assert!(rounds < 100, "the loop spins");
        }
        rounds
    }

    /// Everything that the guest can read.
    fn guest_reads(&mut self) -> Vec<u8> {
        let mut got = Vec::new();
        loop {
            self.settle();
            let before = got.len();
            while self.serial.read(LSR) & READY != 0 {
                got.push(self.serial.read(DATA));
            }
            if got.len() == before {
                return got;
            }
        }
    }

    fn has_ended(&self) -> bool {
        self.input.lock().expect("no panic").has_ended()
    }
}

#[test]
fn a_pipe_reaches_the_guest_as_it_is() {
    let (read, mut write) = io::pipe().expect("a pipe");
    let mut bed = Bed::new(read.as_fd());
    assert_eq!(bed.guest_reads(), b"");
    write.write_all(b"ls\n\x01x\x01\x01").expect("room");
    assert_eq!(bed.guest_reads(), b"ls\n\x01x\x01\x01");
    write.write_all(b"bye").expect("room");
    drop(write);
    assert_eq!(bed.guest_reads(), b"bye");
    assert!(bed.has_ended());
    assert_eq!(bed.settle(), 0, "the end is told once");
}

#[test]
fn input_that_was_there_before_the_loop_is_not_missed() {
    let (read, mut write) = io::pipe().expect("a pipe");
    write.write_all(b"early").expect("room");
    assert_eq!(Bed::new(read.as_fd()).guest_reads(), b"early");
}

#[test]
fn a_guest_that_reads_nothing_stops_the_reading_and_not_the_loop() {
    let (read, mut write) = io::pipe().expect("a pipe");
    let sent: Vec<u8> = (0..60_000_u32).map(|n| (n % 253) as u8).collect();
    write.write_all(&sent).expect("a pipe takes 64 KiB");
    drop(write);
    let mut bed = Bed::new(read.as_fd());
    bed.settle();
    assert_eq!(bed.settle(), 0, "what waits keeps no one awake");
    assert!(!bed.has_ended());
    assert!(bed.guest_reads() == sent);
    assert!(bed.has_ended());
}

#[test]
fn a_file_reaches_the_guest() {
    let mut file = tempfile::tempfile().expect("a file");
    let sent: Vec<u8> = (0..100_000_u32).map(|n| (n % 241) as u8).collect();
    file.write_all(&sent).expect("it is written");
    file.rewind().expect("a file has a start");
    let mut bed = Bed::new(file.as_fd());
    assert!(bed.guest_reads() == sent);
    assert!(bed.has_ended());
}

#[test]
fn nothing_to_read_from_ends_the_reading_only() {
    let null = File::open("/dev/null").expect("it is everywhere");
    let directory = File::open("/").expect("it is everywhere");
    for from in [null.as_fd(), directory.as_fd()] {
        let mut bed = Bed::new(from);
        assert_eq!(bed.guest_reads(), b"");
        assert!(bed.has_ended(), "{from:?}");
        assert_eq!(bed.settle(), 0);
    }
}
