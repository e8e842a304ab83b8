//! Page tables of an identity map, built in memory that the guest walks but cannot reach.
//!
//! The tables lie in the platform region and do not map themselves: a guest in ring 3 never needs
//! them. [`Tables`] takes one after the other from a slice that [`tables_needed`] sized.

use std::sync::atomic::{AtomicU64, Ordering};

/// Entries of one table.
pub(super) const ENTRIES: usize = 512;

const PAGE: u64 = 1 << 12;
const HUGE: u64 = 1 << 21;
const GIGA: u64 = 1 << 30;
const TERA_HALF: u64 = 1 << 39;

// Accessed and dirty are set from the start: no walk has to write to a table.
const PRESENT: u64 = 1 | 1 << 5;
const WRITE: u64 = 1 << 1 | 1 << 6;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The access rights to a 4 KiB page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub(super) enum Access {
    /// Guest data.
    User = PRESENT | WRITE | USER | NO_EXECUTE,
    /// Data of the CPU and of the exception stubs.
    Kernel = PRESENT | WRITE | NO_EXECUTE,
    /// The exception stubs.
    KernelCode = PRESENT,
}

/// Tables for huge pages in `0..ram` and 4 KiB pages in `small..small + bytes` after it, where
/// `small` starts a gigabyte.
pub(super) const fn tables_needed(ram: u64, small: u64, bytes: u64) -> u64 {
    let end = small + bytes;
    let directories = ram.div_ceil(GIGA) + bytes.div_ceil(GIGA);
    1 + end.div_ceil(TERA_HALF) + directories + bytes.div_ceil(HUGE)
}

/// Page tables under construction; the first one is the root.
pub(super) struct Tables<'a> {
    words: &'a [AtomicU64],
    gpa: u64,
    used: u64,
}

impl<'a> Tables<'a> {
    /// Starts with an empty root in zeroed `words`, which the guest sees at `gpa`.
    pub(super) fn new(words: &'a [AtomicU64], gpa: u64) -> Self {
        Self { words, gpa, used: 1 }
    }

    /// Maps the 2 MiB at `address` to itself, for the guest's code and data.
    pub(super) fn map_huge(&mut self, address: u64) {
        let entry = address | PRESENT | WRITE | USER | LARGE;
        self.slot(address, HUGE).store(entry, Ordering::Relaxed);
    }

    /// Maps the 4 KiB at `address` to itself.
    pub(super) fn map_page(&mut self, address: u64, access: Access) {
        self.slot(address, PAGE).store(address | access as u64, Ordering::Relaxed);
    }

    /// The entry for `address` in the table whose entries cover `span`. Runs out of tables, and
    /// panics, only if the slice is smaller than [`tables_needed`] says: no guest has run yet.
    fn slot(&mut self, address: u64, span: u64) -> &AtomicU64 {
        let mut table = self.gpa;
        let mut covers = TERA_HALF;
        while covers > span {
            let entry = self.entry(table, address / covers);
            let mut next = entry.load(Ordering::Relaxed);
            if next == 0 {
                next = (self.gpa + self.used * PAGE) | PRESENT | WRITE | USER;
                entry.store(next, Ordering::Relaxed);
                self.used += 1;
            }
            table = next & ADDRESS;
            covers /= ENTRIES as u64;
        }
        self.entry(table, address / span)
    }

    fn entry(&self, table: u64, index: u64) -> &AtomicU64 {
        &self.words[(table - self.gpa) as usize / 8 + index as usize % ENTRIES]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(words: &[AtomicU64], gpa: u64, address: u64) -> Option<(u64, u64)> {
        let mut table = gpa;
        for covers in [TERA_HALF, GIGA, HUGE, PAGE] {
            let index = (table - gpa) as usize / 8 + (address / covers) as usize % ENTRIES;
            let entry = words[index].load(Ordering::Relaxed);
            if entry & PRESENT == 0 {
                return None;
            }
            if covers == PAGE || entry & LARGE != 0 {
                return Some((entry & ADDRESS, entry & !ADDRESS));
            }
            table = entry & ADDRESS;
        }
        None
    }

    #[test]
    fn every_mapped_address_leads_to_itself_and_tables_suffice() {
        for (ram, bytes) in [(4 << 20, PAGE), (3 << 30, 3 * HUGE), (1 << 40, 2 * GIGA + PAGE), (513 << 30, HUGE)] {
            let small = u64::next_multiple_of(ram, GIGA);
            let needed = tables_needed(ram, small, bytes);
            let words: Vec<_> = (0..needed as usize * ENTRIES).map(|_| AtomicU64::new(0)).collect();
            let gpa = small + bytes;
            let mut tables = Tables::new(&words, gpa);
            for address in (HUGE..ram).step_by(HUGE as usize) {
                tables.map_huge(address);
            }
            for address in (small..small + bytes).step_by(PAGE as usize) {
                tables.map_page(address, Access::User);
            }
            assert_eq!(tables.used, needed, "ram {ram:#x}");
            assert_eq!(walk(&words, gpa, 0), None);
            assert_eq!(walk(&words, gpa, HUGE), Some((HUGE, 0xe7)));
            assert_eq!(walk(&words, gpa, ram - HUGE), Some((ram - HUGE, 0xe7)));
            assert_eq!(walk(&words, gpa, small), Some((small, 0x67 | NO_EXECUTE)));
            assert_eq!(walk(&words, gpa, small + bytes), None);
        }
    }
}
