//! [`Violation`]: what is wrong with a table, and where. Plain values, no memory touched.
//!
//! Two checks, one for each side: the tenant's compares an entry with its bits, the host's with R.
//! Both are exact when nobody is at work. The tenant's holds whatever callers did wrong through
//! this crate; the host's holds unless a guest wrote entries on its own.

use crate::residency::Residency;
use core::fmt;
use shared_layout::{HugeEntry, HugeId, Run};

/// A huge frame whose words contradict each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Violation {
    /// The huge frame.
    pub huge: HugeId,
    /// Its entry.
    pub entry: HugeEntry,
    /// The fact that the entry contradicts.
    pub contradiction: Contradiction,
}

/// A fact that an entry contradicts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Contradiction {
    /// Itself: no sequence of transitions leads to it.
    Invalid,
    /// Its bitfield: this many bits are clear, and the counter says another number.
    Counter(u32),
    /// Its bitfield: a free run is longer than it may be.
    Run(Run),
    /// Its bitfield: allocated as a whole or held, and yet this many bits are set.
    Bits(u32),
    /// R, about whether the host holds the frame.
    Held(Residency),
    /// R, about whether the frame is backed by memory.
    Evicted(Residency),
    /// R says that somebody is at work: a claim was forgotten.
    Busy,
}

impl Violation {
    /// An entry against the number of clear bits in its bitfield, and the longest run of them.
    pub(crate) fn of_bits(huge: HugeId, entry: HugeEntry, clear: u32, longest: Run) -> Option<Self> {
        let contradiction = if !entry.is_valid() {
            Contradiction::Invalid
        } else if entry.is_huge() || entry.is_held() {
            // Their bits stay clear.
            (clear != 512).then(|| Contradiction::Bits(512 - clear))?
        } else if clear != u32::from(entry.free()) {
            Contradiction::Counter(clear)
        } else {
            (entry.has_room() && longest > entry.run()).then_some(Contradiction::Run(longest))?
        };
        Some(Self { huge, entry, contradiction })
    }

    /// An entry against the host's own knowledge.
    pub(crate) fn of_residency(huge: HugeId, entry: HugeEntry, r: Residency, busy: bool) -> Option<Self> {
        let contradiction = match () {
            () if busy => Contradiction::Busy,
            () if !entry.is_valid() => Contradiction::Invalid,
            () if entry.is_held() != (r == Residency::Held) => Contradiction::Held(r),
            () if entry.is_evicted() != (r != Residency::Installed) => Contradiction::Evicted(r),
            () => return None,
        };
        Some(Self { huge, entry, contradiction })
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (huge, entry) = (self.huge.0, self.entry);
        match self.contradiction {
            Contradiction::Invalid => write!(f, "huge frame {huge}: nothing leads to {entry:?}"),
            Contradiction::Counter(clear) => write!(f, "huge frame {huge}: {clear} bits are clear, but {entry:?}"),
            Contradiction::Run(run) => {
                write!(f, "huge frame {huge}: a run of order {} is free, but {entry:?}", run.order().get())
            }
            Contradiction::Bits(set) => write!(f, "huge frame {huge}: {set} bits are set, but {entry:?}"),
            Contradiction::Held(r) | Contradiction::Evicted(r) => {
                write!(f, "huge frame {huge}: the host knows it as {r:?}, but {entry:?}")
            }
            Contradiction::Busy => write!(f, "huge frame {huge}: a claim on it was never settled"),
        }
    }
}

impl core::error::Error for Violation {}
