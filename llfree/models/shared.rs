//! State shared by tenant and host, and the host's own R, against whatever atomics `crate::sync` names.

use crate::host::{Host, Residency};
use crate::sync::{AtomicU8, AtomicU16, AtomicU64};
use crate::tenant::Tenant;
use shared_layout::HugeEntry;

/// One table with its hints.
pub(crate) struct Shared {
    pub(crate) entries: Vec<AtomicU16>,
    pub(crate) rows: Vec<AtomicU64>,
    hints: Vec<AtomicU16>,
    summary: Vec<AtomicU64>,
    pub(crate) epoch: AtomicU64,
    residency: Vec<AtomicU8>,
    always_listed: bool,
}

impl Shared {
    /// Huge frames in these states; `used` says which bits of each row of the table are set.
    pub(crate) fn new(frames: &[(HugeEntry, Residency)], used: impl Fn(usize) -> u64) -> Self {
        let huge_frames = frames.len() as u32;
        let shared = Self {
            entries: frames.iter().map(|(entry, _)| AtomicU16::new(entry.bits())).collect(),
            rows: (0..frames.len() * 8).map(|row| AtomicU64::new(used(row))).collect(),
            hints: (0..Tenant::hint_len(huge_frames)).map(|_| AtomicU16::new(0)).collect(),
            summary: (0..Tenant::summary_len(huge_frames)).map(|_| AtomicU64::new(0)).collect(),
            epoch: AtomicU64::new(0),
            residency: frames.iter().map(|(_, r)| AtomicU8::new(*r as u8)).collect(),
            always_listed: true,
        };
        shared.tenant().recount();
        shared
    }

    /// The same, and whether its trees are listed, or looked at one by one as in tables up to 4 GiB.
    pub(crate) fn listed(mut self, listed: bool) -> Self {
        self.always_listed = listed;
        self.tenant().forget();
        self.tenant().recount();
        self
    }

    pub(crate) fn tenant(&self) -> Tenant<'_> {
        let tenant = Tenant::new(&self.entries, &self.rows, &self.hints, &self.summary, &self.epoch);
        let mut tenant = tenant.expect("lengths fit");
        tenant.trees.always_listed = self.always_listed;
        tenant
    }

    pub(crate) fn host(&self) -> Host<'_> {
        Host::new(&self.entries, &self.residency).expect("lengths fit")
    }
}
