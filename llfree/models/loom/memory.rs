//! The contents of a frame: its next owner, and a host that takes it, see all that the last owner did.
//! One cell stands for the memory; an access that nothing orders after the previous one fails.

use super::{H0, Table, order, race};
use crate::host::{Reclaim, Residency};
use crate::rows::ROWS;
use crate::sync::Ordering;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use shared_layout::{FrameId, HugeEntry, HugeId, Order};

/// The memory of frame 0, or of the huge frame that it begins.
pub(crate) struct Memory(UnsafeCell<u32>);

// SAFETY: only the frame's owner touches the cell; that this holds is what the models check, and
// loom's cell fails where it does not.
unsafe impl Sync for Memory {}

impl Memory {
    pub(crate) fn new() -> Self {
        Self(UnsafeCell::new(0))
    }

    /// The owner reads and writes its memory.
    pub(crate) fn touch(&self) {
        // SAFETY: the caller owns the frame; loom fails the model if the accesses are not ordered.
        self.0.with_mut(|cell| unsafe { *cell += 1 });
    }
}

/// Frame 0 is owned, all others are as well but for `free` bits of row 0 and three frames of row 1:
/// with these the counter lets takers in before a give is done, so that bits alone must order it.
fn owned(free: u64) -> Arc<Table> {
    let table = Table::one_row(free);
    table.rows[1].store(u64::MAX << 3, Ordering::Relaxed);
    let taken = 512 - 3 - free.count_ones() as u16;
    table.entries[0].store(HugeEntry::FREE_INSTALLED.take(taken).expect("some are taken").bits(), Ordering::Relaxed);
    table
}

fn touch_if(t: &Table, mine: bool) -> bool {
    if mine {
        t.memory.touch();
    }
    mine
}

fn give_base(t: &Table) {
    t.memory.touch();
    t.lower().give(FrameId(0), order(0)).expect("ours");
}

#[test]
fn a_base_frame_changes_hands_in_every_way() {
    let takes: [fn(&Table) -> bool; 4] = [
        |t| t.lower().take(H0, order(0)).ok().is_some_and(|taken| taken.frame.0 == 0),
        |t| t.lower().take_at(FrameId(0), order(0)).is_ok(),
        |t| t.lower().take_row(H0, Order::BASE, 64).ok().is_some_and(|row| row.first.0 == 0 && row.bits & 1 != 0),
        |t| {
            let mut rows = [0; ROWS];
            t.lower().take_rest(H0, 64, |row, bits| rows[row] |= bits).ok().is_some() && rows[0] & 1 != 0
        },
    ];
    let gives: [fn(&Table); 2] = [give_base, |t| {
        t.memory.touch();
        assert!(t.lower().give_row(FrameId(0), 1).is_some());
    }];
    for give in gives {
        for take in takes {
            race(|| owned(0b10), give, move |t| touch_if(t, take(t)), |_, (), _| {});
        }
    }
}

#[test]
fn two_rows_change_hands() {
    race(
        || Table::one_row(0),
        |t| {
            t.memory.touch();
            t.lower().give(FrameId(0), order(7)).expect("ours");
        },
        |t| touch_if(t, t.lower().take(H0, order(7)).ok().is_some()),
        |_, (), _| {},
    );
}

#[test]
fn small_frames_become_a_huge_one_and_back() {
    let almost = || {
        let table = Table::new(&[(HugeEntry::FREE_INSTALLED, Residency::Installed)]);
        table.entries[0].store(HugeEntry::FREE_INSTALLED.take(1).expect("free").bits(), Ordering::Relaxed);
        table.rows[0].store(1, Ordering::Relaxed);
        table
    };
    race(almost, give_base, |t| touch_if(t, t.lower().take(H0, Order::HUGE).ok().is_some()), |_, (), _| {});
    race(
        || Table::new(&[(HugeEntry::HUGE_INSTALLED, Residency::Installed)]),
        |t| {
            t.memory.touch();
            assert!(t.lower().give_one_huge(H0).is_some());
        },
        |t| touch_if(t, t.lower().take(H0, order(0)).ok().is_some()),
        |_, (), _| {},
    );
}

#[test]
fn order_ten_changes_hands() {
    race(
        || Table::new(&[(HugeEntry::HUGE_INSTALLED, Residency::Installed); 2]),
        |t| {
            t.memory.touch();
            t.lower().give(FrameId(0), Order::MAX).expect("ours");
        },
        |t| touch_if(t, t.lower().take(HugeId(1), Order::HUGE).ok().is_some()),
        |_, (), _| {},
    );
}

/// Reclaims the huge frame and discards its memory.
fn discard(t: &Table, how: Reclaim) -> bool {
    let Some(claim) = t.host().claim(H0) else { return false };
    let Ok(reclaimed) = claim.reclaim(how) else { return false };
    if reclaimed.has_memory() {
        t.memory.touch();
    }
    reclaimed.done();
    true
}

fn install(t: &Table) {
    let claim = loop {
        match t.host().claim(H0) {
            Some(claim) => break claim,
            None => loom::thread::yield_now(),
        }
    };
    let installing = claim.install().expect("not held");
    if installing.needs_memory() {
        t.memory.touch();
    }
    installing.done();
}

#[test]
fn a_discard_comes_after_the_last_owners_writes() {
    for how in [Reclaim::Soft, Reclaim::Hard] {
        race(
            || Table::new(&[(HugeEntry::HUGE_INSTALLED, Residency::Installed)]),
            |t| {
                t.memory.touch();
                assert!(t.lower().give_one_huge(H0).is_some());
            },
            move |t| discard(t, how),
            |_, (), _| {},
        );
    }
}

#[test]
fn a_discard_comes_before_the_next_install() {
    // The taker waits for its own install, as the guest's contract says.
    for o in [0, 9] {
        race(
            || Table::new(&[(HugeEntry::FREE_INSTALLED, Residency::Installed)]),
            |t| discard(t, Reclaim::Soft),
            move |t| {
                let taken = t.lower().take(H0, order(o)).expect("soft reclaim leaves it free");
                if taken.evicted {
                    install(t);
                }
                t.memory.touch();
            },
            |_, _, ()| {},
        );
    }
}

#[test]
fn an_install_that_another_cpu_asked_for_is_complete_when_seen() {
    race(
        || Table::new(&[(HugeEntry::FREE_EVICTED.take(2).expect("free"), Residency::Evicted)]),
        install,
        // What a handle does before it calls a frame of an evicted row ready, without any call.
        |t| touch_if(t, !t.lower().is_evicted(H0)),
        |_, (), _| {},
    );
}

#[test]
fn a_released_frame_is_installed_behind_its_discard() {
    race(
        || Table::new(&[(HugeEntry::FREE_INSTALLED, Residency::Installed)]),
        |t| {
            if discard(t, Reclaim::Hard) {
                let _ = t.host().claim(H0).expect("idle: nobody installs a held frame").release();
            }
        },
        |t| {
            if let Ok(taken) = t.lower().take(H0, Order::HUGE) {
                if taken.evicted {
                    install(t);
                }
                t.memory.touch();
            }
        },
        |_, (), ()| {},
    );
}
