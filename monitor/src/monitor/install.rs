//! Installs: zeroed memory for evicted frames, for vCPUs that wait for it.
//!
//! They come from vCPU threads, in parallel; two meet only at a frame that both ask for. `evicted`
//! is cleared in an entry after the memory is there, and a frame whose memory did not come stays
//! evicted, in R and in its entry.

use super::{BATCH, Monitor};
use crate::memory::Shortfall;
use llfree::Installing;
use llfree_base::error_line;
use shared_layout::HugeRange;
use std::sync::atomic::Ordering;

/// Why not all frames were installed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InstallError {
    /// There are no such frames; nothing was done.
    #[error("no such frames")]
    OutOfRange,
    /// The host holds one of them; the frames before it were installed.
    #[error("the host holds a frame")]
    Held,
    /// The host has no memory; some frames before the failing one may have been installed.
    #[error("the host has no memory")]
    NoMemory,
    /// The host's kernel refused for another reason; some frames may have been installed.
    #[error("the host's kernel refused")]
    Refused,
    /// The monitor is stopping; some frames may have been installed.
    #[error("the monitor is stopping")]
    Stopping,
}

impl Monitor {
    /// Backs frames with zeroed memory for a tenant that waits for it. Any may be asked for.
    ///
    /// # Errors
    /// [`InstallError`]. Frames before a held one are installed; of those before one that the host
    /// has no memory for, some may be.
    pub fn install(&self, frames: impl Into<HugeRange>) -> Result<(), InstallError> {
        // Nothing interrupts it.
        self.install_while(frames.into(), || true).unwrap_or(Err(InstallError::Stopping))
    }

    /// The same, as long as `go_on` says so, which is asked before each batch of 64 MiB. `None` if it was
    /// interrupted: some of the frames are installed then, and asking again for all of them does the rest.
    ///
    /// # Errors
    /// As above.
    pub fn install_while(&self, frames: HugeRange, go_on: impl Fn() -> bool) -> Option<Result<(), InstallError>> {
        let installed = if frames.is_empty() || frames.end().0 > self.huge_frames() {
            Err(InstallError::OutOfRange)
        } else {
            self.install_batches(frames, go_on)?
        };
        if installed.is_err() {
            self.counters.install_failures.inc();
        }
        Some(installed)
    }

    fn install_batches(&self, frames: HugeRange, go_on: impl Fn() -> bool) -> Option<Result<(), InstallError>> {
        let mut rest = frames;
        while !rest.is_empty() {
            if self.is_stopping() {
                return Some(Err(InstallError::Stopping));
            }
            if !go_on() {
                return None;
            }
            let (batch, behind) = rest.split(BATCH);
            let installed = self.install_batch(batch);
            if installed.is_err() {
                return Some(installed);
            }
            rest = behind;
        }
        Some(Ok(()))
    }

    /// Claims up to a batch of neighbours and backs each run of them that needs it.
    fn install_batch(&self, frames: HugeRange) -> Result<(), InstallError> {
        let mut run: Vec<Installing<'_>> = Vec::new();
        let claimed = frames.iter().try_for_each(|huge| match self.claim_patiently(huge).install() {
            Ok(installing) if installing.needs_memory() => {
                run.push(installing);
                Ok(())
            }
            Ok(installing) => {
                // Installed by another vCPU meanwhile, or asked for twice.
                installing.done();
                self.supply_run(&mut run)
            }
            Err(_) => Err(InstallError::Held),
        });
        // The frames before a held one are still the tenant's due.
        self.supply_run(&mut run).and(claimed)
    }

    fn supply_run(&self, run: &mut Vec<Installing<'_>>) -> Result<(), InstallError> {
        let Some(first) = run.first().map(Installing::huge) else { return Ok(()) };
        let frames = HugeRange::saturating(first, run.len() as u32);
        let comes_by_touch = self.comes_by_touch();
        match self.supply_memory(frames) {
            Ok(()) => {
                run.drain(..).for_each(Installing::done);
                self.counters.installs.add(frames.count().into());
                Ok(())
            }
            Err(Shortfall { installed, error }) => {
                run.drain(..(installed as usize).min(run.len())).for_each(Installing::done);
                self.counters.installs.add(installed.into());
                let (_, failed) = frames.split(installed);
                let number = self.host_failures.tick();
                if let Some(number) = number {
                    let why = error_line(&error);
                    let (first, count) = (failed.first().0, failed.count());
                    log::warn!("install of {count} huge frames from {first} on failed ({number} so far): {why}");
                }
                if comes_by_touch {
                    // What the tenant had by touch may be in these frames, is in use, and stays for an audit to adopt.
                    // Where touches are seen, there is no audit's need: only the first frame can have part of what a
                    // move left, which is used without a fault from now on, and pages that it lacks are lent.
                    if self.supply.userfault().is_some() {
                        run.drain(..run.len().min(1)).for_each(Installing::done);
                    }
                } else {
                    // What the kernel gave before it failed must not stay under frames that R calls
                    // evicted. An audit at work may have seen it: our claims keep it off until it is
                    // over and we have our turn.
                    let _turn = self.discards.lock();
                    if let Err(error) = self.ram.discard(failed)
                        && number.is_some()
                    {
                        log::warn!("and what it left behind could not be discarded: {}", error_line(&error));
                    }
                }
                run.clear();
                Err(if error.is_out_of_memory() { InstallError::NoMemory } else { InstallError::Refused })
            }
        }
    }

    /// Backs claimed frames. Pages of them that are there stay, if the tenant may have memory by touching it.
    pub(super) fn supply_memory(&self, frames: impl Into<HugeRange>) -> Result<(), Shortfall> {
        let supplied =
            if self.comes_by_touch() { self.supply.install_around(frames) } else { self.supply.install(frames) };
        if supplied.is_err() {
            self.host_failed.store(true, Ordering::Release);
        }
        supplied
    }
}
