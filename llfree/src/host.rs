//! The host's view of a table: reclaim, return and install, one huge frame at a time.
//!
//! [`Host`] touches one shared word a huge frame, its [`HugeEntry`], and trusts none of its bits.
//! What it believes lies in a table of its own, the residency R, that no guest can reach. Each
//! operation first [claims](Host::claim) the frame (a busy bit in R), and only the claimant may
//! change the memory that backs it; the types below let the steps happen in the right order only:
//!
//! ```text
//! claim -> reclaim: CAS entry  -> [caller discards memory]  -> done   (or undone)
//! claim -> release: CAS entry, R Held -> Evicted
//! claim -> install: R Evicted? -> [caller populates memory] -> done: clear `evicted`
//! ```
//!
//! No allocation, no system call, no wait: a busy frame is an answer, not a reason to spin. Every
//! loop is bounded, also against a guest that rewrites its words as fast as it can.

use crate::error::{Part, TableError, check_huge_frames, check_len};
use crate::lower::transition;
use crate::residency::BUSY;
pub use crate::residency::Residency;
use crate::sync::{AtomicU8, AtomicU16, Ordering};
use crate::violation::Violation;
use core::fmt;
use shared_layout::{HugeEntry, HugeId};

/// Attempts at one entry before a guest that keeps changing it is called [`Refused::Contended`].
const PATIENCE: u32 = 64;

/// The way that memory is taken back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reclaim {
    /// Evict: the frame stays free for the guest.
    Soft,
    /// Hold: the frame leaves the guest's reach.
    Hard,
}

/// Who says that a frame of a table is backed by memory.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Installer {
    /// The host, which put the memory there: a virtual machine's.
    #[default]
    Host,
    /// The tenant, whose first touch brings it: a process. It clears `evicted` on its own
    /// ([`EvictedBlock::self_install`](crate::EvictedBlock::self_install)), and R follows its word at the next
    /// claim: that a frame has memory is a claim that can cost the host a call, and nothing else.
    ///
    /// Such a tenant asks for nothing and so waits for nobody. Therefore a soft reclaim, too, holds the frame while its
    /// memory goes: a taker in between would lose what it wrote.
    Tenant,
}

/// Why one huge frame could not be changed; nothing was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    /// The guest owns frames in it, or wrote an entry that no transition leads from.
    NotFree(HugeEntry),
    /// R says that there is nothing to do: it is held, or evicted already.
    Residency(Residency),
    /// The guest kept changing the entry; try again later.
    Contended,
}

/// Counts from one pass over the entries and R.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Census {
    /// Huge frames in the table.
    pub huge_frames: u64,
    /// R: backed by memory.
    pub installed: u64,
    /// R: not backed, not held.
    pub evicted: u64,
    /// R: held.
    pub held: u64,
    /// Claimed: wholly free and backed by memory: what a reclaim would gain.
    pub free_installed: u64,
    /// Claimed: wholly free, not backed.
    pub free_evicted: u64,
    /// Claimed: free 4 KiB frames inside partly used huge frames.
    pub fragmented_frames: u64,
    /// Claimed: 4 KiB frames the guest has in use.
    pub used_frames: u64,
    /// Entries that no transition leads to, or that contradict R about `held`: only a guest makes
    /// such.
    pub corrupt: u64,
}

/// The host side of one table.
#[derive(Clone, Copy)]
pub struct Host<'a> {
    entries: &'a [AtomicU16],
    residency: &'a [AtomicU8],
    installer: Installer,
}

impl<'a> Host<'a> {
    /// `entries` are shared with the guest, `residency` must be out of its reach (zero: all
    /// evicted): one element of each a huge frame, at most
    /// [`MAX_HUGE_FRAMES`](shared_layout::table::MAX_HUGE_FRAMES).
    ///
    /// # Errors
    /// Too many entries, or that `residency` has not as many.
    pub fn new(entries: &'a [AtomicU16], residency: &'a [AtomicU8]) -> Result<Self, TableError> {
        check_huge_frames(entries.len())?;
        check_len(Part::Residency, residency.len(), entries.len())?;
        Ok(Self { entries, residency, installer: Installer::Host })
    }

    /// The same for a tenant whose frames are installed like this.
    #[must_use]
    pub fn installed_by(self, installer: Installer) -> Self {
        Self { installer, ..self }
    }

    /// Huge frames in the table.
    #[must_use]
    pub fn huge_frames(&self) -> u32 {
        self.entries.len() as u32
    }

    /// The guest's claim about a huge frame; `None` beyond the table.
    #[must_use]
    pub fn entry(&self, huge: HugeId) -> Option<HugeEntry> {
        self.entries.get(huge.index()).map(|word| HugeEntry::from_bits(word.load(Ordering::Relaxed)))
    }

    /// The host's knowledge of a huge frame; `None` beyond the table.
    #[must_use]
    pub fn residency(&self, huge: HugeId) -> Option<Residency> {
        let r = Residency::from_bits(self.residency.get(huge.index())?.load(Ordering::Acquire));
        Some(self.installer.follow(r, self.entry(huge)?))
    }

    /// The right to change one frame's memory; `None` if somebody else has it, or beyond the table.
    #[must_use]
    #[inline]
    pub fn claim(&self, huge: HugeId) -> Option<Claim<'a>> {
        let word = self.residency.get(huge.index())?;
        let state = word.load(Ordering::Relaxed);
        if state & BUSY != 0 {
            return None;
        }
        // Acquire pairs with the Release in `Claim::settle`: we see what the last claimant did.
        word.compare_exchange(state, state | BUSY, Ordering::Acquire, Ordering::Relaxed).ok()?;
        let entry = &self.entries[huge.index()];
        let installer = self.installer;
        let seen = HugeEntry::from_bits(entry.load(Ordering::Relaxed));
        let state = installer.follow(Residency::from_bits(state), seen);
        Some(Claim { entry, word, huge, state, installer })
    }

    /// One lap over the table, starting at `from` and wrapping around: a cursor for passes that
    /// stop early and go on later. Each shared word is read once.
    pub fn scan(self, from: HugeId) -> impl Iterator<Item = (HugeId, HugeEntry, Residency)> {
        let len = self.entries.len();
        let start = if from.index() < len { from.index() } else { 0 };
        (start..len).chain(0..start).map(move |i| {
            let entry = HugeEntry::from_bits(self.entries[i].load(Ordering::Relaxed));
            let residency = Residency::from_bits(self.residency[i].load(Ordering::Relaxed));
            (HugeId(i as u32), entry, self.installer.follow(residency, entry))
        })
    }

    /// Checks every entry against R: `held`, `evicted`, and that no claim is open. Exact when nobody
    /// is at work; a guest that writes its entries can make it fail, and harms only itself by that.
    ///
    /// # Errors
    /// The first huge frame whose entry is invalid or contradicts R.
    pub fn validate(&self) -> Result<(), Violation> {
        let mut all = self.entries.iter().zip(self.residency).zip(0..);
        let violation = all.find_map(|((entry, r), huge)| {
            let (entry, r) = (HugeEntry::from_bits(entry.load(Ordering::Relaxed)), r.load(Ordering::Acquire));
            let known = self.installer.follow(Residency::from_bits(r), entry);
            Violation::of_residency(HugeId(huge), entry, known, r & BUSY != 0)
        });
        violation.map_or(Ok(()), Err)
    }

    /// Adds the table up. Exact when nobody is at work, else a snapshot torn between frames.
    #[must_use]
    pub fn census(&self) -> Census {
        let mut c = Census { huge_frames: self.entries.len() as u64, ..Census::default() };
        for (huge, entry, residency) in self.scan(HugeId(0)) {
            match residency {
                Residency::Installed => c.installed += 1,
                Residency::Evicted => c.evicted += 1,
                Residency::Held => c.held += 1,
            }
            let torn = entry.is_held() != (residency == Residency::Held);
            if !entry.is_valid() || (torn && self.contradicts(huge)) {
                c.corrupt += 1;
            } else if entry.is_all_free() {
                match residency {
                    Residency::Installed => c.free_installed += 1,
                    Residency::Evicted => c.free_evicted += 1,
                    Residency::Held => {}
                }
            } else if !entry.is_held() {
                c.fragmented_frames += u64::from(entry.free());
                c.used_frames += u64::from(HugeEntry::FREE_INSTALLED.free() - entry.free());
            }
        }
        c
    }

    /// Whether entry and R disagree about `held` though nobody is at the frame. They may for as long
    /// as a claimant is between its two steps, so the question is asked under a claim.
    fn contradicts(&self, huge: HugeId) -> bool {
        let Some(claim) = self.claim(huge) else { return false };
        let entry = HugeEntry::from_bits(claim.entry.load(Ordering::Relaxed));
        entry.is_held() != (claim.state == Residency::Held)
    }
}

impl Installer {
    /// What is known of a frame, given R and its entry.
    #[inline]
    fn follow(self, r: Residency, entry: HugeEntry) -> Residency {
        match r {
            Residency::Installed | Residency::Evicted
                if self == Self::Tenant && entry.is_valid() && !entry.is_held() =>
            {
                if entry.is_evicted() {
                    Residency::Evicted
                } else {
                    Residency::Installed
                }
            }
            _ => r,
        }
    }
}

impl fmt::Debug for Host<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("huge_frames", &self.huge_frames()).finish_non_exhaustive()
    }
}

/// The right to change one huge frame. Dropped, it leaves the frame as it was.
#[must_use]
pub struct Claim<'a> {
    entry: &'a AtomicU16,
    word: &'a AtomicU8,
    huge: HugeId,
    state: Residency,
    installer: Installer,
}

impl<'a> Claim<'a> {
    /// The frame.
    #[must_use]
    pub fn huge(&self) -> HugeId {
        self.huge
    }

    /// Its residency when it was claimed.
    #[must_use]
    pub fn residency(&self) -> Residency {
        self.state
    }

    /// The way in which the frame's entry contradicts R. No other host thread is between two steps
    /// on it; a contradiction found was written by a guest, or left by a caller of this crate.
    ///
    /// # Errors
    /// The contradiction.
    pub fn check(&self) -> Result<(), Violation> {
        let entry = HugeEntry::from_bits(self.entry.load(Ordering::Relaxed));
        Violation::of_residency(self.huge, entry, self.state, false).map_or(Ok(()), Err)
    }

    /// Takes the frame from the guest's free memory; the caller then discards its memory.
    ///
    /// # Errors
    /// [`Refused`]; the claim is over and nothing changed.
    #[inline]
    pub fn reclaim(mut self, how: Reclaim) -> Result<Reclaimed<'a>, Refused> {
        match (how, self.state) {
            (_, Residency::Held) | (Reclaim::Soft, Residency::Evicted) => {
                return Err(Refused::Residency(self.state));
            }
            _ => {}
        }
        let step = match (how, self.installer) {
            (Reclaim::Soft, Installer::Host) => HugeEntry::evict,
            (Reclaim::Soft, Installer::Tenant) | (Reclaim::Hard, _) => HugeEntry::hold,
        };
        match transition(self.entry, PATIENCE, step) {
            Ok(old) => {
                // The tenant may have had the frame, and touched it, since it was claimed.
                self.state = self.installer.follow(self.state, old);
                Ok(Reclaimed { claim: self, how })
            }
            Err(seen) if step(seen).is_some() => Err(Refused::Contended),
            Err(seen) => Err(Refused::NotFree(seen)),
        }
    }

    /// Returns a held frame to the guest, still evicted. Never fails on a held frame: if the guest
    /// overwrote its entry (`false`), the host's own state moves all the same and the guest keeps
    /// the entry that it asked for.
    ///
    /// # Errors
    /// [`Refused::Residency`] if the frame is not held.
    #[inline]
    pub fn release(mut self) -> Result<bool, Refused> {
        if self.state != Residency::Held {
            return Err(Refused::Residency(self.state));
        }
        // The guest may take the frame and ask for an install as soon as the entry changed: the
        // busy bit makes that install wait until R says `Evicted`, when this claim is dropped.
        self.state = Residency::Evicted;
        Ok(transition(self.entry, PATIENCE, HugeEntry::release).is_ok())
    }

    /// Takes over a frame that another host, gone by now, held; whether it did. What is behind it is not known. What we
    /// held ourselves and it gave back meanwhile may be in use, and is held no longer.
    #[must_use]
    pub fn adopt(mut self) -> bool {
        let entry = HugeEntry::from_bits(self.entry.load(Ordering::Acquire));
        let (was_held, is_held) = (self.state == Residency::Held, entry.release().is_some());
        if is_held {
            self.state = Residency::Held;
        } else if was_held {
            self.state = if entry.is_evicted() { Residency::Evicted } else { Residency::Installed };
        }
        is_held && !was_held
    }

    /// Begins to back the frame with memory.
    ///
    /// # Errors
    /// [`Refused::Residency`] if the frame is held.
    #[inline]
    pub fn install(self) -> Result<Installing<'a>, Refused> {
        match self.state {
            Residency::Held => Err(Refused::Residency(self.state)),
            Residency::Evicted | Residency::Installed => Ok(Installing { claim: self }),
        }
    }
}

impl fmt::Debug for Claim<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claim").field("huge", &self.huge).field("residency", &self.state).finish_non_exhaustive()
    }
}

impl Drop for Claim<'_> {
    #[inline]
    fn drop(&mut self) {
        // Release: the next claimant sees our entry transition and our change of memory.
        self.word.store(self.state as u8, Ordering::Release);
    }
}

/// A frame that the guest can no longer take (hard) or knows to be evicted (soft).
///
/// Dropped without [`done`](Self::done), the frame goes back as it was: that is what a failed
/// discard leads to: a return, for a host that has said that [what it holds stays held](crate::HELD_STAYS).
#[must_use = "dropping it gives the frame back"]
#[derive(Debug)]
pub struct Reclaimed<'a> {
    claim: Claim<'a>,
    how: Reclaim,
}

impl Reclaimed<'_> {
    /// The frame.
    #[must_use]
    pub fn huge(&self) -> HugeId {
        self.claim.huge
    }

    /// Whether there is memory to discard; an evicted frame costs no system call.
    #[must_use]
    #[inline]
    pub fn has_memory(&self) -> bool {
        self.claim.state == Residency::Installed
    }

    /// The memory is gone (or never was): R follows.
    #[inline]
    pub fn done(mut self) {
        self.claim.state = match self.how {
            Reclaim::Soft => Residency::Evicted,
            Reclaim::Hard => Residency::Held,
        };
    }
}

impl Drop for Reclaimed<'_> {
    #[inline]
    fn drop(&mut self) {
        let settled = match self.how {
            Reclaim::Soft => Residency::Evicted,
            Reclaim::Hard => Residency::Held,
        };
        if (self.how, self.claim.installer, self.claim.state) == (Reclaim::Soft, Installer::Tenant, Residency::Evicted)
        {
            // Held while its memory went, or without any. An entry that the tenant overwrote stays as it wants it.
            let _ = transition(self.claim.entry, PATIENCE, HugeEntry::release);
        }
        if self.claim.state == settled {
            return;
        }
        // Undo only what `reclaim` did. A guest that overwrote the entry meanwhile keeps its bits.
        if self.claim.installer == Installer::Tenant && self.claim.state == Residency::Installed {
            let _ = transition(self.claim.entry, PATIENCE, HugeEntry::keep);
            return;
        }
        if self.how == Reclaim::Hard {
            let _ = transition(self.claim.entry, PATIENCE, HugeEntry::release);
        }
        if self.claim.state == Residency::Installed {
            let _ = transition(self.claim.entry, PATIENCE, HugeEntry::installed);
        }
    }
}

/// A frame that is being installed. Dropped without [`done`](Self::done), nothing changed.
#[must_use = "dropping it gives the install up"]
#[derive(Debug)]
pub struct Installing<'a> {
    claim: Claim<'a>,
}

impl Installing<'_> {
    /// The frame.
    #[must_use]
    pub fn huge(&self) -> HugeId {
        self.claim.huge
    }

    /// Whether it must be backed with memory first; not so if another vCPU asked before us.
    #[must_use]
    #[inline]
    pub fn needs_memory(&self) -> bool {
        self.claim.state == Residency::Evicted
    }

    /// The frame is backed with zeroed memory: only now may the guest see `evicted` go.
    #[inline]
    pub fn done(mut self) {
        self.claim.state = Residency::Installed;
        // An entry without `evicted` (another install was first, or the guest wrote it) is fine.
        let _ = transition(self.claim.entry, PATIENCE, HugeEntry::installed);
    }
}
