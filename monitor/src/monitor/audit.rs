//! The audit: R against the kernel's own account of what is resident.
//!
//! A guest can touch any of its RAM, asked or not, and the kernel gives it memory. Only the kernel
//! knows; so it is asked, and what it says beyond R is settled on the spot and counted.

use super::{Monitor, MonitorError};
use crate::memory::{MemoryError, RamResidency};
use llfree::{Census, Residency};
use shared_layout::{HUGE_SIZE, HugeId};
use std::ops::Range;
use std::sync::atomic::Ordering;

/// What is resident, what may be, and what the entries claim, all of one moment.
#[derive(Clone, Copy, Debug)]
pub struct Picture {
    /// The kernel's account of guest RAM.
    pub residency: RamResidency,
    /// Huge frames that the guest may hold.
    pub limit: u32,
    /// R and the entries.
    pub census: Census,
}

impl Monitor {
    /// Looks at everything between two batches of discards, so that no figure is of another moment than
    /// the others. Installs may go on, within the limit.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub fn picture(&self) -> Result<Picture, MonitorError> {
        let _turn = self.discards.lock();
        let residency = self.ram.residency().map_err(MonitorError::Residency)?;
        Ok(Picture { residency, limit: self.limit(), census: self.census() })
    }

    /// Compares R with the kernel's accounting, and repairs what a guest did unnoticed:
    /// memory that appeared under a held frame is discarded again, under an evicted one it is
    /// adopted as installed. Returns the frames concerned, which also count as violations, unless they are evicted and the
    /// tenant may still touch those. What the kernel keeps of them does not keep it from settling the others.
    ///
    /// It waits for the batch of discards at work, not for the pass that the batch belongs to.
    ///
    /// # Errors
    /// If the kernel does not answer, or does not take memory back.
    pub fn audit(&self) -> Result<u64, MonitorError> {
        // Nobody may discard between the kernel's answer and our look at R. Between two batches a
        // pass has no frame in hand, so R is settled. Installs may go on: they only ever make R
        // agree with the kernel, and a frame that one is at is left to the next audit.
        let _turn = self.discards.lock();
        let (comes_by_touch, excused) = (self.comes_by_touch(), self.touched_before.load(Ordering::Relaxed));
        let mut suspects = Vec::new();
        let see = |range: Range<u64>| {
            for huge in (range.start / HUGE_SIZE) as u32..range.end.div_ceil(HUGE_SIZE) as u32 {
                if self.host().residency(HugeId(huge)).is_some_and(|r| r != Residency::Installed) {
                    suspects.push(HugeId(huge));
                }
            }
        };
        self.ram.for_each_resident(see).map_err(MonitorError::Residency)?;
        suspects.dedup();
        let (mut violations, mut held) = (0, 0);
        let mut kept = None;
        for huge in suspects {
            match self.settle(huge) {
                // It had no memory when it was held: a pass sees to that, as long as touches are excused.
                Ok(Some(Residency::Held)) => held += 1,
                Ok(Some(_)) if excused => self.counters.boot_touches.inc(),
                Ok(Some(_)) => violations += 1,
                Ok(None) => {}
                Err(source) => {
                    let (_, frames, _) = kept.get_or_insert((huge.0, 0, source));
                    *frames += 1;
                }
            }
        }
        if !comes_by_touch {
            self.touched_before.store(false, Ordering::Relaxed);
        }
        violations += held;
        if violations > 0 {
            self.counters.held_violations.add(held);
            self.counters.violations.add(violations);
            if self.violations_found.tick().is_some() {
                log::warn!(
                    "the guest touched {violations} huge frames that it had not asked for, {} since it started; \
                     the memory of held frames was taken back",
                    self.counters.violations.get()
                );
            }
        }
        kept.map_or(Ok(violations), |(first, frames, source)| Err(MonitorError::Repair { first, frames, source }))
    }

    /// Makes R and the kernel agree about a frame that has memory. Says what R called it, if that is
    /// news: not if they agree by now, nor if its pages were lent.
    fn settle(&self, huge: HugeId) -> Result<Option<Residency>, MemoryError> {
        let Some(claim) = self.host().claim(huge) else { return Ok(None) };
        let residency = claim.residency();
        let lent = self.lent.forget(huge);
        match residency {
            Residency::Installed => return Ok(None),
            Residency::Evicted if !lent => {
                if let Ok(installing) = claim.install() {
                    installing.done();
                }
            }
            Residency::Evicted | Residency::Held => {
                self.ram.discard(huge)?;
            }
        }
        Ok((!lent).then_some(residency))
    }
}
