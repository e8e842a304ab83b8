//! The decision that a hand-over is, or a device's driver that comes before it: made once, by one compare-and-exchange.

use super::{HandOver, Monitor, is_held};
use llfree_base::lock;
use shared_layout::HugeId;
use std::sync::atomic::Ordering;

impl Monitor {
    /// The tenant says how far it is. Until that is [`HandOver::Complete`], touches of frames that are not held are no
    /// violations, and what a failed install left in a frame may be in use. [`HandOver::ByTouch`] is an excuse that only a
    /// host gives which had no memory: if all installs had theirs, it is complete. False, and nothing changes, if its memory
    /// was [left to a device](Self::leave_to_device) before.
    pub fn hand_over(&self, to: HandOver) -> bool {
        let excused = self.host_failed.load(Ordering::Acquire);
        let to = if to == HandOver::ByTouch && !excused { HandOver::Complete } else { to };
        let more = |now: u8| (HandOver::from_byte(now) != HandOver::ToDevice).then_some(now.max(to as u8));
        self.handed_over.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_ok()
    }

    /// The tenant has not handed over anything, and the driver of a device that moves memory is at work in it: from now on
    /// its memory comes by touch and goes by that device. R calls all frames installed, whether or not memory backs them,
    /// no touch is a violation, and nothing is to be taken by the table any more. Says whether that is so: not if the
    /// tenant handed its memory over before.
    ///
    /// The caller keeps the device from discarding anything until this returns. It waits for the pass at work.
    #[must_use]
    pub fn leave_to_device(&self) -> bool {
        // A pass that began before would go on by the table.
        let _passes = lock(&self.passes);
        let (from, to) = (HandOver::Booting as u8, HandOver::ToDevice as u8);
        if let Err(before) = self.handed_over.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire) {
            return before == to;
        }
        self.announce_returns();
        for huge in (0..self.huge_frames()).map(HugeId) {
            let mut claim = self.claim_patiently(huge);
            // Only of a tenant that gave frames without a word.
            if is_held(claim.residency() as u8) {
                let _ = claim.release();
                claim = self.claim_patiently(huge);
            }
            self.lent.forget(huge);
            if let Ok(installing) = claim.install() {
                installing.done();
            }
        }
        self.tell_of_returns();
        self.set_wanted(0);
        self.publish_limit();
        true
    }

    /// How far the tenant is; one whose memory is not by touch has been [`HandOver::Complete`] from the start.
    #[must_use]
    pub fn handed_over(&self) -> HandOver {
        HandOver::from_byte(self.handed_over.load(Ordering::Acquire))
    }

    /// Whether the tenant has said nothing yet.
    #[must_use]
    pub fn is_booting(&self) -> bool {
        self.handed_over() == HandOver::Booting
    }

    /// Whether the tenant shares what is free.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        matches!(self.handed_over(), HandOver::ByTouch | HandOver::Complete)
    }

    /// Whether its memory was [left to a device](Self::leave_to_device).
    #[must_use]
    pub fn is_left_to_device(&self) -> bool {
        self.handed_over() == HandOver::ToDevice
    }

    /// Whether the tenant may have memory by touching it.
    pub(super) fn comes_by_touch(&self) -> bool {
        self.handed_over() != HandOver::Complete
    }
}
