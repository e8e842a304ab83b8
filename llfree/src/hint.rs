//! [`TreeHint`]: where to look, never what is true.
//!
//! A tree is [`HUGE_PER_TREE`] huge frames; one 16-bit word says roughly what is free in it. The
//! words are the tenant's own and anybody may find them stale: the host takes and returns frames
//! without touching them. They are recounted from the entries, never adjusted, so no error stays.
//!
//! ```text
//!  15..12    11         10        9..5             4..0
//! +--------+----------+---------+----------------+-----------+
//! | zero   | reserved | partial | installed free | free huge |
//! +--------+----------+---------+----------------+-----------+
//! ```

use shared_layout::HugeEntry;
use shared_layout::header::HUGE_PER_TREE;

/// What was free in a tree when somebody last counted.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct TreeHint(u16);

const COUNT_MASK: u16 = 0x1f;
const INSTALLED_SHIFT: u16 = 5;
const PARTIAL: u16 = 1 << 10;
const RESERVED: u16 = 1 << 11;

const _: () = assert!(HUGE_PER_TREE as u16 <= COUNT_MASK);

/// What a search is after, in the order in which searches ask.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Want {
    /// A huge frame that is in use already and has room: small blocks stay together.
    Partial,
    /// A free huge frame with memory behind it.
    Installed,
    /// Any free huge frame.
    Free,
}

impl Want {
    pub(crate) fn matches(self, entry: HugeEntry) -> bool {
        match self {
            Self::Partial => !entry.is_huge() && !entry.is_all_free() && entry.free() > 0,
            Self::Installed => entry.is_all_free() && !entry.is_evicted(),
            Self::Free => entry.is_all_free(),
        }
    }
}

impl TreeHint {
    pub(crate) fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    pub(crate) fn bits(self) -> u16 {
        self.0
    }

    /// Counts a tree's entries; `reserved` is kept by the caller.
    pub(crate) fn count(entries: impl Iterator<Item = HugeEntry>, reserved: bool) -> Self {
        let mut hint = if reserved { RESERVED } else { 0 };
        for entry in entries {
            if Want::Partial.matches(entry) {
                hint |= PARTIAL;
            } else if Want::Free.matches(entry) {
                hint += 1;
                if Want::Installed.matches(entry) {
                    hint += 1 << INSTALLED_SHIFT;
                }
            }
        }
        Self(hint)
    }

    pub(crate) fn promises(self, want: Want) -> bool {
        match want {
            Want::Partial => self.0 & PARTIAL != 0,
            Want::Installed => self.0 & (COUNT_MASK << INSTALLED_SHIFT) != 0,
            Want::Free => self.0 & COUNT_MASK != 0,
        }
    }

    /// A CPU fills this tree with small blocks; others had better look elsewhere.
    pub(crate) fn is_reserved(self) -> bool {
        self.0 & RESERVED != 0
    }

    pub(crate) fn with_partial(self) -> Self {
        Self(self.0 | PARTIAL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_tree_of_free_frames_fits_the_counters() {
        let all = core::iter::repeat_n(HugeEntry::FREE_INSTALLED, HUGE_PER_TREE as usize);
        let hint = TreeHint::count(all, true);
        assert!(hint.promises(Want::Free) && hint.promises(Want::Installed) && hint.is_reserved());
        assert!(!hint.promises(Want::Partial));
        assert_eq!(hint.bits() & COUNT_MASK, 16);
    }

    #[test]
    fn held_and_huge_frames_promise_nothing() {
        let held = HugeEntry::FREE_EVICTED.hold().expect("free");
        let hint = TreeHint::count([held, HugeEntry::HUGE_EVICTED].into_iter(), false);
        assert_eq!(hint, TreeHint::default());
    }
}
