//! [`Reported`]: which free huge frames the host knows to be free, a bit each.
//!
//! A frame that is taken loses its mark, no matter who takes it: afterwards it is backed by memory
//! again. The bits permanently own a block of RAM.

use core::ptr::with_exposed_provenance;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use shared_layout::{HugeId, Order};

/// The marks; empty, and so unmarked, until they have [memory](Self::keep_in).
#[derive(Debug)]
pub(crate) struct Reported {
    bits: AtomicUsize,
}

impl Reported {
    /// Without memory.
    pub(crate) const fn new() -> Self {
        Self { bits: AtomicUsize::new(0) }
    }

    /// The order of the block that marks for this many huge frames need.
    pub(crate) fn order(huge_frames: u32) -> Order {
        let bytes = u64::from(huge_frames.div_ceil(64)) * 8;
        // 2^25 huge frames need 4 MiB, the largest block.
        (0..).map_while(Order::new).find(|order| order.bytes() >= bytes).unwrap_or(Order::MAX)
    }

    /// Gives the marks their memory.
    ///
    /// # Safety
    /// `address` is that of zeroed words, one for 64 huge frames of RAM, that nobody else uses for
    /// as long as the value lives.
    pub(crate) unsafe fn keep_in(&self, address: u64) {
        // Release: a reader of the address sees the zeroes.
        self.bits.store(address as usize, Ordering::Release);
    }

    /// Whether a huge frame of RAM is marked.
    pub(crate) fn get(&self, huge: HugeId) -> bool {
        self.word(huge).is_some_and(|word| word.load(Ordering::Relaxed) & bit(huge) != 0)
    }

    /// Marks a huge frame of RAM.
    pub(crate) fn set(&self, huge: HugeId) {
        if let Some(word) = self.word(huge) {
            word.fetch_or(bit(huge), Ordering::Relaxed);
        }
    }

    /// Removes the mark of a huge frame of RAM that its caller owns a part of.
    pub(crate) fn clear(&self, huge: HugeId) {
        // Most of the time there is none, and a look is cheaper than a write.
        if let Some(word) = self.word(huge)
            && word.load(Ordering::Relaxed) & bit(huge) != 0
        {
            word.fetch_and(!bit(huge), Ordering::Relaxed);
        }
    }

    fn word(&self, huge: HugeId) -> Option<&AtomicU64> {
        let base = self.bits.load(Ordering::Acquire);
        let word = with_exposed_provenance::<AtomicU64>(base).wrapping_add(huge.index() / 64);
        // SAFETY: with an address there is a word for each huge frame of RAM by the contract of
        // `keep_in`, and callers name no other.
        (base != 0).then(|| unsafe { &*word })
    }
}

const fn bit(huge: HugeId) -> u64 {
    1 << (huge.0 % 64)
}
