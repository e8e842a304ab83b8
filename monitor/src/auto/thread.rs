//! The thread `auto-reclaim`: it scans at each interval and carries the plan out, batch by batch.
//!
//! While the host is short of memory, if it is to heed that, a scan leaves no headroom and asks for no age.
//! It sleeps without a wake-up while it is off. Between two batches it looks whether the guest has
//! installed something meanwhile, or used what the headroom counted on, and then leaves the rest of
//! the plan to the next scan. It keeps nothing else waiting: a batch takes the same locks as one of
//! a reclaim that somebody asked for.

use super::{Decision, FRAMES_A_WORD, Pace, Policy};
use crate::memory::Pressure;
use crate::monitor::{BATCH, LARGEST_BATCH, Monitor, next_batch};
use crate::roles;
use llfree::Residency;
use llfree::host::Installer;
use llfree_base::choices::{Settings, Switch};
use llfree_base::thread::Spawner;
use llfree_base::units::Bytes;
use llfree_base::{RateLimit, error_line, lock};
use shared_layout::{HugeEntry, HugeId};
use std::io;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long the host's need is heeded after it was told: the window of the kernel's trigger.
const NEED: Duration = Duration::from_secs(2);

/// A batch is as large as what the rate allows in this time, between the smallest and the largest: each takes a wake-up.
const STRETCH: Duration = Duration::from_millis(10);

/// What automatic reclaim is at, in huge frames.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct AutoStatus {
    /// The settings, if it is on.
    pub switch: Switch,
    /// Frames that it evicted since the VM started.
    pub evicted: u64,
    /// Scans since the VM started.
    pub scans: u64,
    /// Time in all of them, the evictions left out.
    pub scan_time: Duration,
    /// When the last one was.
    pub last_scan: Option<Instant>,
    /// What it decided.
    pub last: Decision,
}

#[derive(Default)]
struct State {
    status: AutoStatus,
    /// Raised when the switch was turned: a plan under the old settings ends.
    turns: u64,
    stopping: bool,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Settings that keep more with the guest than it has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("automatic reclaim cannot keep {keep} free: the guest's memory is {memory}; use less for 'keep'")]
pub struct KeepTooLarge {
    /// What was to stay free.
    pub keep: Bytes,
    /// The guest's memory.
    pub memory: Bytes,
}

/// Automatic reclaim of one VM: off until it is switched on.
pub struct AutoReclaim {
    monitor: Arc<Monitor>,
    shared: Arc<Shared>,
    threads: Spawner,
    before_scan: Arc<dyn Fn() + Send + Sync>,
    /// How the host's memory is watched, if it is.
    pressure: Option<fn() -> Pressure>,
}

/// Why automatic reclaim was not switched on; it is as it was.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// Nothing would ever go back.
    #[error(transparent)]
    KeepTooLarge(#[from] KeepTooLarge),
    /// The host has no thread to give.
    #[error("the host could not start the thread of automatic reclaim")]
    Thread(#[source] io::Error),
}

impl AutoReclaim {
    /// For the guest of `monitor`; no thread runs before it is switched on.
    #[must_use]
    pub fn new(monitor: Arc<Monitor>, threads: Spawner) -> Self {
        Self { monitor, shared: Arc::default(), threads, before_scan: Arc::new(|| ()), pressure: None }
    }

    /// The same with something for the thread to do before each scan: a tenant in this very process has caches, and
    /// what lies in them unused can be freed.
    #[must_use]
    pub fn before_each_scan(mut self, step: impl Fn() + Send + Sync + 'static) -> Self {
        self.before_scan = Arc::new(step);
        self
    }

    /// The same heeding the host's need: a scan while it is short of memory (by the kernel's pressure stall information, or
    /// less than a fiftieth available where there is none) gives back all that is free.
    #[must_use]
    pub fn heeding_pressure(mut self) -> Self {
        self.pressure = Some(Pressure::watch);
        self
    }

    /// Switches it on, off, or to other settings.
    ///
    /// # Errors
    /// If the host has no thread to give, or for settings under which nothing would ever go back.
    pub fn switch(&self, switch: Switch) -> Result<(), SwitchError> {
        let memory = self.monitor.ram().bytes();
        // What nobody chose is no mistake: a guest smaller than the default just keeps all.
        let possible = memory.max(Settings::default().keep_bytes);
        if let Some(keep) = switch.0.map(|settings| settings.keep_bytes).filter(|keep| *keep > possible) {
            return Err(KeepTooLarge { keep: Bytes(keep), memory: Bytes(memory) }.into());
        }
        let mut state = lock(&self.shared.state);
        if switch.0.is_some() && state.thread.is_none() && !state.stopping {
            let (monitor, shared) = (self.monitor.clone(), self.shared.clone());
            let before_scan = self.before_scan.clone();
            // From here on, not from whenever the thread gets to run.
            let installs = monitor.counters.installs.get();
            let watch = self.pressure;
            let body = move || {
                let pressure = watch.map(|watch| watch());
                Worker::new(&monitor, &shared, &*before_scan, (installs, pressure)).run();
            };
            let thread = self.threads.spawn("auto-reclaim", roles::AUTO_RECLAIM, body);
            state.thread = Some(thread.map_err(SwitchError::Thread)?);
        }
        state.status.switch = switch;
        state.turns += 1;
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// What it is at.
    #[must_use]
    pub fn status(&self) -> AutoStatus {
        lock(&self.shared.state).status
    }

    /// Ends the thread after the batch at work.
    pub fn stop(&self) {
        let mut state = lock(&self.shared.state);
        state.stopping = true;
        let thread = state.thread.take();
        drop(state);
        self.shared.changed.notify_all();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread of automatic reclaim panicked");
        }
    }
}

impl Drop for AutoReclaim {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The thread's own.
struct Worker<'a> {
    monitor: &'a Monitor,
    shared: &'a Shared,
    before_scan: &'a dyn Fn(),
    pressure: Option<Pressure>,
    /// The host's need is heeded until then.
    in_need_until: Option<Instant>,
    /// The scan at work heeds it.
    is_in_need: bool,
    policy: Policy,
    plan: Vec<HugeId>,
    /// The count of installs at the last scan.
    installs: u64,
    started: Instant,
    failures: RateLimit,
}

impl<'a> Worker<'a> {
    fn new(
        monitor: &'a Monitor,
        shared: &'a Shared,
        before_scan: &'a dyn Fn(),
        (installs, pressure): (u64, Option<Pressure>),
    ) -> Self {
        Self {
            monitor,
            shared,
            before_scan,
            pressure,
            in_need_until: None,
            is_in_need: false,
            policy: Policy::new(monitor.huge_frames()),
            plan: Vec::new(),
            installs,
            started: Instant::now(),
            failures: RateLimit::default(),
        }
    }

    fn run(&mut self) {
        let mut due = None;
        loop {
            let mut state = lock(&self.shared.state);
            let turn = state.turns;
            if self.monitor.is_left_to_device() {
                // The table says nothing any more.
                state.status.switch = Switch::default();
            }
            let settings = state.status.switch.0;
            if state.stopping {
                return;
            }
            let Some(settings) = settings else {
                // Ages are of scans in a row.
                self.policy = Policy::new(self.monitor.huge_frames());
                due = None;
                state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                drop(state);
                self.installs = self.installs();
                continue;
            };
            drop(state);
            let deadline = *due.get_or_insert_with(|| Instant::now() + settings.interval);
            if !self.sleep(deadline.saturating_duration_since(Instant::now()), turn) {
                due = None;
                continue;
            }
            // By the clock, so that a long plan does not stretch the interval; missed scans are lost.
            due = Some((deadline + settings.interval).max(Instant::now()));
            let settings = self.in_need(settings);
            let decision = self.scan(&settings);
            self.carry_out(&settings, decision, turn);
        }
    }

    /// Sleeps; false if the switch was turned, or everything ends.
    fn sleep(&self, time: Duration, turn: u64) -> bool {
        let mut state = lock(&self.shared.state);
        let same = |state: &mut State| state.turns == turn && !state.stopping;
        if time.is_zero() {
            // A wait is a system call, however short.
            return same(&mut state);
        }
        let waited = self.shared.changed.wait_timeout_while(state, time, same);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        same(&mut state)
    }

    /// The settings for a scan: others while the host is short of memory. The kernel says so once a window, and scans
    /// come more often.
    fn in_need(&mut self, settings: Settings) -> Settings {
        let now = Instant::now();
        if self.pressure.as_mut().is_some_and(Pressure::is_high) {
            self.in_need_until = Some(now + NEED);
        }
        self.is_in_need = self.in_need_until.is_some_and(|until| now < until);
        match self.is_in_need {
            true => Settings { min_age: 1, keep_bytes: 0, ..settings },
            false => settings,
        }
    }

    fn installs(&self) -> u64 {
        self.monitor.counters.installs.get()
    }

    fn scan(&mut self, settings: &Settings) -> Decision {
        (self.before_scan)();
        let start = Instant::now();
        self.monitor.note_own_installs();
        let now = self.installs();
        let mut installed = u32::try_from(now.saturating_sub(self.installs)).unwrap_or(u32::MAX);
        self.installs = now;
        if self.is_in_need {
            // Nor does anything stay for what came back lately.
            self.policy.forget_installs();
            installed = 0;
        }
        let decision = self.policy.scan(settings, self.monitor.unused_with_memory(), installed, &mut self.plan);
        let mut state = lock(&self.shared.state);
        state.status.scans += 1;
        state.status.scan_time += start.elapsed();
        state.status.last_scan = Some(start);
        state.status.last = decision;
        decision
    }

    fn carry_out(&self, settings: &Settings, decision: Decision, turn: u64) {
        let mut pace = Pace::new(settings.rate_bytes);
        let most = pace.frames_in(STRETCH).clamp(BATCH, LARGEST_BATCH);
        let headroom = decision.headroom.max(self.monitor.floor()) as usize;
        let (mut plan, mut size) = (&*self.plan, BATCH);
        while !plan.is_empty() {
            if !self.sleep(pace.wait(self.started.elapsed()), turn) || self.installs() != self.installs {
                break;
            }
            let batch;
            (batch, plan) = plan.split_at(plan.len().min(size.min(most) as usize));
            // From here on, where the rest of the plan lies: as a rule that is enough, and the table is
            // not read to its end for each batch.
            let enough = headroom.saturating_add(batch.len());
            let free = self.monitor.free_with_memory(batch[0]).filter(|free| *free).take(enough).count();
            let room = free.saturating_sub(headroom);
            if room == 0 {
                break;
            }
            let begin = Instant::now();
            let batch = &batch[..room];
            let evicted = match self.monitor.evict_these(batch) {
                Ok(pass) => pass.frames,
                Err(error) => {
                    if let Some(number) = self.failures.tick() {
                        log::warn!("automatic reclaim ({number} so far): {}", error_line(&error));
                    }
                    0
                }
            };
            // Frames that were in use again say nothing of what a discard takes.
            if evicted > 0 {
                size = next_batch(evicted, begin.elapsed());
            }
            pace.take(evicted, self.started.elapsed());
            lock(&self.shared.state).status.evicted += u64::from(evicted);
        }
    }
}

impl Monitor {
    /// Of each huge frame, `from` first and then around, whether memory backs it and its entry
    /// claims that it is free.
    fn free_with_memory(&self, from: HugeId) -> impl Iterator<Item = bool> {
        let (before, behind) = {
            let entries = self.table().entries();
            entries.split_at(from.index().min(entries.len()))
        };
        let is_free = self.has_memory_and_is_free();
        let wrapped = (from.0..).zip(behind).chain((0..).zip(before));
        wrapped.map(move |(huge, word)| is_free(HugeId(huge), word))
    }

    /// The same of all frames, but not of those that the tenant says it freed since the last scan: a word for each
    /// [`FRAMES_A_WORD`] of them.
    fn unused_with_memory(&self) -> impl Iterator<Item = u64> {
        let is_free = self.has_memory_and_is_free();
        let is_unused = move |(word, huge)| is_free(HugeId(huge), word) && !self.was_freed_lately(HugeId(huge));
        let all = self.table().entries().chunks(FRAMES_A_WORD).zip((0..).step_by(FRAMES_A_WORD));
        all.map(move |(words, first)| {
            if self.has_no_memory(words) {
                return 0;
            }
            let bits = words.iter().zip(first..).map(&is_unused).zip(0..);
            bits.fold(0, |word, (is_unused, bit)| word | u64::from(is_unused) << bit)
        })
    }

    /// Asks for one load of most frames, for a scan has all of them, and there are many scans.
    fn has_memory_and_is_free(&self) -> impl Fn(HugeId, &AtomicU16) -> bool {
        let host = self.host();
        let follows_entries = self.installer() == Installer::Tenant;
        move |huge, word| {
            let entry = HugeEntry::from_bits(word.load(Ordering::Relaxed));
            // Where R follows the entries, no evicted frame has memory.
            entry.is_all_free()
                && !(follows_entries && entry.is_evicted())
                && host.residency(huge) == Some(Residency::Installed)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, GuestRam, PoolConfig, Supply, UseUserfaultfd};
    use crate::{Region, Table, TenantStart};
    use shared_layout::{HUGE_SIZE, HugeEntry, TableLayout};
    use std::sync::atomic::Ordering;

    /// A tenant of 8 frames, all of them with memory and free.
    fn all_free() -> Arc<Monitor> {
        let ram = Arc::new(GuestRam::new(8 * HUGE_SIZE, Backing::Anon).expect("small"));
        let supply = Supply::new(ram.clone(), PoolConfig::default(), UseUserfaultfd::Off, &Spawner::default());
        let layout = TableLayout::new(8).expect("small");
        let region = Arc::new(Region::anonymous(layout.total as usize).expect("room"));
        let table = Table::new(region, layout).expect("it fits");
        let start = TenantStart { taken: 0..8, installed: vec![0..4, 4..8], ..TenantStart::default() };
        let monitor = Monitor::new(ram, supply.expect("no pool"), table.clone(), start).expect("memory for eight");
        for entry in table.entries() {
            let given = HugeEntry::from_bits(entry.load(Ordering::Relaxed)).give_huge().expect("it is taken");
            entry.store(given.bits(), Ordering::Relaxed);
        }
        Arc::new(monitor)
    }

    fn scanned(pressure: fn() -> Pressure) -> AutoStatus {
        let mut auto = AutoReclaim::new(all_free(), Spawner::default());
        auto.pressure = Some(pressure);
        let interval = Duration::from_millis(10);
        let settings = Settings { interval, min_age: 200, keep_bytes: 8 * HUGE_SIZE, rate_bytes: 64 << 30 };
        auto.switch(Switch(Some(settings))).expect("a thread");
        let deadline = Instant::now() + Duration::from_secs(30);
        while auto.status().scans < 4 {
            assert!(Instant::now() < deadline, "it does not scan");
            std::thread::sleep(Duration::from_millis(2));
        }
        auto.status()
    }

    #[test]
    fn a_frame_among_many_that_were_never_used_is_seen() {
        let ram = Arc::new(GuestRam::new(200 * HUGE_SIZE, Backing::Anon).expect("address space"));
        let supply = Supply::new(ram.clone(), PoolConfig::default(), UseUserfaultfd::Off, &Spawner::default());
        let layout = TableLayout::new(200).expect("small");
        let region = Arc::new(Region::anonymous(layout.total as usize).expect("room"));
        let table = Table::new(region, layout).expect("it fits");
        table.clear();
        let start = TenantStart { installer: Installer::Tenant, ..TenantStart::default() };
        let monitor = Monitor::new(ram, supply.expect("no pool"), table.clone(), start).expect("nothing is installed");
        let unused = || monitor.unused_with_memory().collect::<Vec<_>>();
        assert_eq!((monitor.note_own_installs(), unused()), (0, vec![0; 4]));
        let free = HugeEntry::FREE_INSTALLED.bits();
        for huge in [0, 130, 199] {
            table.entries()[huge].store(free, Ordering::Relaxed);
        }
        assert_eq!((monitor.note_own_installs(), unused()), (3, vec![1, 0, 1 << 2, 1 << 7]));
        table.entries()[130].store(HugeEntry::HUGE_INSTALLED.bits(), Ordering::Relaxed);
        assert_eq!((monitor.note_own_installs(), unused()), (0, vec![1, 0, 0, 1 << 7]));
    }

    #[test]
    fn a_host_in_need_gets_what_would_be_kept() {
        assert_eq!(scanned(|| Pressure::below(0)).evicted, 0, "it is young, and no more than is to stay");
        assert_eq!(scanned(|| Pressure::below(u64::MAX)).evicted, 8);
    }

    #[test]
    fn a_host_in_need_gets_what_would_be_kept_for_what_came_back_lately() {
        let (monitor, shared) = (all_free(), Shared::default());
        let headroom = |pressure| {
            let mut worker = Worker::new(&monitor, &shared, &|| (), (monitor.counters.installs.get(), Some(pressure)));
            monitor.counters.installs.add(5);
            let settings = worker.in_need(Settings { keep_bytes: 0, ..Settings::default() });
            worker.scan(&settings).headroom
        };
        assert_eq!([headroom(Pressure::below(0)), headroom(Pressure::below(u64::MAX))], [5, 0]);
    }

    #[test]
    fn need_that_is_told_once_is_heeded_until_it_could_be_told_again() {
        let (monitor, shared) = (all_free(), Shared::default());
        let mut worker = Worker::new(&monitor, &shared, &|| (), (0, Some(Pressure::once())));
        let settings = Settings { keep_bytes: 8 * HUGE_SIZE, ..Settings::default() };
        for _ in 0..3 {
            assert_eq!(worker.in_need(settings).keep_bytes, 0);
        }
        worker.in_need_until = Some(Instant::now());
        assert_eq!(worker.in_need(settings).keep_bytes, settings.keep_bytes);
    }
}
