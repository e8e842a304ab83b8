//! What the host sees of a disk: which one it is and what it did since the VM started. Shared between
//! the device's thread and the control plane.

use llfree_control::report::DiskStatus;
use std::sync::atomic::{AtomicU64, Ordering};

/// Events of one disk. Each is exact; two of them read one after the other may not fit together.
#[derive(Default, Debug)]
pub struct DiskCounters {
    /// Reads that succeeded.
    pub reads: AtomicU64,
    /// Bytes that they read.
    pub read_bytes: AtomicU64,
    /// Writes that succeeded.
    pub writes: AtomicU64,
    /// Bytes that they wrote.
    pub written_bytes: AtomicU64,
    /// Flushes that succeeded.
    pub flushes: AtomicU64,
    /// Bytes that were discarded or filled with zeroes.
    pub cleared_bytes: AtomicU64,
    /// Requests that the host could not carry out: I/O errors of the file.
    pub errors: AtomicU64,
    /// Requests that made no sense, such as those behind the end of the disk.
    pub refused: AtomicU64,
}

/// The host's side of a disk.
#[derive(Debug)]
pub struct DiskControl {
    /// As it was given, fit for a terminal.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// Whether the guest must not write.
    pub read_only: bool,
    /// See [`DiskCounters`].
    pub counters: DiskCounters,
}

impl DiskControl {
    /// All of it, for people.
    #[must_use]
    pub fn status(&self) -> DiskStatus {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let c = &self.counters;
        DiskStatus {
            path: self.path.clone(),
            size_bytes: self.bytes,
            read_only: self.read_only,
            reads: count(&c.reads),
            read_bytes: count(&c.read_bytes),
            writes: count(&c.writes),
            written_bytes: count(&c.written_bytes),
            flushes: count(&c.flushes),
            cleared_bytes: count(&c.cleared_bytes),
            io_errors: count(&c.errors),
            refused_requests: count(&c.refused),
        }
    }
}
