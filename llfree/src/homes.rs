//! Who looks where: each handle has a home, and its [`Vicinity`] is what lies between that and the home of the next one.
//!
//! Two handles at work in the same trees pay for each other's cache lines with every block: a third of the time where
//! blocks of all orders come and go. So homes, which are marks in the hints of trees, are as far from each other as can
//! be, and a handle looks beyond its vicinity only for what nothing in there can serve. Alone, it has all of memory.
//! A handle moves in at its first search and out when it is drained, for then it may sleep for long. What it may take
//! without looking further is as good as anything elsewhere: memory without an install, and of nobody else's class.
//!
//! A mark that a dead handle left behind, or that a recount or somebody who moved out of the same tree wiped out, costs
//! time and never memory.

use crate::hint::tree_of;
use crate::spot::Spot;
use crate::sync::Ordering;
use crate::tenant::Tenant;
use crate::vicinity::Vicinity;
use shared_layout::HugeId;
use shared_layout::table::HUGE_PER_TREE;

/// Trees that are searched for homes at most: 16 GiB. A handle without another one within as many has all of memory.
const LOOKS: u32 = 256;
/// Handles that move in at the same moment find the same place; so often one of them looks again.
const TRIES: u32 = 4;
/// In a program of checkers, which are too short for a second search, nobody has a home.
const HAS_HOMES: bool = !cfg!(any(loom, shuttle, stepping));

impl Tenant<'_> {
    /// That of another handle.
    pub(crate) fn first_vicinity(&self) -> Vicinity {
        if HAS_HOMES {
            return Vicinity::NOWHERE;
        }
        Vicinity::all(self.anywhere(self.moves.fetch_add(1, Ordering::Relaxed) as u32))
    }

    /// Before a search: a handle without a home looks for one, and one that has it looks whether others came or went, and
    /// leaves its trees to a newcomer that lives around them.
    #[inline]
    pub(crate) fn look_around(&self, spot: &mut Spot) {
        if spot.vicinity.is_wanted {
            self.move_in(spot);
        } else if spot.vicinity.is_home && spot.vicinity.moves != self.moves.load(Ordering::Relaxed) {
            self.measure(&mut spot.vicinity);
            self.leave_abroad(spot);
        }
    }

    /// Leaves the trees that are no longer in the vicinity, but for the frames and the places of freed blocks that the handle
    /// has in there. Blocks come and go in a tree that is in hand: for good it would be one of two handles.
    #[cold]
    #[inline(never)]
    fn leave_abroad(&self, spot: &mut Spot) {
        let (vicinity, trees) = (spot.vicinity, self.trees.len());
        let is_abroad = |tree: u32| !vicinity.has(tree, trees);
        for small in &mut spot.small {
            self.leave(small.take_if(|huge| is_abroad(tree_of(*huge))).map(tree_of));
        }
        let last = spot.last_tree.take_if(|tree| is_abroad(*tree));
        if last.is_some() && core::mem::take(&mut spot.owns_last) {
            self.leave(last);
        }
        self.leave(spot.tree.take_if(|tree| is_abroad(*tree)));
        spot.forget_listed(is_abroad);
        if is_abroad(spot.home) {
            spot.home = vicinity.first();
        }
        if is_abroad(tree_of(spot.huge)) {
            spot.huge = HugeId(vicinity.first() * HUGE_PER_TREE);
        }
    }

    #[cold]
    #[inline(never)]
    fn move_in(&self, spot: &mut Spot) {
        let is_first = spot.vicinity.first == u32::MAX;
        spot.vicinity = self.find_home();
        if is_first {
            spot.home = spot.vicinity.first;
            spot.huge = HugeId(spot.home * HUGE_PER_TREE);
        }
    }

    /// Half of the longest vicinity there is.
    fn find_home(&self) -> Vicinity {
        let number = self.moves.load(Ordering::Relaxed) as u32;
        for attempt in 0..TRIES {
            let is_small = self.trees.len() <= LOOKS;
            let home = if is_small { self.far_from_homes() } else { Some(self.anywhere(number.wrapping_add(attempt))) };
            let Some(home) = home else { break };
            if !self.trees.change(home, |hint| hint.at_home(true)).0.is_home() {
                // Release, after the mark: a handle that finds this count finds the mark.
                self.moves.fetch_add(1, Ordering::Release);
                let mut vicinity = Vicinity { is_home: true, ..Vicinity::all(home) };
                self.measure(&mut vicinity);
                return vicinity;
            }
        }
        Vicinity::all(self.anywhere(number))
    }

    /// The handle of a vicinity sleeps or is gone: others may have it.
    pub(crate) fn move_out(&self, vicinity: &mut Vicinity) {
        if core::mem::take(&mut vicinity.is_home) {
            self.abandon_home(vicinity.first);
        }
        vicinity.len = u32::MAX;
        vicinity.is_wanted = HAS_HOMES;
    }

    /// The home of a handle is nobody's any more.
    pub(crate) fn abandon_home(&self, tree: u32) {
        self.trees.change(tree, |hint| hint.at_home(false));
        self.moves.fetch_add(1, Ordering::Release);
    }

    #[inline(never)]
    fn measure(&self, vicinity: &mut Vicinity) {
        // Acquire, before the marks.
        vicinity.moves = self.moves.load(Ordering::Acquire);
        let mut others = (vicinity.first + 1..self.trees.len()).chain(0..vicinity.first).take(LOOKS as usize);
        let next = others.position(|tree| self.trees.get(tree).is_home());
        vicinity.len = next.map_or(u32::MAX, |place| place as u32 + 1);
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

    /// A tree for each number: successive ones are far apart.
    fn anywhere(&self, number: u32) -> u32 {
        /// The golden ratio as a fraction of 2^32: its multiples never crowd.
        const STEP: u32 = 0x9e37_79b9;
        ((u64::from(number.wrapping_mul(STEP)) * u64::from(self.trees.len())) >> 32) as u32
    }
}
