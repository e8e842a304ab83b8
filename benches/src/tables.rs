//! The adapter to `llfree`: the only place of the allocator figures that calls it.
//!
//! [`Tables`] owns what a guest would share with its host, laid out as there: no figure here
//! touches a frame, so 256 GiB of them cost 8 MiB.

use crate::frames::{FAILED, Frames, Handle};
use guest_abi::Layout;
use llfree::{Cpu, HELD_STAYS, Host, Reclaim, Tenant};
use memmap2::{MmapOptions, MmapRaw};
use shared_layout::{FrameId, HugeEntry, HugeId, Order};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

/// `Residency::Installed` in the host's table.
const INSTALLED: u8 = llfree::Residency::Installed as u8;

/// One table, all frames free and installed, and the host's knowledge of it.
pub(crate) struct Tables {
    region: MmapRaw,
    layout: Layout,
    residency: Vec<AtomicU8>,
}

impl Tables {
    pub(crate) fn new(huge_frames: u32) -> Self {
        // Plans have as many huge frames as a region may have, and their memory is small.
        let layout = Layout::new(huge_frames, 1).unwrap_or_else(|| unreachable!());
        // Populated: a kernel's tables are there when its allocator starts.
        let region = MmapOptions::new()
            .len(layout.total as usize)
            .populate()
            .map_anon()
            .expect("address space for 33 KiB a GiB");
        let residency = (0..huge_frames).map(|_| AtomicU8::new(INSTALLED)).collect();
        let tables = Self { region: region.into(), layout, residency };
        tables.entries().iter().for_each(|word| word.store(HugeEntry::FREE_INSTALLED.bits(), Ordering::Relaxed));
        tables
    }

    pub(crate) fn tenant(&self) -> Tenant<'_> {
        // SAFETY: a mapping is page aligned and lives as long as `self`, it has the layout's length,
        // and nobody has another view of it than those made here, which are of atomics.
        let tenant = unsafe { Tenant::from_raw(self.region.as_mut_ptr(), &self.layout.table()) };
        tenant.recount();
        tenant
    }

    /// The host gave memory back: handles are to look anew.
    pub(crate) fn raise_return_epoch(&self) {
        self.return_epoch().fetch_add(1, Ordering::Relaxed);
    }

    /// From now on the host gives nothing back of what it holds.
    pub(crate) fn say_held_stays(&self) {
        self.return_epoch().store(HELD_STAYS, Ordering::Relaxed);
    }

    fn return_epoch(&self) -> &AtomicU64 {
        // SAFETY: as above; the layout keeps the word inside its total, at a multiple of its size.
        unsafe { &*self.region.as_mut_ptr().add(self.layout.table().return_epoch as usize).cast::<AtomicU64>() }
    }

    fn entries(&self) -> &[AtomicU16] {
        // SAFETY: as above; the layout keeps the entries inside its total.
        unsafe {
            let first = self.region.as_mut_ptr().add(self.layout.entries as usize);
            std::slice::from_raw_parts(first.cast(), self.layout.huge_frames as usize)
        }
    }

    fn host(&self) -> Host<'_> {
        // Both have one element a huge frame, counted by a u32.
        Host::new(self.entries(), &self.residency).unwrap_or_else(|_| unreachable!())
    }
}

/// llfree with a handle for each CPU.
pub(crate) struct Llfree<'a>(pub(crate) Tenant<'a>);

impl Frames for Llfree<'_> {
    type Handle<'a>
        = Cpu<'a>
    where
        Self: 'a;

    fn handle(&self) -> Cpu<'_> {
        self.0.cpu()
    }
}

impl Handle for Cpu<'_> {
    #[inline]
    fn alloc(&mut self, order: Order) -> u64 {
        Cpu::alloc(self, order).map_or(FAILED, |allocation| allocation.position().0.0)
    }

    #[inline]
    fn free(&mut self, frame: u64, order: Order) -> bool {
        Cpu::free(self, FrameId(frame), order).is_ok()
    }
}

/// llfree without a handle: nothing is cached, every block comes from shared memory.
pub(crate) struct Shared<'a>(pub(crate) Tenant<'a>);

impl<'t> Frames for Shared<'t> {
    type Handle<'a>
        = &'a Tenant<'t>
    where
        Self: 'a;

    fn handle(&self) -> &Tenant<'t> {
        &self.0
    }
}

impl Handle for &Tenant<'_> {
    #[inline]
    fn alloc(&mut self, order: Order) -> u64 {
        Tenant::alloc(self, order).map_or(FAILED, |allocation| allocation.position().0.0)
    }

    #[inline]
    fn free(&mut self, frame: u64, order: Order) -> bool {
        Tenant::free(self, FrameId(frame), order).is_ok()
    }
}

/// A host's step on one huge frame; false if it was refused.
pub(crate) trait StateChanges: Sync {
    fn evict(&self, huge: u32) -> bool;
    fn hold(&self, huge: u32) -> bool;
    fn release(&self, huge: u32) -> bool;
    fn installed(&self, huge: u32) -> bool;
}

/// One claim a change, as a monitor does it.
pub(crate) struct Claims<'a>(Host<'a>);

impl<'a> Claims<'a> {
    pub(crate) fn new(tables: &'a Tables) -> Self {
        Self(tables.host())
    }
}

impl StateChanges for Claims<'_> {
    #[inline]
    fn evict(&self, huge: u32) -> bool {
        let claim = self.0.claim(HugeId(huge));
        claim.and_then(|claim| claim.reclaim(Reclaim::Soft).ok()).map(llfree::Reclaimed::done).is_some()
    }

    #[inline]
    fn hold(&self, huge: u32) -> bool {
        let claim = self.0.claim(HugeId(huge));
        claim.and_then(|claim| claim.reclaim(Reclaim::Hard).ok()).map(llfree::Reclaimed::done).is_some()
    }

    #[inline]
    fn release(&self, huge: u32) -> bool {
        self.0.claim(HugeId(huge)).and_then(|claim| claim.release().ok()).unwrap_or(false)
    }

    #[inline]
    fn installed(&self, huge: u32) -> bool {
        let claim = self.0.claim(HugeId(huge));
        claim.and_then(|claim| claim.install().ok()).map(llfree::Installing::done).is_some()
    }
}

/// The floor under [`Claims`]: the entry's transition alone, without the host's own table.
pub(crate) struct Entries<'a>(&'a [AtomicU16]);

impl<'a> Entries<'a> {
    pub(crate) fn new(tables: &'a Tables) -> Self {
        Self(tables.entries())
    }

    #[inline]
    fn change(&self, huge: u32, step: impl Fn(HugeEntry) -> Option<HugeEntry>) -> bool {
        let word = &self.0[huge as usize];
        let old = word.load(Ordering::Relaxed);
        step(HugeEntry::from_bits(old))
            .is_some_and(|new| word.compare_exchange(old, new.bits(), Ordering::AcqRel, Ordering::Relaxed).is_ok())
    }
}

impl StateChanges for Entries<'_> {
    #[inline]
    fn evict(&self, huge: u32) -> bool {
        self.change(huge, HugeEntry::evict)
    }

    #[inline]
    fn hold(&self, huge: u32) -> bool {
        self.change(huge, HugeEntry::hold)
    }

    #[inline]
    fn release(&self, huge: u32) -> bool {
        self.change(huge, HugeEntry::release)
    }

    #[inline]
    fn installed(&self, huge: u32) -> bool {
        self.change(huge, HugeEntry::installed)
    }
}
