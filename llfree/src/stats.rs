//! [`Stats`]: a table added up from its entries.

use shared_layout::{FRAMES_PER_HUGE, HugeEntry};

/// Exact when nobody is at work, else a snapshot torn between huge frames.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stats {
    /// Base frames in the table.
    pub frames: u64,
    /// Base frames that are free, evicted ones included, held ones not.
    pub free_frames: u64,
    /// Huge frames that are wholly free.
    pub free_huge: u64,
    /// Of those, the ones with nothing behind them.
    pub free_evicted_huge: u64,
    /// Huge frames allocated as a whole.
    pub allocated_huge: u64,
    /// Huge frames with both free and allocated base frames.
    pub partial_huge: u64,
    /// Huge frames with nothing behind them, held ones included.
    pub evicted_huge: u64,
    /// Huge frames that the host took.
    pub held_huge: u64,
}

impl Stats {
    pub(crate) fn count(entries: impl Iterator<Item = HugeEntry>) -> Self {
        let mut s = Self::default();
        for entry in entries {
            s.frames += FRAMES_PER_HUGE;
            s.free_frames += u64::from(entry.free());
            s.free_huge += u64::from(entry.is_all_free());
            s.free_evicted_huge += u64::from(entry.is_all_free() && entry.is_evicted());
            s.allocated_huge += u64::from(entry.is_huge());
            s.partial_huge += u64::from(entry.free() > 0 && !entry.is_all_free());
            s.evicted_huge += u64::from(entry.is_evicted());
            s.held_huge += u64::from(entry.is_held());
        }
        s
    }
}
