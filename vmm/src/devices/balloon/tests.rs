//! Promises of the balloon.

use super::super::driver::{CONTENTS, Driver};
use super::super::request::Buffer;
use super::*;
use llfree_monitor::memory::{AddressMap, Backing, GuestRam, HOLE_END};
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORTING: usize = 4;
/// Far from what the tests' driver keeps in RAM.
const FAR: u32 = 0x400;

fn config(huge: bool) -> BalloonConfig {
    let stats = Some(Duration::from_secs(60));
    BalloonConfig { huge, deflate_on_oom: true, reporting: Some(true), coalesce: true, stats }
}

/// A driver that took all features, on 16 MiB whose every page is resident.
fn started(config: BalloonConfig) -> (Driver, Arc<BalloonControl>) {
    let control = Arc::new(BalloonControl::default());
    let of_device = control.clone();
    let mut driver = Driver::new(16, |ram| Box::new(Balloon::new(config, ram, of_device)));
    driver.ram.populate(shared_layout::HugeRange::saturating(shared_layout::HugeId(0), 8)).expect("16 MiB");
    let features = driver.offered() & 0xffff_ffff & !(1 << 29 | 1 << 28);
    driver.start(features, 5);
    (driver, control)
}

/// A driver that took all features, on 64 MiB whose every page is resident. The first half of it
/// lies below the hole of a PC, the second from 4 GiB on.
fn started_over_a_hole(config: BalloonConfig, backing: Backing) -> (Driver, Arc<BalloonControl>) {
    let control = Arc::new(BalloonControl::default());
    let of_device = control.clone();
    let map = AddressMap::with_hole(64 * MIB, 32 * MIB);
    let ram = GuestRam::with_map(64 * MIB, backing, map).expect("small");
    let mut driver = Driver::over(ram, |ram| Box::new(Balloon::new(config, ram, of_device)));
    driver.ram.populate(shared_layout::HugeRange::saturating(shared_layout::HugeId(0), 32)).expect("64 MiB");
    let features = driver.offered() & 0xffff_ffff & !(1 << 29 | 1 << 28);
    driver.start(features, 5);
    (driver, control)
}

/// The number by which a driver knows a page.
fn page(address: u64) -> u32 {
    u32::try_from(address / FRAME_SIZE).expect("below 16 TiB")
}

fn resident(ram: &GuestRam) -> u64 {
    ram.residency().expect("the kernel answers").resident_bytes
}

fn count(counter: &llfree_base::metrics::Counter) -> u64 {
    counter.get()
}

#[test]
fn inflated_pages_leave_the_host_and_come_back_as_zeroes() {
    let (mut driver, control) = started(config(false));
    driver.put(u64::from(FAR) * FRAME_SIZE, b"secret");
    let pages = driver.words(&[FAR + 2, FAR, FAR + 1, FAR + 9]);
    driver.send(INFLATE, &[pages]);
    assert_eq!(driver.used(INFLATE), 1);
    assert_eq!(control.inflated_bytes(), 4 * FRAME_SIZE);
    assert_eq!(resident(&driver.ram), 16 * MIB - 4 * FRAME_SIZE);
    assert_eq!(count(&control.counters.discards), 2, "neighbours are joined");
    driver.send(DEFLATE, &[pages]);
    assert_eq!(control.inflated_bytes(), 0);
    let bytes: [u8; 6] = driver.ram.guest_memory().read_obj(GuestAddress(u64::from(FAR) * FRAME_SIZE)).expect("in RAM");
    assert_eq!(bytes, [0; 6]);
    assert_eq!(driver.device.driver_errors(), 0);
}

#[test]
fn pages_behind_the_hole_leave_the_host_and_pages_in_it_are_nobodys() {
    for backing in [Backing::Anon, Backing::Memfd] {
        let (mut driver, control) = started_over_a_hole(config(false), backing);
        let high = HOLE_END + 8 * MIB;
        driver.put(high, b"secret");
        driver.put(high + FRAME_SIZE, b"stays");
        // The last page below the hole and the first above it are neighbours for the host.
        let pages = driver.words(&[page(high), page(HOLE_END), page(32 * MIB) - 1]);
        driver.send(INFLATE, &[pages]);
        assert_eq!(control.inflated_bytes(), 3 * FRAME_SIZE, "{backing}");
        assert_eq!(resident(&driver.ram), 64 * MIB - 3 * FRAME_SIZE, "{backing}");
        assert_eq!(count(&control.counters.discards), 2);
        let read = |at| driver.ram.guest_memory().read_obj::<[u8; 6]>(GuestAddress(at)).expect("in RAM");
        assert_eq!((read(high), read(high + FRAME_SIZE)), ([0; 6], *b"stays\0"));
        // In the hole, past RAM, and where RAM would end without a hole.
        let nowhere = [page(32 * MIB), page(64 * MIB) - 1, page(HOLE_END) - 1, page(HOLE_END + 32 * MIB)];
        let pages = driver.words(&nowhere);
        driver.send(INFLATE, &[pages]);
        assert_eq!((control.inflated_bytes(), count(&control.counters.bad_pages)), (3 * FRAME_SIZE, 4));
        let pages = driver.words(&[page(HOLE_END), page(high), page(32 * MIB) - 1]);
        driver.send(DEFLATE, &[pages]);
        assert_eq!((control.inflated_bytes(), count(&control.counters.repeated_pages)), (0, 0));
        assert_eq!(driver.device.driver_errors(), 0);
    }
}

#[test]
fn reports_of_free_memory_count_guest_addresses() {
    for backing in [Backing::Anon, Backing::Memfd] {
        let (mut driver, control) = started_over_a_hole(config(false), backing);
        let block = |address, bytes| Buffer { address, bytes, writable: true };
        driver.send(
            REPORTING,
            &[block(HOLE_END, 4 << 20), block(28 * MIB, 4 << 20), block(HOLE_END + 28 * MIB, 4 << 20)],
        );
        assert_eq!(resident(&driver.ram), (64 - 12) * MIB, "{backing}");
        assert_eq!((control.inflated_bytes(), driver.device.driver_errors()), (0, 0));
        // Neighbours for the host are not neighbours for the guest.
        driver.send(REPORTING, &[block(30 * MIB, 4 << 20)]);
        driver.assert_driver_errors(1);
        assert_eq!(resident(&driver.ram), (64 - 12) * MIB, "{backing}");
    }
}

#[test]
fn huge_blocks_behind_the_hole_are_blocks() {
    let (mut driver, control) = started_over_a_hole(config(true), Backing::Anon);
    let pages = driver.words(&[page(HOLE_END), page(HOLE_END + 30 * MIB), page(32 * MIB), page(HOLE_END) + 1]);
    driver.send(INFLATE, &[pages]);
    assert_eq!((control.inflated_bytes(), count(&control.counters.bad_pages)), (4 * MIB, 2));
    assert_eq!(resident(&driver.ram), 60 * MIB);
}

#[test]
fn without_coalescing_each_page_is_a_call() {
    let (mut driver, control) = started(BalloonConfig { coalesce: false, ..config(false) });
    let pages = driver.words(&[FAR, FAR + 1, FAR + 2]);
    driver.send(INFLATE, &[pages]);
    assert_eq!(count(&control.counters.discards), 3);
    assert_eq!(resident(&driver.ram), 16 * MIB - 3 * FRAME_SIZE);
}

#[test]
fn the_huge_balloon_takes_blocks_of_two_mib() {
    let (mut driver, control) = started(config(true));
    let pages = driver.words(&[0x600, 0x800, 0x601]);
    driver.send(INFLATE, &[pages]);
    assert_eq!(control.inflated_bytes(), 4 * MIB);
    assert_eq!(resident(&driver.ram), 12 * MIB);
    assert_eq!(count(&control.counters.bad_pages), 1, "0x601 starts no block");
    assert_eq!(driver.device.driver_errors(), 0);
}

#[test]
fn a_driver_without_the_huge_feature_still_works_with_pages() {
    let control = Arc::new(BalloonControl::default());
    let of_device = control.clone();
    let mut driver = Driver::new(16, |ram| Box::new(Balloon::new(config(true), ram, of_device)));
    driver.start(0, 2);
    let pages = driver.words(&[FAR]);
    driver.send(INFLATE, &[pages]);
    assert_eq!(control.inflated_bytes(), FRAME_SIZE);
}

#[test]
fn pages_out_of_range_or_twice_are_counted_and_nothing_else() {
    let (mut driver, control) = started(config(false));
    let pages = driver.words(&[FAR, FAR, 4096, u32::MAX, 4095]);
    driver.send(INFLATE, &[pages]);
    driver.send(INFLATE, &[pages]);
    assert_eq!(control.inflated_bytes(), 2 * FRAME_SIZE);
    assert_eq!(count(&control.counters.bad_pages), 4);
    assert_eq!(count(&control.counters.repeated_pages), 4);
    let pages = driver.words(&[FAR, 7, FAR]);
    driver.send(DEFLATE, &[pages]);
    assert_eq!(control.inflated_bytes(), FRAME_SIZE);
    assert_eq!(count(&control.counters.repeated_pages), 6, "7 was never given");
    assert_eq!((driver.used(INFLATE), driver.used(DEFLATE), driver.device.driver_errors()), (2, 1, 0));
}

#[test]
fn lists_of_a_bad_length_are_faults() {
    let (mut driver, _) = started(config(false));
    driver.send(INFLATE, &[Buffer { address: CONTENTS, bytes: 6, writable: false }]);
    driver.assert_driver_errors(1);
    let (mut driver, _) = started(config(false));
    driver.send(DEFLATE, &[Buffer { address: 0, bytes: (16 << 10) + 4, writable: false }]);
    driver.assert_driver_errors(1);
}

#[test]
fn a_driver_that_starts_over_has_all_its_pages() {
    let (mut driver, control) = started(config(false));
    let pages = driver.words(&[FAR]);
    driver.send(INFLATE, &[pages]);
    driver.write(virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS, 0);
    assert_eq!(control.inflated_bytes(), 0);
}

#[test]
fn reported_memory_goes_back_and_stays_the_guests() {
    let (mut driver, control) = started(config(false));
    let block = |address, bytes| Buffer { address, bytes, writable: true };
    driver.send(REPORTING, &[block(4 * MIB, 2 << 20), block(8 * MIB, 4096)]);
    assert_eq!(resident(&driver.ram), 14 * MIB - 4096);
    assert_eq!(control.inflated_bytes(), 0);
    assert_eq!(count(&control.counters.reported_bytes), (2 << 20) + 4096);
    // Parts of a page cannot be discarded.
    driver.send(REPORTING, &[block(6 * MIB + 8, 4096)]);
    driver.assert_driver_errors(1);
    assert_eq!(resident(&driver.ram), 14 * MIB - 4096);
}

#[test]
fn the_reporting_queue_is_found_where_linux_looks_for_it() {
    let block = Buffer { address: 4 * MIB, bytes: 4096, writable: true };
    // Without statistics it is the third queue, with them the fourth; by the standard the fifth.
    for (features, queue) in [(1 << F_REPORTING, 2), (1 << F_REPORTING | 1 << F_STATS_VQ, 3)] {
        let control = Arc::new(BalloonControl::default());
        let of_device = control.clone();
        let mut driver = Driver::new(16, |ram| Box::new(Balloon::new(config(false), ram, of_device)));
        driver.start(features, 5);
        driver.send(queue, &[block]);
        assert_eq!(count(&control.counters.reported_bytes), 4096, "queue {queue}");
    }
    // Not negotiated, there is no such queue.
    let mut driver = Driver::new(16, |ram| Box::new(Balloon::new(config(false), ram, Arc::default())));
    driver.start(0, 5);
    driver.send(REPORTING, &[block]);
    driver.assert_driver_errors(1);
}

#[test]
fn statistics_are_asked_for_by_giving_the_last_ones_back() {
    let (mut driver, control) = started(config(false));
    assert_eq!(control.stats(), None);
    let record = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let bytes = [record(4, 77 << 20), record(5, 99 << 20), record(9999, 1), record(6, u64::MAX), vec![1]].concat();
    driver.put(CONTENTS, &bytes);
    let buffer = Buffer { address: CONTENTS, bytes: bytes.len() as u32, writable: false };
    driver.send(STATS, &[buffer]);
    assert_eq!(driver.used(STATS), 0, "the device keeps it");
    driver.device.tick();
    assert_eq!(driver.used(STATS), 1);
    driver.device.tick();
    assert_eq!(driver.used(STATS), 1, "a driver that does not answer is not asked twice");
    let guest = control.status().guest.expect("it came");
    assert_eq!((guest.free_bytes, guest.total_bytes), (Some(77 << 20), Some(99 << 20)));
    assert_eq!((guest.available_bytes, guest.cache_bytes), (None, None));
    // A second request while one is kept gives the first one back.
    driver.send(STATS, &[buffer]);
    driver.send(STATS, &[buffer]);
    assert_eq!((driver.used(STATS), driver.device.driver_errors()), (2, 0));
}

#[test]
fn statistics_end_with_the_driver_that_sent_them() {
    let (mut driver, control) = started(config(false));
    driver.put(CONTENTS, &[&5u16.to_le_bytes()[..], &(99u64 << 20).to_le_bytes()].concat());
    driver.send(STATS, &[Buffer { address: CONTENTS, bytes: 10, writable: false }]);
    let status = control.status();
    assert!(status.deflates_on_oom && status.guest.is_some_and(|guest| !guest.stale));
    driver.write(virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS, 0);
    let status = control.status();
    assert_eq!((status.guest, status.deflates_on_oom), (None, false));
}

/// Linux that clears pages when they are freed says that they are filled with zeroes, one that looks
/// for stray writes fills them with something else.
#[test]
fn what_a_guest_relies_on_in_its_free_pages_stays() {
    let poison = virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG + 12;
    let block = Buffer { address: 4 * MIB, bytes: 2 << 20, writable: true };
    let (mut driver, control) = started(config(false));
    assert_ne!(driver.offered() & 1 << F_PAGE_POISON, 0);
    driver.write(poison, 0xaaaa_aaaa);
    assert_eq!(driver.config(12), 0xaaaa_aaaa);
    driver.send(REPORTING, &[block]);
    assert_eq!((resident(&driver.ram), count(&control.counters.reported_bytes)), (16 * MIB, 2 << 20));
    driver.write(poison, 0);
    driver.send(REPORTING, &[block]);
    assert_eq!((resident(&driver.ram), driver.device.driver_errors()), (14 * MIB, 0));
    // What is not offered cannot be written.
    let quiet = BalloonConfig { reporting: None, ..config(false) };
    let (driver, _) = started(quiet);
    assert_eq!(driver.offered() & (1 << F_PAGE_POISON | 1 << F_REPORTING), 0);
    driver.write(poison, 1);
    driver.assert_driver_errors(1);
}

/// The order of drivers/virtio/virtio_balloon.c: queues without gaps, a first buffer of statistics
/// before the driver is ready, numbers in lists, `actual` after each.
#[test]
fn a_driver_that_does_as_linux_does_is_served() {
    use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_STATUS};
    let control = Arc::new(BalloonControl::default());
    let of_device = control.clone();
    let mut driver = Driver::new(16, |ram| Box::new(Balloon::new(config(false), ram, of_device)));
    driver.ram.populate(shared_layout::HugeRange::saturating(shared_layout::HugeId(0), 8)).expect("16 MiB");
    // It does not take the page poison's feature, unless it clears or fills free pages.
    driver.negotiate(1 << F_STATS_VQ | 1 << F_DEFLATE_ON_OOM | 1 << F_REPORTING);
    (0..4).for_each(|queue| driver.set_queue(queue, Driver::rings(queue)));
    driver.put(CONTENTS, &[&6u16.to_le_bytes()[..], &(12 * MIB).to_le_bytes()].concat());
    driver.send(STATS, &[Buffer { address: CONTENTS, bytes: 10, writable: false }]);
    assert_eq!(control.stats(), None, "nothing is served before the driver is ready");
    driver.write(VIRTIO_MMIO_STATUS, super::super::driver::DRIVER_OK);
    driver.device.serve(STATS, || false);
    assert_eq!(control.status().guest.and_then(|guest| guest.available_bytes), Some(12 * MIB));
    control.set_target(256);
    driver.device.config_changed();
    // Its pages come one by one, the last one first.
    let pages: Vec<u32> = (FAR..FAR + driver.config(0)).rev().collect();
    let pages = driver.words(&pages);
    driver.send(INFLATE, &[pages]);
    driver.write(VIRTIO_MMIO_CONFIG + 4, 256);
    assert_eq!((control.inflated_bytes(), control.claimed_pages()), (MIB, 256));
    assert_eq!((resident(&driver.ram), count(&control.counters.discards)), (15 * MIB, 1));
    driver.send(3, &[Buffer { address: 8 * MIB, bytes: 4 << 20, writable: true }]);
    assert_eq!(resident(&driver.ram), 11 * MIB);
    assert_eq!((driver.used(INFLATE), driver.used(STATS), driver.used(3)), (1, 0, 1));
    assert_eq!(driver.device.driver_errors(), 0);
}

#[test]
fn the_driver_reads_its_target_and_writes_its_size() {
    let (driver, control) = started(config(false));
    control.set_target(1234);
    let before = driver.read(virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG_GENERATION);
    driver.device.config_changed();
    assert_eq!(driver.config(0), 1234);
    assert_ne!(driver.read(virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG_GENERATION), before);
    assert_eq!(driver.read(virtio_bindings::virtio_mmio::VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    driver.write(virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG + 4, 55);
    assert_eq!((control.claimed_pages(), driver.config(4)), (55, 55));
    assert_eq!(control.inflated_bytes(), 0, "a claim is a claim");
    driver.write(virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG, 55);
    driver.assert_driver_errors(1);
    assert_eq!(control.target_pages(), 1234);
}

/// Pages that it takes go past the table, so the two are never at work together.
#[test]
fn beside_a_table_that_serves_nothing_is_discarded() {
    use llfree_base::thread::Spawner;
    use llfree_monitor::memory::{PoolConfig, Supply, UseUserfaultfd};
    use llfree_monitor::{HandOver, Region, Table, TenantStart};

    for shares in [false, true] {
        let control = Arc::new(BalloonControl::default());
        let mut owner = None;
        let mut driver = Driver::new(16, |ram| {
            let off = UseUserfaultfd::Off;
            let supply = Supply::new(ram.clone(), PoolConfig::default(), off, &Spawner::default()).expect("no pool");
            let layout = shared_layout::TableLayout::new(ram.huge_frames()).expect("small");
            let region = Arc::new(Region::anonymous(layout.total as usize).expect("room"));
            let table = Table::new(region, layout).expect("it fits");
            let start = TenantStart { threads: 1, taken: 0..8, ..TenantStart::default() };
            let monitor = Arc::new(Monitor::new(ram.clone(), supply, table, start).expect("no image"));
            owner = Some(monitor.clone());
            Box::new(Balloon::new(config(false), ram, control.clone()).instead_of_table(monitor))
        });
        let monitor = owner.expect("it was made");
        driver.ram.populate(shared_layout::HugeRange::saturating(shared_layout::HugeId(0), 8)).expect("16 MiB");
        if shares {
            assert!(monitor.hand_over(HandOver::Complete));
        }
        let features = driver.offered() & 0xffff_ffff & !(1 << 29 | 1 << 28);
        driver.start(features, 5);
        let pages = driver.words(&[FAR, FAR + 1]);
        driver.send(INFLATE, &[pages]);
        let expected = if shares { (0, 1) } else { (2 * FRAME_SIZE, 0) };
        assert_eq!((control.inflated_bytes(), driver.device.driver_errors()), expected, "shares: {shares}");
        assert_eq!(resident(&driver.ram), 16 * MIB - expected.0);
        assert_eq!(monitor.is_left_to_device(), !shares);
    }
}
