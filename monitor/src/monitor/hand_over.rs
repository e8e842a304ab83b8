//! The hand-over: how a tenant with an allocator of its own stops having memory by touching it.

use super::Monitor;
use std::sync::atomic::Ordering;

/// What such a tenant has said of its memory so far. It only ever says more.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum HandOver {
    /// Nothing: it boots, or shares nothing at all, and has memory by touching it.
    Booting,
    /// What is free is shared, but the host had no memory for all that was in use: that comes by touch still.
    ByTouch,
    /// It touches nothing that was not installed.
    Complete,
}

impl HandOver {
    fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::Booting,
            1 => Self::ByTouch,
            _ => Self::Complete,
        }
    }
}

impl Monitor {
    /// The tenant says how far it is. Until that is [`HandOver::Complete`], touches of frames that are not held are no
    /// violations, and what a failed install left in a frame may be in use.
    pub fn hand_over(&self, to: HandOver) {
        self.handed_over.fetch_max(to as u8, Ordering::AcqRel);
    }

    /// How far the tenant is; one whose memory is not by touch has been [`HandOver::Complete`] from the start.
    #[must_use]
    pub fn handed_over(&self) -> HandOver {
        HandOver::from_byte(self.handed_over.load(Ordering::Acquire))
    }

    /// Whether the tenant has not handed over anything yet.
    #[must_use]
    pub fn is_booting(&self) -> bool {
        self.handed_over() == HandOver::Booting
    }

    /// Whether the tenant may have memory by touching it.
    pub(super) fn comes_by_touch(&self) -> bool {
        self.handed_over() < HandOver::Complete
    }
}
