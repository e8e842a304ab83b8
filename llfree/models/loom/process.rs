//! A process as tenant: it takes frames and installs them itself, against a reclaimer that owns what it discards.

use super::{H0, Table, order, race};
use crate::host::{Host, Installer, Reclaim, Residency};
use loom::sync::Arc;
use shared_layout::{HugeEntry, HugeRange, Order};

fn host(t: &Table) -> Host<'_> {
    t.host().installed_by(Installer::Tenant)
}

/// Takes memory back softly; what the frame held is touched by the kernel, while the reclaimer owns it.
fn reclaim(t: &Table) -> bool {
    let Some(claim) = host(t).claim(H0) else { return false };
    let Ok(reclaimed) = claim.reclaim(Reclaim::Soft) else { return false };
    if reclaimed.has_memory() {
        t.memory.touch();
    }
    reclaimed.done();
    true
}

/// Takes a block, clears the mark if there is one, and touches the memory: whether it could.
fn take_and_touch(t: &Table, o: Order) -> Option<bool> {
    let taken = t.lower().take(H0, o).ok()?;
    if taken.evicted {
        t.lower().self_install(H0);
    }
    t.memory.touch();
    Some(taken.evicted)
}

fn free_installed() -> Arc<Table> {
    Table::new(&[(HugeEntry::FREE_INSTALLED, Residency::Installed)])
}

#[test]
fn a_process_takes_and_installs_against_a_reclaimer() {
    for o in [0, 9] {
        race(
            free_installed,
            reclaim,
            move |t| take_and_touch(t, order(o)),
            |t, reclaimed, taken| {
                assert!(reclaimed || taken.is_some(), "one of them had it");
                // A block out of discarded memory was told so, and another one never.
                if let Some(evicted) = taken {
                    assert_eq!(evicted, reclaimed);
                    assert!(!t.entry(0).is_evicted(), "its owner installed it");
                }
                host(t).validate().expect("R follows the entry");
            },
        );
    }
}

#[test]
fn what_a_process_installed_is_discarded_when_it_is_free() {
    // R does not know yet that the owner has touched it.
    race(
        || Table::new(&[(HugeEntry::HUGE_INSTALLED, Residency::Evicted)]),
        |t| {
            t.memory.touch();
            assert!(t.lower().give_one_huge(H0).is_some());
        },
        reclaim,
        |t, (), reclaimed| {
            assert_eq!(t.entry(0).is_evicted(), reclaimed);
            let known = if reclaimed { Residency::Evicted } else { Residency::Installed };
            assert_eq!(host(t).residency(H0), Some(known));
        },
    );
}

#[test]
fn a_frame_that_kept_its_memory_is_never_seen_evicted() {
    // Who takes an evicted frame counts on zeroes.
    let refused = |t: &Table| {
        let claim = host(t).claim(H0);
        if let Some(reclaimed) = claim.and_then(|claim| claim.reclaim(Reclaim::Soft).ok()) {
            drop(reclaimed);
        }
    };
    race(
        free_installed,
        refused,
        |t| take_and_touch(t, Order::HUGE),
        |t, (), taken| {
            assert_ne!(taken, Some(true));
            assert!(!t.entry(0).is_evicted() && !t.entry(0).is_held());
            host(t).validate().expect("R follows the entry");
        },
    );
}

#[test]
fn two_blocks_of_an_evicted_frame_are_both_installed() {
    let take = |t: &Table| {
        let taken = t.lower().take(H0, order(0)).expect("many are free");
        if taken.evicted {
            t.lower().self_install(H0);
        }
        assert!(!t.entry(0).is_evicted(), "nothing sets the mark again while a part has an owner");
    };
    race(
        || Table::new(&[(HugeEntry::FREE_EVICTED, Residency::Evicted)]),
        take,
        take,
        |t, (), ()| assert_eq!((t.entry(0).free(), t.entry(0).is_evicted()), (510, false)),
    );
}

#[test]
fn a_run_against_a_take_of_its_second_frame() {
    let tenant_takes = |t: &Table| {
        let range = HugeRange::up_to(2);
        let mut taken = 0;
        for huge in range {
            match t.lower().take_huge_if(huge, |_| true) {
                Some(_) => taken += 1,
                None => {
                    // As `Tenant::alloc_run` undoes it: these and no other.
                    for mine in range.split(taken).0 {
                        assert!(t.lower().give_one_huge(mine).is_some(), "ours");
                    }
                    return false;
                }
            }
        }
        true
    };
    race(
        || Table::new(&[(HugeEntry::FREE_INSTALLED, Residency::Installed); 2]),
        tenant_takes,
        |t| t.lower().take(shared_layout::HugeId(1), Order::HUGE).is_ok(),
        |t, run, single| {
            assert!(run != single, "one owner");
            assert_eq!((t.entry(0).is_huge(), t.entry(1).is_huge()), (run, true));
        },
    );
}
