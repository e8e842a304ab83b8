//! [`Reclaimer`]: the monitor of an area, and the thread that has it look for memory to give back.
//!
//! The monitor is that of virtual machines; the tenant here installs by itself. Before each of its looks around the thread
//! has the caches of this process free what lies in them unused.

use crate::error::AreaError;
use crate::fork::Maker;
use crate::space::Space;
use llfree::host::Installer;
use llfree_base::choices::Switch;
use llfree_base::lock;
use llfree_base::thread::Spawner;
use llfree_monitor::auto::{AutoReclaim, AutoStatus};
use llfree_monitor::memory::{PoolConfig, Supply, UseUserfaultfd};
use llfree_monitor::{Direction, Monitor, Pass, Resize, Table, TenantStart, Validation};
use shared_layout::HUGE_SIZE;
use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, Weak};

/// A cache of an area's memory.
pub(crate) trait Flush: Send + Sync {
    /// Frees what nobody took or put since the last call.
    fn free_idle(&self);
    /// Frees all of it.
    fn free_all(&self);
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
}

type Caches = Arc<Mutex<Vec<Weak<dyn Flush>>>>;

pub(crate) struct Reclaimer {
    // A forked child has no such thread, and whoever held these locks stayed with the parent.
    auto: ManuallyDrop<AutoReclaim>,
    monitor: Arc<Monitor>,
    caches: Caches,
    maker: Maker,
}

impl Reclaimer {
    pub(crate) fn new(space: &Arc<Space>, table: Table) -> Result<Self, AreaError> {
        let threads = Spawner::default();
        let supply = Supply::new(space.ram().clone(), PoolConfig::default(), UseUserfaultfd::Off, &threads)?;
        let start = TenantStart { installer: Installer::Tenant, ..TenantStart::default() };
        let monitor = Arc::new(Monitor::new(space.ram().clone(), supply, table, start)?);
        let caches = Caches::default();
        let (to_flush, keeps) = (caches.clone(), space.clone());
        let auto = AutoReclaim::new(monitor.clone(), threads).before_each_scan(move || {
            // The thread's way to the caches must keep what they free to.
            let _mapped = &keeps;
            flush(&to_flush, |cache| cache.free_idle());
        });
        Ok(Self { auto: ManuallyDrop::new(auto), monitor, caches, maker: Maker::new() })
    }

    fn monitor(&self) -> Result<&Monitor, AreaError> {
        if self.maker.is_gone() { Err(AreaError::Forked) } else { Ok(&self.monitor) }
    }

    pub(crate) fn add_cache(&self, cache: Weak<dyn Flush>) {
        let mut caches = lock(&self.caches);
        caches.retain(|cache| cache.strong_count() > 0);
        caches.push(cache);
    }

    /// Huge frames that a lowered limit keeps out of reach.
    pub(crate) fn held_for_good(&self) -> u64 {
        if self.maker.is_gone() {
            // Nobody returns what the parent's reclaimer had in hand.
            return u64::MAX;
        }
        u64::from(self.monitor.huge_frames()).saturating_sub(self.monitor.published_limit())
    }

    pub(crate) fn await_batch(&self) {
        if let Ok(monitor) = self.monitor() {
            monitor.await_batch();
        }
    }

    pub(crate) fn switch(&self, switch: Switch) -> Result<(), AreaError> {
        self.monitor()?;
        Ok(self.auto.switch(switch)?)
    }

    pub(crate) fn reclaim(&self, bytes: u64) -> Result<Pass, AreaError> {
        let monitor = self.monitor()?;
        flush(&self.caches, |cache| cache.free_all());
        Ok(monitor.evict(frames(bytes))?)
    }

    pub(crate) fn resize(&self, direction: Direction, bytes: u64) -> Result<Resize, AreaError> {
        let monitor = self.monitor()?;
        let drain = || flush(&self.caches, |cache| cache.free_all());
        Ok(monitor.resize(direction, frames(bytes), drain, |_| false)?)
    }

    pub(crate) fn validate(&self) -> Result<Validation, AreaError> {
        Ok(self.monitor()?.validate()?)
    }

    pub(crate) fn status(&self, space: &Space) -> Result<Status, AreaError> {
        let picture = self.monitor()?.picture()?;
        let auto_reclaim = self.auto.status();
        let census = picture.census;
        Ok(Status {
            bytes: space.bytes(),
            limit_bytes: u64::from(picture.limit) * HUGE_SIZE,
            resident_bytes: picture.residency.resident_bytes,
            huge_bytes: picture.residency.huge_bytes,
            used_bytes: census.used_frames * 4096,
            reclaimable_bytes: census.free_installed * HUGE_SIZE,
            evicted_bytes: auto_reclaim.evicted * HUGE_SIZE,
            auto_reclaim,
        })
    }
}

fn flush(caches: &Caches, how: impl Fn(&dyn Flush)) {
    // Not under the lock: a cache that is added meanwhile has nothing to free.
    let all: Vec<_> = lock(caches).iter().filter_map(Weak::upgrade).collect();
    for cache in all {
        how(&*cache);
    }
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
