//! [`Refusal`]: "out of memory" said once, and believed until something is freed.
//!
//! A refusal is found out in three steps: its order is written down, every tree is looked at, and it
//! stands if nothing withdrew it meanwhile. Whoever makes a hint promise more (see `hint`) withdraws it
//! first: so a free that finds its promise made finds the refusal withdrawn as well, and one that comes
//! after the look at its tree is known before it is over. A refusal is true at the moment at which it is
//! said: since it was written down nothing that fits came free, and each tree was found without.
//! It is not remembered where the host may make a block possible, for it tells nobody: where it holds a huge frame, and
//! where a huge frame comes free meanwhile whose other half it holds ([`doubt_pairs`](Refusal::doubt_pairs)).
//!
//! ```text
//!  63..32                 31..7    6         5         4      3..0
//! +----------------------+--------+---------+---------+------+-------+
//! | return epoch, low 32 | number | doubted | looking | said | order |
//! +----------------------+--------+---------+---------+------+-------+
//! ```
//!
//! What the host returns changes the epoch. The number is another one after each withdrawal, so that a
//! look never takes somebody else's refusal for its own.

use crate::sync::{AtomicU64, Ordering, change_before_looks};
use shared_layout::Order;

const ORDER_MASK: u64 = 0xf;
const SAID: u64 = 1 << 4;
const LOOKING: u64 = 1 << 5;
/// What a look finds of order 10 is not remembered.
const DOUBTED: u64 = 1 << 6;
const NUMBER_SHIFT: u32 = 7;
const NUMBER_MASK: u64 = ((1 << 25) - 1) << NUMBER_SHIFT;
const EPOCH_SHIFT: u32 = 32;
const MAX: u64 = Order::MAX.get() as u64;

/// The last refusal of a table. Its word is not trusted before [`forget`](Self::forget).
#[derive(Clone, Copy)]
pub(crate) struct Refusal<'a>(&'a AtomicU64);

/// A refusal that is being found out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Looking {
    number: u64,
    order: u64,
}

fn same_epoch(word: u64, epoch: u64) -> bool {
    word >> EPOCH_SHIFT == epoch & u64::from(u32::MAX)
}

fn next_number(word: u64) -> u64 {
    (word & NUMBER_MASK).wrapping_add(1 << NUMBER_SHIFT) & NUMBER_MASK
}

impl<'a> Refusal<'a> {
    pub(crate) fn new(word: &'a AtomicU64) -> Self {
        Self(word)
    }

    /// Nothing was refused. Looks on their way come to nothing.
    pub(crate) fn forget(self) {
        self.withdraw_all(self.0.load(Ordering::Relaxed));
    }

    /// Whether a block of `order` was refused, and nothing was freed since.
    #[inline]
    pub(crate) fn stands(self, order: Order, epoch: u64) -> bool {
        let word = self.0.load(Ordering::Acquire);
        word & SAID != 0 && word & ORDER_MASK <= u64::from(order.get()) && same_epoch(word, epoch)
    }

    /// Writes down that a block of `order` is about to be refused; then comes the look at every tree.
    pub(crate) fn begin(self, order: Order, epoch: u64) -> Looking {
        let order = u64::from(order.get());
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            let active = word & (SAID | LOOKING) != 0 && same_epoch(word, epoch);
            // What withdraws the refusal of a smaller block withdraws that of a larger one.
            let next = if active && word & ORDER_MASK <= order {
                word
            } else {
                epoch << EPOCH_SHIFT | next_number(word) | LOOKING | order
            };
            match self.0.compare_exchange(word, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => {
                    change_before_looks();
                    return Looking { number: next & NUMBER_MASK, order };
                }
                Err(seen) => word = seen,
            }
        }
    }

    /// Every tree was looked at: whether the refusal stands. If it does, others may believe it.
    pub(crate) fn conclude(self, looking: Looking) -> bool {
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            if word & (SAID | LOOKING) == 0 || word & NUMBER_MASK != looking.number {
                return false;
            }
            let next = if word & DOUBTED != 0 && looking.order == MAX {
                word
            } else if word & ORDER_MASK == looking.order {
                word & !LOOKING | SAID
            } else if word & SAID != 0 {
                // That of a smaller block says ours as well.
                word
            } else {
                // A look for a smaller block may never end, for it found one. If it goes on it begins again.
                word & !(LOOKING | ORDER_MASK | NUMBER_MASK) | next_number(word) | SAID | looking.order
            };
            // Release: the looks come before it.
            match self.0.compare_exchange(word, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(seen) => word = seen,
            }
        }
    }

    /// Every tree was looked at: whether nothing that fits came free meanwhile. For a refusal that is true now and not
    /// to be remembered.
    pub(crate) fn is_undisturbed(self, looking: Looking) -> bool {
        let word = self.0.load(Ordering::Relaxed);
        word & (SAID | LOOKING) != 0
            && word & NUMBER_MASK == looking.number
            // Release: the looks come before it.
            && self.0.compare_exchange(word, word, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Whether [`doubt_pairs`](Self::doubt_pairs) would change anything.
    #[inline]
    pub(crate) fn has_undoubted_pairs(self) -> bool {
        Self::without_pairs(self.0.load(Ordering::Relaxed)).is_some()
    }

    /// A huge frame came free whose other half the host holds, which may give it back without a word: that order 10
    /// was refused is forgotten, and if it is refused at this moment that is not remembered. Nothing came free that is enough, so
    /// no look begins anew.
    #[cold]
    pub(crate) fn doubt_pairs(self) {
        let mut word = self.0.load(Ordering::Relaxed);
        while let Some(next) = Self::without_pairs(word) {
            match self.0.compare_exchange(word, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return,
                Err(seen) => word = seen,
            }
        }
    }

    /// The same word, but order 10 is not refused for good; `None` if it is not anyway.
    fn without_pairs(word: u64) -> Option<u64> {
        if word & LOOKING != 0 && word & DOUBTED == 0 {
            return Some(word | DOUBTED);
        }
        (word & SAID != 0 && word & ORDER_MASK == MAX).then(|| next_number(word))
    }

    /// A block of `largest` may be free, and a hint is about to say so.
    #[inline]
    pub(crate) fn withdraw(self, largest: Order) {
        let word = self.0.load(Ordering::Relaxed);
        if word & (SAID | LOOKING) != 0 && word & ORDER_MASK <= u64::from(largest.get()) {
            self.withdraw_all(word);
        }
    }

    #[cold]
    fn withdraw_all(self, mut word: u64) {
        while word & (SAID | LOOKING) != 0 {
            match self.0.compare_exchange(word, next_number(word), Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return,
                Err(seen) => word = seen,
            }
        }
    }
}
