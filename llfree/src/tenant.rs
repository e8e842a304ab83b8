//! The tenant's view of a table: allocate and free, by anybody or through a CPU's handle.
//!
//! [`Tenant`] is shared by all CPUs of a guest and goes straight to the lower level. [`Cpu`] is a
//! handle with `&mut self` that one CPU owns: it remembers the row of frames and the huge frame it
//! works in, as plain memory. Handles and hints decide only *where to look*; whatever they miss is
//! found by a pass over the huge entries before "out of memory" is said.

use crate::error::{AllocError, FreeError};
use crate::hint::{TreeHint, Want};
use crate::lower::{Lower, Taken, TakenRow};
use crate::stats::Stats;
use crate::sync::{AtomicU16, AtomicU64, Ordering};
use shared_layout::header::HUGE_PER_TREE;
use shared_layout::{ControlWord, FrameId, HugeEntry, HugeId, Layout, Order};

/// Trees with room in used frames that a search tries before it opens a fresh huge frame:
/// with memory badly fragmented for an order, each such tree costs a look at all its rows.
const PARTIAL_TREES: u32 = 8;

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
    fn new(taken: Taken, order: Order) -> Self {
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
    lower: Lower<'a>,
    hints: &'a [AtomicU16],
    return_epoch: &'a AtomicU64,
}

impl<'a> Tenant<'a> {
    /// A tenant over slices: eight `rows` and one of `entries` a huge frame, one of `hints` per
    /// [`HUGE_PER_TREE`]. `None` if the lengths do not fit. Call [`recount`](Self::recount) once
    /// before the first allocation.
    #[must_use]
    pub fn new(
        entries: &'a [AtomicU16],
        rows: &'a [AtomicU64],
        hints: &'a [AtomicU16],
        return_epoch: &'a AtomicU64,
    ) -> Option<Self> {
        let lower = Lower::new(entries, rows)?;
        (hints.len() == entries.len().div_ceil(HUGE_PER_TREE as usize)).then_some(Self { lower, hints, return_epoch })
    }

    /// A tenant over a shared region.
    ///
    /// # Safety
    /// `base` must be page aligned and point to `layout.total` bytes that stay mapped for `'a` and
    /// that every party (this one, other CPUs, the host) accesses as atomics only.
    #[must_use]
    pub unsafe fn from_raw(base: *mut u8, layout: &Layout) -> Self {
        let huge = layout.huge_frames as usize;
        let trees = huge.div_ceil(HUGE_PER_TREE as usize);
        // SAFETY: by the caller's contract; `Layout` keeps the parts inside `total`, page aligned
        // and disjoint, and all bit patterns are valid atomics.
        unsafe {
            let at = |offset: u64| base.add(offset as usize);
            Self {
                lower: Lower::new(
                    core::slice::from_raw_parts(at(layout.entries).cast(), huge),
                    core::slice::from_raw_parts(at(layout.bitfields).cast(), huge * crate::lower::ROWS),
                )
                .expect("the lengths were computed from one number, at most MAX_HUGE_FRAMES"),
                hints: core::slice::from_raw_parts(at(layout.tenant).cast(), trees),
                return_epoch: &*at(ControlWord::ReturnEpoch.offset()).cast(),
            }
        }
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
        Cpu {
            tenant: *self,
            row: EMPTY_ROW,
            small: None,
            huge_tree: 0,
            epoch: self.return_epoch.load(Ordering::Acquire),
        }
    }

    /// Allocates the block of `order` that starts at `frame`.
    ///
    /// # Errors
    /// Which part of the request does not fit, or that the block is not free.
    pub fn alloc_at(&self, frame: FrameId, order: Order) -> Result<Allocation, AllocError> {
        let taken = self.lower.take_at(frame, order)?;
        if let Some(huge) = frame.huge() {
            self.recount_tree(tree_of(huge));
        }
        Ok(Allocation::new(taken, order))
    }

    /// Frees a block without a handle.
    ///
    /// # Errors
    /// What is wrong with the block; nothing changed unless [`FreeError::Corrupt`].
    pub fn free(&self, frame: FrameId, order: Order) -> Result<(), FreeError> {
        let after = self.lower.give(frame, order)?;
        self.note_free(frame, after);
        Ok(())
    }

    /// Counts the table from its entries: exact when nobody is at work. Frames in the caches of
    /// handles count as allocated; [`Cpu::drain`] gives them back.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats::count((0..self.huge_frames()).filter_map(|i| self.lower.entry(HugeId(i))))
    }

    /// Recounts all hints from the entries: at boot, and when frames came back behind our back.
    pub fn recount(&self) {
        for tree in 0..self.trees() {
            self.recount_tree(tree);
        }
    }

    /// Checks every entry against its bitfield; call it when nobody is at work.
    ///
    /// # Errors
    /// The first huge frame whose entry is invalid or whose bits contradict its counter.
    pub fn validate(&self) -> Result<(), HugeId> {
        for huge in (0..self.huge_frames()).map(HugeId) {
            let Some(entry) = self.lower.entry(huge) else { return Err(huge) };
            // Bits of held frames and of huge blocks stay clear.
            let expected = if entry.is_huge() || entry.is_held() { 512 } else { u32::from(entry.free()) };
            if !entry.is_valid() || self.lower.clear_bits(huge) != expected {
                return Err(huge);
            }
        }
        Ok(())
    }

    fn is_evicted(&self, frame: FrameId, order: Order) -> bool {
        let first = (frame.0 / Order::HUGE.frames()) as u32;
        // Acquire (in `transition`, by the host) is not needed here: the host's reply to the
        // install call came after it cleared the bit, and nothing sets it while we own a frame.
        (first..first + order.huge_frames()).any(|i| self.lower.entry(HugeId(i)).is_none_or(HugeEntry::is_evicted))
    }

    fn trees(&self) -> u32 {
        self.hints.len() as u32
    }

    fn hint(&self, tree: u32) -> TreeHint {
        self.hints.get(tree as usize).map_or(TreeHint::default(), |h| TreeHint::from_bits(h.load(Ordering::Relaxed)))
    }

    fn set_hint(&self, tree: u32, hint: TreeHint) {
        if let Some(word) = self.hints.get(tree as usize) {
            // A plain store: a lost update costs a look at the wrong place, nothing else.
            word.store(hint.bits(), Ordering::Relaxed);
        }
    }

    fn recount_tree(&self, tree: u32) {
        self.recount_tree_as(tree, self.hint(tree).is_reserved());
    }

    fn recount_tree_as(&self, tree: u32, reserved: bool) {
        let entries = self.huge_in(tree).filter_map(|huge| self.lower.entry(huge));
        self.set_hint(tree, TreeHint::count(entries, reserved));
    }

    fn huge_in(&self, tree: u32) -> impl Iterator<Item = HugeId> + use<> {
        let first = tree * HUGE_PER_TREE;
        (first..(first + HUGE_PER_TREE).min(self.huge_frames())).map(HugeId)
    }

    fn note_free(&self, frame: FrameId, after: HugeEntry) {
        let Some(huge) = frame.huge() else { return };
        let tree = tree_of(huge);
        if after.is_all_free() {
            self.recount_tree(tree);
        } else {
            let hint = self.hint(tree);
            if !hint.promises(Want::Partial) {
                self.set_hint(tree, hint.with_partial());
            }
        }
    }
}

fn tree_of(huge: HugeId) -> u32 {
    huge.0 / HUGE_PER_TREE
}

/// No row: it lies beyond every table, so no free ever matches it.
const EMPTY_ROW: TakenRow = TakenRow { first: FrameId(!63), bits: 0, evicted: false };

/// One CPU's handle: its reservation is its own memory, so the fast path has no atomics.
///
/// A row of up to 64 frames is taken at once and served from a register; to everybody else
/// those frames are allocated. [`drain`](Self::drain) (or dropping the handle) gives them back.
pub struct Cpu<'a> {
    tenant: Tenant<'a>,
    row: TakenRow,
    /// The huge frame that small blocks come from.
    small: Option<HugeId>,
    /// Where the last huge frame was found.
    huge_tree: u32,
    /// `return_epoch` when the hints were last believed.
    epoch: u64,
}

impl Cpu<'_> {
    /// Allocates a block of `order`, from this CPU's reservation if it can.
    ///
    /// # Errors
    /// [`AllocError::OutOfMemory`] after a pass over all entries found none.
    pub fn alloc(&mut self, order: Order) -> Result<Allocation, AllocError> {
        if order == Order::BASE
            && let Some(taken) = self.pop_row()
        {
            return Ok(Allocation::new(taken, order));
        }
        if !order.is_huge()
            && let Some(huge) = self.small
            && let Some(taken) = self.take_in(huge, order)
        {
            return Ok(Allocation::new(taken, order));
        }
        self.search(order).map(|taken| Allocation::new(taken, order)).ok_or(AllocError::OutOfMemory(order))
    }

    /// Frees a block, whoever allocated it.
    ///
    /// # Errors
    /// What is wrong with the block; nothing changed unless [`FreeError::Corrupt`].
    pub fn free(&mut self, frame: FrameId, order: Order) -> Result<(), FreeError> {
        if order == Order::BASE && frame.0 & !63 == self.row.first.0 {
            let bit = 1 << (frame.0 & 63);
            if self.row.bits & bit != 0 {
                return Err(FreeError::NotAllocated(frame, order));
            }
            // Only frames that the lower level knows as taken may enter the cache.
            if self.tenant.lower.is_taken(frame) {
                self.row.bits |= bit;
                return Ok(());
            }
            return Err(FreeError::NotAllocated(frame, order));
        }
        self.tenant.free(frame, order)
    }

    /// Gives cached frames and the reservation back to the table.
    pub fn drain(&mut self) {
        self.give_row();
        if let Some(huge) = self.small.take() {
            self.tenant.recount_tree_as(tree_of(huge), false);
        }
    }

    fn give_row(&mut self) {
        let row = core::mem::replace(&mut self.row, EMPTY_ROW);
        if row.bits != 0
            && let Ok(after) = self.tenant.lower.give_row(row.first, row.bits)
        {
            self.tenant.note_free(row.first, after);
        }
    }

    fn pop_row(&mut self) -> Option<Taken> {
        if self.row.bits == 0 {
            return None;
        }
        let bit = self.row.bits.trailing_zeros();
        self.row.bits &= self.row.bits - 1;
        let frame = FrameId(self.row.first.0 + u64::from(bit));
        if self.row.evicted {
            // Somebody may have had the huge frame installed since; nothing can evict it again
            // while the row is ours.
            self.row.evicted = self.tenant.is_evicted(frame, Order::BASE);
        }
        Some(Taken { frame, evicted: self.row.evicted })
    }

    /// Takes a block in one huge frame; for order 0, a whole row of them.
    fn take_in(&mut self, huge: HugeId, order: Order) -> Option<Taken> {
        if order != Order::BASE {
            return self.tenant.lower.take(huge, order, 0);
        }
        let row = self.tenant.lower.take_row(huge, 0)?;
        // The old row is empty here, or its huge frame has no other: nothing is lost.
        self.give_row();
        self.row = row;
        self.pop_row()
    }

    /// The slow path: another huge frame, in our tree or in another.
    fn search(&mut self, order: Order) -> Option<Taken> {
        let epoch = self.tenant.return_epoch.load(Ordering::Acquire);
        if epoch != self.epoch {
            self.epoch = epoch;
            self.tenant.recount();
        }
        let home = if order.is_huge() { self.huge_tree } else { self.small.map_or(self.huge_tree, tree_of) };
        let wants: &[Want] = if order.is_huge() {
            &[Want::Installed, Want::Free]
        } else {
            &[Want::Partial, Want::Installed, Want::Free]
        };
        for &want in wants {
            if let Some(taken) = self.search_by_hint(home, order, want) {
                return Some(taken);
            }
        }
        // No hint helped: only the entries themselves can say that there is nothing left. This also
        // enters trees that others reserved.
        for &want in wants {
            for tree in laps(home, self.tenant.trees()) {
                if let Some(taken) = self.search_tree(tree, order, want) {
                    return Some(taken);
                }
            }
        }
        None
    }

    fn search_by_hint(&mut self, home: u32, order: Order, want: Want) -> Option<Taken> {
        let mut patience = if want == Want::Partial { PARTIAL_TREES } else { u32::MAX };
        for tree in laps(home, self.tenant.trees()) {
            let hint = self.tenant.hint(tree);
            let foreign = hint.is_reserved() && self.small.map(tree_of) != Some(tree);
            if !hint.promises(want) || foreign {
                continue;
            }
            if let Some(taken) = self.search_tree(tree, order, want) {
                return Some(taken);
            }
            patience -= 1;
            if patience == 0 {
                return None;
            }
        }
        None
    }

    /// Tries every fitting huge frame of a tree, the fullest first, and recounts it afterwards.
    fn search_tree(&mut self, tree: u32, order: Order, want: Want) -> Option<Taken> {
        let mut at_least = 0;
        loop {
            // The fullest that was not tried yet: (free, position) grows from round to round.
            let best = self
                .tenant
                .huge_in(tree)
                .filter(|huge| huge.first_frame().is_aligned(order))
                .filter_map(|huge| Some((huge, self.tenant.lower.entry(huge)?)))
                .filter(|(_, entry)| want.matches(*entry))
                .filter(|(_, entry)| order.is_huge() || u64::from(entry.free()) >= order.frames())
                .map(|(huge, entry)| (u64::from(entry.free()) << 32 | u64::from(huge.0), huge))
                .filter(|(key, _)| *key >= at_least)
                .min();
            let Some((key, huge)) = best else {
                self.tenant.recount_tree(tree);
                return None;
            };
            if let Some(taken) = self.take_in(huge, order) {
                self.settle(huge, order);
                return Some(taken);
            }
            at_least = key + 1;
        }
    }

    /// Remembers where a search ended.
    fn settle(&mut self, huge: HugeId, order: Order) {
        let tree = tree_of(huge);
        if order.is_huge() {
            self.huge_tree = tree;
            self.tenant.recount_tree(tree);
            return;
        }
        if let Some(old) = self.small.replace(huge).map(tree_of)
            && old != tree
        {
            self.tenant.recount_tree_as(old, false);
        }
        self.tenant.recount_tree_as(tree, true);
    }
}

impl Drop for Cpu<'_> {
    fn drop(&mut self) {
        self.drain();
    }
}

/// All trees once, `home` first.
fn laps(home: u32, trees: u32) -> impl Iterator<Item = u32> {
    let home = if home < trees { home } else { 0 };
    (home..trees).chain(0..home)
}
