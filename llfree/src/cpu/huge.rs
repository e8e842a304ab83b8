//! Huge blocks of a handle: order 9 spares what order 10 needs.
//!
//! Where blocks of all sizes come and go most free huge frames have a neighbour in use, and two that lie side by side are
//! what order 10 cannot do without. So a handle's block of order 9 comes from the first kind while a tree says that it has
//! some: from where one was freed lately, or from the others of the tree that the last one came from. A block that makes two
//! neighbours free together is remembered as a place for order 10. In memory that has more of such pairs than it
//! needs, and in fresh memory, the next huge frame is as good as any and the shortest way.

use super::Cpu;
use crate::class::Class;
use crate::entries::Want;
use crate::error::FreeError;
use crate::hint::tree_of;
use crate::spot::Listed;
use crate::taken::Taken;
use shared_layout::{FrameId, HugeEntry, HugeId, Order};

/// Places that are tried before a search.
const TRIES: u32 = 4;

impl Cpu<'_> {
    /// A huge block where one was freed lately, or where the last search saw that another one is free.
    #[inline]
    pub(super) fn take_freed(&mut self, order: Order, class: Class) -> Option<Taken> {
        match class {
            Class::HUGE if order == Order::HUGE && self.spot.spares => self.take_lone(),
            Class::HUGE if order == Order::MAX => self.take_pair(),
            _ => None,
        }
    }

    /// A huge frame that is no half of a pair.
    #[inline(never)]
    fn take_lone(&mut self) -> Option<Taken> {
        for _ in 0..TRIES {
            let Some(huge) = self.spot.freed.pop().or_else(|| self.spot.lone.next()) else { break };
            if self.is_free_pair(huge) {
                self.warm.put(HugeId(huge.0 & !1).first_frame(), Order::MAX, HugeEntry::FREE_INSTALLED);
                continue;
            }
            if self.is_in_others_tree(huge) {
                continue;
            }
            let taken = self.tenant.lower.take_huge_if(huge, |entry| Want::Installed.matches(entry));
            if taken.is_some() {
                return taken;
            }
        }
        if let Some(tree) = self.spot.lone.through() {
            // Else a search would believe that there are more.
            self.spot.lone = Listed::NOTHING;
            self.tenant.recount_tree(tree);
        }
        None
    }

    /// A pair that was freed lately, or came to be one, while there is memory behind it.
    #[inline]
    fn take_pair(&mut self) -> Option<Taken> {
        if let Some(pair) = self.spot.freed_pair.take() {
            let taken = self.take_installed_pair(pair);
            if taken.is_some() {
                return taken;
            }
        }
        if self.warm.has(Order::MAX) || !self.spot.pairs.is_empty() { self.take_warm_pair() } else { None }
    }

    #[inline(never)]
    fn take_warm_pair(&mut self) -> Option<Taken> {
        for _ in 0..TRIES {
            let pair = match self.pop_place(Order::MAX) {
                Some(place) => place.huge()?,
                None => {
                    // The tree may have gone to a newcomer.
                    self.tenant.look_around(&mut self.spot);
                    self.spot.pairs.next()?
                }
            };
            let taken = self.take_installed_pair(pair);
            if taken.is_some() {
                return taken;
            }
        }
        None
    }

    #[inline]
    fn take_installed_pair(&self, pair: HugeId) -> Option<Taken> {
        let is_installed =
            |huge: u32| self.tenant.entry(HugeId(huge)).is_some_and(|entry| Want::Installed.matches(entry));
        let is_ours = !self.is_in_others_tree(pair);
        if is_ours && is_installed(pair.0) && is_installed(pair.0 | 1) {
            self.tenant.grab(pair, Order::MAX)
        } else {
            None
        }
    }

    /// Whether a huge frame and its other half are free.
    #[inline]
    fn is_free_pair(&self, huge: HugeId) -> bool {
        self.tenant.is_free(huge) && self.tenant.is_free(HugeId(huge.0 ^ 1))
    }

    /// Whether somebody else is at work around a huge frame.
    #[inline]
    fn is_in_others_tree(&self, huge: HugeId) -> bool {
        let tree = tree_of(huge);
        self.spot.tree != Some(tree) && self.tenant.trees.get(tree).is_reserved()
    }

    /// What a free does as a rule, with no call before its end: so it saves no register.
    #[inline(never)]
    pub(super) fn free_huge(&mut self, frame: FrameId) -> Result<(), FreeError> {
        let lower = &self.tenant.lower;
        let huge = frame.huge().filter(|_| frame.is_aligned(Order::HUGE));
        let Some((huge, after)) = huge.and_then(|huge| Some((huge, lower.give_unsettled(huge)?))) else {
            return self.refuse(frame, Order::HUGE);
        };
        if lower.is_durable() || self.tenant.is_news(huge, after, Order::HUGE.frames()) {
            return self.tell_free(huge, after);
        }
        self.keep_freed(huge, after);
        Ok(())
    }

    /// The same for a huge frame that has to be written back, or that its tree does not promise.
    #[inline(never)]
    fn tell_free(&mut self, huge: HugeId, after: HugeEntry) -> Result<(), FreeError> {
        self.tenant.lower.settle(huge);
        if self.tenant.note_free(huge, after, Order::HUGE.frames()) {
            let tree = tree_of(huge);
            self.spot.back = Some(self.spot.back.map_or(tree, |back| back.min(tree)));
        }
        self.keep_freed(huge, after);
        Ok(())
    }

    /// Remembers where a huge frame was freed.
    #[inline]
    fn keep_freed(&mut self, huge: HugeId, after: HugeEntry) {
        if !after.is_evicted() {
            // There is memory again that costs no install: look for that first.
            self.spot.any = false;
            self.spot.freed.put(huge);
        }
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
