//! Figures for a monitor to ask for each second: [`Stats`], the same by class, and free blocks by order.
//!
//! All of it is added up from entries and bitfields when somebody asks; the allocator keeps no
//! counter. Exact when nobody is at work, else a snapshot torn between huge frames. 16 GiB cost
//! some 10 microseconds; free blocks by order also look at the rows of huge frames that are partly used.

use crate::class::{CLASSES, Class};
use crate::hint::{tree_of, tree_range};
use crate::row::free_blocks_in_row;
use crate::rows::ROWS;
use crate::tenant::Tenant;
use shared_layout::{FRAMES_PER_HUGE, HugeEntry, HugeId, Order};

/// A table, or a part of it, added up from its entries.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stats {
    /// Base frames in the table.
    pub frames: u64,
    /// Base frames that are free, evicted ones included, held ones not.
    pub free_frames: u64,
    /// Huge frames that are wholly free.
    pub free_huge: u64,
    /// Of those, the ones that are not backed.
    pub free_evicted_huge: u64,
    /// Huge frames allocated as a whole.
    pub allocated_huge: u64,
    /// Huge frames with both free and allocated base frames.
    pub partial_huge: u64,
    /// Huge frames that are not backed, held ones included.
    pub evicted_huge: u64,
    /// Huge frames that the host took.
    pub held_huge: u64,
}

impl core::ops::AddAssign for Stats {
    fn add_assign(&mut self, other: Self) {
        self.frames += other.frames;
        self.free_frames += other.free_frames;
        self.free_huge += other.free_huge;
        self.free_evicted_huge += other.free_evicted_huge;
        self.allocated_huge += other.allocated_huge;
        self.partial_huge += other.partial_huge;
        self.evicted_huge += other.evicted_huge;
        self.held_huge += other.held_huge;
    }
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

/// Orders that blocks have.
pub const ORDERS: usize = Order::MAX.get() as usize + 1;

impl Tenant<'_> {
    /// Counts the table from its entries. Frames in the caches of handles count as allocated;
    /// [`Cpu::drain`](crate::Cpu::drain) gives them back.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats::count(self.lower.entries(self.lower.all()))
    }

    /// The same for the trees of each class; the last row is that of trees without any block. The
    /// class of a tree is a hint: the rows always add up to [`stats`](Self::stats).
    #[must_use]
    pub fn stats_by_class(&self) -> [Stats; CLASSES + 1] {
        let mut stats = [Stats::default(); CLASSES + 1];
        for tree in 0..self.trees.len() {
            let entries = self.lower.entries(tree_range(tree));
            stats[usize::from(self.trees.get(tree).class().get())] += Stats::count(entries);
        }
        stats
    }

    /// The class that a huge frame's tree has; `None` if the tree has no block, or is none.
    #[must_use]
    pub fn class_of(&self, huge: HugeId) -> Option<Class> {
        self.entry(huge)?;
        Class::new(self.trees.get(tree_of(huge)).class().get())
    }

    /// Free blocks of each order. Every free frame counts once, in the largest free block that it
    /// lies in: what an allocation of some order could have is the sum from that order up.
    #[must_use]
    pub fn free_blocks(&self) -> [u64; ORDERS] {
        let mut blocks = [0; ORDERS];
        let all_free = |huge: u32| self.entry(HugeId(huge)).is_some_and(HugeEntry::is_all_free);
        for huge in self.lower.all() {
            let Some(entry) = self.entry(huge) else { break };
            if entry.is_all_free() {
                // Counted with its neighbour, or alone.
                match all_free(huge.0 ^ 1) {
                    true if huge.0 % 2 == 0 => blocks[10] += 1,
                    true => {}
                    false => blocks[9] += 1,
                }
            } else if entry.has_room() {
                self.free_blocks_in(huge, &mut blocks);
            }
        }
        blocks
    }

    fn free_blocks_in(&self, huge: HugeId, blocks: &mut [u64; ORDERS]) {
        let rows = self.lower.used_rows(huge);
        let free = |range: core::ops::Range<usize>| rows[range].iter().all(|row| *row == 0);
        for quad in (0..ROWS).step_by(4) {
            if free(quad..quad + 4) {
                blocks[8] += 1;
                continue;
            }
            for pair in (quad..quad + 4).step_by(2) {
                if free(pair..pair + 2) {
                    blocks[7] += 1;
                    continue;
                }
                rows[pair..pair + 2].iter().for_each(|used| free_blocks_in_row(*used, blocks));
            }
        }
    }
}
