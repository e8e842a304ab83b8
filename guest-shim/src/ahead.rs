//! [`Ahead`]: how many frames to have installed at once, decided like read-ahead of a file.
//!
//! One call to the host costs as much for many neighbours as for one. While blocks come from evicted
//! frames in order, and what was asked for ahead is used, the window doubles with each call; any
//! other pattern, and a host that refuses, begin anew with what is needed. It only counts: asking
//! is the business of `memory`, and what is asked ahead stays free for anybody.

use shared_layout::Order;
use shared_layout::table::HUGE_PER_TREE;

/// The largest window in huge frames: 64 MiB, a tree, and what the host installs in one batch.
const MOST: u32 = HUGE_PER_TREE;

/// The window of one vCPU for one kind of blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ahead {
    /// Huge frames of the last call, or 0 if nothing is known.
    window: u32,
    /// The first frame that was asked for last.
    start: u32,
    /// Behind the last of them.
    end: u32,
    /// Behind the last frame of these that was used.
    used: u32,
    /// Frames asked for before they were needed, since boot.
    pub(crate) frames: u64,
}

impl Ahead {
    /// Nothing asked for yet.
    pub(crate) const fn new() -> Self {
        Self { window: 0, start: 0, end: 0, used: 0, frames: 0 }
    }

    /// A block in huge frame `first`, or of that and the next, needed no install. A whole one from
    /// elsewhere ends the run.
    #[inline]
    pub(crate) fn note_use(&mut self, first: u32, order: Order) {
        if (self.used..self.end).contains(&first) {
            self.used = first + order.huge_frames();
        } else if order.is_huge() && !(self.start..self.end).contains(&first) {
            self.window = 0;
        }
    }

    /// A block of `need` huge frames from `first` on is evicted: how many to ask for, at least `need`
    /// and not beyond its tree.
    pub(crate) fn window(&mut self, first: u32, need: u32) -> u32 {
        let all_used = self.window > 0 && self.used >= self.end;
        // A CPU that used up its tree goes on in another one; a single frame at a tree's end tells
        // nothing.
        let goes_on = first == self.end || (self.window > 1 && self.end.is_multiple_of(HUGE_PER_TREE));
        self.window = if all_used && goes_on { (self.window * 2).min(MOST) } else { 1 };
        let tree = HUGE_PER_TREE - first % HUGE_PER_TREE;
        self.window.min(tree).max(need)
    }

    /// The host was asked for `count` huge frames from `first` on, and `need` of them are used now.
    pub(crate) fn note_call(&mut self, first: u32, need: u32, count: u32) {
        self.start = first;
        self.end = first + count;
        self.used = first + need;
        self.frames += u64::from(count - need);
    }

    /// The host did not give all that was asked for.
    pub(crate) fn refused(&mut self) {
        self.window = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    /// One block after the other, none installed: the calls, as ranges.
    fn calls(ahead: &mut Ahead, blocks: impl IntoIterator<Item = u32>) -> Vec<(u32, u32)> {
        let mut installed = std::collections::BTreeSet::new();
        let mut calls = Vec::new();
        for first in blocks {
            if installed.contains(&first) {
                ahead.note_use(first, Order::HUGE);
                continue;
            }
            let count = ahead.window(first, 1);
            ahead.note_call(first, 1, count);
            installed.extend(first..first + count);
            calls.push((first, count));
        }
        calls
    }

    #[test]
    fn the_window_doubles_to_a_tree_and_never_crosses_one() {
        let mut ahead = Ahead::new();
        let first_tree = [(1, 1), (2, 2), (4, 4), (8, 8), (16, 16)];
        assert_eq!(calls(&mut ahead, 1..32), first_tree);
        assert_eq!(calls(&mut ahead, 32..96), [(32, 32), (64, 32)]);
        assert_eq!(calls(&mut ahead, 128..160), [(128, 32)], "another CPU has the tree between");
        assert_eq!(ahead.frames, 26 + 3 * 31);
    }

    #[test]
    fn frames_asked_for_and_not_used_begin_anew() {
        let mut ahead = Ahead::new();
        assert_eq!(calls(&mut ahead, [1, 2, 3, 4, 5]), [(1, 1), (2, 2), (4, 4)]);
        // 6 and 7 are there, and something else is wanted.
        assert_eq!(calls(&mut ahead, [20, 21, 22, 23]), [(20, 1), (21, 2), (23, 4)]);
        // They were evicted again.
        assert_eq!(calls(&mut ahead, [24]), [(24, 1)]);
        // All used, but then came blocks that were there already.
        ahead.note_use(50, Order::BASE);
        assert_eq!(calls(&mut ahead, [25, 26]), [(25, 2)]);
        ahead.note_use(50, Order::HUGE);
        assert_eq!(calls(&mut ahead, [27]), [(27, 1)]);
    }

    #[test]
    fn a_random_pattern_asks_for_what_it_needs() {
        let mut ahead = Ahead::new();
        let blocks: Vec<u32> = (0..64).map(|i| i * 37 % 101).collect();
        let calls = calls(&mut ahead, blocks);
        assert!(calls.iter().all(|(_, count)| *count == 1), "{calls:?}");
    }

    #[test]
    fn a_refusal_begins_anew_and_a_large_block_gets_what_it_needs() {
        let mut ahead = Ahead::new();
        calls(&mut ahead, 1..8);
        ahead.refused();
        assert_eq!(ahead.window(8, 2), 2);
        ahead.note_call(8, 2, 2);
        assert_eq!(ahead.window(10, 2), 2);
        ahead.note_call(10, 2, 2);
        assert_eq!(ahead.window(12, 2), 4);
        ahead.note_call(12, 2, 4);
        ahead.note_use(14, Order::MAX);
        assert_eq!(ahead.window(16, 2), 8);
        assert_eq!(Ahead::new().window(u32::MAX - 1, 1), 1);
    }
}
