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

#[test]
fn memory_goes_back_while_the_host_is_short_of_it() {
    let pool = Pool::start(4, 0, Pressure::below(u64::MAX), Arc::default(), &Spawner::default()).expect("a thread");
    assert!(pool.take(1).is_none(), "a host that is short of memory is not asked for any");
    let pool = Pool::start(4, 0, Pressure::below(0), Arc::default(), &Spawner::default()).expect("a thread");
    while pool.status().resident_bytes < 4 * HUGE_SIZE {
        std::thread::yield_now();
    }
    assert!(pool.shared.ring.give_back());
    assert_eq!(pool.status().resident_bytes, 0);
}
