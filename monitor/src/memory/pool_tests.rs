use super::*;
use llfree_base::thread::Spawner;
use std::sync::atomic::AtomicU32;

#[test]
fn a_slot_has_one_taker_and_is_filled_again() {
    let ring = Ring::new(4).expect("address space");
    let stop = AtomicBool::new(false);
    let owned: Vec<AtomicU32> = (0..4).map(|_| AtomicU32::new(0)).collect();
    std::thread::scope(|scope| {
        let (ring, stop, owned) = (&ring, &stop, &owned);
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                if !ring.fill().expect("there is memory") {
                    std::thread::yield_now();
                }
            }
        });
        let takers: Vec<_> = [1, 3]
            .map(|most| {
                scope.spawn(move || {
                    let mut taken = 0;
                    while taken < 500 {
                        let Some(slots) = ring.take(most) else {
                            std::thread::yield_now();
                            continue;
                        };
                        taken += slots.len();
                        slots.clone().for_each(|slot| assert_eq!(owned[slot].fetch_add(1, Ordering::Relaxed), 0));
                        slots.clone().for_each(|slot| owned[slot].store(0, Ordering::Relaxed));
                        drop(Run { ring, slots, moved: false });
                    }
                })
            })
            .into_iter()
            .collect();
        takers.into_iter().for_each(|taker| taker.join().expect("no panic"));
        stop.store(true, Ordering::Relaxed);
    });
    ring.give_back();
    assert_eq!(ring.resident.load(Ordering::Relaxed), 0);
}

#[test]
fn a_run_does_not_wrap_and_is_no_longer_than_asked() {
    let ring = Ring::new(4).expect("address space");
    assert_eq!(ring.take(1), None);
    while ring.fill().expect("there is memory") {}
    assert_eq!(ring.take(3), Some(0..3));
    assert!(!ring.fill().expect("there is memory"), "what was taken has not left its slot");
    ring.vacate(0..3);
    while ring.fill().expect("there is memory") {}
    assert_eq!(ring.take(4), Some(3..4));
    assert_eq!(ring.take(4), Some(0..3));
    assert_eq!(ring.take(4), None);
}

fn start(fill: Fill, pressure: Pressure) -> io::Result<Pool> {
    Pool::start(PoolConfig { huge_frames: 4, rate: 0, fill }, pressure, Arc::default(), &Spawner::default())
}

/// Waits for what the refilling thread is to come to.
fn wait_until(mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(60), "it does not come about");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn demand_is_followed_up_at_once_and_down_by_halves() {
    let start = Instant::now();
    let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
    let mut demand = Demand::new(start);
    assert_eq!(demand.goal(0, 32, 3, at(0.1)), 0, "a guest that hardly grows needs no pool");
    assert_eq!(demand.goal(0, 32, 1, at(0.2)), 8);
    assert_eq!(demand.goal(8, 32, 100, at(0.3)), 32, "no more than there is room for");
    assert_eq!(demand.goal(32, 32, 0, at(4.0)), 32);
    let mut goal = 32;
    let goals = (1..=7).map(|n| {
        goal = demand.goal(goal, 32, u64::from(n < 3), at(4.0 + 6.0 * f64::from(n)));
        goal
    });
    assert_eq!(goals.collect::<Vec<_>>(), [16, 8, 4, 2, 1, 0, 0], "a frame now and then is no demand");
}

#[test]
fn an_idle_pool_costs_nothing_and_one_in_use_fills_up() {
    let pool = start(Fill::OnDemand, Pressure::below(0)).expect("a thread");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!((pool.status().resident_bytes, pool.status().goal_bytes), (0, 0));
    for _ in 0..LEAST_DEMAND {
        // The caller backs them by itself.
        assert!(pool.take(1).is_none());
    }
    wait_until(|| pool.status().resident_bytes == 4 * HUGE_SIZE);
    assert!(pool.take(1).is_some());
}

#[test]
fn a_slot_that_the_kernel_emptied_is_given_to_nobody() {
    let pool = start(Fill::Always, Pressure::below(0)).expect("a thread");
    let ring = &pool.shared.ring;
    if ring.pagemap.as_ref().is_none_or(|pagemap| pagemap.resident_bytes(ring.mapping.start(), SLOT).is_err()) {
        return test_support::skipped("no PAGEMAP_SCAN");
    }
    wait_until(|| ring.full() == 4);
    // What memory pressure does to zeroed pages: the kernel takes them, and maps the shared page of zeroes. Here
    // only one, in the second of the slots.
    discard(&ring.mapping, 1..2);
    let page = ring.mapping.pointer(SLOT).cast::<u8>();
    // SAFETY: it lies in our mapping, and nobody writes to it.
    assert_eq!(unsafe { page.read_volatile() }, 0);
    assert!(ring.is_whole(&(0..1)) && !ring.is_whole(&(1..2)));
    assert!(pool.take(1).is_some(), "the first is as it was");
    assert!(pool.take(3).is_none());
    assert_eq!(pool.shared.counters.stale.get(), 3);
    wait_until(|| pool.take(4).is_some());
}

#[test]
fn memory_goes_back_while_the_host_is_short_of_it() {
    let pool = start(Fill::Always, Pressure::below(u64::MAX)).expect("a thread");
    assert!(pool.take(1).is_none(), "a host that is short of memory is not asked for any");
    let pool = start(Fill::Always, Pressure::below(0)).expect("a thread");
    while pool.status().resident_bytes < 4 * HUGE_SIZE {
        std::thread::yield_now();
    }
    assert!(pool.shared.ring.give_back());
    assert_eq!(pool.status().resident_bytes, 0);
}
