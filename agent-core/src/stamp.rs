//! The contents of each page of a block, chosen so that a page that was swapped, zeroed, lost or is stale does not
//! pass: words derived from a number that no other use of any page has.
//!
//! One word is the page's first, one lies in each further quarter, at a place that moves from
//! page to page: a fault that hits only some cache lines is found in one page or another.

use crate::rng::mix;
use core::sync::atomic::{AtomicU64, Ordering};
use shared_layout::FRAME_SIZE;

/// 64-bit words in a page.
pub const PAGE_WORDS: usize = (FRAME_SIZE / 8) as usize;
/// Words stamped in each page.
const STAMPS: usize = 4;

/// The contents of a page. Atomics, as a host that misbehaves may write here too.
pub type Page = [AtomicU64; PAGE_WORDS];

/// Tags for one command's blocks: the same page hardly ever gets the same tag twice.
#[derive(Debug)]
pub struct Tags {
    seed: u64,
    serial: u64,
}

impl Tags {
    /// Tags of command number `command` of the agent with this number.
    #[must_use]
    pub const fn new(seed: u64, agent: u32, command: u64) -> Self {
        Self { seed: mix(mix(seed ^ agent as u64) ^ command), serial: 0 }
    }

    /// The next block's; all of its bits are random.
    pub const fn draw(&mut self) -> u64 {
        self.serial += 1;
        mix(self.seed.wrapping_add(self.serial))
    }
}

/// A word that is not what was stamped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wrong {
    /// Which word of the page.
    pub index: usize,
    /// The stamp expected there.
    pub expected: u64,
    /// The word found there.
    pub found: u64,
}

/// Bad pages, and the first of them.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Damage {
    /// Pages with a wrong stamp.
    pub pages: u64,
    /// Guest-physical address of the first wrong word; 0 if nobody knows.
    pub address: u64,
    /// The stamp expected there.
    pub expected: u64,
    /// The word found there.
    pub found: u64,
}

impl Damage {
    /// One more bad page. `address` computes the guest-physical address of the wrong word from its byte offset
    /// in the page; only the first page's is asked for.
    pub fn note(&mut self, wrong: Wrong, address: impl FnOnce(u64) -> u64) {
        if self.pages == 0 {
            self.address = address(wrong.index as u64 * 8);
            (self.expected, self.found) = (wrong.expected, wrong.found);
        }
        self.pages += 1;
    }
}

/// Place and value of each stamp of a page. `id` names one use of one page. No value is 0, as that is what
/// a lost page holds.
pub fn stamps(id: u64) -> impl Iterator<Item = (usize, u64)> {
    const QUARTER: usize = PAGE_WORDS / STAMPS;
    let key = mix(id);
    (0..STAMPS).map(move |i| {
        let word = mix(key.wrapping_add(i as u64)) | 1;
        (if i == 0 { 0 } else { i * QUARTER + (key >> (8 * i)) as usize % QUARTER }, word)
    })
}

/// Writes the stamps of a page for the use that `id` names.
pub fn fill(page: &Page, id: u64) {
    for (index, value) in stamps(id) {
        page[index].store(value, Ordering::Relaxed);
    }
}

/// Checks the stamps of a page: the first wrong one.
#[must_use]
pub fn check(page: &Page, id: u64) -> Option<Wrong> {
    stamps(id).find_map(|(index, expected)| {
        let found = page[index].load(Ordering::Relaxed);
        (found != expected).then_some(Wrong { index, expected, found })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::vec::Vec;

    #[test]
    fn stamps_reach_every_cache_line_but_never_one_place_twice() {
        let mut lines = HashSet::new();
        for id in 0..2000 {
            let places: Vec<_> = stamps(id).map(|(index, _)| index).collect();
            assert!(places.is_sorted_by(|a, b| a < b));
            lines.extend(places.into_iter().map(|index| index / 8));
        }
        // The first quarter has only its first word.
        assert_eq!(lines.len(), 1 + 48);
    }

    #[test]
    fn a_lost_page_a_stale_one_and_a_changed_word_do_not_pass() {
        let page: Page = std::array::from_fn(|_| AtomicU64::new(0));
        assert!(check(&page, 7).is_some(), "zeroes");
        fill(&page, 7);
        assert_eq!(check(&page, 7), None);
        assert!(check(&page, 8).is_some(), "of another use");
        page[0].store(1, Ordering::Relaxed);
        assert_eq!(check(&page, 7).map(|wrong| (wrong.index, wrong.found)), Some((0, 1)));
    }

    #[test]
    fn the_first_damage_is_the_one_reported() {
        let mut sum = Damage::default();
        sum.note(Wrong { index: 2, expected: 6, found: 7 }, |offset| 5 + offset);
        for found in [1, 2] {
            sum.note(Wrong { index: 0, expected: 9, found }, |_| panic!("one address is enough"));
        }
        assert_eq!(sum, Damage { pages: 3, address: 5 + 16, expected: 6, found: 7 });
    }

    #[test]
    fn no_two_commands_agents_or_blocks_share_a_tag() {
        let mut tags = HashSet::new();
        for (agent, command) in (0..4).flat_map(|agent| (0..16).map(move |command| (agent, command))) {
            let mut drawn = Tags::new(9, agent, command);
            assert!((0..64).all(|_| tags.insert(drawn.draw())), "agent {agent}, command {command}");
        }
    }
}
