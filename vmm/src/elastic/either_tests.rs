//! Who serves a guest to which the table and a balloon are offered: whoever comes first, and nobody before.

use super::either::Either;
use super::*;
use crate::boot::Platform;
use llfree_base::thread::Spawner;
use llfree_control::report::{ChosenBy, ElasticKind};
use llfree_monitor::memory::{AddressMap, Backing, GuestRam, PoolConfig, Supply, UseUserfaultfd};
use llfree_monitor::{Direction, HandOver, Monitor, TenantStart};
use shared_layout::{HUGE_SIZE, HugeEntry};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_mmio as reg;

const FRAMES: u32 = 32;
const MIB: u64 = 1 << 20;
const MEMORY: u64 = FRAMES as u64 * HUGE_SIZE;

/// A guest in its boot.
struct Guest {
    elastic: Arc<dyn Elasticity>,
    monitor: Arc<Monitor>,
    platform: Arc<Platform>,
}

impl Guest {
    fn boot() -> Self {
        let platform = Arc::new(Platform::above(MEMORY, MEMORY, 1, 40).expect("small"));
        let ram = Arc::new(GuestRam::new(MEMORY, Backing::Anon).expect("small"));
        let off = UseUserfaultfd::Off;
        let supply = Supply::new(ram.clone(), PoolConfig::default(), off, &Spawner::default()).expect("no pool");
        let start = TenantStart { threads: 1, taken: 0..FRAMES, ..TenantStart::default() };
        let monitor = Arc::new(Monitor::new(ram.clone(), supply, platform.table().clone(), start).expect("no image"));
        let (notifier, nudge, drain) = (Box::new(|| ()), Box::new(|| ()), Box::new(|| ()));
        let parts = Parts { ram: &ram, monitor: &monitor, notifier, nudge, words: platform.clone(), drain };
        let elastic = Elastic::for_linux().way().build(parts).expect("events");
        Self { elastic, monitor, platform }
    }

    fn read(&self, register: u32) -> u32 {
        let mut word = [0; 4];
        self.elastic.transport().expect("there is a balloon").read(register.into(), &mut word);
        u32::from_le_bytes(word)
    }

    fn write(&self, register: u32, value: u32) {
        self.elastic.transport().expect("there is a balloon").write(register.into(), &value.to_le_bytes());
    }

    fn set_up_driver(&self) {
        [0, 1, 3].into_iter().for_each(|status| self.write(reg::VIRTIO_MMIO_STATUS, status));
        self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, 1);
        self.write(reg::VIRTIO_MMIO_STATUS, 11);
    }

    fn driver_is_ready(&self) {
        self.write(reg::VIRTIO_MMIO_STATUS, 15);
    }

    fn give(&self, frames: u32) {
        for entry in &self.platform.table().entries()[..frames as usize] {
            entry.store(HugeEntry::FREE_EVICTED.bits(), Ordering::Relaxed);
        }
    }

    fn shrink(&self, mib: u64) -> u64 {
        self.elastic.resize(Direction::Shrink, mib * MIB, &|_| false).expect("nothing is refused").actual / MIB
    }

    /// The kind at work, who chose it, and whether the table is available.
    fn state(&self) -> (ElasticKind, ChosenBy, bool) {
        let status = self.elastic.status();
        let (kind, by) = (status.kind.known().expect("a kind"), status.chosen_by.known().expect("somebody"));
        assert_eq!(self.elastic.way(&Either::FOR_LINUX).kind(), kind);
        (kind, by, self.elastic.table().is_some())
    }

    fn pages_wanted(&self) -> u32 {
        self.read(reg::VIRTIO_MMIO_CONFIG)
    }
}

#[test]
fn what_a_balloon_could_not_have_is_not_left_to_the_guest() {
    let check = |backing| {
        let map = AddressMap::flat(MEMORY);
        Elastic::for_linux().way().check(&Shape { backing, map: &map, image: &(0..0) })
    };
    assert!(check(Backing::Anon).is_ok() && check(Backing::Memfd).is_ok());
    assert!(matches!(check(Backing::Hugetlb), Err(DeviceError::SmallPagesOfHugetlb)));
}

#[test]
fn before_anybody_spoke_nothing_moves_and_a_limit_waits() {
    let guest = Guest::boot();
    assert_eq!(guest.state(), (ElasticKind::Undecided, ChosenBy::Nobody, true));
    assert_eq!(guest.read(reg::VIRTIO_MMIO_DEVICE_ID), VIRTIO_ID_BALLOON);
    // Nor what a kernel gives that is about to say Hello, or one that lies.
    guest.give(FRAMES);
    assert_eq!((guest.shrink(32), guest.elastic.take_free(32 * MIB).expect("none").frames), (64, 0));
    assert_eq!((guest.elastic.limit(), guest.elastic.wanted(), guest.monitor.limit()), (MEMORY, 32 * MIB, FRAMES));
    assert!(!guest.elastic.is_moving(Duration::ZERO), "nobody is at it");
    // It is taken back as it was set.
    assert_eq!((guest.shrink(64), guest.elastic.wanted()), (64, 0));
}

#[test]
fn a_kernel_that_says_hello_has_no_balloon() {
    let guest = Guest::boot();
    guest.give(20);
    assert_eq!(guest.shrink(32), 64);
    assert!(guest.monitor.hand_over(HandOver::Complete));
    assert_eq!(guest.state(), (ElasticKind::Llfree, ChosenBy::Hello, true));
    assert_eq!(guest.read(reg::VIRTIO_MMIO_DEVICE_ID), 0, "an empty place");
    // Who pursues the limit looks again.
    assert_eq!(guest.elastic.take_free(32 * MIB).expect("it discards").frames, 16);
    assert_eq!((guest.elastic.limit(), guest.monitor.limit()), (32 * MIB, 16));
    // A driver that does not care what the device is gets nowhere.
    guest.set_up_driver();
    guest.driver_is_ready();
    assert_eq!(guest.state(), (ElasticKind::Llfree, ChosenBy::Hello, true));
    assert_eq!(guest.monitor.limit(), 16, "held is held");
}

#[test]
fn a_driver_without_a_hello_has_the_balloon() {
    let guest = Guest::boot();
    assert_eq!(guest.shrink(32), 64);
    guest.set_up_driver();
    assert_eq!(guest.state(), (ElasticKind::Undecided, ChosenBy::Nobody, true), "it may think better of it");
    guest.driver_is_ready();
    assert_eq!(guest.state(), (ElasticKind::Balloon, ChosenBy::Driver, false));
    assert_eq!(u64::from(guest.pages_wanted()) * 4096, 32 * MIB, "the limit was there when it came");
    assert_eq!(guest.elastic.wanted(), 32 * MIB);
    // Once it is decided it stays so: for a Hello that comes late, and a driver that starts over.
    assert!(!guest.monitor.hand_over(HandOver::Complete));
    guest.give(FRAMES);
    assert_eq!((guest.shrink(16), guest.monitor.limit()), (64, FRAMES), "nothing goes by the table");
    guest.set_up_driver();
    assert_eq!(guest.state(), (ElasticKind::Balloon, ChosenBy::Driver, false));
    guest.driver_is_ready();
    assert_eq!(guest.state(), (ElasticKind::Balloon, ChosenBy::Driver, false));
    assert_eq!(guest.read(reg::VIRTIO_MMIO_DEVICE_ID), VIRTIO_ID_BALLOON);
}

#[test]
fn a_hello_between_two_steps_of_a_driver_is_first() {
    let guest = Guest::boot();
    guest.set_up_driver();
    assert!(guest.monitor.hand_over(HandOver::Complete));
    guest.driver_is_ready();
    assert_eq!(guest.state(), (ElasticKind::Llfree, ChosenBy::Hello, true));
}

#[test]
fn a_resize_that_waits_goes_on_with_whoever_comes() {
    let guest = Guest::boot();
    guest.give(20);
    let looks = AtomicU32::new(0);
    let go_on = |_: Duration| {
        if looks.fetch_add(1, Ordering::Relaxed) == 1 {
            assert!(guest.monitor.hand_over(HandOver::Complete));
        }
        looks.load(Ordering::Relaxed) < 10
    };
    let resize = guest.elastic.resize(Direction::Shrink, 32 * MIB, &go_on).expect("it discards");
    assert_eq!((resize.actual, guest.monitor.limit()), (32 * MIB, 16));
}
