//! The check of a live VM: is any frame lost, or owned twice, as far as the host can know?
//!
//! It only looks. Entries are compared with R under a claim each, R with the kernel's account under
//! the turn to discard, so nothing waits longer for it than for a batch. What it finds in words that
//! a guest can write is that guest's claim; the rest is a fault of the host. Each frame is looked at
//! once, one that somebody is at a few times more, and only the first few of each kind are kept.

use super::{BATCH, CLAIM_POLL, Monitor, MonitorError};
use llfree::host::Installer;
use llfree::{Census, Claim, Contradiction, Residency};
use llfree_base::check::Check;
use llfree_base::lock;
use shared_layout::{HUGE_SIZE, HostWord, HugeId};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Frames checked in one turn: some tens of microseconds, less than a batch of discards takes.
const TURN: u32 = 32 * BATCH;
/// Frames of each kind that a finding names.
const NAMED: usize = 8;
/// How long an install may be at a frame before its claim counts as forgotten.
const LONGEST_CLAIM: Duration = Duration::from_secs(10);

/// One kind of contradiction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// What was compared.
    pub check: Check,
    /// How many frames, or words of the header, are concerned.
    pub count: u64,
    /// The first few of the frames.
    pub first: Vec<HugeId>,
}

/// What a validation saw.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Validation {
    /// The table, added up afterwards.
    pub census: Census,
    /// What contradicts what; empty if all is well.
    pub findings: Vec<Finding>,
}

/// What the kernel has for a frame.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Found {
    Nothing,
    /// The page of zeroes that all share, in some places.
    Zeroes,
    /// Memory or swap, in some places.
    Memory,
}

impl Validation {
    fn note(&mut self, check: Check, huge: Option<HugeId>) {
        let known = self.findings.iter().position(|finding| finding.check == check);
        let index = known.unwrap_or_else(|| {
            self.findings.push(Finding { check, count: 0, first: Vec::new() });
            self.findings.len() - 1
        });
        let finding = &mut self.findings[index];
        finding.count += 1;
        if let Some(huge) = huge
            && finding.first.len() < NAMED
        {
            finding.first.push(huge);
        }
    }
}

impl Monitor {
    /// Checks that entries, R, the kernel's account, limit and header agree, while the VM runs.
    ///
    /// # Errors
    /// If the kernel does not say what is resident.
    pub fn validate(&self) -> Result<Validation, MonitorError> {
        let mut seen = Validation::default();
        self.validate_entries(&mut seen);
        self.validate_memory(&mut seen)?;
        self.validate_header(&mut seen);
        seen.census = self.census();
        seen.findings.sort_by_key(|finding| finding.check as u8);
        Ok(seen)
    }

    fn validate_entries(&self, seen: &mut Validation) {
        let host = self.host();
        let mut busy = Vec::new();
        for start in (0..self.huge_frames()).step_by(TURN as usize) {
            // With the turn in hand no reclaim finds a frame busy because of us, and passes it over.
            let _turn = self.discards.lock();
            for huge in (start..self.huge_frames().min(start + TURN)).map(HugeId) {
                match host.claim(huge) {
                    Some(claim) => check_entry(&claim, seen),
                    None => busy.push(huge),
                }
            }
        }
        // Installs were at these. None takes that long for all of its frames.
        let deadline = Instant::now() + LONGEST_CLAIM;
        for huge in busy {
            loop {
                if let Some(claim) = host.claim(huge) {
                    check_entry(&claim, seen);
                    break;
                }
                // An install that finds the monitor stopping may be at it till the end, which is near.
                if self.is_stopping() {
                    break;
                }
                if Instant::now() > deadline {
                    seen.note(Check::ForgottenClaim, Some(huge));
                    break;
                }
                std::thread::sleep(CLAIM_POLL);
            }
        }
    }

    /// The kernel against R, both ways. What an install is at is left out: it is neither yet.
    fn validate_memory(&self, seen: &mut Validation) -> Result<(), MonitorError> {
        // As in an audit: nobody discards between the kernel's answer and our look at R.
        let _turn = self.discards.lock();
        let host = self.host();
        let installed: Vec<bool> = host.scan(HugeId(0)).map(|(_, _, r)| r == Residency::Installed).collect();
        let mut found = vec![Found::Nothing; installed.len()];
        let see = |range: Range<u64>, is_resident| {
            let frames = (range.start / HUGE_SIZE) as usize..range.end.div_ceil(HUGE_SIZE) as usize;
            let what = if is_resident { Found::Memory } else { Found::Zeroes };
            found.get_mut(frames).into_iter().flatten().for_each(|found| *found = what.max(*found));
        };
        self.ram.for_each_mapped(see).map_err(MonitorError::Residency)?;
        for ((huge, was_installed), found) in (0..).map(HugeId).zip(installed).zip(found) {
            // Zeroes alone are enough for a frame that is to have memory, and none for one that is not: the
            // kernel itself puts the shared zero page in the place of pages that hold only zeroes.
            let is_resident = found == Found::Memory;
            if if was_installed { found > Found::Nothing } else { !is_resident } {
                continue;
            }
            let now = host.claim(huge).map(|claim| claim.residency());
            match now {
                // A process says so before it touches the frame.
                Some(Residency::Installed) if was_installed && self.installer == Installer::Tenant => {}
                Some(Residency::Installed) if was_installed => seen.note(Check::MissingMemory, Some(huge)),
                Some(Residency::Evicted | Residency::Held) if is_resident => {
                    seen.note(Check::UnaskedMemory, Some(huge));
                }
                // Installed since we looked, or about to be.
                _ => {}
            }
        }
        Ok(())
    }

    fn validate_header(&self, seen: &mut Validation) {
        // Passes move R and publish when they are through.
        let _passes = lock(&self.passes);
        let limit = self.published_limit.get();
        for _ in 0..limit.abs_diff(u64::from(self.limit())) {
            seen.note(Check::Limit, None);
        }
        let copies = [
            (HostWord::Limit, limit),
            (HostWord::Wanted, self.wanted.get()),
            (HostWord::ReturnEpoch, self.return_epoch.load(Ordering::Relaxed)),
        ];
        for (word, copy) in copies {
            if self.table.claimed_control(word) != copy {
                seen.note(Check::Header, None);
            }
        }
    }
}

fn check_entry(claim: &Claim<'_>, seen: &mut Validation) {
    let Err(violation) = claim.check() else { return };
    let check = match violation.contradiction {
        Contradiction::Held(_) => Check::HeldEntry,
        Contradiction::Evicted(_) => Check::EvictedEntry,
        // The bitfields are the guest's: the host never looks at them.
        Contradiction::Invalid | Contradiction::Counter(_) | Contradiction::Run(_) | Contradiction::Bits(_) => {
            Check::InvalidEntry
        }
        Contradiction::Busy => Check::ForgottenClaim,
    };
    seen.note(check, Some(violation.huge));
}
