//! The tenant's view of a table: [`Tenant`], shared by all CPUs of a guest, and what it gives out.
//!
//! A tenant goes straight to the lower level; a CPU that allocates often takes a
//! [handle](crate::Cpu), which remembers rows of frames in memory of its own. Where to look is the
//! business of `search`; whatever hints miss is found before "out of memory" is said.

pub use crate::block::{Allocation, Block, EvictedBlock};
use crate::class::{Class, Policy};
use crate::entries::Want;
use crate::error::{AllocError, FreeError, Part, TableError, check_len};
use crate::hint::{Trees, bitmap_words, huge_of, tree_of, tree_range};
use crate::lower::Lower;
use crate::refusal::{Refusal, held_stays};
use crate::spot::Place;
use crate::sync::{AtomicU16, AtomicU64, Ordering, change_before_looks};
use crate::taken::Miss;
use crate::violation::Violation;
use core::fmt;
use shared_layout::{FrameId, HugeEntry, HugeId, HugeRange, Order, TableLayout};

/// The tenant side of one table; share it between CPUs.
#[derive(Clone, Copy)]
pub struct Tenant<'a> {
    pub(crate) lower: Lower<'a>,
    pub(crate) trees: Trees<'a>,
    pub(crate) return_epoch: &'a AtomicU64,
    pub(crate) refusal: Refusal<'a>,
    /// Where allocations without a handle come from.
    pub(crate) place: Place,
    /// Handles that came and went.
    pub(crate) moves: &'a AtomicU64,
    pub(crate) policy: Policy,
}

impl<'a> Tenant<'a> {
    /// `AtomicU16`s that a tenant of `huge_frames` needs for its hints.
    #[must_use]
    pub const fn hint_len(huge_frames: u32) -> usize {
        TableLayout::hint_words(huge_frames) as usize
    }

    /// `AtomicU64`s that it needs for its summary.
    #[must_use]
    pub const fn summary_len(huge_frames: u32) -> usize {
        TableLayout::summary_words(huge_frames) as usize
    }

    /// A tenant over slices: one of `entries` and eight `rows` a huge frame (none, or up to
    /// [`MAX_HUGE_FRAMES`](crate::MAX_HUGE_FRAMES)), [`Self::hint_len`] `hints`, [`Self::summary_len`]
    /// words of `summary`. It writes nothing, so it can join others at work; the first party calls
    /// [`recount`](Self::recount) before the first allocation, whatever `hints` and `summary`
    /// contain. [`Table`](crate::Table) lays all of this out in one region and recounts itself.
    ///
    /// # Errors
    /// The first part that does not fit.
    pub fn new(
        entries: &'a [AtomicU16],
        rows: &'a [AtomicU64],
        hints: &'a [AtomicU16],
        summary: &'a [AtomicU64],
        return_epoch: &'a AtomicU64,
    ) -> Result<Self, TableError> {
        let lower = Lower::new(entries, rows)?;
        let trees = TableLayout::trees(lower.huge_frames());
        let needed = Self::summary_len(lower.huge_frames());
        check_len(Part::Hints, hints.len(), Self::hint_len(lower.huge_frames()))?;
        check_len(Part::Summary, summary.len(), needed)?;
        let (bitmaps, words) = summary.split_at(bitmap_words(trees));
        let trees = Trees::new(hints, bitmaps, trees)?;
        let [moves, refusal, ..] = words else {
            return Err(TableError::Length { part: Part::Summary, found: summary.len(), needed });
        };
        let (refusal, place) = (Refusal::new(refusal), Place::BY_STACK);
        Ok(Self { lower, trees, return_epoch, refusal, place, moves, policy: Policy::DEFAULT })
    }

    /// The same tenant with another policy; all CPUs of a guest should use the same.
    #[must_use]
    pub fn with_policy(self, policy: Policy) -> Self {
        Self { policy, ..self }
    }

    /// The same tenant for callers at one place, such as a CPU, by its number. Allocations without a handle
    /// begin at different ends of memory for different places and keep out of each other's way; by
    /// default a place is told by the stack that the caller runs on.
    #[must_use]
    pub fn at_place(self, place: usize) -> Self {
        Self { place: Place::numbered(place), ..self }
    }

    /// Huge frames in the table.
    #[must_use]
    pub fn huge_frames(&self) -> u32 {
        self.lower.huge_frames()
    }

    /// The host's count of its returns: another one after frames that it held came back, and, where the tenant installs
    /// by itself, also before those of a soft reclaim do. It may have the bit [`HELD_STAYS`](crate::HELD_STAYS).
    #[must_use]
    pub fn return_epoch(&self) -> u64 {
        self.return_epoch.load(Ordering::Acquire)
    }

    /// The current contents of a huge frame's entry; `None` beyond the table.
    #[must_use]
    pub fn entry(&self, huge: HugeId) -> Option<HugeEntry> {
        self.lower.entry(huge)
    }

    /// Allocates the block of `order` that starts at `frame`.
    ///
    /// # Errors
    /// Which part of the request does not fit, or that the block is not free.
    pub fn alloc_at(&self, frame: FrameId, order: Order) -> Result<Allocation, AllocError> {
        let taken = self.lower.take_at(frame, order).map_err(|(error, miss)| {
            if let (Miss::Undone, Some(huge)) = (miss, frame.huge()) {
                self.note_undone(huge);
            }
            error
        })?;
        if let Some(tree) = frame.huge().map(tree_of) {
            // The first block of a tree gives it its class, also one that chose its place.
            let first = |class| if class == Class::FREE { Class::of(order) } else { class };
            self.recount_tree_as(tree, |hint| hint.with_class(first(hint.class())));
        }
        Ok(Allocation::new(taken, order))
    }

    /// Allocates exactly `frames` base frames from `first` on, in the largest blocks that fit: for
    /// holes in RAM, a boot image, a last huge frame that is not whole. All of them or none.
    ///
    /// [`free`](Self::free) takes it back in parts: whole huge frames with order 9, the frames around
    /// them with smaller ones.
    ///
    /// # Errors
    /// Why the first block that failed could not be allocated. `Ok` says nothing about the memory
    /// behind evicted frames.
    pub fn reserve(&self, first: FrameId, frames: u64) -> Result<(), AllocError> {
        for (frame, order) in blocks(first, frames) {
            if let Err(error) = self.alloc_at(frame, order) {
                // A stretch that ends where a block does is cut up the same way.
                for (frame, order) in blocks(first, frame.0 - first.0) {
                    // Ours since a moment ago: nobody else frees it.
                    let _ = self.free(frame, order);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Frees a block without a handle.
    ///
    /// # Errors
    /// The error in the block; nothing changed unless [`FreeError::Corrupt`].
    #[inline]
    pub fn free(&self, frame: FrameId, order: Order) -> Result<(), FreeError> {
        if order <= Order::ROW
            && let Some(after) = self.lower.give_in_row(frame, order)
        {
            self.note_free(huge_of(frame), after, order.frames());
            return Ok(());
        }
        let after = self.give(frame, order)?;
        if let Some(huge) = frame.huge() {
            self.note_free(huge, after, order.frames());
        }
        Ok(())
    }

    /// Gives a block back; the caller makes it known. A part of a block, which a wrong free gives, is known already.
    pub(crate) fn give(&self, frame: FrameId, order: Order) -> Result<HugeEntry, FreeError> {
        self.lower.give(frame, order).inspect_err(|error| {
            if let (FreeError::NotAllocated(..), Some(huge)) = (error, frame.huge()) {
                self.note_undone(huge);
            }
        })
    }

    /// Gives some frames of a row back; false if there is no such row or somebody broke its entry.
    #[inline]
    pub(crate) fn give_row_back(&self, first: FrameId, bits: u64) -> bool {
        let Some(huge) = first.huge() else { return false };
        let Some(after) = self.lower.give_row(first, bits) else { return false };
        self.note_free(huge, after, u64::from(bits.count_ones()));
        true
    }

    /// Forgets all hints and counts them from the entries: at boot, also over memory that was used
    /// before, and when frames came back behind our back. Trees keep their class; that a CPU
    /// reserved them is forgotten, so while CPUs are at work two of them may meet in one.
    pub fn recount(&self) {
        self.forget();
        for tree in 0..self.trees.len() {
            self.recount_tree_as(tree, |hint| hint.reserved(false).at_home(false));
        }
        self.moves.fetch_add(1, Ordering::Release);
    }

    /// Checks every entry against its bitfield; exact when nobody is at work. It holds whatever
    /// callers do, wrong frees included: frames may then have two owners, but the table stays sound.
    ///
    /// # Errors
    /// The first huge frame whose entry is invalid or contradicts its bits.
    pub fn validate(&self) -> Result<(), Violation> {
        let violation = self.lower.all().iter().find_map(|huge| self.lower.violation(huge));
        violation.map_or(Ok(()), Err)
    }

    /// Whether every huge frame of a range, of which the caller owns a part, is backed by memory; false
    /// beyond the table. [`EvictedBlock::confirm`] asks this for a block.
    #[must_use]
    pub fn is_installed(&self, range: HugeRange) -> bool {
        !self.is_evicted(range)
    }

    /// Whether one of a block's huge frames is not backed.
    pub(crate) fn is_evicted(&self, range: HugeRange) -> bool {
        range.iter().any(|huge| self.lower.is_evicted(huge))
    }

    /// Counts all hints over memory that somebody used before. What a tree was for is not known: small
    /// blocks count as movable.
    pub(crate) fn classify(&self) {
        let is_small = |entry: HugeEntry| !entry.is_all_free() && !entry.is_huge() && !entry.is_held();
        for tree in 0..self.trees.len() {
            let small = self.lower.entries(tree_range(tree)).any(is_small);
            let class = if small { Class::MOVABLE } else { Class::HUGE };
            self.recount_tree_as(tree, |hint| hint.reserved(false).at_home(false).with_class(class));
        }
        self.moves.fetch_add(1, Ordering::Release);
    }

    /// The contents of the hints' words are no longer trusted.
    pub(crate) fn forget(&self) {
        self.refusal.forget();
        self.trees.unlist_all();
    }

    /// Whether a block of `order` was refused, and none came free since.
    pub(crate) fn is_refused(&self, order: Order) -> bool {
        self.refusal.unsure(order, self.return_epoch.load(Ordering::Acquire)).is_none()
    }

    /// Frames came free in a huge frame: sees to it that its tree's hint promises them. True if it did not.
    #[inline]
    pub(crate) fn note_free(&self, huge: HugeId, after: HugeEntry, frames: u64) -> bool {
        self.is_news(huge, after, frames) && self.note_news(huge, after)
    }

    /// Whether it does not, or something else may follow from them.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "frees of huge frames spend a tenth of their time on the call")]
    pub(crate) fn is_news(&self, huge: HugeId, after: HugeEntry, frames: u64) -> bool {
        let tree = tree_of(huge);
        // The entry was changed before; see `hint`.
        change_before_looks();
        let hint = self.trees.get(tree);
        if after.has_room() {
            // A count may find that by now there is more than a little.
            return hint.is_outdone_by(after) || hint.has_few() && u64::from(after.free() % ENOUGH) < frames;
        }
        let promised = hint.promises(Want::Installed) || after.is_evicted() && hint.promises(Want::Free);
        !promised || !hint.has_pair() && self.may_pair(HugeId(huge.0 ^ 1))
    }

    pub(crate) fn is_free(&self, huge: HugeId) -> bool {
        self.lower.entry(huge).is_some_and(HugeEntry::is_all_free)
    }

    /// Whether somebody has to hear that the other half of this huge frame came free: it is free as well, or the host holds it,
    /// may give it back without a word, and order 10 was refused.
    #[inline]
    fn may_pair(&self, huge: HugeId) -> bool {
        let is_refused = || self.refusal.has_undoubted_pairs(tree_of(huge));
        let (half, may_come_back) = self.half(huge);
        half.is_some_and(HugeEntry::is_all_free) || may_come_back && is_refused()
    }

    /// An entry, and whether the host holds it and may give it back without a new epoch.
    #[inline]
    fn half(&self, huge: HugeId) -> (Option<HugeEntry>, bool) {
        // In this order: what is held then is so until there is a later epoch than that.
        let epoch = self.return_epoch();
        let entry = self.lower.entry(huge);
        (entry, entry.is_some_and(HugeEntry::is_held) && !held_stays(epoch))
    }

    /// Promises them; true unless they were promised before.
    #[cold]
    #[inline(never)]
    fn note_news(&self, huge: HugeId, after: HugeEntry) -> bool {
        let tree = tree_of(huge);
        if after.has_room() {
            let (old, new) = self.change_hint(tree, Order::BASE, |hint| hint.with_room(after));
            if old == new {
                // There was little room.
                self.recount_tree(tree);
            }
        } else if after.is_all_free() {
            let (half, is_doubtful) = self.half(HugeId(huge.0 ^ 1));
            if is_doubtful {
                self.refusal.doubt_pairs(tree);
            }
            // What the host may make whole is not to stay refused.
            let least = if is_doubtful { Order::MAX } else { Order::BASE };
            let pair = half.is_some_and(HugeEntry::is_all_free);
            let (old, new) = self.change_hint(tree, least, |hint| hint.with_free(!after.is_evicted(), pair));
            return old != new;
        }
        true
    }
}

/// Free frames in a huge frame, or a multiple of them, at which a tree that had little room is counted.
const ENOUGH: u16 = 32;

/// The largest aligned blocks of a stretch of memory, from its start.
fn blocks(first: FrameId, frames: u64) -> impl Iterator<Item = (FrameId, Order)> {
    let (mut at, end) = (first.0, first.0.saturating_add(frames));
    core::iter::from_fn(move || {
        let largest = (end - at).checked_ilog2()?.min(at.trailing_zeros()).min(Order::MAX.get().into());
        let block = (FrameId(at), Order::new(largest as u8)?);
        at += block.1.frames();
        Some(block)
    })
}

impl EvictedBlock {
    /// Looks whether the host cleared `evicted` on every huge frame of the block.
    ///
    /// # Errors
    /// The block itself, if the host did not.
    #[inline]
    pub fn confirm(self, tenant: &Tenant<'_>) -> Result<Block, Self> {
        if tenant.is_evicted(self.huge_range()) { Err(self) } else { Ok(self.installed()) }
    }
}

impl EvictedBlock {
    /// In a process that owns its memory: the first touch brings it, so the block is ready as soon as its huge
    /// frames say so. The reclaimer must [know such a tenant](crate::host::Installer::Tenant).
    #[must_use]
    #[inline]
    pub fn self_install(self, tenant: &Tenant<'_>) -> Block {
        for huge in self.huge_range() {
            tenant.lower.self_install(huge);
        }
        self.installed()
    }
}

impl fmt::Debug for Tenant<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tenant").field("huge_frames", &self.huge_frames()).finish_non_exhaustive()
    }
}
