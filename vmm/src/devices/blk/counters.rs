//! [`DiskCounters`]: what a disk did since the VM started, for who asks from another thread.

use std::sync::atomic::AtomicU64;

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
