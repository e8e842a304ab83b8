//! Drivers that keep their device busy and come no nearer to what a resize asks for: nobody waits for them
//! longer than for one that rests.

use super::driver::{CONTENTS, Driver};
use super::request::Buffer;
use crate::elastic::{Elastic, Elasticity, Parts};
use llfree_base::thread::Spawner;
use llfree_monitor::memory::{Backing, GuestRam, PoolConfig, Supply, UseUserfaultfd};
use llfree_monitor::{Direction, Monitor, Region, Table, TenantStart};
use shared_layout::{FRAME_SIZE, HUGE_SIZE, TableLayout};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const RAM: u64 = 16 << 20;
/// Where the driver's pages lie: far from what it keeps in RAM.
const FAR: u32 = 0x400;
/// The machine may be busy, but a resize that waits for such a driver would take for ever.
const LONG: Duration = Duration::from_secs(60);

/// A way of moving memory over 16 MiB, with a driver that was asked for nothing yet.
fn device(kind: &str) -> (Arc<dyn Elasticity>, Driver) {
    let ram = Arc::new(GuestRam::new(RAM, Backing::Anon).expect("small"));
    let off = UseUserfaultfd::Off;
    let supply = Supply::new(ram.clone(), PoolConfig::default(), off, &Spawner::default()).expect("nothing to fail");
    let layout = TableLayout::new(ram.huge_frames()).expect("small");
    let region = Arc::new(Region::anonymous(layout.total as usize).expect("room"));
    let table = Table::new(region, layout).expect("it fits");
    let monitor = Monitor::untracked(ram.clone(), supply, table, TenantStart::default(), 0..0).expect("no image");
    let elastic: Elastic = kind.parse().expect("a kind");
    let parts = Parts {
        ram: &ram,
        monitor: &Arc::new(monitor),
        notifier: Box::new(|| {}),
        nudge: Box::new(|| {}),
        words: Arc::new(crate::boot::Platform::above(RAM, RAM, 1, 40).expect("small")),
        drain: Box::new(|| {}),
    };
    let elasticity = elastic.way().build(parts).expect("events");
    let device = elasticity.transport().expect("a device").clone();
    (elasticity, Driver::of(device, ram))
}

/// Gives pages away through queue 0, or takes them back through queue 1.
fn balloon(driver: &mut Driver, queue: usize, pages: std::ops::Range<u32>) {
    let pages = driver.words(&pages.collect::<Vec<_>>());
    driver.send(queue, &[pages]);
}

/// Plugs (0) or unplugs (1) 2 MiB blocks of virtio-mem, from the 5th MiB of RAM on.
fn blocks(driver: &mut Driver, ask: u16, first: u64, count: u16) {
    let mut bytes = [0; 24];
    bytes[..2].copy_from_slice(&ask.to_le_bytes());
    bytes[8..16].copy_from_slice(&((4 << 20) + first * HUGE_SIZE).to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    driver.put(CONTENTS, &bytes);
    let buffer = |at, bytes, writable| Buffer { address: CONTENTS + at, bytes, writable };
    driver.send(0, &[buffer(0, 24, false), buffer(64, 10, true)]);
}

/// Has `work` keep the device busy for as long as a resize to `target` takes; that resize's end and duration.
fn against(
    (elastic, driver): (&Arc<dyn Elasticity>, &mut Driver),
    direction: Direction,
    target: u64,
    mut work: impl FnMut(&mut Driver) + Send,
) -> (u64, Duration) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                work(driver);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let start = Instant::now();
        // As a shrink or a grow without a deadline has it.
        let go_on = |elapsed| elapsed < LONG && elastic.is_moving(elapsed);
        let resize = elastic.resize(direction, target, &go_on).expect("in range");
        over.store(true, Ordering::Relaxed);
        (resize.actual, start.elapsed())
    })
}

#[test]
fn a_driver_that_toggles_pages_or_starts_over_holds_up_no_resize() {
    let toggled = |_| {
        let (elastic, mut driver) = device("balloon,stats=off");
        driver.start(0, 2);
        balloon(&mut driver, 0, FAR..FAR + 8);
        // One page back and forth, of eight that should come back.
        let toggle = |driver: &mut Driver| {
            balloon(driver, 1, FAR..FAR + 1);
            balloon(driver, 0, FAR..FAR + 1);
        };
        let (actual, grew) = against((&elastic, &mut driver), Direction::Grow, RAM, toggle);
        assert!(actual < RAM, "{actual}");
        // All of it at once, and then everything from the start.
        let start_over = |driver: &mut Driver| {
            driver.start(0, 2);
            balloon(driver, 0, FAR..FAR + 8);
        };
        let target = RAM - 2 * HUGE_SIZE;
        let (actual, shrank) = against((&elastic, &mut driver), Direction::Shrink, target, start_over);
        assert!(actual >= RAM - 8 * FRAME_SIZE, "{actual}");
        grew.max(shrank)
    };
    // A hundred, all at once: each is over after the time for which no step counts, and the first one's.
    let took: Vec<Duration> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..100).map(|n| scope.spawn(move || toggled(n))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    assert!(took.iter().all(|took| *took < LONG / 2), "{took:?}");
}

#[test]
fn a_driver_that_toggles_blocks_holds_up_no_resize() {
    let (elastic, mut driver) = device("virtio-mem,boot=4M");
    driver.start(0, 1);
    blocks(&mut driver, 0, 0, 3);
    let toggle = |driver: &mut Driver| {
        blocks(driver, 1, 0, 1);
        blocks(driver, 0, 0, 1);
    };
    let (actual, grew) = against((&elastic, &mut driver), Direction::Grow, RAM, toggle);
    assert!(actual < RAM && grew < LONG / 2, "{actual} after {grew:?}");
    let (actual, shrank) = against((&elastic, &mut driver), Direction::Shrink, 4 << 20, toggle);
    assert!(actual > 4 << 20 && shrank < LONG / 2, "{actual} after {shrank:?}");
}

#[test]
fn a_driver_that_comes_nearer_step_by_step_is_waited_for() {
    let (elastic, mut driver) = device("balloon,stats=off");
    driver.start(0, 2);
    let mut next = FAR;
    let target = RAM - HUGE_SIZE;
    let step = |driver: &mut Driver| {
        if next < FAR + 512 {
            balloon(driver, 0, next..next + 1);
            next += 1;
        }
    };
    let (actual, _) = against((&elastic, &mut driver), Direction::Shrink, target, step);
    assert_eq!(actual, target);
}
