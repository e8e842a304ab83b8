//! Passes over the table: hold and evict what is free, return what is held.
//!
//! A pass owns `passes` for its length and hands the turn to discard on after each batch. A frame
//! that it claimed is given back as it was when the kernel refuses its memory, so a pass that fails
//! half-way loses nothing.

use super::{BATCH, Monitor, MonitorError, Pass, is_held, lock};
use llfree::{Reclaim, Reclaimed, Residency};
use shared_layout::{ControlWord, HugeId};
use std::sync::atomic::Ordering;

impl Monitor {
    /// One pass towards a limit of `target` huge frames: holds what is free, frames with memory
    /// behind them first (those are what the host gains), then evicted ones, which cost no call.
    /// What is missing afterwards becomes the header's `wanted`.
    ///
    /// # Errors
    /// [`MonitorError::Discard`]; the frames taken before stay taken.
    pub fn shrink(&self, target: u32) -> Result<Pass, MonitorError> {
        let mut cursor = lock(&self.passes);
        let mut pass = Pass::default();
        let excess = self.limit().saturating_sub(target);
        let result = [Residency::Installed, Residency::Evicted].into_iter().try_for_each(|residency| {
            let missing = excess - pass.frames;
            pass += self.reclaim_pass(&mut cursor, missing, residency, Reclaim::Hard)?;
            Ok(())
        });
        self.set_wanted(u64::from(self.limit().saturating_sub(target)));
        self.publish_limit();
        result.map(|()| pass)
    }

    /// Returns held frames until the limit is `target` huge frames. Touches no memory and cannot
    /// fail: a frame whose entry the guest overwrote is returned in R all the same.
    pub fn grow(&self, target: u32) -> Pass {
        let _cursor = lock(&self.passes);
        let missing = target.saturating_sub(self.limit());
        let mut pass = Pass::default();
        for (index, word) in self.residency.iter().enumerate() {
            if pass.frames == missing {
                break;
            }
            if !is_held(word.load(Ordering::Relaxed)) {
                continue;
            }
            // An install that asks for a held frame has it for an instant before it is refused.
            if self.claim_patiently(HugeId(index as u32)).release().is_ok() {
                pass.frames += 1;
            }
        }
        let epoch = self.return_epoch.fetch_add(1, Ordering::Relaxed) + 1;
        self.platform.set_control(ControlWord::ReturnEpoch, epoch);
        self.set_wanted(0);
        self.publish_limit();
        pass
    }

    /// Takes memory from behind at most `frames` free frames, which stay free for the guest.
    ///
    /// # Errors
    /// [`MonitorError::Discard`]; the frames taken before stay taken.
    pub fn evict(&self, frames: u32) -> Result<Pass, MonitorError> {
        let mut cursor = lock(&self.passes);
        self.reclaim_pass(&mut cursor, frames, Residency::Installed, Reclaim::Soft)
    }

    fn reclaim_pass(
        &self,
        cursor: &mut HugeId,
        most: u32,
        residency: Residency,
        how: Reclaim,
    ) -> Result<Pass, MonitorError> {
        let mut pass = Pass::default();
        let mut free = self.host().scan(*cursor).filter(|(_, entry, r)| *r == residency && entry.is_all_free());
        while pass.frames < most && !self.is_stopping() {
            let _turn = self.discards.take();
            let due = BATCH.min(most - pass.frames);
            let mut step = Pass::default();
            let mut batch = Vec::with_capacity(BATCH as usize);
            while step.frames < due
                && let Some((huge, ..)) = free.next()
            {
                let Some(reclaimed) = self.host().claim(huge).and_then(|claim| claim.reclaim(how).ok()) else {
                    continue;
                };
                *cursor = HugeId(huge.0 + 1);
                step.frames += 1;
                // R may have changed between scan and claim.
                if reclaimed.has_memory() {
                    step.discarded += 1;
                    batch.push(reclaimed);
                } else {
                    reclaimed.done();
                }
            }
            self.discard_batch(batch)?;
            pass += step;
            if step.frames < due {
                break;
            }
        }
        Ok(pass)
    }

    /// Discards the memory of a batch, one system call a run of neighbours.
    fn discard_batch(&self, batch: Vec<Reclaimed<'_>>) -> Result<(), MonitorError> {
        let mut result = Ok(());
        let mut rest = batch.into_iter().peekable();
        while let Some(reclaimed) = rest.next() {
            let first = reclaimed.huge();
            let mut run = vec![reclaimed];
            while let Some(next) = rest.next_if(|next| next.huge().0 == first.0 + run.len() as u32) {
                run.push(next);
            }
            let frames = run.len() as u32;
            match self.ram.discard(first, frames) {
                Ok(()) => run.into_iter().for_each(Reclaimed::done),
                // Dropping the run gives its frames back as they were.
                Err(source) => result = Err(MonitorError::Discard { first: first.0, frames, source }),
            }
        }
        drop(rest);
        self.batch_over.1.notify_all();
        result
    }
}
