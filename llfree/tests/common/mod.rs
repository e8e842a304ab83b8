//! A table in ordinary memory, for tests of both sides.

use llfree::{Host, Tenant};
use shared_layout::HugeEntry;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64};

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

    pub(crate) fn tenant(&self) -> Tenant<'_> {
        Tenant::new(&self.entries, &self.rows, &self.hints, &self.summary, &self.epoch).expect("lengths fit")
    }

    pub(crate) fn host(&self) -> Host<'_> {
        Host::new(&self.entries, &self.residency).expect("lengths fit")
    }
}
