//! [`Vicinity`]: the trees that a handle looks at first.
//!
//! A place to look and nothing more: who has which one is for [`homes`](crate::homes) to say.

use crate::entries::Want;
use crate::hint::Trees;
use crate::sync::Ordering;
use core::ops::Range;
use shared_layout::Order;

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
        self.is_all() || self.place_of(tree, trees) < self.len
    }

    /// Its trees in a table of `trees`, once each, from `home` on if that is one of them.
    #[inline]
    pub(crate) fn lap(&self, home: u32, trees: u32) -> [Range<u32>; 4] {
        if self.is_all() {
            let home = if home < trees { home } else { 0 };
            return [home..trees, 0..home, 0..0, 0..0];
        }
        let first = if self.first < trees { self.first } else { 0 };
        let (place, len) = (Self { first, ..*self }.place_of(home, trees), self.len.min(trees));
        let (home, place) = if home < trees && place < len { (home, place) } else { (first, 0) };
        // From there to the end, and what is before it; past the last tree comes the first.
        let (end, before) = (home + (len - place), first + place);
        let (wrapped, wrapped_before) = (end.saturating_sub(trees), before.saturating_sub(trees));
        [home..end.min(trees), 0..wrapped, first..before.min(trees), 0..wrapped_before]
    }
}

/// What a visitor of trees says to each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Look {
    /// No more of them.
    Enough,
    /// The next one.
    Next,
    /// The next one that may serve: so many could not that it is worth a glance at all trees of a word first.
    NextThatServes,
}

/// Where trees that are listed are looked for.
struct Lap<F> {
    want: Want,
    done: F,
    order: Order,
    /// Only those that may serve `order` are shown.
    only_serving: bool,
    /// Words of the bitmap whose trees were glanced at for that.
    glances: u32,
}

impl Trees<'_> {
    /// Shows the trees of a vicinity that are listed for `want`, once each, from `home` on if it is one of them, until
    /// `done` says so. Returns how many times it glanced at the hints of 64 trees to leave out those that cannot serve a
    /// block of `order`.
    #[inline]
    pub(crate) fn visit(
        &self,
        want: Want,
        order: Order,
        vicinity: Vicinity,
        home: u32,
        done: impl FnMut(u32) -> Look,
    ) -> u32 {
        let mut lap = Lap { want, done, order, only_serving: false, glances: 0 };
        let _ = vicinity.lap(home, self.len()).into_iter().any(|run| self.visit_run(run, &mut lap));
        lap.glances
    }

    /// The part of a lap in a range; whether that was enough.
    #[inline]
    fn visit_run<F: FnMut(u32) -> Look>(&self, run: Range<u32>, lap: &mut Lap<F>) -> bool {
        let mut at = run.start;
        while at < run.end {
            let word = at / 64 * 64;
            let mut bits = self.summary_word(lap.want, at).map_or(0, |bits| bits.load(Ordering::Relaxed));
            bits &= u64::MAX << (at - word);
            at = word + 64;
            if at > run.end {
                bits &= u64::MAX >> (at - run.end);
            }
            if lap.only_serving && bits != 0 {
                bits = self.glance_at(word, bits, lap);
            }
            while bits != 0 {
                let tree = word + bits.trailing_zeros();
                bits &= bits - 1;
                match (lap.done)(tree) {
                    Look::Enough => return true,
                    Look::NextThatServes if !lap.only_serving => {
                        lap.only_serving = true;
                        bits = self.glance_at(word, bits, lap);
                    }
                    Look::Next | Look::NextThatServes => {}
                }
            }
        }
        false
    }

    /// Those of some trees of a word that may serve; what is not what it is listed for is taken off the list, as by who
    /// looks at it alone.
    fn glance_at<F>(&self, word: u32, bits: u64, lap: &mut Lap<F>) -> u64 {
        lap.glances += 1;
        let (listed, serving) = self.glance(word, lap.want, lap.order);
        let mut stale = bits & !listed;
        while stale != 0 {
            self.unlist(word + stale.trailing_zeros());
            stale &= stale - 1;
        }
        bits & listed & serving
    }
}
