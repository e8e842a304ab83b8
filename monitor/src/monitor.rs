//! The monitor: the host-side owner of one guest's memory.
//!
//! It alone discards and populates guest RAM, and it keeps the residency R, which no guest can
//! reach, in step with what it did; [`llfree::Host`] gives the order of the steps. Passes run one
//! at a time, in bounded batches; between two batches an [audit](Monitor::audit) gets its turn.
//! Installs come from vCPU threads, in parallel, and wait for the thread that holds a frame of theirs: one
//! batch of discards, or another vCPU's batch. Nothing here believes a guest: what the entries
//! claim decides where to look and is reported as a claim, never how much memory there is. That
//! comes from R and, cross-checked by the audit, from the kernel.

mod audit;
mod decision;
mod hand_over;
mod install;
mod lent;
mod reclaim;
mod resize;
mod validate;
mod violation;

pub(crate) use reclaim::{LARGEST_BATCH, next_batch};

pub use audit::Picture;
pub use hand_over::HandOver;
pub use install::InstallError;
pub use llfree_base::choices::OnViolation;
pub use resize::{Direction, Resize};
pub use violation::{Ending, Violation, Violations};

use crate::fair_lock::FairLock;
use crate::memory::{GuestRam, MemoryError, Supply};
use crate::region::{FRAMES_A_WORD, Table};
use lent::Lent;
use llfree::host::Installer;
use llfree::{Census, Claim, Host, Installing, Residency};
use llfree_base::counters::MonitorCounters;
use llfree_base::metrics::Gauge;
use llfree_base::{RateLimit, lock};
use shared_layout::table::{HELD_STAYS, next_epoch};
use shared_layout::{HostWord, HugeEntry, HugeId, HugeRange};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::Duration;

pub use llfree_base::check::Check;
pub use validate::{Finding, Validation};

/// Frames in one batch, of discards or of an install: 64 MiB. Who needs a frame of a batch waits for
/// all of it: for discards of huge pages 0.2 ms, of 4 KiB pages 10 to 30 ms; for an install 3 ms, or
/// 100 ms and more where the host must find the memory first. Discards that prove quick come in
/// larger ones: see `reclaim`.
pub(crate) const BATCH: u32 = 32;
/// How often a thread that waits for a frame looks again; a finished batch of discards wakes it sooner.
const CLAIM_POLL: Duration = Duration::from_micros(200);

/// What one pass did, in huge frames.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Pass {
    /// Frames that changed state.
    pub frames: u32,
    /// Of those, frames that were backed by memory, which went back to the host's kernel; before a hand-over is complete,
    /// all that a tenant may have touched.
    pub discarded: u32,
    /// Bytes of host memory that went back with those: less than their size where the kernel had none for
    /// some of it. Where it does not say, their size.
    pub freed_bytes: u64,
}

impl std::ops::AddAssign for Pass {
    fn add_assign(&mut self, other: Self) {
        self.frames += other.frames;
        self.discarded += other.discarded;
        self.freed_bytes += other.freed_bytes;
    }
}

/// What a tenant starts with.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct TenantStart {
    /// Its threads that may touch memory at once, such as vCPUs.
    pub threads: u32,
    /// Nobody may use these frames: allocated for ever, without memory.
    pub unusable: Range<u32>,
    /// These are the tenant's from the start and get memory when it touches them: it has an allocator of its own
    /// and gives what is free there, by and by. See [`Monitor::hand_over`].
    pub taken: Range<u32>,
    /// These are the tenant's and have memory, such as those of a guest's image.
    pub installed: Vec<Range<u32>>,
    /// Bytes of frames that are the tenant's. The rest of each of those frames has memory at the latest when it is touched.
    pub image: Vec<Range<u64>>,
    /// Who puts memory behind frames: a process does it itself.
    pub installer: Installer,
    /// It is at work already, and may have had a monitor before: [`Monitor::take_over`] comes next.
    pub adopted: bool,
    /// All frames that it may use have memory from the start, those that are free as well.
    pub populated: bool,
}

/// What a tenant with an allocator of its own agrees with its host beside the table.
pub struct Terms {
    /// Huge frames that it asks its host to leave free, by its own claim.
    pub floor: Box<dyn Fn() -> u32 + Send + Sync>,
    /// Tells it that a control word has changed.
    pub notice: Box<dyn Fn() + Send + Sync>,
}

/// A pass that had to stop. What it did before stands, and no frame is lost.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The kernel did not take memory back; those frames were given back to the guest.
    #[error(
        "the kernel refused to take back {frames} huge frames, the first of them frame {first}; they stay with the \
         guest; {} others were taken before it did",
        done.frames
    )]
    Discard {
        /// The first of them.
        first: u32,
        /// How many, all in one batch.
        frames: u32,
        /// What the pass did until then, the rest of that batch included. It stands.
        done: Pass,
        /// What the kernel said.
        source: MemoryError,
    },
    /// The kernel did not take back memory a guest touched unnoticed.
    #[error(
        "the kernel refused to take back {frames} huge frames that the guest touched but does not have, the first of \
         them frame {first}"
    )]
    Repair {
        /// The first of them.
        first: u32,
        /// How many; all others were settled.
        frames: u64,
        /// What the kernel said about the first.
        source: MemoryError,
    },
    /// The kernel did not say what is resident.
    #[error("cannot ask the kernel which guest memory is resident")]
    Residency(#[source] MemoryError),
}

impl MonitorError {
    /// The same at the end of a longer pass, which did `before` before.
    fn after(mut self, before: Pass) -> Self {
        if let Self::Discard { done, .. } = &mut self {
            *done += before;
        }
        self
    }
}

/// The host-side owner of one guest's memory; shared by vCPU threads and the control plane.
pub struct Monitor {
    ram: Arc<GuestRam>,
    supply: Supply,
    table: Table,
    residency: Box<[AtomicU8]>,
    installer: Installer,
    /// Held for the length of a pass; the value is the frame where the next one starts.
    passes: Mutex<HugeId>,
    /// Held by the thread that discards: for a batch of a pass, what a failed install left, or an audit.
    /// Its owner waits for no claim.
    discards: FairLock,
    /// Signalled when a batch of discards has let go of its frames.
    batch_over: (Mutex<()>, Condvar),
    /// These three are in the header as well, where the guest can overwrite them.
    published_limit: Gauge,
    wanted: Gauge,
    return_epoch: AtomicU64,
    stopping: AtomicBool,
    /// How far the tenant is with that: a [`HandOver`].
    handed_over: AtomicU8,
    /// What the next audit finds may have been touched before that was complete, as long as it is not held.
    touched_before: AtomicBool,
    /// Whether an install ever failed for a reason of the host.
    host_failed: AtomicBool,
    terms: OnceLock<Terms>,
    /// Installs that failed for a reason of the host, for the log.
    host_failures: RateLimit,
    /// Audits that found something, for the log.
    violations_found: RateLimit,
    /// Pages that a guest has for the moment.
    lent: Lent,
    /// What happened since the VM started.
    pub counters: MonitorCounters,
}

impl Monitor {
    /// Takes charge of `ram`, with memory from `supply`: every frame is free and evicted, except those
    /// that are occupied from the start.
    ///
    /// # Errors
    /// A table for RAM of another size, or no memory for what is installed.
    pub fn new(ram: Arc<GuestRam>, supply: Supply, table: Table, start: TenantStart) -> Result<Self, MemoryError> {
        let frames = (table.layout().huge_frames, ram.huge_frames());
        if frames.0 != frames.1 {
            return Err(MemoryError::Table { table: frames.0, ram: frames.1 });
        }
        let residency = (0..ram.huge_frames()).map(|_| AtomicU8::new(Residency::Evicted as u8)).collect();
        let monitor = Self {
            ram,
            supply,
            lent: Lent::new(start.threads),
            table,
            residency,
            installer: start.installer,
            passes: Mutex::new(HugeId(0)),
            discards: FairLock::default(),
            batch_over: (Mutex::new(()), Condvar::new()),
            published_limit: Gauge::default(),
            wanted: Gauge::default(),
            return_epoch: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            handed_over: AtomicU8::new(
                if start.taken.is_empty() { HandOver::Complete } else { HandOver::Booting } as u8
            ),
            touched_before: AtomicBool::new(!start.taken.is_empty()),
            host_failed: AtomicBool::new(false),
            terms: OnceLock::new(),
            host_failures: RateLimit::default(),
            violations_found: RateLimit::default(),
            counters: MonitorCounters::default(),
        };
        let entries = monitor.table.entries();
        let claim_for_guest = |huge: u32, entry: HugeEntry| {
            if let Some(word) = entries.get(huge as usize) {
                word.store(entry.bits(), Ordering::Relaxed);
            }
        };
        for huge in start.unusable.clone().chain(start.taken) {
            claim_for_guest(huge, HugeEntry::HUGE_EVICTED);
        }
        let note_installed = |huge: u32| {
            claim_for_guest(huge, HugeEntry::HUGE_INSTALLED);
            monitor.residency[huge as usize].store(Residency::Installed as u8, Ordering::Relaxed);
        };
        for huge in start.installed.into_iter().flatten() {
            monitor.supply.install(HugeId(huge)).map_err(|short| short.error)?;
            note_installed(huge);
        }
        if start.populated {
            monitor.populate(&start.unusable)?;
        }
        for bytes in start.image {
            monitor.supply.install_part(bytes.clone())?;
            HugeRange::around(bytes).iter().for_each(|huge| note_installed(huge.0));
        }
        if !start.adopted {
            monitor.continue_epoch();
            monitor.publish_limit();
        }
        Ok(monitor)
    }

    /// Puts memory behind all frames that have none yet, but for those that nobody may use.
    fn populate(&self, unusable: &Range<u32>) -> Result<(), MemoryError> {
        let host = self.host();
        let lacks_memory = |huge: &u32| host.residency(HugeId(*huge)) == Some(Residency::Evicted);
        let frames: Vec<u32> =
            (0..self.huge_frames()).filter(|huge| !unusable.contains(huge)).filter(lacks_memory).collect();
        for run in frames.chunk_by(|left, right| left + 1 == *right) {
            // In one call, which populates with all its might.
            let run = HugeRange::saturating(HugeId(run[0]), run.len() as u32);
            self.supply.install(run).map_err(|short| short.error)?;
            // Nobody else is there yet.
            run.iter().filter_map(|huge| host.claim(huge)?.install().ok()).for_each(Installing::done);
        }
        Ok(())
    }

    /// Takes charge of `ram` whose memory comes by touch and goes by a device: no frame is ever
    /// evicted, and R calls all of them installed, whether or not memory backs them. Those of `kept_back` are
    /// taken in the table; the code that brings them to the guest frees them there.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn untracked(
        ram: Arc<GuestRam>,
        supply: Supply,
        table: Table,
        start: TenantStart,
        kept_back: Range<u32>,
    ) -> Result<Self, MemoryError> {
        let monitor = Self::new(ram, supply, table, start)?;
        for (huge, (word, r)) in monitor.table.entries().iter().zip(&monitor.residency).enumerate() {
            let free = word.load(Ordering::Relaxed) == HugeEntry::FREE_EVICTED.bits();
            let kept = !free || kept_back.contains(&(huge as u32));
            let entry = if kept { HugeEntry::HUGE_INSTALLED } else { HugeEntry::FREE_INSTALLED };
            word.store(entry.bits(), Ordering::Relaxed);
            r.store(Residency::Installed as u8, Ordering::Relaxed);
        }
        Ok(monitor)
    }

    /// Agrees on terms with a tenant that has an allocator of its own. Only the first call counts.
    pub fn agree(&self, terms: Terms) {
        let _ = self.terms.set(terms);
    }

    /// Whether the tenant has an allocator of its own.
    #[must_use]
    pub fn has_terms(&self) -> bool {
        self.terms.get().is_some()
    }

    /// Huge frames that passes leave free, unless they are forced: by the tenant's claim, and at most all.
    #[must_use]
    pub fn floor(&self) -> u32 {
        self.terms.get().map_or(0, |terms| (terms.floor)().min(self.huge_frames()))
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

    /// Where the guest's memory comes from.
    #[must_use]
    pub fn supply(&self) -> &Supply {
        &self.supply
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
        self.wanted.get()
    }

    /// Ends installs and reclaiming passes, now and later, at their next batch: the VM goes down.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// Waits for the batch of discards at work. A tenant that installs by itself finds the frames of a batch held, and
    /// free again afterwards.
    pub fn await_batch(&self) {
        drop(self.discards.lock());
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    pub(crate) fn host(&self) -> Host<'_> {
        Host::new(self.table.entries(), &self.residency)
            .expect("both tables were made with one element a huge frame of the same RAM")
            .installed_by(self.installer)
    }

    /// Takes note of the frames that a tenant has installed by itself since the last time; how many they are.
    pub(crate) fn note_own_installs(&self) -> u64 {
        if self.installer == Installer::Host {
            return 0;
        }
        let host = self.host();
        let is_news = |(huge, r): &(u32, &AtomicU8)| {
            r.load(Ordering::Relaxed) == Residency::Evicted as u8
                && host.residency(HugeId(*huge)) == Some(Residency::Installed)
        };
        let words = self.table.entries().chunks(FRAMES_A_WORD).zip(self.residency.chunks(FRAMES_A_WORD));
        let mut settled = 0;
        for ((entries, residency), first) in words.zip((0..).step_by(FRAMES_A_WORD)) {
            if !self.has_no_memory(entries) {
                // Letting go of a claim settles what it saw.
                let news = (first..).zip(residency).filter(is_news);
                settled += news.filter_map(|(huge, _)| host.claim(HugeId(huge))).count() as u64;
            }
        }
        self.counters.installs.add(settled);
        settled
    }

    /// Whether some neighbours are all evicted, by the word of a tenant that installs by itself. Most of most tenants are,
    /// and there are many scans: one load each, and no branch.
    pub(crate) fn has_no_memory(&self, entries: &[AtomicU16]) -> bool {
        let common = || entries.iter().fold(u16::MAX, |common, entry| common & entry.load(Ordering::Relaxed));
        self.installer == Installer::Tenant && HugeEntry::from_bits(common()).is_evicted()
    }

    pub(crate) fn table(&self) -> &Table {
        &self.table
    }

    pub(crate) fn installer(&self) -> Installer {
        self.installer
    }

    /// Whether the tenant marked a frame since this was asked the last time.
    pub(crate) fn was_freed_lately(&self, huge: HugeId) -> bool {
        self.table.was_freed_lately(huge)
    }

    /// Goes on where the tenant's last host was: a tenant that finds an epoch that it has seen before believes that nothing came back since. As with
    /// the limit, it could have written that word, and then has only itself to thank. The last host may have been at returns.
    fn continue_epoch(&self) {
        let number = |epoch: u64| epoch & !HELD_STAYS;
        let claimed = number(self.table.claimed_control(HostWord::ReturnEpoch));
        let last = number(self.return_epoch.load(Ordering::Relaxed)).max(claimed);
        self.return_epoch.store(last, Ordering::Relaxed);
        self.tell_of_returns();
    }

    /// Frames that are held are about to be free again, whether they are returned or the kernel keeps their memory: until
    /// [`tell_of_returns`](Self::tell_of_returns) the tenant looks at each that is held.
    fn announce_returns(&self) {
        self.raise_epoch(false);
    }

    /// Frames are free again, of which the tenant's hints know nothing. What a VM's host holds now stays held until it announces
    /// something else; a process's holds frames for a moment only.
    fn tell_of_returns(&self) {
        self.raise_epoch(self.installer == Installer::Host);
    }

    /// One at a time: in a pass, or before there are any.
    fn raise_epoch(&self, held_stays: bool) {
        let epoch = next_epoch(self.return_epoch.load(Ordering::Relaxed), held_stays);
        self.return_epoch.store(epoch, Ordering::Relaxed);
        self.table.set_control(HostWord::ReturnEpoch, epoch);
    }

    /// What follows a soft pass: where the frames were held meanwhile, they came back, and those that the kernel kept
    /// did so too.
    fn after_evictions(&self, result: Result<Pass, MonitorError>) -> Result<Pass, MonitorError> {
        let moved = result.as_ref().map_or(true, |pass| pass.frames > 0);
        if self.installer == Installer::Tenant && moved || result.is_err() {
            self.tell_of_returns();
        }
        result
    }

    /// Claims a frame of the table, waiting for a thread that holds it.
    fn claim_patiently(&self, huge: HugeId) -> Claim<'_> {
        let host = self.host();
        loop {
            if let Some(claim) = host.claim(huge) {
                return claim;
            }
            let (mutex, batch_over) = &self.batch_over;
            let guard = lock(mutex);
            // The timeout covers a notification that came before we slept, and claims that end
            // without one: other vCPUs' installs, audits, grows.
            let _ = batch_over.wait_timeout(guard, CLAIM_POLL);
        }
    }

    fn set_wanted(&self, huge_frames: u64) {
        self.wanted.set(huge_frames);
        self.table.set_control(HostWord::Wanted, huge_frames);
    }

    /// The limit in the header, which the tenant can write, and another monitor of its.
    #[must_use]
    pub fn claimed_limit(&self) -> u32 {
        let claimed = self.table.claimed_control(HostWord::Limit);
        u32::try_from(claimed).unwrap_or(u32::MAX).min(self.huge_frames())
    }

    fn publish_limit(&self) {
        let limit = u64::from(self.limit());
        self.published_limit.set(limit);
        self.table.set_control(HostWord::Limit, limit);
        if let Some(terms) = self.terms.get() {
            (terms.notice)();
        }
    }
}

fn is_held(residency: u8) -> bool {
    residency & 0x7f == Residency::Held as u8
}
