//! [`HugeEntry`]: the one word per huge frame that host and guest both change.
//!
//! ```text
//!  15     14       13    12..10     9..0
//! +------+---------+------+--------+-----------+
//! | held | evicted | huge | zero   | free 0-512|
//! +------+---------+------+--------+-----------+
//! ```
//!
//! The named transitions below are the only way to make a new value. Each is a total function
//! from an entry to `Option<HugeEntry>`: any bits at all may be fed to it, and bits that no
//! transition could have produced (a hostile or broken guest wrote them) yield `None`.

use crate::units::{FRAMES_PER_HUGE, Order};

/// State of one huge frame; see the [module](self) for its bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct HugeEntry(u16);

const FREE_MASK: u16 = 0x03ff;
const RESERVED: u16 = 0x1c00;
const HUGE: u16 = 1 << 13;
const EVICTED: u16 = 1 << 14;
const HELD: u16 = 1 << 15;
const ALL_FREE: u16 = FRAMES_PER_HUGE as u16;

impl HugeEntry {
    /// All frames free, backed by host memory.
    pub const FREE_INSTALLED: Self = Self(ALL_FREE);
    /// All frames free, not backed: the initial state of every frame.
    pub const FREE_EVICTED: Self = Self(ALL_FREE | EVICTED);
    /// Allocated as a whole, backed by host memory: the initial state of a boot image's frames.
    pub const HUGE_INSTALLED: Self = Self(HUGE);
    /// Allocated as a whole, not backed: an address range that is never to be used.
    pub const HUGE_EVICTED: Self = Self(HUGE | EVICTED);

    /// Any bits, unchecked: the transitions check.
    #[must_use]
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// The word as stored.
    #[must_use]
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// Free base frames, as claimed: `0..=1023`, above 512 only if somebody broke the rules.
    #[must_use]
    pub const fn free(self) -> u16 {
        self.0 & FREE_MASK
    }

    /// The host took this frame out of the guest's reach.
    #[must_use]
    pub const fn is_held(self) -> bool {
        self.0 & HELD != 0
    }

    /// Not backed by host memory: install before use.
    #[must_use]
    pub const fn is_evicted(self) -> bool {
        self.0 & EVICTED != 0
    }

    /// Allocated as one block of order 9 (or half of an order 10).
    #[must_use]
    pub const fn is_huge(self) -> bool {
        self.0 & HUGE != 0
    }

    /// Whether some sequence of transitions leads here.
    #[must_use]
    pub const fn is_valid(self) -> bool {
        if self.0 & RESERVED != 0 || self.free() > ALL_FREE {
            return false;
        }
        // Held implies evicted; held and huge both imply that nothing is free.
        if self.is_held() {
            return self.0 == HELD | EVICTED;
        }
        !self.is_huge() || self.free() == 0
    }

    /// Every base frame is free and the guest may take it.
    #[must_use]
    pub const fn is_all_free(self) -> bool {
        self.0 & !EVICTED == ALL_FREE
    }

    /// Some base frames are in use, and others the guest may take.
    #[must_use]
    pub const fn has_room(self) -> bool {
        self.is_small() && self.free() > 0 && self.free() < ALL_FREE
    }

    /// Base frames are given out one by one here: neither held nor huge, and valid.
    const fn is_small(self) -> bool {
        self.0 & (HELD | HUGE | RESERVED) == 0 && self.free() <= ALL_FREE
    }

    /// Guest: take `frames` base frames (1..=511 or a whole row), keeping `evicted`.
    #[must_use]
    pub const fn take(self, frames: u16) -> Option<Self> {
        if self.is_small() && frames > 0 && self.free() >= frames { Some(Self(self.0 - frames)) } else { None }
    }

    /// Guest: give `frames` base frames back.
    #[must_use]
    pub const fn give(self, frames: u16) -> Option<Self> {
        if self.is_small() && frames > 0 && frames <= ALL_FREE && self.free() + frames <= ALL_FREE {
            Some(Self(self.0 + frames))
        } else {
            None
        }
    }

    /// Guest: take the huge frame as one block, keeping `evicted`.
    #[must_use]
    pub const fn take_huge(self) -> Option<Self> {
        if self.is_all_free() { Some(Self((self.0 & EVICTED) | HUGE)) } else { None }
    }

    /// Guest: give a block of order 9 back.
    #[must_use]
    pub const fn give_huge(self) -> Option<Self> {
        if self.0 & !EVICTED == HUGE { Some(Self((self.0 & EVICTED) | ALL_FREE)) } else { None }
    }

    /// Host, soft reclaim: a free frame loses its memory and stays free.
    #[must_use]
    pub const fn evict(self) -> Option<Self> {
        if self.0 == Self::FREE_INSTALLED.0 { Some(Self::FREE_EVICTED) } else { None }
    }

    /// Host, hard reclaim: a free frame leaves the guest's reach.
    #[must_use]
    pub const fn hold(self) -> Option<Self> {
        if self.is_all_free() { Some(Self(HELD | EVICTED)) } else { None }
    }

    /// Host: a held frame is free for the guest again, still evicted.
    #[must_use]
    pub const fn release(self) -> Option<Self> {
        if self.0 == HELD | EVICTED { Some(Self::FREE_EVICTED) } else { None }
    }

    /// Host: an evicted frame was backed with memory.
    #[must_use]
    pub const fn installed(self) -> Option<Self> {
        if self.is_valid() && self.is_evicted() && !self.is_held() { Some(Self(self.0 & !EVICTED)) } else { None }
    }

    /// Guest: take a block of `order` below 9.
    #[must_use]
    pub const fn take_order(self, order: Order) -> Option<Self> {
        if order.is_huge() { None } else { self.take(order.frames() as u16) }
    }
}

impl core::fmt::Debug for HugeEntry {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "HugeEntry({:#06x}: free {}", self.0, self.free())?;
        for (set, name) in [(self.is_huge(), "huge"), (self.is_evicted(), "evicted"), (self.is_held(), "held")] {
            if set {
                write!(f, " {name}")?;
            }
        }
        write!(f, "{})", if self.is_valid() { "" } else { " INVALID" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every() -> impl Iterator<Item = HugeEntry> {
        (0..=u16::MAX).map(HugeEntry::from_bits)
    }

    fn transitions(e: HugeEntry) -> impl Iterator<Item = HugeEntry> {
        let sized = (0..=513).flat_map(move |n| [e.take(n), e.give(n)]);
        sized.chain([e.take_huge(), e.give_huge(), e.evict(), e.hold(), e.release(), e.installed()]).flatten()
    }

    #[test]
    fn valid_entries_are_exactly_the_reachable_ones() {
        let mut reached = [false; 1 << 16];
        let mut todo = [HugeEntry::FREE_EVICTED; 4096];
        let mut len = 1;
        reached[HugeEntry::FREE_EVICTED.bits() as usize] = true;
        while len > 0 {
            len -= 1;
            for next in transitions(todo[len]) {
                if !reached[next.bits() as usize] {
                    reached[next.bits() as usize] = true;
                    todo[len] = next;
                    len += 1;
                }
            }
        }
        for e in every() {
            assert_eq!(e.is_valid(), reached[e.bits() as usize], "{e:?}");
        }
    }

    #[test]
    fn invalid_bits_have_no_transition() {
        for e in every().filter(|e| !e.is_valid()) {
            assert_eq!(transitions(e).next(), None, "{e:?}");
        }
    }

    #[test]
    fn guest_transitions_keep_evicted_and_never_touch_held() {
        for e in every().filter(|e| e.is_valid()) {
            for n in [1, 2, 64, 256, 512] {
                for next in [e.take(n), e.give(n), e.take_huge(), e.give_huge()].into_iter().flatten() {
                    assert_eq!(next.is_evicted(), e.is_evicted());
                    assert!(!e.is_held() && !next.is_held());
                }
            }
        }
    }

    #[test]
    fn the_host_takes_only_frames_that_are_wholly_free() {
        for e in every() {
            if e.evict().is_some() || e.hold().is_some() {
                assert_eq!((e.free(), e.is_huge(), e.is_held()), (512, false, false));
            }
        }
    }

    #[test]
    fn a_transition_and_its_inverse_cancel() {
        for e in every().filter(|e| e.is_valid()) {
            if let Some(t) = e.take(8) {
                assert_eq!(t.give(8), Some(e));
            }
            if let Some(t) = e.take_huge() {
                assert_eq!(t.give_huge(), Some(e));
            }
            if let Some(t) = e.hold() {
                assert_eq!(t.release(), Some(HugeEntry::FREE_EVICTED));
            }
        }
    }
}
