//! The tenant's view of a table: [`Tenant`], shared by all CPUs of a guest, and what it gives out.
//!
//! A tenant goes straight to the lower level; a CPU that allocates often takes a
//! [handle](crate::Cpu), which remembers rows of frames in memory of its own. Where to look is the
//! business of `search`; whatever hints miss is found before "out of memory" is said.

use crate::class::{Class, Policy};
use crate::cpu::Cpu;
use crate::error::{AllocError, FreeError};
use crate::hint::{TreeHint, Trees, Want, bitmap_words};
use crate::lower::{Lower, ROWS, Taken};
use crate::search::Spot;
use crate::sync::{AtomicU16, AtomicU64, Ordering};
use crate::violation::Violation;
use shared_layout::header::{HUGE_PER_TREE, tenant_words};
use shared_layout::{ControlWord, FrameId, HugeEntry, HugeId, Layout, Order};

/// A block that has memory behind it and may be touched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Block {
    frame: FrameId,
    order: Order,
}

impl Block {
    /// Its first frame.
    #[must_use]
    pub fn frame(&self) -> FrameId {
        self.frame
    }

    /// Its size.
    #[must_use]
    pub fn order(&self) -> Order {
        self.order
    }
}

/// A block that the caller owns but must not touch: it gives no address until the host installed
/// all of its huge frames.
#[must_use = "an evicted block is owned: install and confirm it, or free it"]
#[derive(PartialEq, Eq, Debug)]
pub struct EvictedBlock {
    block: Block,
}

impl EvictedBlock {
    /// The first huge frame to ask the host for.
    #[must_use]
    pub fn first_huge(&self) -> HugeId {
        // A block comes out of the lower level, whose frames all have a huge frame.
        HugeId((self.block.frame.0 / Order::HUGE.frames()) as u32)
    }

    /// How many huge frames to ask for: 1, or 2 for order 10.
    #[must_use]
    pub fn huge_frames(&self) -> u32 {
        self.block.order.huge_frames()
    }

    /// Looks whether the host cleared `evicted` on every huge frame of the block.
    ///
    /// # Errors
    /// The block itself, if the host did not.
    pub fn confirm(self, tenant: &Tenant<'_>) -> Result<Block, Self> {
        if tenant.is_evicted(self.block.frame, self.block.order) { Err(self) } else { Ok(self.block) }
    }

    /// Gives up on it: what to pass to a `free`.
    #[must_use]
    pub fn release(self) -> (FrameId, Order) {
        (self.block.frame, self.block.order)
    }
}

/// A block that was allocated.
#[must_use]
#[derive(PartialEq, Eq, Debug)]
pub enum Allocation {
    /// Usable at once.
    Ready(Block),
    /// The host must install it first.
    Evicted(EvictedBlock),
}

impl Allocation {
    pub(crate) fn new(taken: Taken, order: Order) -> Self {
        let block = Block { frame: taken.frame, order };
        if taken.evicted { Self::Evicted(EvictedBlock { block }) } else { Self::Ready(block) }
    }

    /// The block's first frame and order, whatever is behind it.
    #[must_use]
    pub fn position(&self) -> (FrameId, Order) {
        match self {
            Self::Ready(block) | Self::Evicted(EvictedBlock { block }) => (block.frame, block.order),
        }
    }
}

/// The tenant side of one table; share it between CPUs.
#[derive(Clone, Copy)]
pub struct Tenant<'a> {
    pub(crate) lower: Lower<'a>,
    pub(crate) trees: Trees<'a>,
    pub(crate) return_epoch: &'a AtomicU64,
    /// Where allocations without a handle look first: a [`Spot`], packed.
    pub(crate) spot: &'a AtomicU64,
    /// Handles made so far: each begins somewhere else.
    handles: &'a AtomicU64,
    pub(crate) policy: Policy,
}

impl<'a> Tenant<'a> {
    /// `AtomicU16`s that a tenant of `huge_frames` needs for its hints.
    #[must_use]
    pub const fn hint_len(huge_frames: u32) -> usize {
        huge_frames.div_ceil(HUGE_PER_TREE) as usize
    }

    /// `AtomicU64`s that it needs for its summary.
    #[must_use]
    pub const fn summary_len(huge_frames: u32) -> usize {
        // Whole cache lines, so that hints can follow.
        (bitmap_words(Self::hint_len(huge_frames)) + 2).next_multiple_of(8)
    }

    /// A tenant over slices: one of `entries` and eight `rows` a huge frame, [`Self::hint_len`]
    /// `hints`, [`Self::summary_len`] words of `summary`. `None` if a length does not fit or there
    /// are more than [`MAX_HUGE_FRAMES`](shared_layout::header::MAX_HUGE_FRAMES). Call [`recount`](Self::recount) once before the
    /// first allocation, whatever `hints` and `summary` contain.
    #[must_use]
    pub fn new(
        entries: &'a [AtomicU16],
        rows: &'a [AtomicU64],
        hints: &'a [AtomicU16],
        summary: &'a [AtomicU64],
        return_epoch: &'a AtomicU64,
    ) -> Option<Self> {
        let lower = Lower::new(entries, rows)?;
        if hints.len() != Self::hint_len(lower.huge_frames()) {
            return None;
        }
        if summary.len() != Self::summary_len(lower.huge_frames()) {
            return None;
        }
        let (bitmaps, words) = summary.split_at(bitmap_words(hints.len()));
        let trees = Trees::new(hints, bitmaps)?;
        let [spot, handles, ..] = words else { return None };
        Some(Self { lower, trees, return_epoch, spot, handles, policy: Policy::DEFAULT })
    }

    /// A tenant over a shared region.
    ///
    /// # Safety
    /// `layout` must come from [`Layout::new`] or a checked header, unchanged, and
    /// `base` must be page aligned and point to `layout.total` bytes that stay mapped for `'a` and
    /// that every party (this one, other CPUs, the host) accesses as atomics only.
    #[must_use]
    pub unsafe fn from_raw(base: *mut u8, layout: &Layout) -> Self {
        let huge = layout.huge_frames as usize;
        let hints = Self::hint_len(layout.huge_frames);
        let summary = Self::summary_len(layout.huge_frames);
        // The layout reserves what we use: the summary first, then the hints.
        debug_assert!(summary as u64 * 8 + hints as u64 * 2 <= layout.tenant_bytes);
        debug_assert_eq!(summary as u64, tenant_words(layout.huge_frames));
        // SAFETY: by the caller's contract; `Layout` keeps the parts inside `total`, page aligned
        // and disjoint, and all bit patterns are valid atomics.
        let tenant = unsafe {
            let at = |offset: u64| base.add(offset as usize);
            Self::new(
                core::slice::from_raw_parts(at(layout.entries).cast(), huge),
                core::slice::from_raw_parts(at(layout.bitfields).cast(), huge * ROWS),
                core::slice::from_raw_parts(at(layout.tenant + summary as u64 * 8).cast(), hints),
                core::slice::from_raw_parts(at(layout.tenant).cast(), summary),
                &*at(ControlWord::ReturnEpoch.offset()).cast(),
            )
        };
        tenant.expect("all lengths were computed from one number, at most MAX_HUGE_FRAMES")
    }

    /// The same tenant with another policy; all CPUs of a guest should use the same.
    #[must_use]
    pub fn with_policy(self, policy: Policy) -> Self {
        Self { policy, ..self }
    }

    /// Huge frames in the table.
    #[must_use]
    pub fn huge_frames(&self) -> u32 {
        self.lower.huge_frames()
    }

    /// What a huge frame's entry says now; `None` beyond the table.
    #[must_use]
    pub fn entry(&self, huge: HugeId) -> Option<HugeEntry> {
        self.lower.entry(huge)
    }

    /// A handle for one CPU. Any number may exist; each works best in one CPU's hands.
    #[must_use]
    pub fn cpu(&self) -> Cpu<'_> {
        Cpu::new(*self)
    }

    /// Allocates a block of `order` without a handle, for callers that have none.
    ///
    /// # Errors
    /// [`AllocError::OutOfMemory`] after a pass over all entries found none.
    pub fn alloc(&self, order: Order) -> Result<Allocation, AllocError> {
        let packed = self.spot.load(Ordering::Relaxed);
        let mut spot = Spot::unpack(packed);
        let taken = self.take(&mut spot, order, Class::of(order), false);
        // Others may have moved it meanwhile; theirs or ours, it is only a place to look.
        if spot.pack() != packed {
            self.spot.store(spot.pack(), Ordering::Relaxed);
        }
        taken.map(|taken| Allocation::new(taken, order)).ok_or(AllocError::OutOfMemory(order))
    }

    /// Allocates the block of `order` that starts at `frame`.
    ///
    /// # Errors
    /// Which part of the request does not fit, or that the block is not free.
    pub fn alloc_at(&self, frame: FrameId, order: Order) -> Result<Allocation, AllocError> {
        let taken = self.lower.take_at(frame, order)?;
        if let Some(tree) = frame.huge().map(tree_of) {
            // The first block of a tree gives it its class, also one that chose its place.
            let hint = self.trees.get(tree);
            let class = if hint.class() == Class::FREE { Class::of(order) } else { hint.class() };
            self.recount_tree_as(tree, hint.is_reserved(), class);
        }
        Ok(Allocation::new(taken, order))
    }

    /// Frees a block without a handle.
    ///
    /// # Errors
    /// What is wrong with the block; nothing changed unless [`FreeError::Corrupt`].
    pub fn free(&self, frame: FrameId, order: Order) -> Result<(), FreeError> {
        let after = self.lower.give(frame, order)?;
        if let Some(huge) = frame.huge() {
            self.note_free(huge, after);
        }
        Ok(())
    }

    /// Forgets all hints and counts them from the entries: at boot, also over memory that was used
    /// before, and when frames came back behind our back. Trees keep their class; that a CPU
    /// reserved them is forgotten, so while CPUs are at work two of them may meet in one.
    pub fn recount(&self) {
        self.spot.store(Spot::START.pack(), Ordering::Relaxed);
        self.handles.store(0, Ordering::Relaxed);
        self.trees.unlist_all();
        for tree in 0..self.trees.len() {
            self.recount_tree_as(tree, false, self.trees.get(tree).class());
        }
    }

    /// Checks every entry against its bitfield; exact when nobody is at work. It holds whatever
    /// callers do, wrong frees included: frames may then have two owners, but the table stays sound.
    ///
    /// # Errors
    /// The first huge frame whose entry is invalid or contradicts its bits.
    pub fn validate(&self) -> Result<(), Violation> {
        let mut all = (0..self.huge_frames()).map(HugeId);
        let violation =
            all.find_map(|huge| Violation::of_bits(huge, self.lower.entry(huge)?, self.lower.clear_bits(huge)));
        violation.map_or(Ok(()), Err)
    }

    pub(crate) fn is_evicted(&self, frame: FrameId, order: Order) -> bool {
        let first = (frame.0 / Order::HUGE.frames()) as u32;
        (first..first + order.huge_frames()).any(|i| self.lower.is_evicted(HugeId(i)))
    }

    /// The tree where a new handle begins: however many there are, they are far from each other, so
    /// that neither trees nor the lines of their hints are shared.
    pub(crate) fn next_start(&self) -> u32 {
        /// The golden ratio as a fraction of 2^32: its multiples never crowd.
        const STEP: u32 = 0x9e37_79b9;
        let number = self.handles.fetch_add(1, Ordering::Relaxed) as u32;
        ((u64::from(number.wrapping_mul(STEP)) * u64::from(self.trees.len())) >> 32) as u32
    }

    pub(crate) fn recount_tree(&self, tree: u32) {
        let hint = self.trees.get(tree);
        self.recount_tree_as(tree, hint.is_reserved(), hint.class());
    }

    pub(crate) fn recount_tree_as(&self, tree: u32, reserved: bool, class: Class) {
        let hint = TreeHint::count(self.lower.entries(tree * HUGE_PER_TREE, HUGE_PER_TREE), reserved, class);
        self.trees.set(tree, hint);
    }

    /// Frames came free in a huge frame: is its tree listed for it? True if it was not.
    #[inline]
    pub(crate) fn note_free(&self, huge: HugeId, after: HugeEntry) -> bool {
        let tree = tree_of(huge);
        let hint = self.trees.get(tree);
        let news = if after.has_room() {
            !hint.has_room()
        } else {
            !(hint.promises(Want::Installed) || after.is_evicted() && hint.promises(Want::Free))
        };
        if news {
            self.note_news(tree, hint, after);
        }
        news
    }

    // Not counted: that costs a look at 32 entries, and who searches here will count.
    #[cold]
    #[inline(never)]
    fn note_news(&self, tree: u32, hint: TreeHint, after: HugeEntry) {
        let news = if after.has_room() { hint.with_room() } else { hint.with_free(!after.is_evicted()) };
        self.trees.set(tree, news);
    }
}

#[inline]
pub(crate) const fn tree_of(huge: HugeId) -> u32 {
    huge.0 / HUGE_PER_TREE
}
