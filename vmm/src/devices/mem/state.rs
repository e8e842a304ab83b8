//! What the host controls virtio-mem with and sees of it, shared between the device's thread and the
//! control plane.

use super::super::progress::Progress;
use llfree_base::counters::MemCounters;
use llfree_base::metrics::Gauge;
use llfree_control::report::MemStatus;
use shared_layout::HUGE_SIZE;
use std::sync::atomic::{AtomicI64, Ordering};

/// The host's side of virtio-mem.
#[derive(Debug)]
pub struct MemControl {
    boot_bytes: u64,
    requested_bytes: Gauge,
    plugged_blocks: AtomicI64,
    /// Signalled when what is plugged came nearer to what should be.
    pub progress: Progress,
    /// What the driver asked for since the VM started.
    pub counters: MemCounters,
}

impl MemControl {
    /// For RAM of `memory_bytes`, of which the first `boot_bytes` always stay with the guest; all of
    /// the rest is requested. Both are multiples of 2 MiB.
    #[must_use]
    pub fn new(memory_bytes: u64, boot_bytes: u64) -> Self {
        Self {
            boot_bytes,
            requested_bytes: Gauge::new(memory_bytes.saturating_sub(boot_bytes)),
            plugged_blocks: AtomicI64::new(0),
            progress: Progress::default(),
            counters: MemCounters::default(),
        }
    }

    /// The part of RAM that the device does not manage, in bytes.
    #[must_use]
    pub fn boot_bytes(&self) -> u64 {
        self.boot_bytes
    }

    /// Sets how much should be plugged, in bytes. The driver must be told.
    pub fn request(&self, bytes: u64) {
        self.progress.aim(|| {
            self.requested_bytes.set(bytes);
            self.distance()
        });
    }

    /// How much should be plugged, in bytes.
    #[must_use]
    pub fn requested_bytes(&self) -> u64 {
        self.requested_bytes.get()
    }

    /// How much is plugged, in bytes.
    #[must_use]
    pub fn plugged_bytes(&self) -> u64 {
        u64::try_from(self.plugged_blocks.load(Ordering::Acquire)).unwrap_or(0) * HUGE_SIZE
    }

    /// Bytes between what is plugged and what should be.
    fn distance(&self) -> u64 {
        self.plugged_bytes().abs_diff(self.requested_bytes())
    }

    pub(super) fn moved(&self, blocks: i64) {
        self.plugged_blocks.fetch_add(blocks, Ordering::AcqRel);
        self.progress.moved(|| self.distance());
    }

    pub(super) fn answered(&self, plug: bool, granted: bool) {
        let c = &self.counters;
        let counter = match (granted, plug) {
            (false, _) => &c.refused_requests,
            (true, true) => &c.plug_requests,
            (true, false) => &c.other_requests,
        };
        counter.inc();
    }

    /// The device's status.
    #[must_use]
    pub fn status(&self) -> MemStatus {
        MemStatus {
            boot_bytes: self.boot_bytes,
            requested_bytes: self.requested_bytes(),
            plugged_bytes: self.plugged_bytes(),
            counts: self.counters.counts(),
        }
    }
}
