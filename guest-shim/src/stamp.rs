//! [`Tag`]: what tells one use of a frame from the next, and what the frame's page is stamped with.
//!
//! A tag is short, as it shares a record's word with its block. With a frame's number it makes the word that
//! names one use of one page; stamps derive from that.

use crate::shared::Ram;
use llfree_agent_core::stamp::{self, Damage, Page};
use shared_layout::FrameId;

/// Bits of a [`Tag`].
pub(crate) const TAG_BITS: u32 = 26;

/// Tells one use of a frame from the next.
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

    const fn of(self, frame: FrameId) -> u64 {
        frame.0 << TAG_BITS | self.0 as u64
    }
}

/// Writes the stamps of a frame's page.
pub(crate) fn fill(page: &Page, frame: FrameId, tag: Tag) {
    stamp::fill(page, tag.of(frame));
}

/// Checks the stamps of a frame's page.
pub(crate) fn check(page: &Page, ram: Ram, frame: FrameId, tag: Tag, damage: &mut Damage) {
    if let Some(wrong) = stamp::check(page, tag.of(frame)) {
        damage.note(wrong, |offset| ram.address(frame) + offset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llfree_agent_core::stamp::{PAGE_WORDS, stamps};
    use std::collections::HashSet;

    #[test]
    fn stamps_differ_by_frame_tag_and_place_and_are_never_zero() {
        let mut values = HashSet::new();
        for frame in 0..64 {
            for tag in 0..64 {
                for (index, value) in stamps(Tag::new(tag).of(FrameId(frame))) {
                    assert!(index < PAGE_WORDS && value != 0);
                    assert!(values.insert(value), "frame {frame} tag {tag} word {index}");
                }
            }
        }
    }
}
