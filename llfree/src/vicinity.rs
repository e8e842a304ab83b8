//! [`Vicinity`]: the trees that a handle looks at first, from its home up to the home of the next handle.
//!
//! Two handles at work in the same trees pay for each other's cache lines with every block: a third of the time where
//! blocks of all orders come and go. So each has a home, marked in the hint of a tree and as far from the others' as can
//! be, and looks beyond its vicinity only for what nothing in there can serve. Alone, a handle has all of memory.
//!
//! A place to look and nothing more: a mark that a dead handle left behind, or that somebody's recount wiped out, costs
//! time and never memory.

use crate::hint::{Trees, Want};
use crate::sync::Ordering;
use crate::tenant::Tenant;

/// Trees that are searched for homes at most: 64 GiB.
const LOOKS: u32 = 1024;
/// Handles that move in at the same moment find the same place; so often one of them looks again.
const TRIES: u32 = 4;
/// In a program of checkers, which are too short for a second search, nobody has a home.
const HAS_HOMES: bool = !cfg!(any(loom, shuttle, stepping));

/// Some trees in a row; the first tree follows the last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vicinity {
    first: u32,
    /// [`u32::MAX`] for all trees.
    len: u32,
    /// `first` has the mark of the handle whose vicinity this is.
    is_home: bool,
    /// The count of handles that came and went when it was measured.
    moves: u64,
}

impl Vicinity {
    /// All trees, beginning at one of them.
    pub(crate) const fn all(first: u32) -> Self {
        Self { first, len: u32::MAX, is_home: false, moves: 0 }
    }

    #[cfg(test)]
    pub(crate) const fn of(first: u32, len: u32) -> Self {
        Self { len, ..Self::all(first) }
    }

    pub(crate) const fn first(&self) -> u32 {
        self.first
    }

    pub(crate) const fn is_all(&self) -> bool {
        self.len == u32::MAX
    }

    /// Where in the vicinity a tree of so many is; past the end of it for all others.
    const fn place_of(&self, tree: u32, trees: u32) -> u32 {
        if tree >= self.first { tree - self.first } else { (tree + trees).wrapping_sub(self.first) }
    }

    pub(crate) const fn has(&self, tree: u32, trees: u32) -> bool {
        self.place_of(tree, trees) < self.len
    }
}

impl Trees<'_> {
    /// Shows the trees of a vicinity that are listed for `want`, once each, from `home` on if it is one of them, until
    /// `done` says so.
    #[inline]
    pub(crate) fn visit(&self, want: Want, vicinity: Vicinity, home: u32, mut done: impl FnMut(u32) -> bool) {
        let trees = self.len();
        if vicinity.is_all() {
            let home = if home < trees { home } else { 0 };
            let _ = self.visit_run(want, home..trees, &mut done) || self.visit_run(want, 0..home, &mut done);
            return;
        }
        let first = if vicinity.first < trees { vicinity.first } else { 0 };
        let vicinity = Vicinity { first, ..vicinity };
        let (place, len) = (vicinity.place_of(home, trees), vicinity.len.min(trees));
        let (home, place) = if home < trees && place < len { (home, place) } else { (first, 0) };
        // From there to the end, and what is before it.
        for (from, count) in [(home, len - place), (first, place)] {
            let end = from + count;
            if self.visit_run(want, from..end.min(trees), &mut done)
                || self.visit_run(want, 0..end.saturating_sub(trees), &mut done)
            {
                return;
            }
        }
    }
}

impl Tenant<'_> {
    /// A vicinity for another handle: half of the longest one.
    pub(crate) fn move_in(&self) -> Vicinity {
        /// The golden ratio as a fraction of 2^32: its multiples never crowd.
        const STEP: u32 = 0x9e37_79b9;
        let moves = self.moves.fetch_add(1, Ordering::Relaxed);
        let trees = self.trees.len();
        let anywhere = (u64::from((moves as u32).wrapping_mul(STEP)) * u64::from(trees)) >> 32;
        for _ in 0..if HAS_HOMES { TRIES } else { 0 } {
            let home = if trees <= LOOKS { self.far_from_homes() } else { Some(anywhere as u32) };
            let Some(home) = home else { break };
            if !self.trees.change(home, |hint| hint.at_home(true)).0.is_home() {
                let mut vicinity = Vicinity { is_home: true, ..Vicinity::all(home) };
                self.measure(&mut vicinity);
                return vicinity;
            }
        }
        Vicinity::all(anywhere as u32)
    }

    /// The handle of a vicinity is gone.
    pub(crate) fn move_out(&self, vicinity: &Vicinity) {
        if vicinity.is_home {
            self.trees.change(vicinity.first, |hint| hint.at_home(false));
            self.moves.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Measures a vicinity anew if handles came or went.
    #[inline]
    pub(crate) fn measure_if_moved(&self, vicinity: &mut Vicinity) {
        if vicinity.is_home && vicinity.moves != self.moves.load(Ordering::Relaxed) {
            self.measure(vicinity);
        }
    }

    #[inline(never)]
    fn measure(&self, vicinity: &mut Vicinity) {
        vicinity.moves = self.moves.load(Ordering::Relaxed);
        let trees = self.trees.len();
        let is_home = |place: &u32| self.trees.get((vicinity.first + place) % trees).is_home();
        vicinity.len = (1..trees.min(LOOKS)).find(is_home).unwrap_or(u32::MAX);
    }

    /// The tree in the middle between two homes that are as far apart as any; none if all trees are homes.
    fn far_from_homes(&self) -> Option<u32> {
        let trees = self.trees.len();
        let mut homes = (0..trees).filter(|tree| self.trees.get(*tree).is_home());
        let Some(first) = homes.next() else { return Some(0) };
        let (mut last, mut longest, mut home) = (first, 1, None);
        for next in homes.chain([first + trees]) {
            if next - last > longest {
                (longest, home) = (next - last, Some((last + (next - last) / 2) % trees));
            }
            last = next;
        }
        home
    }
}
