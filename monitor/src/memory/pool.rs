//! [`Pool`]: huge pages that are resident and zeroed before anybody asks for them.
//!
//! A ring of slots of 2 MiB in a mapping of its own, which no guest sees. One thread fills slots at
//! the head, installs take runs of neighbours from the tail with one compare-and-swap each, and the
//! same thread gives all of it back while the host is short of memory, and at its end. How many slots it
//! keeps full is its *goal*: all of them, or what the [`Demand`] of the last moments calls for, which is none in
//! an idle VM. Invariants: a run belongs to one taker until it is dropped, a slot that is filled holds zeroes
//! that nobody has touched, and the mapping holds no memory for slots that are neither full nor taken.
//!
//! The kernel may take memory out of a slot by itself: under pressure it replaces zeroed pages of huge pages by
//! the one page of zeroes that all share (Linux 6.12), and these are nothing else. So a run is looked at before
//! it is handed out.

use super::mapping::{Mapping, User};
use super::pages::Pagemap;
use super::pressure::Pressure;
use crate::roles;
use llfree_base::counters::SupplyCounters;
use llfree_base::thread::Spawner;
use llfree_base::{RateLimit, faults};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::{Errno, retry_on_intr};
use rustix::mm::Advice;
use shared_layout::HUGE_SIZE;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const SLOT: usize = HUGE_SIZE as usize;
/// The refilling thread's.
const NICE: i32 = 10;
/// How often the thread looks around unasked.
const LOOK: Duration = Duration::from_secs(1);
/// How long the host has to be well before the pool takes memory from it again.
const CONVALESCENCE: Duration = Duration::from_secs(10);

/// Demand is what was installed within this time.
const RECENT: Duration = Duration::from_secs(1);
/// Less than this many frames in that time are no demand: a guest that hardly grows needs no pool.
const LEAST_DEMAND: u64 = 4;
/// After so long without demand half of the pool goes back, and so on.
const QUIET: Duration = Duration::from_secs(5);

/// How much of a pool is kept full.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Fill {
    /// As much as the guest's installs of the last moments call for: none while there are none.
    #[default]
    OnDemand,
    /// All of it, always.
    Always,
}

/// How much memory is kept ready.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct PoolConfig {
    /// Huge frames; 0 is no pool.
    pub huge_frames: u32,
    /// Bytes a second that it is refilled with at most; 0 is no limit.
    pub rate: u64,
    /// How much of it is kept full.
    pub fill: Fill,
}

/// What the pool holds.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct PoolStatus {
    /// Bytes that it holds at most.
    pub size_bytes: u64,
    /// Bytes that it keeps ready at the moment.
    pub goal_bytes: u64,
    /// Bytes that it holds now, those included that are on their way to the guest.
    pub resident_bytes: u64,
}

/// The ring; see the file's head.
struct Ring {
    mapping: Mapping,
    slots: u64,
    /// Slots filled since the start: the next one to fill.
    head: AtomicU64,
    /// Slots taken since the start: the next one to take.
    tail: AtomicU64,
    /// For each slot whether it may be filled: what it held has left it.
    vacant: Box<[AtomicBool]>,
    /// Slots that hold memory.
    resident: AtomicU64,
    /// Slots to keep full.
    goal: AtomicU64,
    /// What the kernel says of the mapping; `None` without `/proc`.
    pagemap: Option<Pagemap>,
}

impl Ring {
    fn new(slots: u32) -> Result<Self, Errno> {
        Ok(Self {
            mapping: Mapping::anonymous(slots as usize * SLOT, User::Guest)?,
            slots: slots.into(),
            head: AtomicU64::new(0),
            tail: AtomicU64::new(0),
            vacant: (0..slots).map(|_| AtomicBool::new(true)).collect(),
            resident: AtomicU64::new(0),
            goal: AtomicU64::new(slots.into()),
            pagemap: Pagemap::open().ok(),
        })
    }

    fn goal(&self) -> u64 {
        self.goal.load(Ordering::Relaxed)
    }

    fn full(&self) -> u64 {
        // The tail first: a head that is read later can only be further.
        let tail = self.tail.load(Ordering::Acquire);
        self.head.load(Ordering::Acquire).saturating_sub(tail)
    }

    fn is_low(&self) -> bool {
        self.full() <= self.goal() / 2
    }

    /// Whether these slots still hold what they were filled with, unless the kernel does not say.
    fn is_whole(&self, slots: &Range<usize>) -> bool {
        let (start, bytes) = (self.mapping.start() + slots.start * SLOT, slots.len() * SLOT);
        let resident = self.pagemap.as_ref().and_then(|pagemap| pagemap.resident_bytes(start, bytes).ok());
        resident.is_none_or(|resident| resident == bytes as u64)
    }

    /// A run of at most `most` full slots; `None` if there is none.
    fn take(&self, most: u32) -> Option<Range<usize>> {
        let mut tail = self.tail.load(Ordering::Relaxed);
        loop {
            // Acquire pairs with the Release in `fill`: the slots below are ours to read.
            let head = self.head.load(Ordering::Acquire);
            let first = tail % self.slots;
            // Not past the end of the mapping: the ring goes on at its start.
            let count = u64::from(most).min(head.saturating_sub(tail)).min(self.slots - first);
            if count == 0 {
                return None;
            }
            match self.tail.compare_exchange_weak(tail, tail + count, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(first as usize..(first + count) as usize),
                Err(now) => tail = now,
            }
        }
    }

    /// Puts zeroed memory into the next slot. False if the ring is full.
    ///
    /// Only the thread that refills calls this.
    fn fill(&self) -> Result<bool, Errno> {
        let head = self.head.load(Ordering::Relaxed);
        let slot = (head % self.slots) as usize;
        // Acquire pairs with the Release in `vacate`: the mapping is empty there.
        if head - self.tail.load(Ordering::Relaxed) == self.slots || !self.vacant[slot].load(Ordering::Acquire) {
            return Ok(false);
        }
        if let Err(error) = populate(&self.mapping, slot..slot + 1) {
            // It may have got a part of it.
            discard(&self.mapping, slot..slot + 1);
            return Err(error);
        }
        self.vacant[slot].store(false, Ordering::Relaxed);
        self.resident.fetch_add(1, Ordering::Relaxed);
        self.head.store(head + 1, Ordering::Release);
        Ok(true)
    }

    /// Lets slots be filled again that hold nothing any more.
    fn vacate(&self, slots: Range<usize>) {
        self.resident.fetch_sub(slots.len() as u64, Ordering::Relaxed);
        for slot in slots {
            self.vacant[slot].store(true, Ordering::Release);
        }
    }

    /// Gives all that nobody has taken back to the host; true if there was any.
    fn give_back(&self) -> bool {
        self.trim(0)
    }

    /// The same, but for so many slots.
    fn trim(&self, most: u64) -> bool {
        let mut any = false;
        let above = || u32::try_from(self.full().saturating_sub(most)).unwrap_or(u32::MAX);
        while let Some(slots) = self.take(above()) {
            discard(&self.mapping, slots.clone());
            self.vacate(slots);
            any = true;
        }
        any
    }
}

/// Full slots that belong to the taker. Dropped, what they still hold goes back to the host.
pub(super) struct Run<'a> {
    ring: &'a Ring,
    slots: Range<usize>,
    moved: bool,
}

impl Run<'_> {
    /// The addresses of the slots.
    pub(super) fn addresses(&self) -> Range<usize> {
        let start = self.ring.mapping.start();
        start + self.slots.start * SLOT..start + self.slots.end * SLOT
    }

    pub(super) fn frames(&self) -> u32 {
        self.slots.len() as u32
    }

    /// All of it was moved to the guest.
    pub(super) fn moved(mut self) {
        self.moved = true;
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        if !self.moved {
            discard(&self.ring.mapping, self.slots.clone());
        }
        self.ring.vacate(self.slots.clone());
    }
}

/// What the refilling thread and the takers share.
struct Shared {
    ring: Ring,
    /// Wakes the thread.
    event: OwnedFd,
    /// It sleeps, and nobody has woken it yet.
    asleep: AtomicBool,
    stop: AtomicBool,
    /// Bytes a second at most; 0 is no limit.
    rate: u64,
    /// Frames that were installed since the thread looked, where the goal follows them.
    installed: Option<AtomicU64>,
    counters: Arc<SupplyCounters>,
}

/// Pre-zeroed memory for installs, and the thread that refills it. Dropping it ends the thread.
pub(super) struct Pool {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Pool {
    /// A pool of at least one huge frame, that takes no memory from the host while `pressure` says that it
    /// is short.
    pub(super) fn start(
        PoolConfig { huge_frames, rate, fill }: PoolConfig,
        pressure: Pressure,
        counters: Arc<SupplyCounters>,
        threads: &Spawner,
    ) -> io::Result<Self> {
        let ring = Ring::new(huge_frames)?;
        if fill == Fill::OnDemand {
            ring.goal.store(0, Ordering::Relaxed);
        }
        let shared = Arc::new(Shared {
            ring,
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            asleep: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            rate,
            installed: (fill == Fill::OnDemand).then(AtomicU64::default),
            counters,
        });
        let of_thread = shared.clone();
        let thread = threads.spawn("install-pool", roles::INSTALL_POOL, move || {
            let demand = Demand::new(Instant::now());
            Refill { shared: &of_thread, pressure, demand, well_from: None, budget: None }.run();
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// A run of at most `most` frames, or `None` if the pool is dry: then the caller backs one by itself, and
    /// comes again. Never waits.
    pub(super) fn take(&self, most: u32) -> Option<Run<'_>> {
        let ring = &self.shared.ring;
        let slots = ring.take(most);
        if let Some(installed) = &self.shared.installed {
            installed.fetch_add(slots.as_ref().map_or(1, Range::len) as u64, Ordering::Relaxed);
        }
        // Pairs with the fence in `Refill::run`: we see that it sleeps, or it sees what we took.
        fence(Ordering::SeqCst);
        // Waking the thread costs as much as an install: not for each of them.
        if ring.is_low()
            && self.shared.asleep.load(Ordering::Relaxed)
            && self.shared.asleep.swap(false, Ordering::Relaxed)
        {
            self.shared.wake();
        }
        let run = Run { ring, slots: slots?, moved: false };
        if !ring.is_whole(&run.slots) {
            self.shared.counters.stale.add(run.frames().into());
            return None;
        }
        Some(run)
    }

    /// Ends the thread, which gives back what nobody has taken; the pool stays dry from then on.
    pub(super) fn retire(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.wake();
    }

    pub(super) fn status(&self) -> PoolStatus {
        let ring = &self.shared.ring;
        PoolStatus {
            size_bytes: ring.slots * HUGE_SIZE,
            goal_bytes: ring.goal() * HUGE_SIZE,
            resident_bytes: ring.resident.load(Ordering::Relaxed) * HUGE_SIZE,
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.retire();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread that refills the install pool panicked");
        }
    }
}

impl Shared {
    fn wake(&self) {
        // It fails only when its counter is full, and then the thread is awake already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Whether somebody took slots, or asked for some, since the thread looked.
    fn has_work(&self) -> bool {
        let asked = self.installed.as_ref().is_some_and(|installed| installed.load(Ordering::Relaxed) > 0);
        asked || (self.ring.is_low() && self.ring.full() < self.ring.goal())
    }
}

/// How many slots the installs of the last moments call for.
struct Demand {
    /// Installs since `since`, at most [`RECENT`] ago.
    recent: u64,
    since: Instant,
    /// When there was demand last, or the goal was lowered.
    quiet_since: Instant,
}

impl Demand {
    fn new(now: Instant) -> Self {
        Self { recent: 0, since: now, quiet_since: now }
    }

    /// The next goal, of at most `slots`: twice what was installed lately, half as much after each quiet time.
    fn goal(&mut self, goal: u64, slots: u64, installed: u64, now: Instant) -> u64 {
        if now - self.since > RECENT {
            (self.recent, self.since) = (0, now);
        }
        self.recent += installed;
        if installed > 0 && self.recent >= LEAST_DEMAND {
            self.quiet_since = now;
            return goal.max(2 * self.recent).min(slots);
        }
        if now - self.quiet_since > QUIET {
            self.quiet_since = now;
            return goal / 2;
        }
        goal
    }
}

/// The refilling thread.
struct Refill<'a> {
    shared: &'a Shared,
    pressure: Pressure,
    demand: Demand,
    /// When the host may be asked for memory again; `None` if it was never short.
    well_from: Option<Instant>,
    /// With a rate: when what was filled so far is paid for.
    budget: Option<Instant>,
}

impl Refill<'_> {
    fn run(mut self) {
        let shared = self.shared;
        // vCPUs first: a vCPU that finds the pool dry takes memory directly.
        if let Err(error) = rustix::process::setpriority_process(None, NICE) {
            log::debug!("the install pool is refilled with ordinary priority: {error}");
        }
        while !shared.stop.load(Ordering::Relaxed) {
            if self.pressure.is_high() {
                self.well_from = Some(Instant::now() + CONVALESCENCE);
                if shared.ring.give_back() {
                    shared.counters.given_back.inc();
                    log::info!("the host is short of memory: the install pool gave back what it held");
                }
            }
            self.follow_demand();
            let pause = self.refill();
            shared.asleep.store(true, Ordering::Relaxed);
            // Somebody may have taken slots and seen us awake.
            fence(Ordering::SeqCst);
            if pause.is_some() || !shared.has_work() {
                self.sleep(pause.unwrap_or(LOOK).min(LOOK));
            }
            shared.asleep.store(false, Ordering::Relaxed);
        }
        shared.ring.give_back();
    }

    /// Sets the goal anew, where it follows the guest's installs.
    fn follow_demand(&mut self) {
        let Shared { ring, installed: Some(installed), .. } = self.shared else { return };
        let goal = self.demand.goal(ring.goal(), ring.slots, installed.swap(0, Ordering::Relaxed), Instant::now());
        ring.goal.store(goal, Ordering::Relaxed);
        ring.trim(goal);
    }

    /// Fills what is empty. Returns after how long to go on, where it could not fill all of it.
    fn refill(&mut self) -> Option<Duration> {
        let shared = self.shared;
        if self.well_from.is_some_and(|well_from| Instant::now() < well_from) {
            return Some(LOOK);
        }
        self.well_from = None;
        loop {
            if shared.stop.load(Ordering::Relaxed) || self.pressure.is_high_now() {
                return Some(Duration::ZERO);
            }
            let now = Instant::now();
            if let Some(paid) = self.budget
                && paid > now
            {
                return Some(paid - now);
            }
            // More was asked for meanwhile, and the goal may be higher by now.
            self.follow_demand();
            if shared.ring.full() >= shared.ring.goal() {
                return None;
            }
            match shared.ring.fill() {
                Ok(true) => {}
                // What the next slot held is on its way to the guest.
                Ok(false) => return Some(Duration::from_micros(100)),
                Err(error) => {
                    log::debug!("the install pool cannot be refilled: {error}");
                    self.well_from = Some(now + CONVALESCENCE);
                    return Some(LOOK);
                }
            }
            if shared.rate > 0 {
                let price = Duration::from_secs_f64(HUGE_SIZE as f64 / shared.rate as f64);
                self.budget = Some(self.budget.unwrap_or(now).max(now) + price);
            }
        }
    }

    /// Sleeps until somebody took enough, the host runs short, or for `pause`.
    fn sleep(&mut self, pause: Duration) {
        let mut fds = vec![PollFd::new(&self.shared.event, PollFlags::IN)];
        if let Some(trigger) = self.pressure.trigger() {
            fds.push(PollFd::from_borrowed_fd(trigger.as_fd(), PollFlags::PRI));
        }
        // At most a second, which a poll can be told.
        let pause = Timespec::try_from(pause).ok();
        let polled = rustix::event::poll(&mut fds, pause.as_ref());
        let urgent = fds.get(1).map(PollFd::revents);
        if let (Ok(1..), Some(events)) = (polled, urgent) {
            self.pressure.note(events);
        }
        // Empty, unless somebody woke us.
        let _ = rustix::io::read(&self.shared.event, &mut [0; 8]);
    }
}

/// Backs slots with memory: zeroed where there was none.
fn populate(mapping: &Mapping, slots: Range<usize>) -> Result<(), Errno> {
    faults::point(faults::POPULATE).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    // SAFETY: the range is inside our mapping, which nobody else uses.
    retry_on_intr(|| unsafe {
        rustix::mm::madvise(mapping.pointer(slots.start * SLOT), slots.len() * SLOT, Advice::LinuxPopulateWrite)
    })
}

/// Gives the memory of slots back to the host.
fn discard(mapping: &Mapping, slots: Range<usize>) {
    // SAFETY: the range is inside our mapping, which nobody else uses.
    let result = retry_on_intr(|| unsafe {
        rustix::mm::madvise(mapping.pointer(slots.start * SLOT), slots.len() * SLOT, Advice::LinuxDontNeed)
    });
    if let Err(error) = result {
        static FAILURES: RateLimit = RateLimit::new();
        if let Some(number) = FAILURES.tick() {
            let count = slots.len();
            log::warn!(
                "{count} huge frames of the install pool could not be given back ({number} times so far): {error}"
            );
        }
    }
}

/// One slot outside the ring, for an install that finds the pool dry: filled on the spot.
pub(super) struct Staging(Mapping);

impl Staging {
    pub(super) fn new() -> Result<Self, Errno> {
        Mapping::anonymous(SLOT, User::Guest).map(Self)
    }

    /// Fills it with zeroed memory, and says where that is.
    pub(super) fn fill(&self) -> Result<Range<usize>, Errno> {
        let start = self.0.start();
        populate(&self.0, 0..1).map(|()| start..start + SLOT)
    }

    /// Empties it.
    pub(super) fn clear(&self) {
        discard(&self.0, 0..1);
    }
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
