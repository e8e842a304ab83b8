//! [`Vicinity`]: the trees that a handle looks at first.
//!
//! A place to look and nothing more: who has which one is for [`homes`](crate::homes) to say.

use crate::hint::{Trees, Want};

/// Some trees in a row; the first tree follows the last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vicinity {
    pub(crate) first: u32,
    /// [`u32::MAX`] for all trees.
    pub(crate) len: u32,
    /// `first` has the mark of the handle whose vicinity this is.
    pub(crate) is_home: bool,
    /// The next search looks for a home first.
    pub(crate) is_wanted: bool,
    /// The count of handles that came and went when it was measured.
    pub(crate) moves: u64,
}

impl Vicinity {
    /// That of a handle which has not searched yet.
    pub(crate) const NOWHERE: Self = Self { first: u32::MAX, is_wanted: true, ..Self::all(0) };

    /// All trees, beginning at one of them.
    pub(crate) const fn all(first: u32) -> Self {
        Self { first, len: u32::MAX, is_home: false, is_wanted: false, moves: 0 }
    }

    #[cfg(test)]
    pub(crate) const fn of(first: u32, len: u32) -> Self {
        Self { len, ..Self::all(first) }
    }

    pub(crate) const fn first(&self) -> u32 {
        if self.first == u32::MAX { 0 } else { self.first }
    }

    pub(crate) const fn is_all(&self) -> bool {
        self.len == u32::MAX
    }

    /// Where in the vicinity a tree of a table of `trees` is; past the end of it for all others.
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
