//! [`Trees`]: where to look, and what surely is not there.
//!
//! A tree is [`HUGE_PER_TREE`] huge frames. One 16-bit word says roughly what is free in it and
//! what it is for. Where trees are many, five bitmaps list, one bit a tree, which of them may promise what a
//! search is after; so it looks at 64 trees with one load. All of it is the tenant's own, and it is recounted
//! from the entries rather than adjusted, so no error stays.
//!
//! ```text
//!  15     14     13     12    11..8  7          6..4    3..2   1           0
//! +------+------+------+-----+------+----------+-------+------+-----------+------+
//! | lone | home | pair | few | run  | reserved | class | room | installed | free |
//! +------+------+------+-----+------+----------+-------+------+-----------+------+
//! free: some huge frame is; installed: one of these is backed by memory; pair: two that order 10 can have
//! lone: one with memory whose other half is not free, and few pairs, at the last count: order 9 spares these pairs
//! room: 0 no huge frame in use has any, 1 sparse, 2 mixed, 3 crowded; few: hardly worth a search
//! home: a handle's vicinity begins here (see `vicinity`)
//! run: one more than the order of the longest free run in huge frames in use (see `HugeEntry`), zero if none has room
//! ```
//!
//! A word may promise what is gone: a search that finds the promise broken recounts. It never denies
//! what is there once all calls have returned, the host's returns aside, which the return epoch tells. For a
//! free changes the entry and then looks at the word; a recount changes the word and then looks at the
//! entries again; so one of them sees the other. All changes of a word are compare-and-swaps, for the
//! mark of the CPU that reserved a tree must not be lost to somebody's recount.
//!
//! Why 32 huge frames: the entries of a tree are one cache line, so that CPUs in different trees do
//! not disturb each other; 64 MiB let a CPU work for long without a search; and the hints of a table
//! from 4 GiB on stay below 70 bytes a GiB.

use crate::class::Class;
use crate::entries::{Entries, Want};
use crate::error::{Part, TableError, check_len};
use crate::lanes::{bits, look};
use crate::sync::{AtomicU16, AtomicU64, Ordering, change_before_looks};
use shared_layout::table::{BITMAPS, HUGE_PER_TREE};
use shared_layout::{FRAMES_PER_HUGE, FrameId, HugeEntry, HugeId, HugeRange, Order, Run, TableLayout};

/// The free frames of a tree at the last count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct TreeHint(u16);

/// The entries of a tree, counted.
pub(crate) struct Count {
    pub(crate) hint: TreeHint,
    /// There is no block in it.
    pub(crate) all_free: bool,
}

const FREE: u16 = 1 << 0;
const INSTALLED: u16 = 1 << 1;
const ROOM_SHIFT: u16 = 2;
const ROOM_MASK: u16 = 3 << ROOM_SHIFT;
const CLASS_SHIFT: u16 = 4;
const CLASS_MASK: u16 = 7 << CLASS_SHIFT;
const RESERVED: u16 = 1 << 7;
const RUN_SHIFT: u16 = 8;
const RUN_MASK: u16 = 15 << RUN_SHIFT;
const FEW: u16 = 1 << 12;
const PAIR: u16 = 1 << 13;
const HOME: u16 = 1 << 14;
const LONE: u16 = 1 << 15;
/// What a count says; the rest is the tree's owner and purpose.
const COUNTED: u16 = FREE | INSTALLED | ROOM_MASK | RUN_MASK | FEW | PAIR | LONE;

/// A tree of which less than one frame in this many is free, in huge frames in use, has few.
const FEW_OF: u32 = 32;

/// The largest block, as an order, that a huge frame with room has by its bound and by its count. A bound stays when a run is
/// cut up, and no search tries a huge frame that has fewer frames than it wants: by bounds alone a tree would promise for ever
/// what nobody finds there. Only a hint may go by the count: what is being freed lies there before it is counted, and the
/// party that counts it tells.
#[inline]
pub(crate) fn promised_run(entry: HugeEntry) -> u16 {
    entry.run_bits().min(entry.free().max(1).ilog2() as u16)
}

/// The largest order below 9 whose blocks have no more frames than that, by comparisons: of several counts they are made at once,
/// which logarithms are not.
#[inline]
fn order_of_many(free: u16) -> u16 {
    (1..u16::from(Order::HUGE.get())).map(|order| u16::from(free >= 1 << order)).sum()
}

impl TreeHint {
    /// A tree in which nothing is free.
    pub(crate) const NONE: Self = Self(0);

    /// Counts a tree's entries. The hint has no owner and no purpose.
    pub(crate) fn count(entries: &Entries) -> Count {
        // Sums and maxima without a branch: the compiler counts several entries at once.
        let (mut room, mut run) = (0, 0);
        for entry in entries.entries {
            let partial = u16::from(entry.has_room());
            room += entry.free() * partial;
            let promised = entry.run_bits().min(order_of_many(entry.free()));
            run = ((promised + 1) * partial).max(run);
        }
        let free = entries.free();
        let all = u32::from(entries.len) * FRAMES_PER_HUGE as u32;
        let room = u32::from(room);
        let used = all - free.all.count_ones() * FRAMES_PER_HUGE as u32 - room;
        let rank = match () {
            () if room == 0 => 0,
            () if used * 8 >= all * 7 => 3,
            () if used * 2 >= all => 2,
            () => 1,
        };
        let flag = |set, bit| if set { bit } else { 0 };
        let lone = flag(free.spares_pairs(), LONE);
        let flags =
            flag(free.all != 0, FREE) | flag(free.installed != 0, INSTALLED) | flag(free.pairs() != 0, PAIR) | lone;
        let few = flag(rank == 3 && room * FEW_OF < all, FEW);
        let hint = flags | few | rank << ROOM_SHIFT | run << RUN_SHIFT;
        Count { hint: Self(hint), all_free: free.all.count_ones() == u32::from(entries.len) }
    }

    /// The same tree with the count of another hint.
    pub(crate) fn recounted(self, counted: Self) -> Self {
        Self(self.0 & !COUNTED | counted.0 & COUNTED)
    }

    /// The same tree, where what is free in `counted` is free, too.
    pub(crate) fn with_all_of(self, counted: Self) -> Self {
        let mut both = self.0 | counted.0 & (FREE | INSTALLED | PAIR);
        if both & ROOM_MASK == 0 {
            both |= counted.0 & (ROOM_MASK | FEW);
        }
        if counted.0 & RUN_MASK > both & RUN_MASK {
            both = both & !RUN_MASK | counted.0 & RUN_MASK;
        }
        Self(both)
    }

    #[inline]
    pub(crate) const fn promises(self, want: Want) -> bool {
        match want {
            Want::Crowded => self.0 & ROOM_MASK == 3 << ROOM_SHIFT,
            Want::Mixed => self.0 & ROOM_MASK == 2 << ROOM_SHIFT,
            Want::Sparse => self.0 & ROOM_MASK == 1 << ROOM_SHIFT,
            Want::Installed => self.0 & INSTALLED != 0,
            Want::Free => self.0 & FREE != 0,
        }
    }

    /// What a block of `order` may be taken from.
    #[inline]
    pub(crate) fn offer(self, order: Order) -> Offer {
        let free = self.0 & (FREE | INSTALLED);
        let offer = if order.is_huge() {
            match order {
                Order::MAX if self.0 & PAIR == 0 => 0,
                Order::HUGE if self.0 & LONE == 0 && free != 0 => free | 1 << OFFERED_FEW,
                _ => free,
            }
        } else if (self.0 & RUN_MASK) >> RUN_SHIFT <= u16::from(order.get()) {
            free
        } else {
            free | self.0 & ROOM_MASK | (self.0 & FEW) >> (FEW.trailing_zeros() - OFFERED_FEW)
        };
        Offer(offer as u8)
    }

    /// Whether something is promised that another hint does not.
    pub(crate) fn promises_more_than(self, other: Self) -> bool {
        other.with_all_of(self) != other
    }

    /// The largest block that is promised: all smaller ones are as well.
    fn largest(self) -> Option<Order> {
        if self.0 & (FREE | INSTALLED) != 0 {
            return Some(if self.has_pair() { Order::MAX } else { Order::HUGE });
        }
        let run = (self.0 & RUN_MASK) >> RUN_SHIFT;
        let below_huge = Order::HUGE.get() - 1;
        Order::new((run.checked_sub(1)? as u8).min(below_huge)).filter(|_| self.0 & (ROOM_MASK | FEW) != 0)
    }

    /// The largest block that is promised and not by another hint.
    #[inline]
    pub(crate) fn largest_over(self, other: Self) -> Option<Order> {
        if self == other {
            return None;
        }
        self.largest().filter(|largest| Some(*largest) > other.largest())
    }

    /// Whether an entry with room, after a free, has more than is promised.
    #[inline]
    pub(crate) fn is_outdone_by(self, after: HugeEntry) -> bool {
        // Most often the bound alone says no.
        let promised = (self.0 & RUN_MASK) >> RUN_SHIFT;
        after.run_bits() >= promised && promised_run(after) >= promised
    }

    /// Order 10 has a place.
    #[inline]
    pub(crate) fn has_pair(self) -> bool {
        self.0 & PAIR != 0
    }

    /// At the last count there were few places for order 10, and for order 9 one that is no half of them.
    #[inline]
    pub(crate) fn has_lone(self) -> bool {
        self.0 & LONE != 0
    }

    /// There was little room at the last count; there may be more by now.
    #[inline]
    pub(crate) fn has_few(self) -> bool {
        self.0 & FEW != 0
    }

    /// A CPU is at work in this tree; others had better look elsewhere.
    #[inline]
    pub(crate) fn is_reserved(self) -> bool {
        self.0 & RESERVED != 0
    }

    /// A handle's vicinity begins here.
    #[inline]
    pub(crate) fn is_home(self) -> bool {
        self.0 & HOME != 0
    }

    /// The same tree with a handle's mark or without one.
    pub(crate) fn at_home(self, home: bool) -> Self {
        Self(if home { self.0 | HOME } else { self.0 & !HOME })
    }

    /// The purpose of the tree.
    #[inline]
    pub(crate) fn class(self) -> Class {
        Class::from_bits(self.0 >> CLASS_SHIFT)
    }

    /// The same tree in a CPU's hands, or in nobody's.
    pub(crate) fn reserved(self, reserved: bool) -> Self {
        Self(if reserved { self.0 | RESERVED } else { self.0 & !RESERVED })
    }

    /// The same tree for another class.
    pub(crate) fn with_class(self, class: Class) -> Self {
        Self(self.0 & !CLASS_MASK | u16::from(class.get()) << CLASS_SHIFT)
    }

    /// A tree in which a huge frame came free.
    pub(crate) fn with_free(self, installed: bool, pair: bool) -> Self {
        // What was lone may be half of this pair: the next count says.
        let known = if pair { self.0 & !LONE | PAIR } else { self.0 };
        Self(known | FREE | if installed { INSTALLED } else { 0 })
    }

    /// A tree in which room came free: an entry is `after` now. Where there was none it is little.
    pub(crate) fn with_room(self, after: HugeEntry) -> Self {
        let run = Run::from_bits(promised_run(after));
        let few = Self(3 << ROOM_SHIFT | FEW | (u16::from(run.order().get()) + 1) << RUN_SHIFT);
        self.with_all_of(few)
    }
}

/// What a tree has for some order, five bits: see [`TreeHint::offer`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Offer(u8);

/// The bit of an offer that says that there is little room, or for order 9 nothing but pairs.
const OFFERED_FEW: u32 = 4;

impl Offer {
    /// Different ones.
    pub(crate) const ALL: usize = 2 << OFFERED_FEW;

    pub(crate) const fn from_index(index: usize) -> Self {
        Self(index as u8)
    }

    #[inline]
    pub(crate) const fn index(self) -> usize {
        self.0 as usize % Self::ALL
    }

    pub(crate) const fn is_none(self) -> bool {
        self.0 == 0
    }

    /// Whether it serves a want; little room, or half a pair, only if that will do.
    pub(crate) const fn serves(self, want: Want, few: bool) -> bool {
        if !few && self.0 & 1 << OFFERED_FEW != 0 {
            return false;
        }
        TreeHint(self.0 as u16).promises(want)
    }
}

// The layout counts the bitmaps without knowing what they list.
const _: () = assert!(Want::ALL.len() == BITMAPS as usize);

/// Words that [`Trees`] needs for its bitmaps, for this many trees.
pub(crate) const fn bitmap_words(trees: u32) -> usize {
    TableLayout::bitmap_words(trees) as usize
}

/// The tree that a huge frame belongs to.
#[inline]
pub(crate) const fn tree_of(huge: HugeId) -> u32 {
    huge.0 / HUGE_PER_TREE
}

/// The huge frame of a frame that a table has.
#[inline]
pub(crate) const fn huge_of(frame: FrameId) -> HugeId {
    HugeId((frame.0 / Order::HUGE.frames()) as u32)
}

/// The huge frames of a tree, those past the end of the table included.
#[inline]
pub(crate) const fn tree_range(tree: u32) -> HugeRange {
    HugeRange::saturating(HugeId(tree * HUGE_PER_TREE), HUGE_PER_TREE)
}

/// Trees whose hints a search reads one by one: of a table up to 4 GiB. In the bitmaps of so few, which are one cache line,
/// all CPUs would meet.
pub(crate) const FEW_TREES: u32 = 64;

/// The hints of all trees, and the bitmaps over them.
#[derive(Clone, Copy)]
pub(crate) struct Trees<'a> {
    hints: &'a [AtomicU16],
    summary: &'a [AtomicU64],
    trees: u32,
    /// Hints from that of one tree to the next.
    stride: u32,
    /// They are listed however few they are: programs of checkers have one or two.
    #[cfg(any(loom, shuttle, stepping))]
    pub(crate) always_listed: bool,
}

impl<'a> Trees<'a> {
    /// For a number of trees. Fails unless there are a hint or the same number of them for each, and as many bitmap words as
    /// they need.
    pub(crate) fn new(hints: &'a [AtomicU16], summary: &'a [AtomicU64], trees: u32) -> Result<Self, TableError> {
        let stride = (hints.len() / trees.max(1) as usize).max(1);
        check_len(Part::Hints, hints.len(), trees as usize * stride)?;
        check_len(Part::Summary, summary.len(), bitmap_words(trees))?;
        Ok(Self {
            hints,
            summary,
            trees,
            stride: stride as u32,
            #[cfg(any(loom, shuttle, stepping))]
            always_listed: true,
        })
    }

    pub(crate) fn len(&self) -> u32 {
        self.trees
    }

    fn hint(&self, tree: u32) -> Option<&'a AtomicU16> {
        self.hints.get(tree as usize * self.stride as usize)
    }

    /// Tells tables apart, as a rule.
    #[inline]
    pub(crate) fn id(&self) -> usize {
        self.hints.as_ptr().addr()
    }

    pub(crate) fn get(&self, tree: u32) -> TreeHint {
        // Acquire: with a promise comes that no refusal contradicts it any more.
        TreeHint(self.hint(tree).map_or(0, |hint| hint.load(Ordering::Acquire)))
    }

    /// Changes a tree's word and lists the tree for what it promises; the word before and after. It
    /// stays listed for what it no longer promises until a search comes by, and room in a reserved tree
    /// is not listed, for it comes and goes: CPUs at work in their own trees write nothing that others read.
    pub(crate) fn change(&self, tree: u32, step: impl Fn(TreeHint) -> TreeHint) -> (TreeHint, TreeHint) {
        let Some(word) = self.hint(tree) else { return (TreeHint::NONE, TreeHint::NONE) };
        let mut old = word.load(Ordering::Acquire);
        let new = loop {
            let new = step(TreeHint(old));
            if new.0 == old {
                break new;
            }
            // Acquire and release: who denies something counted after who promised it.
            match word.compare_exchange(old, new.0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break new,
                Err(seen) => old = seen,
            }
        };
        change_before_looks();
        self.list(tree, new);
        (TreeHint(old), new)
    }

    /// So few that their hints are looked at one by one: they are not listed.
    #[inline]
    pub(crate) fn are_few(&self) -> bool {
        #[cfg(any(loom, shuttle, stepping))]
        if self.always_listed {
            return false;
        }
        self.trees <= FEW_TREES
    }

    fn list(&self, tree: u32, hint: TreeHint) {
        if self.are_few() {
            return;
        }
        for want in Want::ALL {
            let (Some(bits), mask) = (self.summary_word(want, tree), 1 << (tree % 64)) else { continue };
            let public = !hint.is_reserved() || !want.is_partial();
            if public && hint.promises(want) && bits.load(Ordering::Relaxed) & mask == 0 {
                // Trees share a word, so this is atomic.
                bits.fetch_or(mask, Ordering::Relaxed);
            }
        }
    }

    /// Takes a tree off the lists of what it does not promise.
    #[cold]
    pub(crate) fn unlist(&self, tree: u32) {
        let mask = 1 << (tree % 64);
        for want in Want::ALL {
            let Some(bits) = self.summary_word(want, tree) else { continue };
            if bits.load(Ordering::Relaxed) & mask != 0 && !self.get(tree).promises(want) {
                bits.fetch_and(!mask, Ordering::Relaxed);
            }
        }
        change_before_looks();
        // Somebody may have freed a block meanwhile and seen a bit still set.
        self.list(tree, self.get(tree));
    }

    /// Empties the bitmaps, bits past the last tree included.
    pub(crate) fn unlist_all(&self) {
        self.summary.iter().for_each(|bits| bits.store(0, Ordering::Relaxed));
    }

    /// Which of 64 trees, from the first of a word on, promise `want`, and which may serve a block of `order`: one bit each.
    #[inline(never)]
    pub(crate) fn glance(&self, first: u32, want: Want, order: Order) -> (u64, u64) {
        // Relaxed: a look only guides; whoever says that there is nothing looks at entries.
        let serves = |hint: TreeHint| !hint.offer(order).is_none();
        let word = self.hints.get(first as usize..).and_then(|hints| hints.first_chunk::<64>());
        let Some(word) = word.filter(|_| self.stride == 1) else {
            // The last word, or a small table.
            let hints = (first..self.trees.min(first + 64))
                .filter_map(|tree| self.hint(tree))
                .map(|hint| TreeHint(hint.load(Ordering::Relaxed)));
            return hints.zip(0..).fold((0, 0), |(listed, serving), (hint, index)| {
                (listed | u64::from(hint.promises(want)) << index, serving | u64::from(serves(hint)) << index)
            });
        };
        let hints = look(word);
        (bits(&hints, |hint| TreeHint(hint).promises(want)), bits(&hints, |hint| serves(TreeHint(hint))))
    }

    pub(crate) fn summary_word(&self, want: Want, tree: u32) -> Option<&'a AtomicU64> {
        let words = self.trees.div_ceil(64) as usize;
        self.summary.get(want as usize * words + tree as usize / 64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entries::PLENTY;
    use std::vec::Vec;

    fn used(free: u16) -> HugeEntry {
        HugeEntry::FREE_INSTALLED.take(512 - free).expect("in range")
    }

    fn count(entries: impl Iterator<Item = HugeEntry>) -> TreeHint {
        TreeHint::count(&Entries::new(entries)).hint
    }

    #[test]
    fn a_free_tree_promises_free_frames() {
        let hint = count(core::iter::repeat_n(HugeEntry::FREE_INSTALLED, HUGE_PER_TREE as usize));
        assert!(hint.promises(Want::Free) && hint.promises(Want::Installed) && hint.has_pair());
        assert!(!Want::ALL.iter().any(|want| want.is_partial() && hint.promises(*want)));
        assert!(hint.offer(Order::MAX).serves(Want::Installed, false));
    }

    #[test]
    fn a_pair_begins_at_an_even_frame() {
        let of = |frees: [u16; 4]| count(frees.into_iter().map(used_or_free));
        fn used_or_free(free: u16) -> HugeEntry {
            if free == 512 { HugeEntry::FREE_EVICTED } else { used(free) }
        }
        assert!(of([512, 512, 0, 0]).has_pair() && of([0, 0, 512, 512]).has_pair());
        let apart = of([0, 512, 512, 0]);
        assert!(!apart.has_pair() && apart.offer(Order::MAX).is_none() && !apart.offer(Order::HUGE).is_none());
    }

    #[test]
    fn order_9_spares_pairs_only_where_they_are_few() {
        let of = |pairs: usize, lone: usize| {
            let entries = [[512, 512]; 8].into_iter().take(pairs).chain([[512, 0]; 8].into_iter().take(lone)).flatten();
            count(entries.map(|free| if free == 512 { HugeEntry::FREE_INSTALLED } else { used(free) }))
        };
        assert!(of(1, 1).has_lone() && of(0, 3).has_lone() && of(PLENTY as usize - 1, 1).has_lone());
        assert!(!of(1, 0).has_lone() && !of(PLENTY as usize, 1).has_lone());
        let serves = |hint: TreeHint, order| hint.offer(order).serves(Want::Installed, false);
        assert!(serves(of(1, 1), Order::HUGE) && !serves(of(1, 0), Order::HUGE));
        assert!(of(1, 0).offer(Order::HUGE).serves(Want::Installed, true));
        assert!(serves(of(1, 0), Order::MAX) && !serves(of(0, 1), Order::MAX));
    }

    #[test]
    fn room_is_ranked_by_how_full_the_tree_is() {
        let of = |frees: [u16; 4]| count(frees.into_iter().map(used));
        assert!(of([0, 0, 0, 1]).promises(Want::Crowded) && of([0, 0, 0, 1]).has_few());
        assert!(of([128, 128, 0, 0]).promises(Want::Crowded) && !of([128, 128, 0, 0]).has_few());
        assert!(of([129, 128, 0, 0]).promises(Want::Mixed));
        assert!(of([500, 500, 20, 5]).promises(Want::Sparse));
        assert!(of([0; 4]).offer(Order::BASE).is_none());
    }

    #[test]
    fn held_and_huge_frames_promise_nothing() {
        let held = HugeEntry::FREE_EVICTED.hold().expect("free");
        let hint = count([held, HugeEntry::HUGE_EVICTED].into_iter());
        assert!(Want::ALL.iter().all(|want| !hint.promises(*want)));
    }

    #[test]
    fn a_run_is_promised_only_where_so_many_frames_are_free() {
        let order = |o| Order::new(o).expect("in range");
        for free in 1..512 {
            assert_eq!(order_of_many(free), free.ilog2() as u16);
            let hint = count([used(free), used(0)].into_iter());
            for order in (0..Order::HUGE.get()).map(order) {
                assert_eq!(!hint.offer(order).is_none(), used(free).may_fit(order), "{free} frames, {order:?}");
            }
        }
        let hint = count([used(255), used(0)].into_iter());
        assert!(
            hint.with_room(used(256)).promises_more_than(hint) && !hint.with_room(used(200)).promises_more_than(hint)
        );
        assert!(hint.is_outdone_by(used(256)) && !hint.is_outdone_by(used(200)));
    }

    #[test]
    fn the_largest_block_of_what_is_promised_beyond_another_hint() {
        let order = |o| Order::new(o).expect("in range");
        let of = |frees: &[u16]| {
            count(frees.iter().map(|free| if *free == 512 { HugeEntry::FREE_EVICTED } else { used(*free) }))
        };
        let (none, row, half) = (of(&[0, 0]), of(&[64, 0]), of(&[256, 0]));
        assert_eq!(row.largest_over(none), Some(Order::ROW));
        assert_eq!((half.largest_over(row), row.largest_over(half)), (Some(order(8)), None));
        let (huge, pair) = (of(&[512, 256]), of(&[512, 512]));
        assert_eq!((huge.largest_over(half), half.largest_over(huge)), (Some(Order::HUGE), None));
        assert_eq!((pair.largest_over(huge), pair.largest_over(none)), (Some(Order::MAX), Some(Order::MAX)));
        assert_eq!(huge.largest_over(pair), None, "what room there is in huge frames in use fits in one that is free");
    }

    #[test]
    fn whatever_is_offered_beyond_another_hint_is_no_larger() {
        let hints = || (0..=u16::MAX).filter(|bits| bits & !(COUNTED & !LONE) == 0).map(TreeHint);
        let offers = |hint: TreeHint| {
            (0..=Order::MAX.get())
                .filter(move |order| Order::new(*order).is_some_and(|order| !hint.offer(order).is_none()))
        };
        let masks: Vec<(TreeHint, u16)> =
            hints().map(|hint| (hint, offers(hint).fold(0, |mask, order| mask | 1 << order))).collect();
        for (new, offered) in &masks {
            for (old, known) in &masks {
                let largest = (offered & !known).checked_ilog2().and_then(|order| Order::new(order as u8));
                assert_eq!(new.largest_over(*old), largest, "{new:?} over {old:?}");
            }
        }
    }

    #[test]
    fn an_order_sees_only_the_trees_whose_runs_are_long_enough() {
        let order = |o| Order::new(o).expect("in range");
        let short = used(256).lower(Run::of(order(2))).expect("above");
        let hint = count([short, used(0)].into_iter());
        assert!(!hint.offer(order(2)).is_none() && hint.offer(order(3)).is_none());
        let more = hint.with_room(used(256).lower(Run::of(order(5))).expect("above"));
        assert!(!more.offer(order(5)).is_none() && more.promises(Want::Mixed), "its rank is for a count to say");
        assert_eq!(more.recounted(hint), hint);
    }
}
