//! [`Class`] and [`Policy`]: what memory is for, and which trees may serve it.
//!
//! Small blocks that live long scattered over memory are what keeps huge frames from being free.
//! So each tree has a class, taken over from the first block in it, and a policy ranks the trees
//! of every class for an allocation. A policy is data, a table of ranks: no code runs in the
//! search, and an illegal policy cannot be written.

use shared_layout::Order;

/// Classes that a policy tells apart, at most.
pub const CLASSES: usize = 7;

/// The purpose of an allocation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Class(u8);

impl Class {
    /// Blocks that can be neither moved nor dropped: page tables, a kernel's own objects.
    pub const IMMOVABLE: Self = Self(0);
    /// Blocks that a guest could move or drop: user memory, caches. The default for small blocks.
    pub const MOVABLE: Self = Self(1);
    /// Blocks of order 9 and 10. The default for these.
    pub const HUGE: Self = Self(2);
    /// A tree without any block in it.
    pub(crate) const FREE: Self = Self(CLASSES as u8);

    /// A class of the user's own, `0..7`; the first three have names. `None` above.
    #[must_use]
    pub const fn new(class: u8) -> Option<Self> {
        if (class as usize) < CLASSES { Some(Self(class)) } else { None }
    }

    /// Its number.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }

    /// The class of a block when none is named.
    #[must_use]
    pub const fn of(order: Order) -> Self {
        if order.is_huge() { Self::HUGE } else { Self::MOVABLE }
    }

    pub(crate) const fn from_bits(bits: u16) -> Self {
        Self((bits & 7) as u8)
    }
}

/// How well a tree of one class suits an allocation of another; searches go from first to last.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum Rank {
    /// It is made for it.
    Match = 1,
    /// Nothing is in the tree yet: it takes on the allocation's class.
    Fresh = 2,
    /// The tree gives its class up for the allocation's.
    Demote = 3,
    /// The tree keeps its class, and has a stranger in it.
    Steal = 4,
}

/// For each class, how it ranks the trees of the others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Policy {
    ranks: [[Rank; CLASSES + 1]; CLASSES],
}

impl Policy {
    /// Every class for itself; strangers are stolen from when nothing else is left, but for whole huge frames with memory,
    /// of which a CPU's handle takes the near ones first. What
    /// [`Policy::DEFAULT`] adds: trees of huge blocks are demoted before others are stolen from,
    /// for they have no small blocks that a newcomer could be mixed with.
    pub const SEPARATE: Self = {
        let mut ranks = [[Rank::Steal; CLASSES + 1]; CLASSES];
        let mut class = 0;
        while class < CLASSES {
            ranks[class][class] = Rank::Match;
            ranks[class][CLASSES] = Rank::Fresh;
            class += 1;
        }
        Self { ranks }
    };

    /// For the three named classes.
    pub const DEFAULT: Self = Self::SEPARATE.with(Class::IMMOVABLE, Class::HUGE, Rank::Demote).with(
        Class::MOVABLE,
        Class::HUGE,
        Rank::Demote,
    );

    /// The same policy, but allocations of `asked` see trees of class `tree` as `rank`.
    #[must_use]
    pub const fn with(mut self, asked: Class, tree: Class, rank: Rank) -> Self {
        self.ranks[asked.0 as usize][tree.0 as usize] = rank;
        self
    }

    /// The view that allocations of `asked` have of trees of class `tree`.
    #[must_use]
    pub const fn rank(&self, asked: Class, tree: Class) -> Rank {
        self.ranks[asked.0 as usize][tree.0 as usize]
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self::DEFAULT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_prefers_its_own_then_fresh_trees() {
        for asked in (0..CLASSES as u8).filter_map(Class::new) {
            for tree in (0..CLASSES as u8).filter_map(Class::new) {
                let rank = Policy::DEFAULT.rank(asked, tree);
                assert_eq!(rank == Rank::Match, asked == tree);
            }
            assert_eq!(Policy::DEFAULT.rank(asked, Class::FREE), Rank::Fresh);
        }
        assert_eq!(Class::new(7), None);
        assert_eq!(Class::from_bits(0xffff), Class::FREE);
    }
}
