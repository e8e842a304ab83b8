//! [`Pool`]: huge pages that are resident and zeroed before anybody asks for them.
//!
//! A ring of slots of 2 MiB in a mapping of its own, which no guest sees. One thread fills slots at
//! the head, installs take runs of neighbours from the tail with one compare-and-swap each, and the
//! same thread gives all of it back while the host is short of memory, and at its end. Invariants: a run belongs to
//! one taker until it is dropped, a slot that is filled holds zeroes that nobody has touched, and
//! the mapping holds no memory for slots that are neither full nor taken.

use super::mapping::Mapping;
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

/// What the pool holds.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct PoolStatus {
    /// Bytes that it holds when it is full.
    pub size_bytes: u64,
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
}

impl Ring {
    fn new(slots: u32) -> Result<Self, Errno> {
        Ok(Self {
            mapping: Mapping::anonymous(slots as usize * SLOT)?,
            slots: slots.into(),
            head: AtomicU64::new(0),
            tail: AtomicU64::new(0),
            vacant: (0..slots).map(|_| AtomicBool::new(true)).collect(),
            resident: AtomicU64::new(0),
        })
    }

    fn full(&self) -> u64 {
        // The tail first: a head that is read later can only be further.
        let tail = self.tail.load(Ordering::Acquire);
        self.head.load(Ordering::Acquire).saturating_sub(tail)
    }

    fn is_low(&self) -> bool {
        self.full() <= self.slots / 2
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
        let mut any = false;
        while let Some(slots) = self.take(u32::MAX) {
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
    counters: Arc<SupplyCounters>,
}

/// Pre-zeroed memory for installs, and the thread that refills it. Dropping it ends the thread.
pub(super) struct Pool {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `slots` huge frames, at least one, that takes at most `rate` bytes a second from
    /// the host (0: as fast as it can), and none while `pressure` says that it is short.
    pub(super) fn start(
        slots: u32,
        rate: u64,
        pressure: Pressure,
        counters: Arc<SupplyCounters>,
        threads: &Spawner,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            ring: Ring::new(slots)?,
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            asleep: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            rate,
            counters,
        });
        let of_thread = shared.clone();
        let thread = threads.spawn("install-pool", roles::INSTALL_POOL, move || {
            Refill { shared: &of_thread, pressure, well_from: None, budget: None }.run();
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// A run of at most `most` frames, or `None` if the pool is dry. Never waits.
    pub(super) fn take(&self, most: u32) -> Option<Run<'_>> {
        let ring = &self.shared.ring;
        let slots = ring.take(most);
        // Pairs with the fence in `Refill::run`: we see that it sleeps, or it sees what we took.
        fence(Ordering::SeqCst);
        // Waking the thread costs as much as an install: not for each of them.
        if ring.is_low()
            && self.shared.asleep.load(Ordering::Relaxed)
            && self.shared.asleep.swap(false, Ordering::Relaxed)
        {
            self.shared.wake();
        }
        Some(Run { ring, slots: slots?, moved: false })
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
}

/// The refilling thread.
struct Refill<'a> {
    shared: &'a Shared,
    pressure: Pressure,
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
            let pause = self.refill();
            shared.asleep.store(true, Ordering::Relaxed);
            // Somebody may have taken slots and seen us awake.
            fence(Ordering::SeqCst);
            if pause.is_some() || !shared.ring.is_low() {
                self.sleep(pause.unwrap_or(LOOK).min(LOOK));
            }
            shared.asleep.store(false, Ordering::Relaxed);
        }
        shared.ring.give_back();
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
            match shared.ring.fill() {
                Ok(true) => {}
                Ok(false) if shared.ring.full() == shared.ring.slots => return None,
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
        Mapping::anonymous(SLOT).map(Self)
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
