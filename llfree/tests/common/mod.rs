//! A table in ordinary memory, for tests of both sides.

#![allow(dead_code, reason = "a test uses a part of it")]

use llfree::{Allocation, Host, Reclaim, Tenant};
use shared_layout::{FrameId, HugeEntry, HugeId, Order};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

pub(crate) struct Table {
    pub(crate) entries: Vec<AtomicU16>,
    pub(crate) rows: Vec<AtomicU64>,
    pub(crate) hints: Vec<AtomicU16>,
    pub(crate) summary: Vec<AtomicU64>,
    pub(crate) epoch: AtomicU64,
    pub(crate) residency: Vec<AtomicU8>,
}

impl Table {
    /// All frames free and evicted, as a guest boots.
    pub(crate) fn evicted(huge_frames: usize) -> Self {
        let table = Self {
            entries: (0..huge_frames).map(|_| AtomicU16::new(HugeEntry::FREE_EVICTED.bits())).collect(),
            rows: (0..huge_frames * 8).map(|_| AtomicU64::new(0)).collect(),
            hints: (0..Tenant::hint_len(huge_frames as u32)).map(|_| AtomicU16::new(0)).collect(),
            summary: (0..Tenant::summary_len(huge_frames as u32)).map(|_| AtomicU64::new(0)).collect(),
            epoch: AtomicU64::new(0),
            residency: (0..huge_frames).map(|_| AtomicU8::new(0)).collect(),
        };
        table.tenant().recount();
        table
    }

    /// All frames free and backed by memory.
    pub(crate) fn installed(huge_frames: usize) -> Self {
        let table = Self::evicted(huge_frames);
        (0..huge_frames as u32).for_each(|huge| table.install(huge));
        table.tenant().recount();
        table
    }

    pub(crate) fn tenant(&self) -> Tenant<'_> {
        Tenant::new(&self.entries, &self.rows, &self.hints, &self.summary, &self.epoch).expect("lengths fit")
    }

    pub(crate) fn host(&self) -> Host<'_> {
        Host::new(&self.entries, &self.residency).expect("lengths fit")
    }

    pub(crate) fn install(&self, huge: u32) {
        self.host().claim(HugeId(huge)).expect("idle").install().expect("not held").done();
    }

    /// Whether the host got it.
    pub(crate) fn reclaim(&self, huge: u32, how: Reclaim) -> bool {
        let claim = self.host().claim(HugeId(huge)).expect("idle");
        claim.reclaim(how).map(llfree::Reclaimed::done).is_ok()
    }

    pub(crate) fn release(&self, huge: u32) {
        assert!(self.host().claim(HugeId(huge)).expect("idle").release().expect("held"));
        self.epoch.fetch_add(1, Ordering::Release);
    }

    /// Whether the entries and bitfields hold a free block of `order`, looked up the slow way.
    pub(crate) fn has_free_block(&self, order: Order) -> bool {
        let entry = |huge: u64| HugeEntry::from_bits(self.entries[huge as usize].load(Ordering::Relaxed));
        let (size, huge_frames) = (order.frames(), self.entries.len() as u64);
        if order.is_huge() {
            let step = u64::from(order.huge_frames());
            return (0..huge_frames / step).any(|i| (i * step..(i + 1) * step).all(|huge| entry(huge).is_all_free()));
        }
        let clear = |f: u64| self.rows[(f / 64) as usize].load(Ordering::Relaxed) >> (f % 64) & 1 == 0;
        let block = |first: u64| (first..first + size).all(clear);
        (0..huge_frames)
            .filter(|huge| entry(*huge).take_order(order).is_some())
            .any(|huge| (0..512 / size).any(|i| block(huge * 512 + i * size)))
    }
}

pub(crate) fn order(order: u8) -> Order {
    Order::new(order).expect("in range")
}

/// The frame of a block that must be usable at once.
pub(crate) fn ready(allocation: Allocation) -> FrameId {
    match allocation {
        Allocation::Ready(block) => block.frame(),
        Allocation::Evicted(block) => panic!("{block:?} should have memory behind it"),
    }
}
