//! A virtio driver made of arbitrary bytes: they decide what it writes to registers and to its rings.
//! Whatever it does, each step ends, nothing panics, and a driver that starts over finds a
//! device that works. The body of a fuzz target and of a plain test.

use llfree_monitor::memory::{Backing, GuestRam};
use shared_layout::HUGE_SIZE;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use vm_memory::{Bytes as _, GuestAddress};
use vmm::devices::VirtioDevice;
use vmm::devices::balloon::{Balloon, BalloonConfig, BalloonControl};
use vmm::devices::blk::{Blk, DiskConfig};
use vmm::devices::console::Console;
use vmm::devices::mem::{Mem, MemControl};
use vmm::devices::mmio::Transport;
use vmm::devices::net::{MacAddr, Net};
use vmm::devices::rng::Rng;

/// Registers of virtio-mmio that a driver needs to bring a device up.
const FEATURES_SEL: u64 = 0x24;
const FEATURES: u64 = 0x20;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_NUM: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const STATUS: u64 = 0x70;
/// Low halves of the addresses of a queue's three rings; the high halves follow at 4.
const RINGS: [u64; 3] = [0x80, 0x90, 0xa0];

const VERSION_1: u64 = 1 << 32;
const DRIVER_OK: u32 = 15;
/// Where the rings lie, and how far those of the next queue are.
const BASE: u64 = 0x10_0000;
const STRIDE: u64 = 0x3000;
/// RAM of the device's guest.
const RAM: u64 = 2 * HUGE_SIZE;

struct Driver {
    device: Transport,
    ram: Arc<GuestRam>,
    queues: u64,
}

/// A network on which some frames are already waiting, and nobody listens.
fn net() -> Net {
    let (ours, theirs) = UnixDatagram::pair().expect("the host has sockets");
    for bytes in [0, 12, 13, 60, 1526, 20_000] {
        theirs.send(&vec![0xee; bytes]).expect("a socket has room for a few frames");
    }
    Net::over(ours.into(), MacAddr([2, 0, 0, 0, 0, 1]), 1500).expect("a socket can be kept from blocking")
}

impl Driver {
    fn new(kind: u8) -> Self {
        let ram = Arc::new(GuestRam::new(RAM, Backing::Anon).expect("two huge frames of address space"));
        let device: Box<dyn VirtioDevice> = match kind % 7 {
            6 => Box::new(net()),
            5 => Box::new(Console::new().expect("the host has eventfds").0),
            4 => Box::new(disk()),
            3 => Box::new(Rng::default()),
            0 => Box::new(Mem::new(ram.clone(), Arc::new(MemControl::new(RAM, HUGE_SIZE)))),
            kind => {
                let config = BalloonConfig {
                    huge: kind == 1,
                    deflate_on_oom: true,
                    reporting: Some(true),
                    coalesce: true,
                    stats: None,
                };
                Box::new(Balloon::new(config, ram.clone(), Arc::new(BalloonControl::default())))
            }
        };
        let device = Transport::new(device, ram.clone(), Box::new(|| {})).expect("the host has eventfds");
        let queues = device.events().len() as u64;
        Self { device, ram, queues }
    }

    fn write(&self, register: u64, value: u32) {
        self.device.write(register, &value.to_le_bytes());
    }

    fn read(&self, register: u64) -> u32 {
        let mut word = [0; 4];
        self.device.read(register, &mut word);
        u32::from_le_bytes(word)
    }

    /// The steps of an honest driver.
    fn start(&self, features: u64) {
        [0, 1, 3].into_iter().for_each(|status| self.write(STATUS, status));
        for half in [0, 1] {
            self.write(FEATURES_SEL, half);
            self.write(FEATURES, ((features | VERSION_1) >> (32 * half)) as u32);
        }
        self.write(STATUS, 11);
        for queue in 0..self.queues {
            self.write(QUEUE_SEL, queue as u32);
            self.write(QUEUE_NUM, 8);
            for (ring, register) in RINGS.into_iter().enumerate() {
                let address = BASE + queue * STRIDE + ring as u64 * 0x1000;
                self.write(register, address as u32);
                self.write(register + 4, 0);
            }
            self.write(QUEUE_READY, 1);
        }
        self.write(STATUS, DRIVER_OK);
    }
}

/// A disk of 64 KiB whose file is deleted with it.
fn disk() -> Blk {
    let path = std::env::temp_dir().join(format!("llfree-vmm-hostile-disk-{}", std::process::id()));
    std::fs::File::create(&path).and_then(|file| file.set_len(64 << 10)).expect("room for a small file");
    let disk = Blk::open(&DiskConfig { path: path.clone(), read_only: false, serial: None });
    std::fs::remove_file(&path).expect("it was made just now");
    disk.expect("a regular file that nobody else has")
}

/// A byte for the kind of device, then eight per step: what, which, and a value.
pub(crate) fn run_bytes(bytes: &[u8]) {
    let Some((kind, steps)) = bytes.split_first() else { return };
    let driver = Driver::new(*kind);
    driver.start(0);
    for step in steps.chunks_exact(8) {
        let [what, which, low, high, a, b, c, d] = [0, 1, 2, 3, 4, 5, 6, 7].map(|i| step[i]);
        let (at, value) = (u64::from(u16::from_le_bytes([low, high])), u32::from_le_bytes([a, b, c, d]));
        let queue = u64::from(which) % driver.queues;
        match what % 8 {
            0 => driver.write(u64::from(which) * 4, value),
            1 => driver.device.write(at, &step[4..4 + usize::from(which) % 5]),
            2 => driver.start(u64::from(value)),
            3..=5 => {
                // Into the rings of a queue: descriptors, available, used.
                let address = BASE + queue * STRIDE + u64::from(what % 8 - 3) * 0x1000 + at % 0x80;
                driver.ram.guest_memory().write_slice(&step[4..], GuestAddress(address)).expect("inside the RAM");
            }
            6 => drop(driver.device.serve(queue as usize, || false)),
            _ => {
                driver.device.tick();
                driver.read(at);
            }
        }
    }
    driver.write(STATUS, 0);
    driver.start(0);
    assert_eq!(driver.read(STATUS), DRIVER_OK, "a driver that starts over finds a device that works");
}
