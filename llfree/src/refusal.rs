//! [`Refusal`]: "out of memory" said once, and believed until something is freed.
//!
//! A refusal is found out in three steps: its order is written down, every tree is looked at, and it
//! stands if nothing withdrew it meanwhile. Whoever makes a hint promise more (see `hint`) withdraws it
//! first, and once more afterwards: so a free that finds its promise made finds the refusal withdrawn as well, and one that comes
//! after the look at its tree is known before it is over. A refusal is true at the moment at which it is
//! said: since it was written down nothing that fits came free, and each tree was found without.
//!
//! Where memory is short blocks are refused and come free all the time, and a look at a tree takes its lines from those
//! who are at work there. So what comes free contradicts no more than it has to: larger blocks stay refused, and those trees
//! are [unsure](Unsure) in which something came free since they were looked at. The next look goes to these alone; of
//! those of a handle one in some sees all, so that what somebody freed who was stopped before he told is not hidden for good.
//!
//! What the host returns changes the epoch. One that does not say that [what it holds stays held](HELD_STAYS) until then may
//! make a block possible and tell nobody, or later: then it is not remembered where it holds a huge frame, and
//! where a huge frame comes free meanwhile whose other half it holds ([`doubt_pairs`](Refusal::doubt_pairs)).
//!
//! ```text
//!  63..47                 46..29   28..13         12        11..8         7..4            3..0
//! +----------------------+--------+--------------+---------+-------------+---------------+---------------+
//! | return epoch, short  | number | unsure trees | doubted | known, from | looking, from | refused, from |
//! +----------------------+--------+--------------+---------+-------------+---------------+---------------+
//! from: the smallest order for which that is so, plus one; zero for none
//! ```
//!
//! The number is another one after each withdrawal, so that a
//! look never takes a refusal that was withdrawn since it began for its own. Until then either what is looked for or what
//! is refused is no larger than the look's own order: what comes free for it is a withdrawal.

use crate::sync::{AtomicU64, Ordering, change_before_looks};
use shared_layout::Order;
use shared_layout::table::HELD_STAYS;

/// A part of the word: its lowest bit, and how many there are.
#[derive(Clone, Copy)]
struct Field {
    shift: u32,
    bits: u32,
}

const REFUSED: Field = Field { shift: 0, bits: 4 };
const LOOKING: Field = Field { shift: 4, bits: 4 };
/// Trees are unsure for blocks of this order and larger ones, and the others have none.
const KNOWN: Field = Field { shift: 8, bits: 4 };
/// What a look finds of order 10 is not remembered.
const DOUBTED: Field = Field { shift: 12, bits: 1 };
const UNSURE: Field = Field { shift: 13, bits: Unsure::GROUPS };
const NUMBER: Field = Field { shift: 29, bits: 18 };
const EPOCH: Field = Field { shift: 47, bits: 17 };
const MAX: u64 = Order::MAX.get() as u64;

impl Field {
    const fn mask(self) -> u64 {
        (1 << self.bits) - 1
    }

    const fn of(self, word: u64) -> u64 {
        word >> self.shift & self.mask()
    }

    const fn set(self, word: u64, value: u64) -> u64 {
        word & !(self.mask() << self.shift) | (value & self.mask()) << self.shift
    }
}

/// Groups of trees that stay unsure for a smaller order while larger ones are looked for; with more it is forgotten that the
/// smaller one was known.
const MOST_UNSURE: u32 = 3;

/// The trees in which something may have come free since they were looked at, in groups: those whose numbers leave the same rest.
/// Of a table of up to 1 GiB each tree is a group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Unsure(
    /// The groups again and again, so that a tree's bit is where it is asked for.
    u64,
);

impl Unsure {
    const GROUPS: u32 = 16;
    pub(crate) const NONE: Self = Self(0);
    pub(crate) const ALL: Self = Self(u64::MAX);

    const fn of(groups: u64) -> Self {
        const AGAIN: u64 = u64::MAX / ((1 << Unsure::GROUPS) - 1);
        Self((groups & ((1 << Self::GROUPS) - 1)) * AGAIN)
    }

    #[inline]
    pub(crate) const fn has(self, tree: u32) -> bool {
        self.0 >> (tree % u64::BITS) & 1 != 0
    }

    pub(crate) const fn with(self, tree: u32) -> Self {
        Self(self.0 | Self::of(1 << (tree % Self::GROUPS)).0)
    }
}

/// Whether what the host holds stays held for as long as its return epoch is this one.
#[inline]
pub(crate) const fn held_stays(epoch: u64) -> bool {
    epoch & HELD_STAYS != 0
}

/// As much of an epoch as the word has room for. It is not the same again after as many returns as are usual in one go: a power
/// of two.
const fn short(epoch: u64) -> u64 {
    (epoch ^ epoch >> EPOCH.bits) & EPOCH.mask()
}

/// The last refusal of a table. Its word is not trusted before [`forget`](Self::forget).
#[derive(Clone, Copy)]
pub(crate) struct Refusal<'a>(&'a AtomicU64);

/// A refusal that is being found out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Looking {
    number: u64,
    order: u64,
    /// Where to look.
    pub(crate) unsure: Unsure,
}

/// The word of a refusal. Orders are past the largest where there is none.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Word(u64);

impl Word {
    const fn order(self, field: Field) -> u64 {
        field.of(self.0).wrapping_sub(1)
    }

    const fn with_order(self, field: Field, order: u64) -> Self {
        self.with(field, if order > MAX { 0 } else { order + 1 })
    }

    const fn with(self, field: Field, value: u64) -> Self {
        Self(field.set(self.0, value))
    }

    const fn is_of(self, epoch: u64) -> bool {
        EPOCH.of(self.0) == short(epoch)
    }

    const fn is_doubted(self) -> bool {
        DOUBTED.of(self.0) != 0
    }

    /// Whether a block of `largest` contradicts a refusal, or a look.
    fn is_contradicted_by(self, largest: u64) -> bool {
        self.order(REFUSED).min(self.order(LOOKING)) <= largest
    }

    /// The trees that may have a block of `order`.
    const fn unsure(self, order: u64) -> Unsure {
        if self.order(KNOWN) <= order { Unsure::of(UNSURE.of(self.0)) } else { Unsure::ALL }
    }

    /// The same where a tree may have a block of `largest`.
    const fn unsure_of(self, tree: u32, largest: u64) -> Self {
        let known = self.order(KNOWN) <= largest;
        if known { self.with(UNSURE, self.unsure(largest).with(tree).0) } else { self }
    }

    /// The next number: nothing is looked for.
    const fn next(self) -> Self {
        self.with(NUMBER, NUMBER.of(self.0).wrapping_add(1)).with(LOOKING, 0).with(DOUBTED, 0)
    }

    /// The next number, and nothing of what was said so far.
    const fn forgotten(self) -> Self {
        self.next().with(REFUSED, 0).with(KNOWN, 0)
    }

    /// Whether nothing is said.
    fn is_blank(self) -> bool {
        [REFUSED, LOOKING, KNOWN].into_iter().all(|field| field.of(self.0) == 0)
    }

    /// After a block of `largest` came free in a tree; `None` if that changes nothing.
    fn without(self, tree: u32, largest: u64) -> Option<Self> {
        let noted = self.unsure_of(tree, largest);
        let next = if self.is_contradicted_by(largest) {
            let refused = match self.order(REFUSED) {
                refused if refused > largest => refused,
                _ => largest + 1,
            };
            noted.next().with_order(REFUSED, refused)
        } else {
            noted
        };
        (next != self).then_some(next)
    }

    /// After a huge frame came free beside one that the host holds: order 10 is not refused for good, least of all because of
    /// this tree; `None` if it is not anyway. For all smaller orders it is a block, and what was said of these is not to go on
    /// as a refusal of order 10.
    fn without_pairs(self, tree: u32) -> Option<Self> {
        let (refused, looking) = (self.order(REFUSED), self.order(LOOKING));
        if refused.min(looking) < MAX {
            return self.without(tree, MAX);
        }
        let noted = self.unsure_of(tree, MAX);
        let next = match (refused == MAX, looking == MAX) {
            (true, false) => noted.next().with(REFUSED, 0),
            (_, true) => noted.with(DOUBTED, 1).with(REFUSED, 0),
            (false, false) => noted,
        };
        (next != self).then_some(next)
    }

    /// The same word after a look for `order` that left these trees unsure.
    fn concluded(self, order: u64, unsure: Unsure) -> Self {
        if self.is_doubted() && order == MAX {
            return self;
        }
        let known = self.order(KNOWN);
        let is_sharper = order <= known || UNSURE.of(self.0).count_ones() > MOST_UNSURE;
        let known = if is_sharper { self.with_order(KNOWN, order).with(UNSURE, unsure.0) } else { self };
        if unsure != Unsure::NONE {
            return known;
        }
        // That of a smaller block says ours as well.
        let refusing = known.with_order(REFUSED, order.min(self.order(REFUSED)));
        if self.order(LOOKING) == order { refusing.with(LOOKING, 0) } else { refusing }
    }
}

impl<'a> Refusal<'a> {
    pub(crate) fn new(word: &'a AtomicU64) -> Self {
        Self(word)
    }

    fn word(self) -> Word {
        Word(self.0.load(Ordering::Relaxed))
    }

    /// Changes the word if `step` says so; the word afterwards.
    fn change(self, step: impl Fn(Word) -> Option<Word>) -> Option<Word> {
        let mut word = self.word();
        loop {
            let next = step(word)?;
            // Release: the looks come before it.
            match self.0.compare_exchange(word.0, next.0, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return Some(next),
                Err(seen) => word = Word(seen),
            }
        }
    }

    /// Nothing was refused, and no tree is known. Looks on their way come to nothing.
    pub(crate) fn forget(self) {
        self.change(|word| Some(word.forgotten()));
    }

    /// The same for what was refused before the host returned memory: it is not believed anyway, until the epoch's few bits are
    /// the same again.
    pub(crate) fn forget_before(self, epoch: u64) {
        self.change(|word| (!word.is_of(epoch) && !word.is_blank()).then(|| word.forgotten()));
    }

    /// The trees that may have a block of `order`; none if it was refused, and nothing was freed since.
    #[inline]
    pub(crate) fn unsure(self, order: Order, epoch: u64) -> Option<Unsure> {
        let (word, order) = (Word(self.0.load(Ordering::Acquire)), u64::from(order.get()));
        match word {
            word if !word.is_of(epoch) => Some(Unsure::ALL),
            word => (word.order(REFUSED) > order).then(|| word.unsure(order)),
        }
    }

    /// Writes down that a block of `order` is about to be refused; then comes the look at every tree that is unsure.
    pub(crate) fn begin(self, order: Order, epoch: u64) -> Looking {
        let order = u64::from(order.get());
        let begun = self.change(|word| {
            Some(match word {
                word if !word.is_of(epoch) => word.forgotten().with(EPOCH, short(epoch)).with_order(LOOKING, order),
                word if word.order(LOOKING) <= order => word,
                word => word.with_order(LOOKING, order),
            })
        });
        change_before_looks();
        let word = begun.unwrap_or(Word(0));
        Looking { number: NUMBER.of(word.0), order, unsure: word.unsure(order) }
    }

    /// The look is over: whether the refusal stands. If it left no tree `unsure`, others may believe it.
    pub(crate) fn conclude(self, looking: Looking, unsure: Unsure) -> bool {
        let concluded = self.change(|word| looking.stands_in(word).then(|| word.concluded(looking.order, unsure)));
        concluded.is_some()
    }

    /// Whether [`doubt_pairs`](Self::doubt_pairs) would change anything.
    #[cold]
    #[inline(never)]
    pub(crate) fn has_undoubted_pairs(self, tree: u32) -> bool {
        self.word().without_pairs(tree).is_some()
    }

    /// A huge frame came free in a tree whose other half the host holds, which may give it back without a word: that order 10
    /// was refused is forgotten, and if it is refused at this moment that is not remembered. Nothing came free that is enough, so
    /// no look begins anew.
    #[cold]
    pub(crate) fn doubt_pairs(self, tree: u32) {
        self.change(|word| word.without_pairs(tree));
    }

    /// A block of `largest` may be free in a tree, and its hint is about to say so, or says so now.
    #[inline]
    pub(crate) fn withdraw(self, tree: u32, largest: Order) {
        let (word, largest) = (self.word(), u64::from(largest.get()));
        if word.is_contradicted_by(largest) || word.order(KNOWN) <= largest && !word.unsure(largest).has(tree) {
            self.withdraw_up_to(tree, largest);
        }
    }

    #[cold]
    #[inline(never)]
    fn withdraw_up_to(self, tree: u32, largest: u64) {
        self.change(|word| word.without(tree, largest));
    }
}

impl Looking {
    /// Whether nothing that fits came free since it began.
    fn stands_in(self, word: Word) -> bool {
        NUMBER.of(word.0) == self.number && word.is_contradicted_by(self.order)
    }
}
