//! The monitor: the host-side owner of one guest's memory.
//!
//! It alone discards and populates guest RAM, and it keeps the residency R, which no guest can
//! reach, in step with what it did; [`llfree::Host`] gives the order of the steps. Passes that
//! change the limit run one at a time; installs come from vCPU threads, in parallel, and wait at
//! most for the one bounded batch that has their own frame. Nothing here believes a guest: what
//! the entries claim decides where to look and is reported as a claim, never how much memory there
//! is. That comes from R and, cross-checked by [`Monitor::audit`], from the kernel.

use crate::boot::Platform;
use crate::memory::{GuestRam, MemoryError};
use llfree::{Census, Claim, Host, Installing, Reclaim, Reclaimed, Residency};
use shared_layout::{ControlWord, HUGE_SIZE, HugeEntry, HugeId, Status};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Frames in one batch of discards: 64 MiB, so that an install behind it waits microseconds.
const BATCH: usize = 32;

/// What one pass did, in huge frames.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Pass {
    /// Frames that changed state.
    pub frames: u32,
    /// Of those, frames that had memory behind them, which went back to the host's kernel.
    pub discarded: u32,
}

impl std::ops::AddAssign for Pass {
    fn add_assign(&mut self, other: Self) {
        self.frames += other.frames;
        self.discarded += other.discarded;
    }
}

/// Events since the VM started.
#[derive(Default, Debug)]
pub struct Counters {
    /// Frames that memory was put behind because a vCPU asked.
    pub installs: AtomicU64,
    /// Install calls that ended with another status than `Ok`.
    pub install_failures: AtomicU64,
    /// Huge frames that a guest touched without having asked for them.
    pub violations: AtomicU64,
}

/// A pass that had to stop. What it did before stands, and no frame is lost.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The kernel did not take memory back; those frames were given back to the guest.
    #[error("the kernel refused to take back {frames} huge frames from frame {first} on; they stay with the guest")]
    Discard {
        /// First frame of the run.
        first: u32,
        /// Length of the run.
        frames: u32,
        /// What the kernel said.
        source: MemoryError,
    },
    /// The kernel did not say what is resident.
    #[error("cannot ask the kernel which guest memory is resident")]
    Residency(#[source] MemoryError),
}

/// The host-side owner of one guest's memory; shared by vCPU threads and the control plane.
pub struct Monitor {
    ram: Arc<GuestRam>,
    platform: Arc<Platform>,
    residency: Box<[AtomicU8]>,
    /// Held for the length of a pass; the value is the frame where the next one starts.
    passes: Mutex<HugeId>,
    /// Signalled when a batch has let go of its frames.
    batch_over: (Mutex<()>, Condvar),
    /// See [`Counters`].
    pub counters: Counters,
}

impl Monitor {
    /// Takes charge of `ram`: every frame evicted, except `image`, which is installed and belongs
    /// to the guest, and frame 0, which nobody may use, so that null pointers fault.
    ///
    /// # Errors
    /// If there is no memory for the image.
    pub fn new(ram: Arc<GuestRam>, platform: Arc<Platform>, image: std::ops::Range<u32>) -> Result<Self, MemoryError> {
        let residency = (0..ram.huge_frames()).map(|_| AtomicU8::new(Residency::Evicted as u8)).collect();
        let monitor = Self {
            ram,
            platform,
            residency,
            passes: Mutex::new(HugeId(0)),
            batch_over: (Mutex::new(()), Condvar::new()),
            counters: Counters::default(),
        };
        let entries = monitor.platform.entries();
        let claim_for_guest = |huge: u32, entry: HugeEntry| {
            if let Some(word) = entries.get(huge as usize) {
                word.store(entry.bits(), Ordering::Relaxed);
            }
        };
        claim_for_guest(0, HugeEntry::HUGE_EVICTED);
        for huge in image.clone() {
            monitor.ram.populate(HugeId(huge), 1)?;
            claim_for_guest(huge, HugeEntry::HUGE_INSTALLED);
            monitor.residency[huge as usize].store(Residency::Installed as u8, Ordering::Relaxed);
        }
        monitor.publish_limit();
        Ok(monitor)
    }

    /// Huge frames of RAM.
    #[must_use]
    pub fn huge_frames(&self) -> u32 {
        self.ram.huge_frames()
    }

    /// The guest's memory.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Huge frames that the guest may hold: all that R does not call held.
    #[must_use]
    pub fn limit(&self) -> u32 {
        let held = self.residency.iter().filter(|r| is_held(r.load(Ordering::Relaxed))).count();
        self.huge_frames() - held as u32
    }

    /// What R knows and the entries claim, added up.
    #[must_use]
    pub fn census(&self) -> Census {
        self.host().census()
    }

    /// Huge frames that the host still wants from the guest.
    #[must_use]
    pub fn wanted(&self) -> u64 {
        self.platform.control(ControlWord::Wanted).load(Ordering::Relaxed)
    }

    /// One pass towards a limit of `target` huge frames: holds what is free, frames with memory
    /// behind them first (those are what the host gains), then evicted ones, which cost no call.
    /// What is missing afterwards becomes the header's `wanted`.
    ///
    /// # Errors
    /// [`MonitorError::Discard`]; the frames taken before stay taken.
    pub fn shrink(&self, target: u32) -> Result<Pass, MonitorError> {
        let mut cursor = self.begin_pass();
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
        let _cursor = self.begin_pass();
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
        // Release: a guest that sees the new epoch sees the entries it stands for.
        self.platform.control(ControlWord::ReturnEpoch).fetch_add(1, Ordering::Release);
        self.set_wanted(0);
        self.publish_limit();
        pass
    }

    /// Takes memory from behind at most `frames` free frames, which stay free for the guest.
    ///
    /// # Errors
    /// [`MonitorError::Discard`]; the frames taken before stay taken.
    pub fn evict(&self, frames: u32) -> Result<Pass, MonitorError> {
        let mut cursor = self.begin_pass();
        self.reclaim_pass(&mut cursor, frames, Residency::Installed, Reclaim::Soft)
    }

    /// Puts zeroed memory behind `count` frames from `first` on, for a vCPU that waits for it.
    /// Any numbers may be asked for; frames before a failing one stay installed.
    pub fn install(&self, first: HugeId, count: u32) -> Status {
        let status = match first.0.checked_add(count) {
            Some(end) if count > 0 && end <= self.huge_frames() => (first.0..end)
                .step_by(BATCH)
                .map(|start| self.install_batch(start..end.min(start + BATCH as u32)))
                .find(|status| *status != Status::Ok)
                .unwrap_or(Status::Ok),
            _ => Status::BadArgument,
        };
        if status != Status::Ok {
            self.counters.install_failures.fetch_add(1, Ordering::Relaxed);
        }
        status
    }

    /// Compares R with the kernel's accounting, and repairs what a guest did behind our back:
    /// memory that appeared behind a held frame is discarded again, behind an evicted one it is
    /// adopted as installed. Returns the frames concerned, which also count as violations.
    ///
    /// # Errors
    /// If the kernel does not answer, or does not take memory back.
    pub fn audit(&self) -> Result<u64, MonitorError> {
        // No pass may run: it would discard between the kernel's answer and our look at R.
        // Installs may: they only ever make R agree with the kernel.
        let _pass = self.begin_pass();
        let mut suspects = Vec::new();
        let see = |range: std::ops::Range<u64>| {
            for huge in (range.start / HUGE_SIZE) as u32..range.end.div_ceil(HUGE_SIZE) as u32 {
                if self.host().residency(HugeId(huge)).is_some_and(|r| r != Residency::Installed) {
                    suspects.push(HugeId(huge));
                }
            }
        };
        self.ram.for_each_resident(see).map_err(MonitorError::Residency)?;
        suspects.dedup();
        let mut violations = 0;
        for huge in suspects {
            let Some(claim) = self.host().claim(huge) else { continue };
            match claim.residency() {
                Residency::Installed => continue,
                Residency::Evicted => {
                    if let Ok(installing) = claim.install() {
                        installing.done();
                    }
                }
                Residency::Held => {
                    let discard = |source| MonitorError::Discard { first: huge.0, frames: 1, source };
                    self.ram.discard(huge, 1).map_err(discard)?;
                }
            }
            violations += 1;
        }
        self.counters.violations.fetch_add(violations, Ordering::Relaxed);
        Ok(violations)
    }

    fn host(&self) -> Host<'_> {
        Host::new(self.platform.entries(), &self.residency)
            .expect("both tables were made with one element a huge frame of the same RAM")
    }

    fn begin_pass(&self) -> MutexGuard<'_, HugeId> {
        // A pass leaves no state behind that a panic could tear: claims undo themselves.
        self.passes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reclaim_pass(
        &self,
        cursor: &mut HugeId,
        most: u32,
        residency: Residency,
        how: Reclaim,
    ) -> Result<Pass, MonitorError> {
        let mut pass = Pass::default();
        if most == 0 {
            return Ok(pass);
        }
        let mut batch = Vec::with_capacity(BATCH);
        for (huge, entry, r) in self.host().scan(*cursor) {
            if r != residency || !entry.is_all_free() {
                continue;
            }
            let Some(reclaimed) = self.host().claim(huge).and_then(|claim| claim.reclaim(how).ok()) else { continue };
            *cursor = HugeId(huge.0 + 1);
            pass.frames += 1;
            // R may have changed between scan and claim.
            if reclaimed.has_memory() {
                pass.discarded += 1;
                batch.push(reclaimed);
            } else {
                reclaimed.done();
            }
            if batch.len() == BATCH || pass.frames == most {
                self.discard_batch(&mut batch)?;
            }
            if pass.frames == most {
                break;
            }
        }
        self.discard_batch(&mut batch)?;
        Ok(pass)
    }

    /// Discards the memory of a batch, one system call a run of neighbours.
    fn discard_batch(&self, batch: &mut Vec<Reclaimed<'_>>) -> Result<(), MonitorError> {
        let mut result = Ok(());
        let mut rest = batch.drain(..).peekable();
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

    /// Claims up to a batch of neighbours and populates each run of them that needs it.
    fn install_batch(&self, range: std::ops::Range<u32>) -> Status {
        let mut run: Vec<Installing<'_>> = Vec::new();
        let mut status = Status::Ok;
        for huge in range {
            match self.claim_patiently(HugeId(huge)).install() {
                Ok(installing) if installing.needs_memory() => run.push(installing),
                Ok(installing) => {
                    // Installed by another vCPU meanwhile, or asked for twice.
                    installing.done();
                    status = self.populate_run(&mut run);
                }
                Err(_) => status = Status::Held,
            }
            if status != Status::Ok {
                break;
            }
        }
        // The frames before a held one are still the guest's due.
        match self.populate_run(&mut run) {
            Status::Ok => status,
            failed => failed,
        }
    }

    fn populate_run(&self, run: &mut Vec<Installing<'_>>) -> Status {
        let Some(first) = run.first().map(Installing::huge) else { return Status::Ok };
        let frames = run.len() as u32;
        match self.ram.populate(first, frames) {
            Ok(()) => {
                run.drain(..).for_each(Installing::done);
                self.counters.installs.fetch_add(u64::from(frames), Ordering::Relaxed);
                Status::Ok
            }
            Err(error) => {
                log::warn!("install of {frames} huge frames from {} on failed: {error}", first.0);
                // What the kernel populated before it failed must not stay behind frames that R
                // calls evicted.
                if let Err(error) = self.ram.discard(first, frames) {
                    log::warn!("and what it left behind could not be discarded: {error}");
                }
                run.clear();
                if error.is_out_of_memory() { Status::NoMemory } else { Status::HostError }
            }
        }
    }

    /// Claims a frame of the table, waiting for the batch that may have it.
    fn claim_patiently(&self, huge: HugeId) -> Claim<'_> {
        let host = self.host();
        loop {
            if let Some(claim) = host.claim(huge) {
                return claim;
            }
            let (lock, batch_over) = &self.batch_over;
            let guard = lock.lock().unwrap_or_else(PoisonError::into_inner);
            // The timeout covers a notification that came before we slept, and other vCPUs'
            // installs, which are over sooner than a wake-up would take.
            let _ = batch_over.wait_timeout(guard, Duration::from_micros(200));
        }
    }

    fn set_wanted(&self, huge_frames: u64) {
        self.platform.control(ControlWord::Wanted).store(huge_frames, Ordering::Relaxed);
    }

    fn publish_limit(&self) {
        self.platform.control(ControlWord::Limit).store(u64::from(self.limit()), Ordering::Relaxed);
    }
}

fn is_held(residency: u8) -> bool {
    residency & 0x7f == Residency::Held as u8
}
