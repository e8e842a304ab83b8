//! Huge blocks of a handle: order 9 spares what order 10 needs.
//!
//! Where blocks of all sizes come and go most free huge frames have a neighbour in use, and two that lie side by side are
//! what order 10 cannot do without. So a block of order 9 comes from the first kind as long as a search meets some: from
//! where one was freed lately, or from the others of the tree that the last one came from. A block that makes two
//! neighbours free together is remembered as a place for order 10. In memory that has more of such pairs than it
//! needs, and in fresh memory, the next huge frame is as good as any and the shortest way.

use super::Cpu;
use crate::class::Class;
use crate::entries::Want;
use crate::error::FreeError;
use crate::hint::tree_of;
use crate::taken::Taken;
use shared_layout::{FrameId, HugeEntry, HugeId, Order};

/// Places that are tried before a search.
const TRIES: u32 = 4;

impl Cpu<'_> {
    /// A huge block where one was freed lately or a search saw another one.
    #[inline]
    pub(super) fn take_freed(&mut self, order: Order, class: Class) -> Option<Taken> {
        if order == Order::MAX
            && class == Class::HUGE
            && let Some(pair) = self.spot.freed_pair.take()
            && let Some(taken) = self.tenant.grab(pair, order)
        {
            return Some(taken);
        }
        match class {
            Class::HUGE if order == Order::HUGE && self.spot.spares => self.take_lone(),
            Class::HUGE if order == Order::MAX && self.warm.has(order) => self.take_pair(),
            _ => None,
        }
    }

    /// A huge frame that is no half of a pair.
    #[inline(never)]
    fn take_lone(&mut self) -> Option<Taken> {
        for _ in 0..TRIES {
            let huge = self.spot.freed.pop().or_else(|| self.spot.lone.next())?;
            if self.is_pair(huge) {
                self.warm.put(HugeId(huge.0 & !1).first_frame(), Order::MAX, HugeEntry::FREE_INSTALLED);
                continue;
            }
            let taken = self.tenant.lower.take_huge_if(huge, |entry| Want::Installed.matches(entry));
            if taken.is_some() {
                return taken;
            }
        }
        None
    }

    /// A pair that was freed lately, or came to be one.
    #[inline(never)]
    fn take_pair(&mut self) -> Option<Taken> {
        for _ in 0..TRIES {
            let pair = self.warm.pop(Order::MAX)?.huge()?;
            let taken = self.tenant.grab(pair, Order::MAX);
            if taken.is_some() {
                return taken;
            }
        }
        None
    }

    /// Whether the other half of a free huge frame is free as well.
    #[inline]
    fn is_pair(&self, huge: HugeId) -> bool {
        self.tenant.is_free(HugeId(huge.0 ^ 1))
    }

    #[inline(never)]
    pub(super) fn free_huge(&mut self, frame: FrameId) -> Result<(), FreeError> {
        let huge = frame.huge().filter(|_| frame.is_aligned(Order::HUGE));
        let Some((huge, after)) = huge.and_then(|huge| Some((huge, self.tenant.lower.give_one_huge(huge)?))) else {
            return self.refuse(frame, Order::HUGE);
        };
        if self.tenant.note_free(huge, after, Order::HUGE.frames()) {
            let tree = tree_of(huge);
            self.spot.back = Some(self.spot.back.map_or(tree, |back| back.min(tree)));
        }
        if !after.is_evicted() {
            // There is memory again that costs no install: look for that first.
            self.spot.any = false;
            self.spot.freed.put(huge);
        }
        Ok(())
    }

    /// Remembers where a block of order 10 was freed.
    #[inline]
    pub(super) fn keep_pair(&mut self, pair: HugeId, after: HugeEntry) {
        if self.spot.spares {
            self.warm.put(pair.first_frame(), Order::MAX, after);
        } else if !after.is_evicted() {
            self.spot.freed_pair = Some(pair);
        }
    }
}
