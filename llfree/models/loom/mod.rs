//! Every interleaving of each protocol step, by loom.
//!
//! With `cfg(loom)` the crate's atomics are loom's. Each model checks what must hold whatever the
//! order: no frame has two owners, none is lost, R and the entry agree. Here are blocks and the
//! host; `rows` has the rows of handles, `memory` what the owner of a frame sees of the last one's
//! work, `refusal` what is remembered of a refusal, `process` a tenant that installs by itself, `handle` whole handles, `biased`
//! a handle that others drain.
//!
//! `cargo test -p llfree-loom` runs them; so does `RUSTFLAGS="--cfg loom" cargo test -p llfree --lib`.

mod biased;
mod handle;
mod memory;
mod process;
mod refusal;
mod rows;
#[path = "../shared.rs"]
mod shared;
mod walk;

use crate::host::{self, Host, Reclaim, Residency};
use crate::lower::Lower;
use crate::sync::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use loom::sync::Arc;
use loom::thread;
use shared_layout::{FrameId, HugeEntry, HugeId, Order};
use walk::walk;

const H0: HugeId = HugeId(0);

struct Table {
    entries: Vec<AtomicU16>,
    rows: Vec<AtomicU64>,
    residency: Vec<AtomicU8>,
    memory: memory::Memory,
}

impl Table {
    fn new(entries: &[(HugeEntry, Residency)]) -> Arc<Self> {
        Arc::new(Self {
            entries: entries.iter().map(|(e, _)| AtomicU16::new(e.bits())).collect(),
            rows: entries.iter().flat_map(|_| (0..8).map(|_| AtomicU64::new(0))).collect(),
            residency: entries.iter().map(|(_, r)| AtomicU8::new(*r as u8)).collect(),
            memory: memory::Memory::new(),
        })
    }

    /// One installed huge frame of which only `free` bits of row 0 are free.
    fn one_row(free: u64) -> Arc<Self> {
        let table = Self::new(&[(HugeEntry::FREE_INSTALLED, Residency::Installed)]);
        let entry = HugeEntry::FREE_INSTALLED.take(512 - free.count_ones() as u16).expect("some are taken");
        table.entries[0].store(entry.bits(), Ordering::Relaxed);
        table.rows[0].store(!free, Ordering::Relaxed);
        table.rows[1..].iter().for_each(|row| row.store(u64::MAX, Ordering::Relaxed));
        table
    }

    fn lower(&self) -> Lower<'_> {
        Lower::new(&self.entries, &self.rows).expect("lengths fit")
    }

    fn host(&self) -> Host<'_> {
        Host::new(&self.entries, &self.residency).expect("lengths fit")
    }

    fn entry(&self, huge: usize) -> HugeEntry {
        HugeEntry::from_bits(self.entries[huge].load(Ordering::Relaxed))
    }

    fn check_counter(&self) {
        let entry = self.entry(0);
        if !entry.is_huge() && !entry.is_held() {
            assert_eq!(self.lower().clear_bits(H0), u32::from(entry.free()), "{entry:?}");
            assert_eq!(self.lower().violation(H0), None, "no run is longer than its bound");
        }
    }
}

fn order(order: u8) -> Order {
    Order::new(order).expect("in range")
}

/// Runs two parties on one table in every interleaving with at most four preemptions, then `after`
/// with their results.
fn race<A: Send + 'static, B: Send + 'static>(
    table: impl Fn() -> Arc<Table> + Send + Sync + 'static,
    a: impl Fn(&Table) -> A + Send + Sync + Copy + 'static,
    b: impl Fn(&Table) -> B + Send + Sync + Copy + 'static,
    after: impl Fn(&Table, A, B) + Send + Sync + 'static,
) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(4);
    walk(&model, move || {
        let table = table();
        let other = table.clone();
        let first = thread::spawn(move || a(&other));
        let b = b(&table);
        let a = first.join().expect("no panic");
        after(&table, a, b);
    });
}

#[test]
fn take_against_take_in_one_row() {
    race(
        || Table::one_row(0b11),
        |t| t.lower().take(H0, order(0)).ok(),
        |t| t.lower().take(H0, order(0)).ok(),
        |t, a, b| {
            let (a, b) = (a.expect("two were free").frame, b.expect("two were free").frame);
            assert_ne!(a, b);
            assert_eq!(t.entry(0).free(), 0);
            t.check_counter();
        },
    );
}

#[test]
fn the_last_frame_has_one_taker() {
    race(
        || Table::one_row(0b100),
        |t| t.lower().take(H0, order(0)).ok(),
        |t| t.lower().take(H0, order(0)).ok(),
        |t, a, b| {
            assert!(a.is_some() != b.is_some());
            t.check_counter();
        },
    );
}

#[test]
fn take_of_different_orders_in_one_row() {
    race(
        || Table::one_row(0b1111),
        |t| t.lower().take(H0, order(1)).ok(),
        |t| t.lower().take(H0, order(2)).ok(),
        |t, a, b| {
            assert!(a.is_some() || b.is_some(), "one of them must get through");
            assert!(a.is_none() || b.is_none(), "they overlap");
            assert_eq!(t.entry(0).free(), if a.is_some() { 2 } else { 0 });
            t.check_counter();
        },
    );
}

#[test]
fn take_of_two_rows_against_take_of_one() {
    // Order 7 wants rows 0 and 1; order 6 gets one of them or the block comes too late.
    let table = || {
        let table = Table::new(&[(HugeEntry::FREE_INSTALLED, Residency::Installed)]);
        table.entries[0].store(HugeEntry::FREE_INSTALLED.take(384).expect("free").bits(), Ordering::Relaxed);
        table.rows[2..].iter().for_each(|row| row.store(u64::MAX, Ordering::Relaxed));
        table
    };
    race(
        table,
        |t| t.lower().take_at(FrameId(0), order(7)),
        |t| t.lower().take_at(FrameId(64), order(6)),
        |t, a, b| {
            assert!(!(a.is_ok() && b.is_ok()), "row 1 has two owners");
            let taken = if a.is_ok() { 128 } else { 0 } + if b.is_ok() { 64 } else { 0 };
            assert_eq!(t.entry(0).free(), 128 - taken);
            t.check_counter();
        },
    );
}

#[test]
fn row_cache_against_take() {
    race(
        || Table::one_row(0b111),
        |t| t.lower().take_row(H0, Order::BASE, 64).ok(),
        |t| t.lower().take(H0, order(0)).ok(),
        |t, row, frame| {
            let bits = row.map_or(0, |row| row.bits);
            let frame = frame.map_or(0, |taken| 1 << taken.frame.0);
            assert_eq!(bits & frame, 0, "a frame with two owners");
            assert_eq!(u32::from(t.entry(0).free()), 3 - (bits | frame).count_ones());
            t.check_counter();
        },
    );
}

#[test]
fn give_against_take() {
    race(
        || Table::one_row(0b10),
        |t| t.lower().give(FrameId(0), order(0)),
        |t| t.lower().take(H0, order(0)).ok(),
        |t, given, taken| {
            given.expect("frame 0 was taken");
            taken.expect("frame 1 was free all along");
            assert_eq!(t.entry(0).free(), 1);
            t.check_counter();
        },
    );
}

#[test]
fn give_against_give_of_one_frame() {
    race(
        || Table::one_row(0b10),
        |t| t.lower().give(FrameId(0), order(0)).is_ok(),
        |t| t.lower().give(FrameId(0), order(0)).is_ok(),
        |t, a, b| {
            assert!(a != b, "a double free must be seen");
            assert_eq!(t.entry(0).free(), 2);
            t.check_counter();
        },
    );
}

fn reclaim(t: &Table, how: Reclaim) -> bool {
    let Some(claim) = t.host().claim(H0) else { return false };
    match claim.reclaim(how) {
        Ok(reclaimed) => {
            reclaimed.done();
            true
        }
        Err(_) => false,
    }
}

#[test]
fn evict_against_take() {
    for o in [0, 9] {
        race(
            || Table::new(&[(HugeEntry::FREE_INSTALLED, Residency::Installed)]),
            |t| reclaim(t, Reclaim::Soft),
            move |t| t.lower().take(H0, order(o)).ok(),
            |t, evicted, taken| {
                // The taker knows exactly whether the memory went away before it.
                assert_eq!(taken.expect("soft reclaim leaves it free").evicted, evicted);
                assert_eq!(t.entry(0).is_evicted(), evicted);
                let r = if evicted { Residency::Evicted } else { Residency::Installed };
                assert_eq!(t.host().residency(H0), Some(r));
            },
        );
    }
}

#[test]
fn hold_against_take() {
    for o in [0, 9] {
        race(
            || Table::new(&[(HugeEntry::FREE_INSTALLED, Residency::Installed)]),
            |t| reclaim(t, Reclaim::Hard),
            move |t| t.lower().take(H0, order(o)).ok(),
            |t, held, taken| {
                assert!(held != taken.is_some(), "exactly one owner");
                assert_eq!(t.entry(0).is_held(), held);
            },
        );
    }
}

#[test]
fn hold_against_give() {
    race(
        || {
            let table = Table::new(&[(HugeEntry::FREE_INSTALLED, Residency::Installed)]);
            table.entries[0].store(HugeEntry::FREE_INSTALLED.take(1).expect("free").bits(), Ordering::Relaxed);
            table.rows[0].store(1, Ordering::Relaxed);
            table
        },
        |t| reclaim(t, Reclaim::Hard),
        |t| t.lower().give(FrameId(0), order(0)),
        |t, held, given| {
            given.expect("the frame was ours");
            assert_eq!(t.entry(0).is_held(), held);
            assert_eq!(t.lower().clear_bits(H0), 512);
            assert_eq!(t.host().residency(H0) == Some(Residency::Held), held);
        },
    );
}

#[test]
fn release_against_take() {
    for o in [0, 9] {
        race(
            || {
                let held = HugeEntry::FREE_EVICTED.hold().expect("free");
                Table::new(&[(held, Residency::Held)])
            },
            |t| t.host().claim(H0).expect("idle").release().expect("held"),
            move |t| t.lower().take(H0, order(o)).ok(),
            |t, clean, taken| {
                assert!(clean);
                assert_eq!(t.host().residency(H0), Some(Residency::Evicted));
                assert!(t.entry(0).is_evicted() && !t.entry(0).is_held());
                if let Some(taken) = taken {
                    assert!(taken.evicted, "a returned frame has nothing behind it");
                }
            },
        );
    }
}

/// A vCPU's install: true if it backed the frame itself.
fn install(t: &Table) -> bool {
    let claim = loop {
        match t.host().claim(H0) {
            Some(claim) => break claim,
            None => thread::yield_now(),
        }
    };
    let installing = claim.install().expect("not held");
    let populated = installing.needs_memory();
    installing.done();
    assert!(!t.entry(0).is_evicted(), "an install that returned left the frame evicted");
    populated
}

#[test]
fn two_installs_of_one_frame() {
    race(
        || Table::new(&[(HugeEntry::HUGE_EVICTED, Residency::Evicted)]),
        install,
        install,
        |t, a, b| {
            assert!(a != b, "memory is put behind a frame once");
            assert_eq!(t.entry(0), HugeEntry::HUGE_INSTALLED);
            assert_eq!(t.host().residency(H0), Some(Residency::Installed));
        },
    );
}

#[test]
fn install_against_a_take_in_the_same_huge_frame() {
    race(
        || Table::new(&[(HugeEntry::FREE_EVICTED.take(1).expect("free"), Residency::Evicted)]),
        install,
        |t| t.lower().take(H0, order(3)).ok(),
        |t, populated, taken| {
            assert!(populated);
            taken.expect("there was room");
            assert_eq!(t.entry(0).free(), 503);
            assert!(!t.entry(0).is_evicted());
        },
    );
}

#[test]
fn a_failed_discard_gives_the_frame_back() {
    race(
        || Table::new(&[(HugeEntry::FREE_INSTALLED, Residency::Installed)]),
        |t| t.host().claim(H0).expect("idle").reclaim(Reclaim::Hard).map(drop).is_ok(),
        |t| t.lower().take(H0, order(9)).ok().is_some(),
        |t, undone, taken| {
            assert!(undone || taken);
            let expected = if taken { HugeEntry::HUGE_INSTALLED } else { HugeEntry::FREE_INSTALLED };
            // A taker between hold and undo's two steps saw it evicted, and must have installed it.
            assert!(t.entry(0) == expected || (taken && undone && t.entry(0) == HugeEntry::HUGE_INSTALLED));
            assert_eq!(t.host().residency(H0), Some(Residency::Installed));
        },
    );
}

#[test]
fn order_ten_against_its_halves() {
    for half in [0, 1] {
        race(
            || Table::new(&[(HugeEntry::FREE_INSTALLED, Residency::Installed); 2]),
            |t| t.lower().take(H0, order(10)).ok().is_some(),
            move |t| t.lower().take(HugeId(half), order(9)).ok().is_some(),
            move |t, whole, part| {
                assert!(!(whole && part), "a half has two owners");
                // Both may lose only to each other's transient claim on the same half.
                let huge = |i| t.entry(i).is_huge();
                assert_eq!(huge(half as usize), whole || part);
                assert_eq!(huge(1 - half as usize), whole);
            },
        );
    }
}

#[test]
fn order_ten_against_evict_of_a_half() {
    race(
        || Table::new(&[(HugeEntry::FREE_INSTALLED, Residency::Installed); 2]),
        |t| t.lower().take(H0, order(10)).expect("soft reclaim leaves it free").evicted,
        |t| {
            let claim = t.host().claim(HugeId(1)).expect("idle");
            claim.reclaim(Reclaim::Soft).map(host::Reclaimed::done).is_ok()
        },
        |t, saw_evicted, evicted| {
            assert_eq!(saw_evicted, evicted, "both halves are checked");
            assert_eq!(t.entry(1).is_evicted(), evicted);
        },
    );
}

#[test]
fn give_of_order_ten_against_take_of_a_half() {
    race(
        || Table::new(&[(HugeEntry::HUGE_INSTALLED, Residency::Installed); 2]),
        |t| t.lower().give(FrameId(0), order(10)),
        |t| t.lower().take(HugeId(1), order(9)).ok().is_some(),
        |t, given, taken| {
            given.expect("ours");
            assert_eq!(t.entry(0), HugeEntry::FREE_INSTALLED);
            assert_eq!(t.entry(1).is_huge(), taken);
        },
    );
}

#[test]
fn a_census_takes_no_step_of_the_host_for_a_lie_of_the_guest() {
    for start in [Residency::Installed, Residency::Held] {
        race(
            move || {
                let held = HugeEntry::FREE_INSTALLED.hold().expect("free");
                let entry = if start == Residency::Held { held } else { HugeEntry::FREE_INSTALLED };
                Table::new(&[(entry, start)])
            },
            // The census may have the frame for an instant; then there is no step.
            move |t| match t.host().claim(H0) {
                Some(claim) if start == Residency::Held => claim.release().is_ok(),
                Some(claim) => claim.reclaim(Reclaim::Hard).map(host::Reclaimed::done).is_ok(),
                None => false,
            },
            |t| t.host().census().corrupt,
            |t, _, corrupt| {
                assert_eq!(corrupt, 0);
                t.entries[0].store(0xffff, Ordering::Relaxed);
                assert_eq!(t.host().census().corrupt, 1);
            },
        );
    }
}

/// Entry and R say the same when all is done.
fn check_residency(t: &Table) {
    t.host().validate().expect("entries fit R");
}

#[test]
fn install_against_hold_and_release() {
    // Nobody owns the frame, so the host may also take it before or after it is installed.
    race(
        || Table::new(&[(HugeEntry::FREE_EVICTED, Residency::Evicted)]),
        |t| t.host().claim(H0).and_then(|claim| claim.install().ok()).map(host::Installing::done).is_some(),
        |t| {
            let held = reclaim(t, Reclaim::Hard);
            held && t.host().claim(H0).is_some_and(|claim| claim.release().expect("held"))
        },
        |t, _, _| match t.host().residency(H0) {
            // The release came while the install looked at the frame, and gave way.
            Some(Residency::Held) => assert!(t.entry(0).is_held()),
            _ => check_residency(t),
        },
    );
}

#[test]
fn release_against_install() {
    race(
        || Table::new(&[(HugeEntry::FREE_EVICTED.hold().expect("free"), Residency::Held)]),
        |t| t.host().claim(H0).and_then(|claim| claim.release().ok()),
        |t| t.host().claim(H0).and_then(|claim| claim.install().ok()).map(host::Installing::done).is_some(),
        |t, released, installed| {
            check_residency(t);
            let expected = match (released, installed) {
                (None, false) => Residency::Held,
                (_, true) => Residency::Installed,
                (Some(clean), false) => {
                    assert!(clean);
                    Residency::Evicted
                }
            };
            assert_eq!(t.host().residency(H0), Some(expected));
        },
    );
}
