//! What a page holds, so that one that was lost, zeroed, mixed up or is stale does not pass.
//!
//! Four words a page, derived from its address and from its block's tag, which no two uses of a
//! page have in common: the first word, and one in each further quarter at a place that moves from
//! page to page, so that a fault of some cache lines only is found in one page or another.

use std::sync::atomic::{AtomicU64, Ordering};

/// 64-bit words of a page.
pub const PAGE_WORDS: usize = 512;
const STAMPS: usize = 4;

/// The contents of a page.
pub type Page = [AtomicU64; PAGE_WORDS];

/// A wrong word: its index in the page, what it should have held, what it held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wrong {
    /// Which word of the page.
    pub index: usize,
    /// What it should have held.
    pub expected: u64,
    /// What it held.
    pub found: u64,
}

/// Scatters every bit of `word` over all of the result; a bijection (the finaliser of SplitMix64).
#[must_use]
pub const fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Place and value of each stamp of the page at `address`. No value is 0, as that is what a lost
/// page holds.
fn stamps(address: u64, tag: u64) -> impl Iterator<Item = (usize, u64)> {
    const QUARTER: usize = PAGE_WORDS / STAMPS;
    let key = mix(mix(tag) ^ address);
    (0..STAMPS).map(move |i| {
        let word = mix(key.wrapping_add(i as u64)) | 1;
        (if i == 0 { 0 } else { i * QUARTER + (key >> (8 * i)) as usize % QUARTER }, word)
    })
}

/// Writes the stamps of the page at `address`.
pub fn fill(page: &Page, address: u64, tag: u64) {
    for (index, value) in stamps(address, tag) {
        page[index].store(value, Ordering::Relaxed);
    }
}

/// Checks the stamps of the page at `address`: the first wrong one.
#[must_use]
pub fn check(page: &Page, address: u64, tag: u64) -> Option<Wrong> {
    stamps(address, tag).find_map(|(index, expected)| {
        let found = page[index].load(Ordering::Relaxed);
        (found != expected).then_some(Wrong { index, expected, found })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn page() -> Page {
        std::array::from_fn(|_| AtomicU64::new(0))
    }

    #[test]
    fn stamps_differ_by_page_tag_and_place_and_are_never_zero() {
        let mut values = HashSet::new();
        for number in 0..64 {
            for tag in 0..64 {
                for (index, value) in stamps(number << 12, tag) {
                    assert!(index < PAGE_WORDS && value != 0);
                    assert!(values.insert(value), "page {number} tag {tag} word {index}");
                }
            }
        }
    }

    #[test]
    fn a_lost_page_a_stale_one_and_anothers_do_not_pass() {
        let page = page();
        assert!(check(&page, 0x1000, 7).is_some(), "zeroes");
        fill(&page, 0x1000, 7);
        assert_eq!(check(&page, 0x1000, 7), None);
        assert!(check(&page, 0x1000, 8).is_some(), "of the block before");
        assert!(check(&page, 0x2000, 7).is_some(), "of another page");
        page[0].store(1, Ordering::Relaxed);
        assert_eq!(check(&page, 0x1000, 7).map(|wrong| (wrong.index, wrong.found)), Some((0, 1)));
    }
}
