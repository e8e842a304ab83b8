//! Every step of the host on one huge frame, for all 2^16 words that a guest may have written there, each state of R,
//! and all 2^16 words that the guest may write in the middle of a step. There are no others: a proof, not a
//! sample, for a guest that writes between the host's steps. (One that writes within them meets a
//! compare-and-swap, which the loom models are about.)
//!
//! What a step does to the word is a transition of [`HugeEntry`]; `shared-layout` has the proof of those.

use llfree::{Host, Reclaim, Refused, Residency};
use shared_layout::{HugeEntry, HugeId};
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

const STATES: [Residency; 3] = [Residency::Evicted, Residency::Installed, Residency::Held];
const HOW: [Reclaim; 2] = [Reclaim::Soft, Reclaim::Hard];
const THE_FRAME: HugeId = HugeId(0);

fn every() -> impl Iterator<Item = HugeEntry> {
    (0..=u16::MAX).map(HugeEntry::from_bits)
}

/// A table of one huge frame.
struct Table {
    entry: [AtomicU16; 1],
    residency: [AtomicU8; 1],
}

impl Table {
    fn new(entry: HugeEntry, residency: Residency) -> Self {
        Self { entry: [AtomicU16::new(entry.bits())], residency: [AtomicU8::new(residency as u8)] }
    }

    fn host(&self) -> Host<'_> {
        Host::new(&self.entry, &self.residency).expect("one of each")
    }

    /// The guest writes what it likes.
    fn overwrite(&self, entry: HugeEntry) {
        self.entry[0].store(entry.bits(), Ordering::Relaxed);
    }

    /// The word and R; no claim is open.
    fn state(&self) -> (HugeEntry, Residency) {
        assert!(self.host().claim(THE_FRAME).is_some(), "the claim is over");
        (self.host().entry(THE_FRAME).expect("there"), self.host().residency(THE_FRAME).expect("there"))
    }
}

fn reclaimed(how: Reclaim) -> Residency {
    match how {
        Reclaim::Soft => Residency::Evicted,
        Reclaim::Hard => Residency::Held,
    }
}

fn step(how: Reclaim, entry: HugeEntry) -> Option<HugeEntry> {
    match how {
        Reclaim::Soft => entry.evict(),
        Reclaim::Hard => entry.hold(),
    }
}

/// The word after a reclaim that was undone, if it was this one before that.
fn undone(how: Reclaim, r: Residency, entry: HugeEntry) -> HugeEntry {
    let released = if how == Reclaim::Hard { entry.release().unwrap_or(entry) } else { entry };
    if r == Residency::Installed { released.installed().unwrap_or(released) } else { released }
}

fn has_something_to_take(how: Reclaim, r: Residency) -> bool {
    match how {
        Reclaim::Soft => r == Residency::Installed,
        Reclaim::Hard => r != Residency::Held,
    }
}

#[test]
fn a_reclaim_takes_what_is_free_by_the_word_and_there_by_r_and_nothing_else() {
    for entry in every() {
        for (how, r) in HOW.into_iter().flat_map(|how| STATES.map(|r| (how, r))) {
            let table = Table::new(entry, r);
            let claim = table.host().claim(THE_FRAME).expect("nobody has it");
            assert_eq!((claim.huge(), claim.residency()), (THE_FRAME, r));
            let expected = match step(how, entry) {
                _ if !has_something_to_take(how, r) => Err(Refused::Residency(r)),
                None => Err(Refused::NotFree(entry)),
                Some(next) => Ok(next),
            };
            match (claim.reclaim(how), expected) {
                (Ok(taken), Ok(next)) => {
                    assert_eq!(taken.has_memory(), r == Residency::Installed, "{entry:?}");
                    taken.done();
                    assert_eq!(table.state(), (next, reclaimed(how)), "{entry:?}");
                }
                (Err(refused), Err(expected)) => {
                    assert_eq!(refused, expected);
                    assert_eq!(table.state(), (entry, r), "nothing changed");
                }
                (got, expected) => panic!("{how:?} of {entry:?} and {r:?}: {got:?} instead of {expected:?}"),
            }
        }
    }
}

#[test]
fn whatever_a_guest_writes_during_a_reclaim_r_says_what_the_host_did() {
    let free = [HugeEntry::FREE_INSTALLED, HugeEntry::FREE_EVICTED];
    for (entry, how, r) in free.into_iter().flat_map(|e| HOW.into_iter().flat_map(move |h| STATES.map(|r| (e, h, r)))) {
        if !has_something_to_take(how, r) || step(how, entry).is_none() {
            continue;
        }
        for (meanwhile, fails) in every().flat_map(|entry| [(entry, false), (entry, true)]) {
            let table = Table::new(entry, r);
            let taken = table.host().claim(THE_FRAME).expect("nobody has it").reclaim(how).expect("free");
            table.overwrite(meanwhile);
            let expected = if fails {
                drop(taken);
                (undone(how, r, meanwhile), r)
            } else {
                taken.done();
                (meanwhile, reclaimed(how))
            };
            assert_eq!(table.state(), expected, "{meanwhile:?} was written over {entry:?}");
        }
    }
}

#[test]
fn a_release_always_gives_up_what_is_held_and_tells_whether_the_guest_sees_it() {
    for entry in every() {
        for r in STATES {
            let table = Table::new(entry, r);
            let released = table.host().claim(THE_FRAME).expect("nobody has it").release();
            let expected = match r {
                Residency::Held => Ok(entry.release().is_some()),
                _ => Err(Refused::Residency(r)),
            };
            assert_eq!(released, expected, "{entry:?}");
            let after = match r {
                Residency::Held => (entry.release().unwrap_or(entry), Residency::Evicted),
                _ => (entry, r),
            };
            assert_eq!(table.state(), after, "{entry:?}");
        }
    }
}

#[test]
fn an_install_goes_by_r_alone_and_clears_evicted_where_that_means_something() {
    for entry in every() {
        for (r, fails) in STATES.into_iter().flat_map(|r| [(r, false), (r, true)]) {
            let table = Table::new(HugeEntry::HUGE_EVICTED, r);
            let after = match table.host().claim(THE_FRAME).expect("nobody has it").install() {
                Err(refused) => {
                    assert_eq!((refused, r), (Refused::Residency(r), Residency::Held));
                    (HugeEntry::HUGE_EVICTED, r)
                }
                Ok(installing) => {
                    assert_eq!(installing.needs_memory(), r == Residency::Evicted);
                    table.overwrite(entry);
                    if fails {
                        drop(installing);
                        (entry, r)
                    } else {
                        installing.done();
                        (entry.installed().unwrap_or(entry), Residency::Installed)
                    }
                }
            };
            assert_eq!(table.state(), after, "{entry:?}");
        }
    }
}
