//! What the host steers virtio-mem by and sees of it, shared between the device's thread and the
//! control plane.

use super::super::progress::Progress;
use llfree_control::report::MemStatus;
use shared_layout::HUGE_SIZE;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// Events since the VM started.
#[derive(Default, Debug)]
pub struct MemCounters {
    /// Requests to plug blocks that were granted.
    pub plugs: AtomicU64,
    /// All other requests that were granted.
    pub others: AtomicU64,
    /// Requests that were refused.
    pub refused: AtomicU64,
    /// Runs of blocks that were discarded, a system call each.
    pub discards: AtomicU64,
    /// Discards that the kernel refused.
    pub failed_discards: AtomicU64,
}

/// The host's side of virtio-mem.
#[derive(Debug)]
pub struct MemControl {
    boot_bytes: u64,
    requested: AtomicU64,
    plugged_blocks: AtomicI64,
    /// Signalled when blocks were plugged or unplugged.
    pub progress: Progress,
    /// See [`MemCounters`].
    pub counters: MemCounters,
}

impl MemControl {
    /// RAM of `memory_bytes`, of which the first `boot_bytes` are always the guest's; all of the
    /// rest is requested. Both are multiples of 2 MiB.
    #[must_use]
    pub fn new(memory_bytes: u64, boot_bytes: u64) -> Self {
        Self {
            boot_bytes,
            requested: AtomicU64::new(memory_bytes.saturating_sub(boot_bytes)),
            plugged_blocks: AtomicI64::new(0),
            progress: Progress::default(),
            counters: MemCounters::default(),
        }
    }

    /// The part of RAM that is not the device's.
    #[must_use]
    pub fn boot_bytes(&self) -> u64 {
        self.boot_bytes
    }

    /// How much shall be plugged. The driver must be told.
    pub fn request(&self, bytes: u64) {
        self.requested.store(bytes, Ordering::Relaxed);
    }

    /// How much shall be plugged, in bytes.
    #[must_use]
    pub fn requested_bytes(&self) -> u64 {
        self.requested.load(Ordering::Relaxed)
    }

    /// How much is, in bytes.
    #[must_use]
    pub fn plugged_bytes(&self) -> u64 {
        u64::try_from(self.plugged_blocks.load(Ordering::Acquire)).unwrap_or(0) * HUGE_SIZE
    }

    pub(super) fn moved(&self, blocks: i64) {
        self.plugged_blocks.fetch_add(blocks, Ordering::AcqRel);
        self.progress.made();
    }

    pub(super) fn answered(&self, plug: bool, granted: bool) {
        let c = &self.counters;
        let counter = match (granted, plug) {
            (false, _) => &c.refused,
            (true, true) => &c.plugs,
            (true, false) => &c.others,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// All of it, for a status.
    #[must_use]
    pub fn status(&self) -> MemStatus {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let c = &self.counters;
        MemStatus {
            boot_bytes: self.boot_bytes,
            requested_bytes: self.requested_bytes(),
            plugged_bytes: self.plugged_bytes(),
            plug_requests: count(&c.plugs),
            other_requests: count(&c.others),
            refused_requests: count(&c.refused),
            discards: count(&c.discards),
            failed_discards: count(&c.failed_discards),
        }
    }
}
