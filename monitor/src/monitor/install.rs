//! Installs: zeroed memory behind evicted frames, for vCPUs that wait for it.
//!
//! They come from vCPU threads, in parallel; two meet only at a frame that both ask for. `evicted`
//! is cleared in an entry after the memory is there, and a frame whose memory did not come stays
//! evicted, in R and in its entry.

use super::{BATCH, Monitor};
use crate::memory::Shortfall;
use llfree::Installing;
use llfree_base::error_line;
use shared_layout::{HugeId, Status};
use std::sync::atomic::Ordering;

impl Monitor {
    /// Puts zeroed memory behind `count` frames from `first` on, for a vCPU that waits for it.
    /// Any numbers may be asked for. Frames before a held one are installed; of those before one
    /// that the host has no memory for, some may be.
    pub fn install(&self, first: HugeId, count: u32) -> Status {
        // Nothing interrupts it.
        self.install_while(first, count, || true).unwrap_or(Status::HostError)
    }

    /// The same, as long as `go_on` says so, which is asked before each batch of 64 MiB. `None` if it was
    /// interrupted: some of the frames are installed then, and asking again for all of them does the rest.
    pub fn install_while(&self, first: HugeId, count: u32, go_on: impl Fn() -> bool) -> Option<Status> {
        let status = match first.0.checked_add(count) {
            Some(end) if count > 0 && end <= self.huge_frames() => self.install_batches(first.0..end, go_on)?,
            _ => Status::BadArgument,
        };
        if status != Status::Ok {
            self.counters.install_failures.fetch_add(1, Ordering::Relaxed);
        }
        Some(status)
    }

    fn install_batches(&self, range: std::ops::Range<u32>, go_on: impl Fn() -> bool) -> Option<Status> {
        for start in range.clone().step_by(BATCH as usize) {
            if self.is_stopping() {
                return Some(Status::HostError);
            }
            if !go_on() {
                return None;
            }
            let status = self.install_batch(start..range.end.min(start + BATCH));
            if status != Status::Ok {
                return Some(status);
            }
        }
        Some(Status::Ok)
    }

    /// Claims up to a batch of neighbours and puts memory behind each run of them that needs it.
    fn install_batch(&self, range: std::ops::Range<u32>) -> Status {
        let mut run: Vec<Installing<'_>> = Vec::new();
        let mut status = Status::Ok;
        for huge in range {
            match self.claim_patiently(HugeId(huge)).install() {
                Ok(installing) if installing.needs_memory() => run.push(installing),
                Ok(installing) => {
                    // Installed by another vCPU meanwhile, or asked for twice.
                    installing.done();
                    status = self.supply_run(&mut run);
                }
                Err(_) => status = Status::Held,
            }
            if status != Status::Ok {
                break;
            }
        }
        // The frames before a held one are still the guest's due.
        match self.supply_run(&mut run) {
            Status::Ok => status,
            failed => failed,
        }
    }

    fn supply_run(&self, run: &mut Vec<Installing<'_>>) -> Status {
        let Some(first) = run.first().map(Installing::huge) else { return Status::Ok };
        let frames = run.len() as u32;
        match self.supply.install(first, frames) {
            Ok(()) => {
                run.drain(..).for_each(Installing::done);
                self.counters.installs.fetch_add(u64::from(frames), Ordering::Relaxed);
                Status::Ok
            }
            Err(Shortfall { installed, error }) => {
                run.drain(..(installed as usize).min(run.len())).for_each(Installing::done);
                self.counters.installs.fetch_add(u64::from(installed), Ordering::Relaxed);
                let (first, frames) = (HugeId(first.0 + installed), frames - installed);
                let number = self.host_failures.tick();
                if let Some(number) = number {
                    let why = error_line(&error);
                    log::warn!("install of {frames} huge frames from {} on failed ({number} so far): {why}", first.0);
                }
                // What the kernel gave before it failed must not stay behind frames that R calls
                // evicted. An audit at work may have seen it: our claims keep it off until it is
                // over and we have our turn.
                let _turn = self.discards.lock();
                if let Err(error) = self.ram.discard(first, frames)
                    && number.is_some()
                {
                    log::warn!("and what it left behind could not be discarded: {}", error_line(&error));
                }
                run.clear();
                if error.is_out_of_memory() { Status::NoMemory } else { Status::HostError }
            }
        }
    }
}
