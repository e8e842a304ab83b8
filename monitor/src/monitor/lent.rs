//! Pages of held frames that a guest may use for a moment.

use llfree_base::lock;
use shared_layout::{FRAME_SIZE, HUGE_SIZE, HugeId};
use std::collections::VecDeque;
use std::sync::Mutex;

/// More than any one instruction needs at once: code, both operands, a stack, each across two pages.
pub(super) const LENT_PER_VCPU: usize = 16;

/// Pages that are lent, the oldest first, as byte offsets of guest RAM.
///
/// A page gets in and out under a claim of its frame.
pub(super) struct Lent {
    pages: Mutex<VecDeque<u64>>,
    most: usize,
}

impl Lent {
    pub(super) fn new(threads: u32) -> Self {
        Self { pages: Mutex::default(), most: LENT_PER_VCPU * threads.max(1) as usize }
    }

    /// For a caller that has a frame claimed and empties it, or finds it installed: whether there were any.
    pub(super) fn forget(&self, huge: HugeId) -> bool {
        let mut pages = lock(&self.pages);
        let before = pages.len();
        pages.retain(|page| page / HUGE_SIZE != u64::from(huge.0));
        pages.len() < before
    }

    /// Whether one more may be lent.
    pub(super) fn has_room(&self) -> bool {
        lock(&self.pages).len() < self.most
    }

    /// Notes that the page at byte `offset` of guest RAM is lent.
    pub(super) fn add(&self, offset: u64) {
        lock(&self.pages).push_back(offset - offset % FRAME_SIZE);
    }

    /// What is lent now, the oldest first.
    pub(super) fn pages(&self) -> Vec<u64> {
        lock(&self.pages).iter().copied().collect()
    }
}
