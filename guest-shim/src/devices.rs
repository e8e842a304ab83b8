//! [`Devices`]: the guest's devices and when their drivers run.
//!
//! All vCPUs share them, behind a lock; vCPU 0 runs the drivers, as a driver's thread would: when
//! the host calls it for that, between two blocks of a command when a device has news, and at the
//! end of each command. A turn is short, and says whether there is more to do. Another vCPU only
//! comes when it has run out of memory.

use crate::balloon::{self, Balloon};
use crate::clock::Clock;
use crate::host::Doorbell;
use crate::mem::{self, Mem};
use crate::memory::{Memory, Relief};
use crate::reported::Reported;
use crate::shared::{PAGE_WORDS, Shared};
use crate::virtio::{Broken, Device};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use guest_abi::ControlWord;
use guest_abi::devices::{DEVICE_BYTES, DEVICE_SLOTS};
use guest_abi::header::FEATURE_DEVICES;
use llfree_agent_core::Clock as _;
use shared_layout::FrameId;
use spin::Mutex;

/// The duration of a turn of the drivers.
const TURN_MILLIS: u64 = 10;
/// The same in batches, without a clock.
const TURN_STEPS: u32 = 64;
/// From one report of free memory to the next: a little less than the host's tick.
const REPORT_MILLIS: u64 = 1800;

/// Drivers at work.
#[derive(Debug)]
struct Drivers {
    balloon: Option<Balloon>,
    mem: Option<Mem>,
    /// When the last round of reports ended.
    reported_at: Option<u64>,
}

/// The devices of a guest, shared by its vCPUs.
#[derive(Debug)]
pub struct Devices {
    drivers: Mutex<Drivers>,
    /// The device events that were looked after.
    events: AtomicU64,
    /// The last turn ended before the work did.
    unfinished: AtomicBool,
    /// The free frames that the host knows of.
    reported: Reported,
}

impl Default for Devices {
    fn default() -> Self {
        Self::new()
    }
}

impl Devices {
    /// None yet.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            drivers: Mutex::new(Drivers { balloon: None, mem: None, reported_at: None }),
            events: AtomicU64::new(0),
            unfinished: AtomicBool::new(false),
            reported: Reported::new(),
        }
    }

    /// Makes a vCPU's memory turn to the drivers when it has none, and tell them what it takes.
    pub(crate) fn connect<'a, D: Doorbell>(&'a self, memory: &mut Memory<'a, D>) {
        memory.attach(self, &self.reported);
    }

    /// Brings up what there is. A device that does not go along is left alone.
    pub(crate) fn probe<D: Doorbell>(&self, shared: &Shared, memory: &mut Memory<'_, D>) {
        memory.drive(|memory| self.bring_up(shared, memory));
    }

    /// Whether a guest has devices at all.
    pub(crate) fn exist(shared: &Shared) -> bool {
        shared.header().features & FEATURE_DEVICES != 0
    }

    fn bring_up<D: Doorbell>(&self, shared: &Shared, memory: &mut Memory<'_, D>) {
        let header = shared.header();
        let mut drivers = self.drivers.lock();
        for slot in 0..u64::from(header.devices.min(DEVICE_SLOTS)) {
            match Device::find(&mut memory.host, header.devices_gpa + slot * DEVICE_BYTES) {
                Some((device, balloon::ID)) => drivers.balloon = Balloon::new(device, memory).ok(),
                Some((device, mem::ID)) => drivers.mem = Mem::new(device, memory).ok(),
                _ => {}
            }
        }
        if drivers.balloon.as_ref().is_some_and(Balloon::reports) {
            self.make_marks(memory);
        }
        drivers.wake(memory);
        // Memory that must be plugged first is the guest's from the start.
        while drivers.mem.is_some() && drivers.step(memory) {}
        // The rest, such as a target from before the start, at the first opportunity.
        self.unfinished.store(true, Ordering::Relaxed);
    }

    fn make_marks<D: Doorbell>(&self, memory: &mut Memory<'_, D>) {
        let order = Reported::order(memory.tenant().huge_frames());
        let Ok(block) = memory.take(order) else { return };
        for frame in block.frame().0..block.frame().0 + order.frames() {
            // SAFETY: in the block that was just taken.
            let page = unsafe { memory.page(FrameId(frame)) };
            (0..PAGE_WORDS).for_each(|word| page.store(word, 0));
        }
        let address = memory.ram().address(block.frame());
        // SAFETY: zeroed above, large enough, and never given back.
        unsafe { self.reported.keep_in(address) };
    }

    /// Whether a device has news, or its driver did not finish. Cheap.
    pub(crate) fn have_work(&self, shared: &Shared) -> bool {
        // Hints both: what they miss now they show at the next look.
        self.unfinished.load(Ordering::Relaxed)
            || self.events.load(Ordering::Relaxed) != shared.control(ControlWord::DeviceEvents)
    }

    /// A turn of the drivers; true if there is more to do. `tick`: the host called for it.
    pub(crate) fn run<D: Doorbell>(
        &self,
        shared: &Shared,
        memory: &mut Memory<'_, D>,
        clock: Clock,
        tick: bool,
    ) -> bool {
        memory.drive(|memory| self.turn(shared, memory, clock, tick))
    }

    fn turn<D: Doorbell>(&self, shared: &Shared, memory: &mut Memory<'_, D>, clock: Clock, tick: bool) -> bool {
        // Held by a vCPU that ran out of memory: a little later is early enough.
        let Some(mut drivers) = self.drivers.try_lock() else { return true };
        let start = clock.now();
        let events = shared.control(ControlWord::DeviceEvents);
        if self.events.swap(events, Ordering::Relaxed) != events {
            drivers.wake(memory);
        }
        let ticks = clock.ticks(TURN_MILLIS);
        let mut more = drivers.step(memory);
        for _ in 1..TURN_STEPS {
            let over = ticks.is_some_and(|ticks| clock.now().saturating_sub(start) >= ticks);
            if !more || over {
                break;
            }
            more = drivers.step(memory);
        }
        self.unfinished.store(more, Ordering::Relaxed);
        more || drivers.report(memory, &self.reported, clock, tick)
    }
}

impl<D: Doorbell> Relief<D> for Devices {
    fn relieve(&self, memory: &mut Memory<'_, D>) -> bool {
        let mut drivers = self.drivers.lock();
        let Some(balloon) = &mut drivers.balloon else { return false };
        match balloon.relieve(memory) {
            Ok(moved) => moved,
            Err(Broken) => {
                drivers.balloon = None;
                false
            }
        }
    }
}

impl Drivers {
    fn wake<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>) {
        if let Some(balloon) = &mut self.balloon {
            balloon.wake(memory);
        }
        if let Some(mem) = &mut self.mem {
            mem.wake(memory);
        }
    }

    /// A batch of each; true if something moved. A device that broke is left alone: what it was
    /// given stays its own.
    fn step<D: Doorbell>(&mut self, memory: &mut Memory<'_, D>) -> bool {
        let balloon = self.balloon.as_mut().map_or(Ok(false), |balloon| balloon.step(memory));
        let mem = self.mem.as_mut().map_or(Ok(false), |mem| mem.step(memory));
        if balloon == Err(Broken) {
            self.balloon = None;
        }
        if mem == Err(Broken) {
            self.mem = None;
        }
        balloon == Ok(true) || mem == Ok(true)
    }

    /// A batch of reports, if it is time; true if the round is not over.
    fn report<D: Doorbell>(
        &mut self,
        memory: &mut Memory<'_, D>,
        reported: &Reported,
        clock: Clock,
        tick: bool,
    ) -> bool {
        let Some(balloon) = &mut self.balloon else { return false };
        let rest = clock.ticks(REPORT_MILLIS).unwrap_or(0);
        let early = self.reported_at.is_some_and(|at| clock.now().saturating_sub(at) < rest);
        if !tick || early || !balloon.reports() {
            return false;
        }
        match balloon.report(memory, reported) {
            Ok(true) => true,
            Ok(false) => {
                self.reported_at = Some(clock.now());
                false
            }
            Err(Broken) => {
                self.balloon = None;
                false
            }
        }
    }
}

#[cfg(test)]
mod tests;
