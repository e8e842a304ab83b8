//! `Reclaimer`: the monitor of an area, and the thread that has it look for memory to give back.
//!
//! The monitor is that of virtual machines; the tenant here installs by itself. Before each of its looks around the thread
//! has the caches of this process free what lies in them unused. Where the [kernel takes free memory back by
//! itself](crate::device), a thread does that alone, and whoever asks this process for something has the area back for as long as
//! that takes.

use crate::device::{self, Device, KernelStatus, Moves, Parts};
use crate::error::AreaError;
use crate::fork::Maker;
use crate::hand::{Flushed, SharedHand};
use crate::idle::Idle;
use crate::membarrier;
use llfree::host::Installer;
use llfree_base::choices::{Settings, Switch};
use llfree_base::lock;
use llfree_base::thread::Spawner;
use llfree_monitor::auto::{AutoReclaim, AutoStatus};
use llfree_monitor::memory::{GuestRam, PoolConfig, Supply, UseUserfaultfd};
use llfree_monitor::{Direction, Monitor, Pass, Resize, Table, TenantStart, Validation};
use shared_layout::HUGE_SIZE;
use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockWriteGuard, Weak};
use std::time::Duration;
use std::{fmt, io};

/// What an area does by default: see `Builder`.
pub(crate) const AUTO_RECLAIM: Settings =
    Settings { interval: Duration::from_millis(200), min_age: 2, keep_bytes: 0, rate_bytes: 16 << 30 };

/// A cache of an area's memory.
pub(crate) trait Flush: Send + Sync {
    /// Frees what lies in it.
    fn flush(&self, what: Flushed);
}

/// What an area is at, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Status {
    /// Its size.
    pub bytes: u64,
    /// What it may use: its size, less what is held.
    pub limit_bytes: u64,
    /// Memory behind it, by the kernel's account.
    pub resident_bytes: u64,
    /// Of that what is mapped in huge pages.
    pub huge_bytes: u64,
    /// What is allocated, caches included.
    pub used_bytes: u64,
    /// Free memory that a reclaim would give back.
    pub reclaimable_bytes: u64,
    /// Given back without being asked for, since the area was made.
    pub evicted_bytes: u64,
    /// Automatic reclaim.
    pub auto_reclaim: AutoStatus,
    /// What the kernel has done, where it is the one that takes memory back: when it is short of it, and at no other time.
    pub kernel: Option<KernelStatus>,
}

type Caches = Arc<Mutex<Lists>>;

/// Who has memory of an area in hand that is in no use.
#[derive(Default)]
struct Lists {
    hands: Vec<Weak<SharedHand>>,
    caches: Vec<Weak<dyn Flush>>,
}

pub(crate) struct Reclaimer {
    // A forked child has no such thread, and whoever held its locks stayed with the parent.
    auto: ManuallyDrop<RwLock<Auto>>,
    monitor: Arc<Monitor>,
    caches: Caches,
    /// What the kernel needs to take memory back, where it may.
    parts: Option<Parts>,
    maker: Maker,
}

/// Who takes memory back. Whoever does takes the lock for reading.
struct Auto {
    whose: Whose,
    /// As it was switched last.
    switch: Switch,
}

enum Whose {
    /// This process's.
    Here(AutoReclaim),
    /// The kernel's.
    Kernel(Device, #[expect(dead_code, reason = "it is a thread, which ends with it")] Idle),
    /// Another process's: nobody here may take anything.
    Lent,
    /// This process's, which has not taken it over from the other, gone by now, for lack of something. The next use of it tries
    /// again.
    Owed,
}

impl Reclaimer {
    /// For an area of this process.
    pub(crate) fn new(ram: Arc<GuestRam>, table: Table) -> Result<Self, AreaError> {
        Self::start(ram, table, false, None)
    }

    /// The same for one that the kernel may have.
    pub(crate) fn offering(parts: Parts, table: Table) -> Result<Self, AreaError> {
        Self::start(parts.ram.clone(), table, false, Some(parts))
    }

    /// For one of another process, which is at work already.
    pub(crate) fn adopting(ram: Arc<GuestRam>, table: Table) -> Result<Self, AreaError> {
        let reclaimer = Self::start(ram, table, true, None)?;
        reclaimer.monitor.take_over()?;
        Ok(reclaimer)
    }

    fn start(ram: Arc<GuestRam>, table: Table, adopted: bool, parts: Option<Parts>) -> Result<Self, AreaError> {
        // Before there is another thread, if we may choose.
        membarrier::prepare();
        let supply = Supply::new(ram.clone(), PoolConfig::default(), UseUserfaultfd::Off, &Spawner::default())?;
        let start = TenantStart { installer: Installer::Tenant, adopted, ..TenantStart::default() };
        let monitor = Arc::new(Monitor::new(ram, supply, table, start)?);
        let caches = Caches::default();
        let whose = Whose::Here(auto(&monitor, &caches));
        let auto = ManuallyDrop::new(RwLock::new(Auto { whose, switch: Switch(None) }));
        Ok(Self { auto, monitor, caches, parts, maker: Maker::new() })
    }

    fn monitor(&self) -> Result<&Monitor, AreaError> {
        if self.maker.is_gone() { Err(AreaError::Forked) } else { Ok(&self.monitor) }
    }

    /// Calls `work` while it is this process that takes memory back.
    fn with<T>(&self, work: impl FnOnce(&Monitor, &AutoReclaim) -> Result<T, AreaError>) -> Result<T, AreaError> {
        let monitor = self.monitor()?;
        let mut auto = self.auto.read().unwrap_or_else(PoisonError::into_inner);
        if matches!(auto.whose, Whose::Kernel(..)) {
            drop(auto);
            return self.with_kernel_aside(work);
        }
        if matches!(auto.whose, Whose::Owed) {
            drop(auto);
            self.settle(&mut self.write())?;
            auto = self.auto.read().unwrap_or_else(PoisonError::into_inner);
        }
        match &auto.whose {
            Whose::Here(here) => work(monitor, here),
            Whose::Kernel(..) | Whose::Lent | Whose::Owed => Err(AreaError::Registered),
        }
    }

    /// The same for an area that the kernel has, which has it again afterwards.
    fn with_kernel_aside<T>(
        &self,
        work: impl FnOnce(&Monitor, &AutoReclaim) -> Result<T, AreaError>,
    ) -> Result<T, AreaError> {
        let mut auto = self.write();
        self.settle(&mut auto)?;
        let done = match &auto.whose {
            Whose::Here(here) => work(&self.monitor, here),
            Whose::Kernel(..) | Whose::Lent | Whose::Owed => Err(AreaError::Registered),
        };
        self.offer(&mut auto);
        done
    }

    /// Leaves the area to the kernel, if that takes it and nobody has asked for more than what it does.
    fn offer(&self, auto: &mut Auto) {
        let (Some(parts), Some(keep)) = (&self.parts, kept_by_kernel(auto.switch)) else { return };
        if !matches!(auto.whose, Whose::Here(_)) {
            return;
        }
        let Ok(device) = device::open() else { return };
        let (caches, moves) = (self.caches.clone(), Moves::watch(&device));
        let work = move || {
            flush(&caches, Flushed::Idle);
            moves.look();
        };
        let Ok(idle) = Idle::start(AUTO_RECLAIM.interval, work) else { return };
        // Nobody here has a frame in hand any more: the thread has ended.
        auto.whose = Whose::Owed;
        match Device::attach(device, parts, keep) {
            Ok(device) => auto.whose = Whose::Kernel(device, idle),
            Err(error) => {
                log::debug!("the kernel does not take an area's memory back: {error}");
                let here = self::auto(&self.monitor, &self.caches);
                if here.switch(auto.switch).is_ok() {
                    auto.whose = Whose::Here(here);
                }
            }
        }
    }

    fn write(&self) -> RwLockWriteGuard<'_, Auto> {
        self.auto.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves the area to another process: when this returns nobody here has a frame of it in hand.
    pub(crate) fn lend(&self) -> Result<(), AreaError> {
        self.monitor()?;
        let mut auto = self.write();
        self.settle(&mut auto)?;
        match &auto.whose {
            // It ends with its thread.
            Whose::Here(_) => auto.whose = Whose::Lent,
            Whose::Kernel(..) | Whose::Lent | Whose::Owed => return Err(AreaError::Registered),
        }
        Ok(())
    }

    /// Has it again, as the other process, gone by now, left it. May be repeated if it fails.
    pub(crate) fn take_back(&self) -> Result<(), AreaError> {
        self.monitor()?;
        let mut auto = self.write();
        if matches!(auto.whose, Whose::Kernel(..)) {
            // As good as ours, and asked for each time that a keeper is looked for.
            return Ok(());
        }
        if matches!(auto.whose, Whose::Lent) {
            auto.whose = Whose::Owed;
        }
        self.settle(&mut auto)?;
        self.offer(&mut auto);
        Ok(())
    }

    /// Takes over what is owed, or what the kernel has.
    fn settle(&self, auto: &mut Auto) -> Result<(), AreaError> {
        if matches!(auto.whose, Whose::Kernel(..)) {
            // It finishes its batch.
            auto.whose = Whose::Owed;
        }
        if matches!(auto.whose, Whose::Owed) {
            self.monitor.take_over()?;
            let here = self::auto(&self.monitor, &self.caches);
            here.switch(auto.switch)?;
            auto.whose = Whose::Here(here);
        }
        Ok(())
    }

    pub(crate) fn add_cache(&self, cache: Weak<dyn Flush>) {
        self.add(cache, |lists| &mut lists.caches);
    }

    pub(crate) fn add_hand(&self, hand: Weak<SharedHand>) {
        self.add(hand, |lists| &mut lists.hands);
    }

    fn add<T: ?Sized>(&self, one: Weak<T>, list: impl FnOnce(&mut Lists) -> &mut Vec<Weak<T>>) {
        if self.maker.is_gone() {
            // Nobody flushes caches here, and the list's lock may be with a thread of the parent.
            return;
        }
        let mut lists = lock(&self.caches);
        let list = list(&mut lists);
        list.retain(|one| one.strong_count() > 0);
        list.push(one);
    }

    /// Has all caches of this process give back what lies in them unused.
    pub(crate) fn free_idle(&self) {
        flush(&self.caches, Flushed::Idle);
    }

    /// Huge frames that a lowered limit keeps out of reach.
    pub(crate) fn held_for_good(&self) -> u64 {
        if self.maker.is_gone() {
            // Nobody returns what the parent's reclaimer had in hand.
            return u64::MAX;
        }
        u64::from(self.monitor.huge_frames()).saturating_sub(self.monitor.claimed_limit().into())
    }

    pub(crate) fn await_batch(&self) {
        if let Ok(monitor) = self.monitor() {
            monitor.await_batch();
        }
    }

    pub(crate) fn switch(&self, switch: Switch) -> Result<(), AreaError> {
        self.with(|_, auto| Ok(auto.switch(switch)?))?;
        let mut auto = self.write();
        let before = std::mem::replace(&mut auto.switch, switch);
        if matches!(auto.whose, Whose::Kernel(..)) && switch != before {
            // It has the headroom of before.
            self.settle(&mut auto)?;
        }
        self.offer(&mut auto);
        Ok(())
    }

    /// Ends passes, now and later, at their next batch.
    pub(crate) fn stop(&self) {
        self.monitor.stop();
    }

    pub(crate) fn reclaim(&self, bytes: u64) -> Result<Pass, AreaError> {
        self.monitor()?;
        if let Whose::Kernel(device, _) = &self.auto.read().unwrap_or_else(PoisonError::into_inner).whose {
            flush(&self.caches, Flushed::All);
            if let Ok(pass) = reclaim_by_kernel(device, frames(bytes)) {
                return Ok(pass);
            }
        }
        self.with(|monitor, _| {
            flush(&self.caches, Flushed::All);
            Ok(monitor.evict(frames(bytes))?)
        })
    }

    pub(crate) fn resize(&self, direction: Direction, bytes: u64) -> Result<Resize, AreaError> {
        let drain = || flush(&self.caches, Flushed::All);
        self.with(|monitor, _| Ok(monitor.resize(direction, frames(bytes), drain, |_| false)?))
    }

    pub(crate) fn validate(&self) -> Result<Validation, AreaError> {
        self.with(|monitor, _| Ok(monitor.validate()?))
    }

    /// Looks for memory that the tenant has behind its own words, and counts it as what it is.
    pub(crate) fn audit(&self) -> Result<u64, AreaError> {
        self.with(|monitor, _| Ok(monitor.audit()?))
    }

    pub(crate) fn status(&self) -> Result<Status, AreaError> {
        let picture = self.monitor()?.picture()?;
        let auto = self.auto.read().unwrap_or_else(PoisonError::into_inner);
        let auto_reclaim = match &auto.whose {
            Whose::Here(here) => here.status(),
            Whose::Kernel(..) | Whose::Lent | Whose::Owed => AutoStatus::default(),
        };
        let kernel = match &auto.whose {
            Whose::Kernel(device, _) => device.status().ok(),
            _ => None,
        };
        let census = picture.census;
        Ok(Status {
            bytes: census.huge_frames * HUGE_SIZE,
            limit_bytes: u64::from(self.monitor.claimed_limit()) * HUGE_SIZE,
            resident_bytes: picture.residency.resident_bytes,
            huge_bytes: picture.residency.huge_bytes,
            used_bytes: census.used_frames * 4096,
            reclaimable_bytes: census.free_installed * HUGE_SIZE,
            evicted_bytes: kernel.map_or(auto_reclaim.evicted, |kernel| kernel.evicted) * HUGE_SIZE,
            auto_reclaim,
            kernel,
        })
    }
}

/// The huge frames that the kernel is to leave, if it may have an area: with settings that differ from the default in those alone.
/// What they say of time and age the kernel decides by itself.
fn kept_by_kernel(switch: Switch) -> Option<u32> {
    let settings = switch.0?;
    let is_ours = Settings { keep_bytes: AUTO_RECLAIM.keep_bytes, ..settings } == AUTO_RECLAIM;
    is_ours.then(|| settings.keep_frames())
}

/// The thread that takes memory back, of which nobody has heard yet.
fn auto(monitor: &Arc<Monitor>, caches: &Caches) -> AutoReclaim {
    let to_flush = caches.clone();
    AutoReclaim::new(monitor.clone(), Spawner::default())
        .heeding_pressure()
        .before_each_scan(move || flush(&to_flush, Flushed::Idle))
}

fn flush(caches: &Caches, what: Flushed) {
    // Not under the lock: a cache that is added meanwhile has nothing to free.
    let (hands, caches) = {
        let Lists { hands, caches } = &*lock(caches);
        (there(hands), there(caches))
    };
    SharedHand::flush(&hands, what);
    caches.iter().for_each(|cache| cache.flush(what));
}

/// Those that are not gone.
fn there<T: ?Sized>(list: &[Weak<T>]) -> Vec<Arc<T>> {
    list.iter().filter_map(Weak::upgrade).collect()
}

fn reclaim_by_kernel(device: &Device, huge_frames: u32) -> io::Result<Pass> {
    let before = device.status()?.freed_pages;
    // At most as many as were asked for.
    let frames = u32::try_from(device.reclaim(huge_frames.into())?).unwrap_or(huge_frames);
    let freed_bytes = device.status()?.freed_pages.saturating_sub(before) * 4096;
    Ok(Pass { frames, discarded: frames, freed_bytes })
}

/// Huge frames that hold this many bytes.
fn frames(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(HUGE_SIZE)).unwrap_or(u32::MAX)
}

impl Drop for Reclaimer {
    fn drop(&mut self) {
        if !self.maker.is_gone() {
            // SAFETY: dropped once, here, and not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.auto) };
        }
    }
}

impl fmt::Debug for Reclaimer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reclaimer").field("limit", &self.monitor.limit()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_may_have_an_area_of_which_some_stays() {
        let kept = |settings| kept_by_kernel(Switch(Some(settings)));
        assert_eq!(kept(AUTO_RECLAIM), Some(0));
        assert_eq!(kept(Settings { keep_bytes: 5 << 20, ..AUTO_RECLAIM }), Some(3));
        assert_eq!(kept(Settings { min_age: 3, ..AUTO_RECLAIM }), None);
        assert_eq!(kept_by_kernel(Switch(None)), None);
    }
}
