//! [`Trees`]: where to look, never what is true.
//!
//! A tree is [`HUGE_PER_TREE`] huge frames. One 16-bit word says roughly what is free in it and
//! what it is for, and five bitmaps list, one bit a tree, which trees may promise what a search is
//! after; so a search looks at 64 trees with one load. All of it is the tenant's own, anybody
//! may find it stale (the host takes and returns frames without touching it), and it is recounted
//! from the entries rather than adjusted, so no error stays.
//!
//! ```text
//!  15..8   7          6..4    3..2   1           0
//! +-------+----------+-------+------+-----------+------+
//! | zero  | reserved | class | room | installed | free |
//! +-------+----------+-------+------+-----------+------+
//! free: some huge frame is; installed: one of these is backed by memory
//! room: 0 no huge frame in use has any, 1 sparse, 2 mixed, 3 crowded
//! ```
//!
//! Why 32 huge frames: the entries of a tree are one cache line, so that CPUs in different trees do
//! not disturb each other; 64 MiB let a CPU work for long without a search; and the hints stay
//! below 50 bytes a GiB.

use crate::class::Class;
use crate::error::{Part, TableError, check_len};
use crate::sync::{AtomicU16, AtomicU64, Ordering};
use shared_layout::table::{BITMAPS, HUGE_PER_TREE};
use shared_layout::{FRAMES_PER_HUGE, HugeEntry, HugeId, HugeRange, TableLayout};

/// The free frames of a tree at the last count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct TreeHint(u16);

const FREE: u16 = 1 << 0;
const INSTALLED: u16 = 1 << 1;
const ROOM_SHIFT: u16 = 2;
const ROOM_MASK: u16 = 3 << ROOM_SHIFT;
const CLASS_SHIFT: u16 = 4;
const CLASS_MASK: u16 = 7 << CLASS_SHIFT;
const RESERVED: u16 = 1 << 7;

/// The goal of a search: room in huge frames that are in use already, from the fullest trees to
/// the emptiest (so that what is nearly empty gets a chance to become free), or free huge frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Want {
    /// In a tree that is at least 7/8 full.
    Crowded = 0,
    /// In a tree that is at least half full.
    Mixed = 1,
    /// In any tree.
    Sparse = 2,
    /// A free huge frame that is backed by memory.
    Installed = 3,
    /// Any free huge frame.
    Free = 4,
}

impl Want {
    const ALL: [Self; 5] = [Self::Crowded, Self::Mixed, Self::Sparse, Self::Installed, Self::Free];

    #[inline]
    pub(crate) fn matches(self, entry: HugeEntry) -> bool {
        match self {
            Self::Installed => entry.is_all_free() && !entry.is_evicted(),
            Self::Free => entry.is_all_free(),
            Self::Crowded | Self::Mixed | Self::Sparse => entry.has_room(),
        }
    }

    pub(crate) fn is_partial(self) -> bool {
        (self as u8) <= Self::Sparse as u8
    }
}

impl TreeHint {
    /// Counts a tree's entries. A tree that is free as a whole has no class any more.
    pub(crate) fn count(entries: impl Iterator<Item = HugeEntry>, reserved: bool, class: Class) -> Self {
        let (mut huge_frames, mut free, mut installed) = (0, 0, false);
        let (mut room, mut used) = (false, 0u32);
        for entry in entries {
            huge_frames += 1;
            if entry.is_all_free() {
                free += 1;
                installed |= !entry.is_evicted();
            } else {
                room |= entry.has_room();
                used += u32::from(FRAMES_PER_HUGE as u16 - entry.free().min(FRAMES_PER_HUGE as u16));
            }
        }
        let all = huge_frames * FRAMES_PER_HUGE as u32;
        let room = match () {
            () if !room => 0,
            () if used * 8 >= all * 7 => 3,
            () if used * 2 >= all => 2,
            () => 1,
        };
        let class = if free == huge_frames && !reserved { Class::FREE } else { class };
        let flag = |set, bit| if set { bit } else { 0 };
        let flags = flag(free > 0, FREE) | flag(installed, INSTALLED) | flag(reserved, RESERVED);
        Self(flags | room << ROOM_SHIFT | u16::from(class.get()) << CLASS_SHIFT)
    }

    #[inline]
    pub(crate) fn promises(self, want: Want) -> bool {
        match want {
            Want::Crowded => self.0 & ROOM_MASK == 3 << ROOM_SHIFT,
            Want::Mixed => self.0 & ROOM_MASK == 2 << ROOM_SHIFT,
            Want::Sparse => self.0 & ROOM_MASK == 1 << ROOM_SHIFT,
            Want::Installed => self.0 & INSTALLED != 0,
            Want::Free => self.0 & FREE != 0,
        }
    }

    /// Some huge frame in use has room.
    #[inline]
    pub(crate) fn has_room(self) -> bool {
        self.0 & ROOM_MASK != 0
    }

    /// A CPU is at work in this tree; others had better look elsewhere.
    #[inline]
    pub(crate) fn is_reserved(self) -> bool {
        self.0 & RESERVED != 0
    }

    /// The purpose of the tree.
    #[inline]
    pub(crate) fn class(self) -> Class {
        Class::from_bits(self.0 >> CLASS_SHIFT)
    }

    /// The same tree in a CPU's hands.
    pub(crate) fn reserve(self) -> Self {
        Self(self.0 | RESERVED)
    }

    /// The same tree for another class.
    pub(crate) fn with_class(self, class: Class) -> Self {
        Self(self.0 & !CLASS_MASK | u16::from(class.get()) << CLASS_SHIFT)
    }

    /// A tree in which a huge frame came free.
    pub(crate) fn with_free(self, installed: bool) -> Self {
        Self(self.0 | FREE | if installed { INSTALLED } else { 0 })
    }

    /// A tree that was full and no longer is: the first room in it makes it crowded.
    pub(crate) fn with_room(self) -> Self {
        Self(self.0 | ROOM_MASK)
    }
}

// The layout counts the bitmaps without knowing what they list.
const _: () = assert!(Want::ALL.len() == BITMAPS as usize);

/// Words that [`Trees`] needs for its bitmaps, for this many trees.
pub(crate) const fn bitmap_words(trees: usize) -> usize {
    TableLayout::bitmap_words(trees as u32) as usize
}

/// The tree that a huge frame belongs to.
#[inline]
pub(crate) const fn tree_of(huge: HugeId) -> u32 {
    huge.0 / HUGE_PER_TREE
}

/// The huge frames of a tree, those past the end of the table included.
#[inline]
pub(crate) const fn tree_range(tree: u32) -> HugeRange {
    HugeRange::saturating(HugeId(tree * HUGE_PER_TREE), HUGE_PER_TREE)
}

/// The hints of all trees, and the bitmaps over them.
#[derive(Clone, Copy)]
pub(crate) struct Trees<'a> {
    hints: &'a [AtomicU16],
    summary: &'a [AtomicU64],
}

impl<'a> Trees<'a> {
    /// Fails unless there are as many bitmap words as the trees need.
    pub(crate) fn new(hints: &'a [AtomicU16], summary: &'a [AtomicU64]) -> Result<Self, TableError> {
        check_len(Part::Summary, summary.len(), bitmap_words(hints.len()))?;
        Ok(Self { hints, summary })
    }

    pub(crate) fn len(&self) -> u32 {
        self.hints.len() as u32
    }

    pub(crate) fn get(&self, tree: u32) -> TreeHint {
        // Relaxed here and below: hints order nothing.
        TreeHint(self.hints.get(tree as usize).map_or(0, |hint| hint.load(Ordering::Relaxed)))
    }

    /// Remembers what was counted, and lists the tree for what it promises. It stays listed for what
    /// it no longer promises until a search comes by, and room in a reserved tree is not listed, for
    /// it comes and goes: CPUs at work in their own trees write nothing that others read.
    pub(crate) fn set(&self, tree: u32, hint: TreeHint) {
        let Some(word) = self.hints.get(tree as usize) else { return };
        if word.load(Ordering::Relaxed) != hint.0 {
            // A plain store: a lost update costs a look at the wrong place, nothing else.
            word.store(hint.0, Ordering::Relaxed);
        }
        for want in Want::ALL {
            let (Some(bits), mask) = (self.summary_word(want, tree), 1 << (tree % 64)) else { continue };
            let public = !hint.is_reserved() || !want.is_partial();
            if public && hint.promises(want) && bits.load(Ordering::Relaxed) & mask == 0 {
                // Trees share a word, so this is atomic.
                bits.fetch_or(mask, Ordering::Relaxed);
            }
        }
    }

    /// Takes a tree off the list of a want that its hint does not promise.
    pub(crate) fn unlist(&self, want: Want, tree: u32) {
        let (Some(bits), mask) = (self.summary_word(want, tree), 1 << (tree % 64)) else { return };
        bits.fetch_and(!mask, Ordering::Relaxed);
        if self.get(tree).promises(want) {
            // Somebody freed a block meanwhile and may have seen the bit still set.
            bits.fetch_or(mask, Ordering::Relaxed);
        }
    }

    /// Empties the bitmaps, bits past the last tree included.
    pub(crate) fn unlist_all(&self) {
        self.summary.iter().for_each(|bits| bits.store(0, Ordering::Relaxed));
    }

    /// The trees that are listed for `want`, once each, from `home` on; or, with `all`, every tree.
    pub(crate) fn listed(self, want: Want, home: u32, all: bool) -> impl Iterator<Item = u32> {
        let words = self.hints.len().div_ceil(64) as u32;
        let home = if home < self.len() { home } else { 0 };
        let start = home / 64;
        let before_home = (1 << (home % 64)) - 1;
        // The first word is visited twice: from `home` on, and at the end below `home`.
        (0..=words).flat_map(move |step| {
            let word = if start + step >= words { start + step - words } else { start + step };
            let mask = match step {
                0 => !before_home,
                _ if step == words => before_home,
                _ => u64::MAX,
            };
            let listed = || self.summary_word(want, word * 64).map_or(0, |bits| bits.load(Ordering::Relaxed));
            let bits = if all { u64::MAX } else { listed() } & mask;
            Bits(bits).map(move |bit| word * 64 + bit)
        })
    }

    fn summary_word(&self, want: Want, tree: u32) -> Option<&'a AtomicU64> {
        let words = self.hints.len().div_ceil(64);
        self.summary.get(want as usize * words + tree as usize / 64)
    }
}

/// Positions of set bits, from the lowest.
struct Bits(u64);

impl Iterator for Bits {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        let bit = self.0.trailing_zeros();
        self.0 &= self.0.wrapping_sub(1);
        (bit < 64).then_some(bit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_tree_promises_free_frames_and_has_no_class() {
        let all = core::iter::repeat_n(HugeEntry::FREE_INSTALLED, HUGE_PER_TREE as usize);
        let hint = TreeHint::count(all.clone(), true, Class::HUGE);
        assert!(hint.promises(Want::Free) && hint.promises(Want::Installed) && hint.is_reserved());
        assert!(!hint.has_room());
        assert_eq!(hint.class(), Class::HUGE, "while it is reserved");
        assert_eq!(TreeHint::count(all, false, Class::HUGE).class(), Class::FREE);
    }

    #[test]
    fn room_is_ranked_by_how_full_the_tree_is() {
        let entry = |free| HugeEntry::FREE_INSTALLED.take(512 - free).expect("in range");
        let of = |frees: [u16; 4]| TreeHint::count(frees.into_iter().map(entry), false, Class::MOVABLE);
        assert!(of([0, 0, 0, 1]).promises(Want::Crowded));
        assert!(of([128, 128, 0, 0]).promises(Want::Crowded));
        assert!(of([129, 128, 0, 0]).promises(Want::Mixed));
        assert!(of([500, 500, 20, 5]).promises(Want::Sparse));
        assert!(!of([0; 4]).has_room());
    }

    #[test]
    fn held_and_huge_frames_promise_nothing() {
        let held = HugeEntry::FREE_EVICTED.hold().expect("free");
        let hint = TreeHint::count([held, HugeEntry::HUGE_EVICTED].into_iter(), false, Class::HUGE);
        assert!(Want::ALL.iter().all(|want| !hint.promises(*want)));
    }
}
