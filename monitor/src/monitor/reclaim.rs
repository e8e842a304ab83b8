//! Passes over the table: hold and evict what is free, return what is held.
//!
//! A pass owns `passes` for its length and hands the turn to discard on after each batch. A frame
//! that it claimed is given back as it was when the kernel refuses its memory, so a pass that fails
//! half-way loses nothing.

use super::{BATCH, Monitor, MonitorError, Pass, is_held};
use llfree::host::Installer;
use llfree::{Reclaim, Reclaimed, Residency};
use llfree_base::lock;
use shared_layout::{HUGE_SIZE, HugeEntry, HugeId, HugeRange};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Frames in a batch of discards at most. Each batch costs 20 us beyond its frames, for KVM and all
/// CPUs let go of the range together: with 32 frames that is a tenth of a reclaim.
pub(crate) const LARGEST_BATCH: u32 = 256;
/// The length of a batch: so long may a guest that needs one of its frames have to wait, or for the
/// smallest batch where memory lies in 4 KiB pages.
const AIM: Duration = Duration::from_millis(1);

/// The size of the batch after one of `frames` that took so long.
pub(crate) fn next_batch(frames: u32, took: Duration) -> u32 {
    let aimed = u128::from(frames) * AIM.as_nanos() / took.as_nanos().max(1);
    aimed.clamp(BATCH.into(), LARGEST_BATCH.into()) as u32
}

impl Monitor {
    /// One pass towards a limit of `target` huge frames: holds what is free, frames with memory
    /// behind them first (those are what the host gains), then evicted ones, which cost no call unless the tenant may have touched them.
    /// What is missing afterwards becomes the header's `wanted`. As many free frames stay as the tenant
    /// [asks for](Self::floor).
    ///
    /// # Errors
    /// [`MonitorError::Discard`]; the frames taken before stay taken.
    pub fn shrink(&self, target: u32) -> Result<Pass, MonitorError> {
        self.shrink_leaving(target, self.floor())
    }

    /// The same, whatever the tenant asks for.
    ///
    /// # Errors
    /// As [`shrink`](Self::shrink).
    pub fn shrink_by_force(&self, target: u32) -> Result<Pass, MonitorError> {
        self.shrink_leaving(target, 0)
    }

    fn shrink_leaving(&self, target: u32, floor: u32) -> Result<Pass, MonitorError> {
        let mut cursor = lock(&self.passes);
        let mut pass = Pass::default();
        let excess = self.limit().saturating_sub(target);
        let result = [Residency::Installed, Residency::Evicted].into_iter().try_for_each(|residency| {
            let missing = excess - pass.frames;
            let more = self.reclaim_pass(&mut cursor, missing, residency, (Reclaim::Hard, floor));
            pass += more.map_err(|error| error.after(pass))?;
            Ok(())
        });
        if result.is_err() {
            // What the kernel kept is the tenant's again.
            self.tell_of_returns();
        }
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
        self.announce_returns();
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
        self.tell_of_returns();
        self.set_wanted(0);
        self.publish_limit();
        pass
    }

    /// Takes the memory of at most `frames` free frames, which stay free for the guest. Those that it
    /// [asks for](Self::floor) keep theirs.
    ///
    /// # Errors
    /// [`MonitorError::Discard`]; the frames taken before stay taken.
    pub fn evict(&self, frames: u32) -> Result<Pass, MonitorError> {
        self.evict_leaving(frames, self.floor())
    }

    /// The same, whatever the tenant asks for.
    ///
    /// # Errors
    /// As [`evict`](Self::evict).
    pub fn evict_by_force(&self, frames: u32) -> Result<Pass, MonitorError> {
        self.evict_leaving(frames, 0)
    }

    fn evict_leaving(&self, frames: u32, floor: u32) -> Result<Pass, MonitorError> {
        let mut cursor = lock(&self.passes);
        let result = self.reclaim_pass(&mut cursor, frames, Residency::Installed, (Reclaim::Soft, floor));
        self.after_evictions(result)
    }

    /// Takes the memory of those of `frames` that are still free, which stay free. No more than
    /// a [`LARGEST_BATCH`] of them, in ascending order, so that neighbours go back together.
    ///
    /// # Errors
    /// [`MonitorError::Discard`]; the frames taken before stay taken.
    pub(crate) fn evict_these(&self, frames: &[HugeId]) -> Result<Pass, MonitorError> {
        let _cursor = lock(&self.passes);
        let _turn = self.discards.lock();
        let mut batch = Batch::default();
        for huge in frames.iter().take(LARGEST_BATCH as usize) {
            if let Some(claim) = self.host().claim(*huge)
                && let Ok(reclaimed) = claim.reclaim(Reclaim::Soft)
            {
                batch.add(reclaimed);
            }
        }
        let result = self.settle_batch(&mut batch);
        self.after_evictions(result)
    }

    fn reclaim_pass(
        &self,
        cursor: &mut HugeId,
        most: u32,
        residency: Residency,
        (how, floor): (Reclaim, u32),
    ) -> Result<Pass, MonitorError> {
        let mut pass = Pass::default();
        let mut batch = Batch::default();
        let mut size = BATCH;
        let host = self.host();
        let mut free = host.scan(*cursor).filter(|(_, entry, r)| *r == residency && entry.is_all_free());
        while pass.frames < most && !self.is_stopping() {
            let _turn = self.discards.lock();
            let due = size.min(most - pass.frames).min(self.free_above(floor, how));
            if due == 0 {
                break;
            }
            let start = Instant::now();
            // Only under `discards`, where audits end it.
            batch.touched = how == Reclaim::Hard && self.touched_before.load(Ordering::Relaxed);
            while batch.frames < due
                && let Some((huge, ..)) = free.next()
            {
                let Some(reclaimed) = host.claim(huge).and_then(|claim| claim.reclaim(how).ok()) else { continue };
                *cursor = HugeId(huge.0 + 1);
                batch.add(reclaimed);
            }
            let over = batch.frames < due;
            pass += self.settle_batch(&mut batch).map_err(|error| error.after(pass))?;
            if over {
                break;
            }
            size = next_batch(due, start.elapsed());
        }
        Ok(pass)
    }

    /// Free frames beyond `floor`: for a soft reclaim those with memory, else all. Looked at anew for each batch, as
    /// the tenant goes on meanwhile.
    fn free_above(&self, floor: u32, how: Reclaim) -> u32 {
        if floor == 0 {
            return u32::MAX;
        }
        let counts = |entry: HugeEntry| entry.is_all_free() && (how == Reclaim::Hard || !entry.is_evicted());
        let free = self.host().scan(HugeId(0)).filter(|(_, entry, _)| counts(*entry)).count();
        // RAM's huge frames fit a u32.
        (free as u32).saturating_sub(floor)
    }

    /// Discards the memory of a batch, which is empty afterwards. Frames that the kernel refuses go
    /// back as they were.
    fn settle_batch(&self, batch: &mut Batch<'_>) -> Result<Pass, MonitorError> {
        let mut pass = Pass { frames: batch.frames, discarded: batch.reclaimed.len() as u32, freed_bytes: 0 };
        batch.frames = 0;
        if batch.reclaimed.is_empty() {
            return Ok(pass);
        }
        if self.installer == Installer::Tenant {
            // While they are held: a tenant that finds no frame held, and this as it was before it looked, missed none.
            self.announce_returns();
        }
        let before = self.ram.resident_in(&batch.runs);
        let mut kept = Vec::new();
        let mut refused = None;
        let mut reclaimed = batch.reclaimed.drain(..);
        self.ram.discard_runs(&batch.runs, |run, result| {
            let frames = reclaimed.by_ref().take(run.count() as usize);
            match result {
                Ok(()) => frames.for_each(Reclaimed::done),
                Err(source) => {
                    if refused.is_none() {
                        self.announce_returns();
                    }
                    // Dropping them gives them back.
                    frames.for_each(drop);
                    pass.frames -= run.count();
                    pass.discarded -= run.count();
                    kept.push(run);
                    let (_, frames, _) = refused.get_or_insert((run.first().0, 0, source));
                    *frames += run.count();
                }
            }
        });
        drop(reclaimed);
        batch.runs.clear();
        let all = u64::from(pass.discarded) * HUGE_SIZE;
        pass.freed_bytes = before.map_or(all, |before| {
            let still = if kept.is_empty() { Some(0) } else { self.ram.resident_in(&kept) };
            before.saturating_sub(still.unwrap_or(0)).min(all)
        });
        self.batch_over.1.notify_all();
        refused.map_or(Ok(pass), |(first, frames, source)| {
            Err(MonitorError::Discard { first, frames, done: pass, source })
        })
    }
}

/// Frames that were taken and whose memory goes back together.
struct Batch<'a> {
    /// All of them, also those that had no memory and are settled.
    frames: u32,
    /// Whether evicted ones may have memory that the tenant had by touch, before it gave them.
    touched: bool,
    reclaimed: Vec<Reclaimed<'a>>,
    /// The same as runs of neighbours.
    runs: Vec<HugeRange>,
}

impl Default for Batch<'_> {
    fn default() -> Self {
        // Once a pass, not once a batch: it never grows beyond this.
        let room = LARGEST_BATCH as usize;
        Self { frames: 0, touched: false, reclaimed: Vec::with_capacity(room), runs: Vec::with_capacity(room) }
    }
}

impl<'a> Batch<'a> {
    fn add(&mut self, reclaimed: Reclaimed<'a>) {
        self.frames += 1;
        // R may have changed between scan and claim.
        if !reclaimed.has_memory() && !self.touched {
            return reclaimed.done();
        }
        let huge = reclaimed.huge();
        if !self.runs.last_mut().is_some_and(|run| run.append(huge)) {
            self.runs.push(huge.into());
        }
        self.reclaimed.push(reclaimed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_take_a_millisecond_or_are_as_small_as_can_be() {
        let next = |frames, micros| next_batch(frames, Duration::from_micros(micros));
        assert_eq!(next(BATCH, 160), 200);
        assert_eq!(next(200, 1000), 200);
        assert_eq!(next(200, 4000), 50);
        assert_eq!(next(50, 20_000), BATCH, "4 KiB pages");
        assert_eq!(next(BATCH, 0), LARGEST_BATCH, "no memory behind it");
    }
}
