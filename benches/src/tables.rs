//! The adapter to `llfree`: the only place of the allocator figures that calls it.
//!
//! [`Tables`] owns what a guest would share with its host, as ordinary heap memory: no figure here
//! touches a frame, so 256 GiB of them cost 8 MiB.

use crate::frames::{FAILED, Frames, Handle};
use llfree::{Cpu, Host, Reclaim, Tenant};
use shared_layout::{FrameId, HugeEntry, HugeId, Order};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

/// Rows of 64 frames in a huge frame; they fill a cache line.
const ROWS: usize = 8;
/// `Residency::Installed` in the host's table.
const INSTALLED: u8 = llfree::Residency::Installed as u8;

/// The words of one table, all frames free and installed.
pub(crate) struct Tables {
    entries: Vec<AtomicU16>,
    /// A line longer than it must be, to begin where a line does.
    rows: Vec<AtomicU64>,
    hints: Vec<AtomicU16>,
    summary: Vec<AtomicU64>,
    epoch: AtomicU64,
    residency: Vec<AtomicU8>,
}

impl Tables {
    pub(crate) fn new(huge_frames: u32) -> Self {
        let huge = huge_frames as usize;
        let entry = HugeEntry::FREE_INSTALLED.bits();
        Self {
            entries: (0..huge).map(|_| AtomicU16::new(entry)).collect(),
            rows: (0..(huge + 1) * ROWS).map(|_| AtomicU64::new(0)).collect(),
            hints: (0..Tenant::hint_len(huge_frames)).map(|_| AtomicU16::new(0)).collect(),
            summary: (0..Tenant::summary_len(huge_frames)).map(|_| AtomicU64::new(0)).collect(),
            epoch: AtomicU64::new(0),
            residency: (0..huge).map(|_| AtomicU8::new(INSTALLED)).collect(),
        }
    }

    pub(crate) fn tenant(&self) -> Tenant<'_> {
        let start = self.rows.as_ptr().align_offset(64);
        let rows = &self.rows[start..start + self.entries.len() * ROWS];
        let tenant = Tenant::new(&self.entries, rows, &self.hints, &self.summary, &self.epoch);
        // The lengths were computed from one number in `new`.
        let tenant = tenant.unwrap_or_else(|| unreachable!());
        tenant.recount();
        tenant
    }

    fn host(&self) -> Host<'_> {
        // Both have one element a huge frame, counted by a u32.
        Host::new(&self.entries, &self.residency).unwrap_or_else(|| unreachable!())
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

/// What a host does to one huge frame; false if it was refused.
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
        Self(&tables.entries)
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
