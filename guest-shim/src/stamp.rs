//! What each page of a block holds, so that a page that was swapped, zeroed, lost or is stale
//! does not pass: words derived from the frame's number and its block's [`Tag`].
//!
//! One word is the page's first, one lies in each further quarter, at a place that moves from
//! page to page: a fault that hits only some cache lines is found in one page or another.

use crate::rng::mix;
use crate::shared::{PAGE_WORDS, Page, Ram};
use shared_layout::FrameId;

/// Bits of a [`Tag`].
pub(crate) const TAG_BITS: u32 = 26;
/// Words stamped in each page.
const STAMPS: usize = 4;

/// What tells one use of a frame from the next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Tag(u32);

impl Tag {
    /// The low [`TAG_BITS`] bits of `word`.
    #[must_use]
    pub(crate) const fn new(word: u64) -> Self {
        Self(word as u32 & ((1 << TAG_BITS) - 1))
    }

    /// The tag as a number below 2^[`TAG_BITS`].
    #[must_use]
    pub(crate) const fn get(self) -> u32 {
        self.0
    }
}

/// Bad pages, and the first of them.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Damage {
    /// Pages with a wrong stamp.
    pub(crate) pages: u64,
    /// Guest-physical address of the first wrong word.
    pub(crate) address: u64,
    /// What it should have held.
    pub(crate) expected: u64,
    /// What it held.
    pub(crate) found: u64,
}

impl Damage {
    /// Adds what a later check found.
    pub(crate) const fn add(&mut self, later: Self) {
        if self.pages == 0 {
            *self = later;
        } else {
            self.pages += later.pages;
        }
    }
}

/// Place and value of each stamp of a page. No value is 0, as that is what a lost page holds.
fn stamps(frame: FrameId, tag: Tag) -> impl Iterator<Item = (usize, u64)> {
    const QUARTER: usize = PAGE_WORDS / STAMPS;
    let key = mix(frame.0 << TAG_BITS | u64::from(tag.0));
    (0..STAMPS).map(move |i| {
        let word = mix(key.wrapping_add(i as u64)) | 1;
        (if i == 0 { 0 } else { i * QUARTER + (key >> (8 * i)) as usize % QUARTER }, word)
    })
}

/// Writes the stamps of a page.
pub(crate) fn fill(page: &Page, frame: FrameId, tag: Tag) {
    for (index, value) in stamps(frame, tag) {
        page.store(index, value);
    }
}

/// Checks the stamps of a page.
#[must_use]
pub(crate) fn check(page: &Page, ram: Ram, frame: FrameId, tag: Tag) -> Damage {
    for (index, expected) in stamps(frame, tag) {
        let found = page.load(index);
        if found != expected {
            return Damage { pages: 1, address: ram.address(frame) + index as u64 * 8, expected, found };
        }
    }
    Damage::default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::vec::Vec;

    #[test]
    fn stamps_differ_by_frame_tag_and_place_and_are_never_zero() {
        let mut values = HashSet::new();
        for frame in 0..64 {
            for tag in 0..64 {
                for (index, value) in stamps(FrameId(frame), Tag::new(tag)) {
                    assert!(index < PAGE_WORDS && value != 0);
                    assert!(values.insert(value), "frame {frame} tag {tag} word {index}");
                }
            }
        }
    }

    #[test]
    fn stamps_reach_every_cache_line_but_never_one_place_twice() {
        let mut lines = HashSet::new();
        for frame in 0..2000 {
            let places: Vec<_> = stamps(FrameId(frame), Tag::new(1)).map(|(index, _)| index).collect();
            assert!(places.is_sorted_by(|a, b| a < b));
            lines.extend(places.into_iter().map(|index| index / 8));
        }
        // The first quarter has only its first word.
        assert_eq!(lines.len(), 1 + 48);
    }

    #[test]
    fn the_first_damage_is_the_one_reported() {
        let mut sum = Damage::default();
        sum.add(Damage::default());
        sum.add(Damage { pages: 1, address: 5, expected: 6, found: 7 });
        sum.add(Damage { pages: 2, address: 8, expected: 9, found: 1 });
        assert_eq!(sum, Damage { pages: 3, address: 5, expected: 6, found: 7 });
    }
}
