//! What the host sees of a disk: which file it is and what it did since the VM started. Shared between
//! the device's thread and the control plane.

use llfree_base::counters::DiskCounters;
use llfree_control::report::DiskStatus;

/// The host's side of a disk.
#[derive(Debug)]
pub struct DiskControl {
    /// As it was given, fit for a terminal.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// Whether the guest must not write.
    pub read_only: bool,
    /// What the guest did with it since the VM started.
    pub counters: DiskCounters,
}

impl DiskControl {
    /// The disk's status.
    #[must_use]
    pub fn status(&self) -> DiskStatus {
        DiskStatus {
            path: self.path.clone(),
            size_bytes: self.bytes,
            read_only: self.read_only,
            counts: self.counters.counts(),
        }
    }
}
