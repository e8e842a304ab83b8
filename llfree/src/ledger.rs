//! [`Ledger`]: what a handle holds back, written down where others find it when its process died.
//!
//! A handle's registers are plain memory of its process and end with it: to everybody else the frames in them stay
//! allocated. A [recorded](crate::Recorded) handle writes its registers into a few words that the table's users share, after each call
//! and before each step that gives frames away. So whenever its process is killed, the words name no frame
//! that is not the handle's, and all that are but for what one call was moving at that moment: a block, and a row or the
//! rest of a huge frame.
//! [`Tenant::give_back`] returns them while everybody else goes on allocating.
//!
//! ```text
//! word 0        1 while a handle has the ledger
//! words 1, 2    the row that frees gather in: its first frame, a bit for each frame
//! words 3, 4    the row that is served
//! words 5-12    the rest of the huge frame that the served row lies in, a word of bits for each of its rows
//! words 13-17   ten trees, 32 bits each and counted from 1: nine that may be reserved, and the home
//! ```
//!
//! A register's bits go before its frame changes and come after it, and frames leave the register that they are moved from
//! before they are in the other: each word alone is true at any moment, so no reader needs a lock. What a hostile or broken
//! process writes there makes frames come free at worst that are allocated, as a wrong free does.

use crate::rows::ROWS;
use crate::spot::TREE_COUNT;
use crate::sync::{AtomicU64, Ordering};
use crate::taken::TakenRow;
use crate::tenant::Tenant;
use core::fmt;
use shared_layout::{FrameId, Order};

const OWNER: usize = 0;
const FREED: usize = 1;
const ROW: usize = 3;
const REST: usize = 5;
const TREES: usize = REST + ROWS;
/// Of the trees, two a word, the last is the home.
const HOME: usize = TREE_COUNT - 1;

/// Words of a [`Ledger`]. Those of different handles had better not share a cache line.
pub const LEDGER_WORDS: usize = TREES + TREE_COUNT / 2;

/// The words for one handle, all zero at first, in memory that outlives the handle's process.
#[derive(Clone, Copy)]
pub struct Ledger<'a>(&'a [AtomicU64; LEDGER_WORDS]);

impl<'a> Ledger<'a> {
    /// A ledger in words that all processes of a table share.
    #[must_use]
    pub const fn new(words: &'a [AtomicU64; LEDGER_WORDS]) -> Self {
        Self(words)
    }

    /// Whether a handle has it, one whose process died included.
    #[must_use]
    pub fn is_in_use(self) -> bool {
        self.0[OWNER].load(Ordering::Acquire) != 0
    }

    fn set(self, word: usize, value: u64) {
        // Nobody else writes the word. Release: in this order also for who reads them while the process is killed.
        if self.0[word].load(Ordering::Relaxed) != value {
            self.0[word].store(value, Ordering::Release);
        }
    }

    /// Takes hold of it; false if somebody has.
    pub(crate) fn take(self) -> bool {
        self.0[OWNER].compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Leaves it to the next one.
    pub(crate) fn leave(self) {
        self.0[OWNER].store(0, Ordering::Release);
    }

    /// Writes down what is in a handle's registers: the row that frees gather in, the one that is served, and the rest of
    /// the huge frame that this lies in.
    #[inline]
    pub(crate) fn write(self, [freed, row]: [TakenRow; 2], rest: &[u64; ROWS]) {
        // What was gathered is served next, never the other way.
        self.set_row(FREED, freed.first, freed.bits);
        // When the row moves to another huge frame nothing is left of the one before, and that was written down.
        self.set_row(ROW, row.first, row.bits);
        rest.iter().enumerate().for_each(|(index, bits)| self.set(REST + index, *bits));
    }

    /// Writes down which trees others would leave to it, and its home, the last of them.
    pub(crate) fn write_trees(self, trees: [Option<u32>; TREE_COUNT]) {
        let number = |tree: Option<u32>| u64::from(tree.map_or(0, |tree| tree + 1));
        for (word, pair) in trees.chunks_exact(2).enumerate() {
            self.set(TREES + word, number(pair[0]) | number(pair[1]) << 32);
        }
    }

    fn set_row(self, at: usize, first: FrameId, bits: u64) {
        if self.0[at].load(Ordering::Relaxed) != first.0 {
            self.set(at + 1, 0);
            self.set(at, first.0);
        }
        self.set(at + 1, bits);
    }
}

impl fmt::Debug for Ledger<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ledger").field("is_in_use", &self.is_in_use()).finish_non_exhaustive()
    }
}

impl Tenant<'_> {
    /// Gives back what a dead handle held, and leaves its trees to others, all of whom may be at work. Returns the
    /// number of frames in its registers. Nothing happens if no handle has the ledger.
    ///
    /// That the handle is dead, and that nobody else does this at the same moment, is for the caller to know (a process that was waited for, a lock that its end
    /// released): to a living one its frames would be given out twice, which harms its owners and not the table.
    /// What its process had allocated and nobody frees stays allocated. If it was killed within a call, that call's block may be
    /// lost, and up to 64 frames that it was moving to a register or from one. They look allocated, or their huge
    /// frame's counter is too low by them until a [recovery](crate::recover()) without others at work.
    pub fn give_back(&self, ledger: Ledger<'_>) -> u64 {
        if !ledger.is_in_use() {
            return 0;
        }
        let words = ledger.0;
        let [freed, row] = [FREED, ROW].map(|at| FrameId(words[at].load(Ordering::Acquire)));
        let base = row.0 & !(Order::HUGE.frames() - 1);
        let rest = (0..ROWS).map(|index| (FrameId(base.wrapping_add(64 * index as u64)), &words[REST + index]));
        let mut frames = 0;
        for (first, bits) in [(freed, &words[FREED + 1]), (row, &words[ROW + 1])].into_iter().chain(rest) {
            // First: if we die as well, what is lost is better than given back twice.
            let bits = bits.fetch_and(0, Ordering::AcqRel);
            if bits != 0 && self.give_row_back(first, bits) {
                frames += u64::from(bits.count_ones());
            }
        }
        let trees = words[TREES..]
            .iter()
            .map(|word| word.load(Ordering::Acquire))
            .flat_map(|two| [two as u32, (two >> 32) as u32]);
        for (place, tree) in trees.enumerate() {
            match tree.checked_sub(1).filter(|tree| *tree < self.trees.len()) {
                Some(home) if place == HOME => self.abandon_home(home),
                tree => self.leave(tree),
            }
        }
        words[TREES..].iter().for_each(|word| word.store(0, Ordering::Release));
        // What it freed last it may not have told.
        self.refusal.forget();
        ledger.leave();
        frames
    }
}

const _: () = assert!(TREE_COUNT.is_multiple_of(2));
