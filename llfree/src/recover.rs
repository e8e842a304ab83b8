//! [`recover`]: from any state that a crash can leave to one that [`validate`](crate::Tenant::validate)
//! accepts, and a way to free what dead handles held.
//!
//! The protocol of `lower` makes this a recount. A take lowers the counter before it sets bits and
//! a give clears bits before it raises the counter, so wherever a party stopped, every bit of a
//! frame that has an owner is set, and the counter, which may be too low, can be derived from the
//! bits. A huge frame's `huge` and `held` are set and cleared in one step while all its bits are
//! clear, so they are believed as they are. The rule, for any bytes at all:
//!
//! | entry says | becomes | its bits |
//! |---|---|---|
//! | held, and whatever else | held and evicted | cleared |
//! | huge, not held | allocated as a whole, `evicted` kept | cleared |
//! | neither | as many free as bits are clear, in runs of any length, `evicted` kept | kept |
//!
//! So no frame that somebody owns is given out again. What is lost, that is allocated and without
//! an owner, is what handles held back ([`HANDLE_FRAMES`](crate::HANDLE_FRAMES) each) and the one
//! block a party that each CPU was taking or giving. Every step alone leads closer to the same end:
//! a crash in here is mended by doing it again.

use crate::lower::Lower;
use crate::rows::ROWS;
use crate::sync::{AtomicU16, AtomicU64, Ordering};
use shared_layout::{FRAMES_PER_HUGE, FrameId, HugeEntry, Order};

const HELD: HugeEntry = HugeEntry::FREE_EVICTED.hold().expect("a free frame can be held");

/// The changes that [`recover`] had to make.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Recovery {
    /// Counters that did not fit their bits: a take or a give was on its way.
    pub counters: u32,
    /// Entries that no crash leaves: something else overwrote them.
    pub entries: u32,
    /// Huge frames, held or allocated as a whole, whose bits were not clear: neither does a crash.
    pub bitfields: u32,
}

/// What [`Persistent::recover_leaks`](crate::Persistent::recover_leaks) freed.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Leaks {
    /// Base frames, one by one.
    pub frames: u64,
    /// Huge frames as a whole.
    pub huge: u64,
}

impl Leaks {
    /// All of it in base frames.
    #[must_use]
    pub fn total_frames(&self) -> u64 {
        self.frames + self.huge * FRAMES_PER_HUGE
    }
}

/// Repairs a table after a crash; `None`, and nothing changed, unless there are eight rows an
/// entry. Needs nobody else at work in the table, which the type of the slices says. Afterwards the
/// hints of a [`Tenant`](crate::Tenant) over it must be [recounted](crate::Tenant::recount).
#[must_use = "`None` means that nothing was done"]
pub fn recover(entries: &mut [AtomicU16], rows: &mut [AtomicU64]) -> Option<Recovery> {
    if entries.len().checked_mul(ROWS) != Some(rows.len()) {
        return None;
    }
    let mut recovery = Recovery::default();
    for (word, rows) in entries.iter_mut().zip(rows.chunks_exact_mut(ROWS)) {
        let found = HugeEntry::from_bits(*word.get_mut());
        // Plain loads, for the compiler to count several rows at once.
        let mut bits = [0; ROWS];
        for (copy, row) in bits.iter_mut().zip(rows.iter_mut()) {
            *copy = *row.get_mut();
        }
        let clear = clear_bits(&bits);
        let whole = found.is_held() || found.is_huge();
        if whole && clear != FRAMES_PER_HUGE as u16 {
            recovery.bitfields += 1;
            for row in rows {
                row.store(0, Ordering::Relaxed);
            }
        }
        let repaired = repaired(found, clear);
        if repaired != found {
            if !found.is_valid() {
                recovery.entries += 1;
            } else if repaired.free() != found.free() {
                recovery.counters += 1;
            }
            word.store(repaired.bits(), Ordering::Relaxed);
        }
    }
    Some(recovery)
}

/// The entry that fits what it said and the bits below it.
fn repaired(found: HugeEntry, clear: u16) -> HugeEntry {
    if found.is_held() {
        return HELD;
    }
    let free = if found.is_evicted() { HugeEntry::FREE_EVICTED } else { HugeEntry::FREE_INSTALLED };
    if found.is_huge() {
        return free.take_huge().unwrap_or(free);
    }
    // Taking nothing is not a transition: a frame that is free as a whole stays as it is.
    free.take(FRAMES_PER_HUGE as u16 - clear).unwrap_or(free)
}

/// Clear bits in the rows of a huge frame.
#[inline]
fn clear_bits(bits: &[u64; ROWS]) -> u16 {
    // The usual cases first: x86-64 has no instruction to count bits that can be relied on.
    let (any, all) = bits.iter().fold((0, u64::MAX), |(any, all), row| (any | row, all & row));
    match (any, all) {
        (0, _) => FRAMES_PER_HUGE as u16,
        (_, u64::MAX) => 0,
        _ => bits.iter().map(|row| row.count_zeros() as u16).sum(),
    }
}

/// Frees every allocated frame that `owned` does not claim; nobody else may be at work.
pub(crate) fn free_unowned(lower: &Lower<'_>, mut owned: impl FnMut(FrameId, Order) -> bool) -> Leaks {
    let mut leaks = Leaks::default();
    for huge in lower.all() {
        let Some(entry) = lower.entry(huge) else { continue };
        if entry.is_huge() {
            let leaked = !owned(huge.first_frame(), Order::HUGE) && lower.give_one_huge(huge).is_some();
            leaks.huge += u64::from(leaked);
        } else if !entry.is_held() && !entry.is_all_free() {
            for (index, row) in lower.rows_of(huge).iter().enumerate() {
                let first = FrameId(huge.first_frame().0 + 64 * index as u64);
                let used = row.load(Ordering::Relaxed);
                let is_leaked = |bit: &u64| used >> bit & 1 != 0 && !owned(FrameId(first.0 + bit), Order::BASE);
                let leaked = (0..64).filter(is_leaked).fold(0, |bits, bit| bits | 1 << bit);
                if leaked != 0 && lower.give_row(first, leaked).is_some() {
                    leaks.frames += u64::from(leaked.count_ones());
                }
            }
        }
    }
    leaks
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared_layout::{HugeId, Run};
    use std::vec::Vec;

    fn table(entries: &[u16], rows: &[u64]) -> (Vec<AtomicU16>, Vec<AtomicU64>) {
        (entries.iter().map(|e| AtomicU16::new(*e)).collect(), rows.iter().map(|r| AtomicU64::new(*r)).collect())
    }

    fn recovered(entry: u16, bits: u64) -> (HugeEntry, u32, Recovery) {
        let (mut entries, mut rows) = table(&[entry], &[bits; ROWS]);
        let recovery = recover(&mut entries, &mut rows).expect("lengths fit");
        let clear = Lower::new(&entries, &rows).expect("lengths fit").clear_bits(HugeId(0));
        let again = recover(&mut entries, &mut rows).expect("lengths fit");
        assert_eq!(again, Recovery::default(), "a second time changes nothing");
        (HugeEntry::from_bits(entries[0].load(Ordering::Relaxed)), clear, recovery)
    }

    #[test]
    fn any_entry_over_any_bits_becomes_valid_and_keeps_its_owners() {
        for bits in [0, 1, u64::MAX >> 1, u64::MAX] {
            // All of them, but where each step takes long.
            for entry in (0..=u16::MAX).step_by(if cfg!(miri) { 97 } else { 1 }) {
                let found = HugeEntry::from_bits(entry);
                let (after, clear, recovery) = recovered(entry, bits);
                assert!(after.is_valid(), "{found:?} became {after:?}");
                assert_eq!(after.is_held(), found.is_held());
                assert_eq!(after.is_huge(), found.is_huge() && !found.is_held());
                assert_eq!(after.is_evicted(), found.is_evicted() || found.is_held());
                let whole = after.is_held() || after.is_huge();
                assert_eq!(clear, if whole { 512 } else { bits.count_zeros() * 8 });
                assert!(whole || u32::from(after.free()) == clear);
                assert_eq!(recovery.entries > 0, !found.is_valid());
                assert_eq!(recovery.counters > 0, found.is_valid() && after.free() != found.free());
                assert_eq!(after.run(), if whole || clear == 0 { Run::SINGLE } else { Run::ANY });
                assert_eq!(recovery.bitfields > 0, whole && bits != 0);
            }
        }
    }

    #[test]
    fn lengths_that_do_not_fit_change_nothing() {
        let (mut entries, mut rows) = table(&[0xffff; 2], &[7; 15]);
        assert_eq!(recover(&mut entries, &mut rows), None);
        assert!(entries.iter().all(|e| e.load(Ordering::Relaxed) == 0xffff));
    }
}
