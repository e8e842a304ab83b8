//! Runs: huge frames side by side, as many as somebody wants, for one large object.
//!
//! A run is nothing that the table knows: each of its frames is a block of order 9, taken by a compare-and-swap of its
//! own, and whoever comes too late for one gives back exactly those that it took. So a run can be freed whole, in parts
//! or frame by frame, and a crash in the middle leaves blocks of order 9. Where to look: on from the last run, where all
//! of it is backed by memory; then where most of it is; then wherever there is room.

use crate::tenant::Tenant;
use core::fmt;
use shared_layout::{HugeEntry, HugeId, HugeRange, Order};

/// Why a run was not taken or not given back; nothing changed unless the variant says so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RunError {
    /// No run has no frames.
    Empty,
    /// So many free huge frames do not lie side by side.
    OutOfMemory {
        /// The number asked for.
        huge_frames: u32,
    },
    /// Not all of these are in the table.
    OutOfRange(HugeRange),
    /// Somebody owns a frame of them, or the host holds it.
    NotFree(HugeRange),
    /// A frame of them is not allocated as a whole. Others freed some at this very moment, if anybody did: then each is free once.
    NotAllocated(HugeRange),
}

impl fmt::Display for RunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let from = |range: &HugeRange| (range.count(), range.first().0);
        match self {
            Self::Empty => write!(f, "a run of no huge frames"),
            Self::OutOfMemory { huge_frames } => {
                write!(f, "out of memory: no {huge_frames} free huge frames side by side")
            }
            Self::OutOfRange(range) => {
                let (count, first) = from(range);
                write!(f, "{count} huge frames from huge frame {first} on are not all in the table")
            }
            Self::NotFree(range) => {
                let (count, first) = from(range);
                write!(f, "the {count} huge frames from huge frame {first} on are not all free")
            }
            Self::NotAllocated(range) => {
                let (count, first) = from(range);
                write!(f, "the {count} huge frames from huge frame {first} on are not all allocated")
            }
        }
    }
}

impl core::error::Error for RunError {}

/// A run that was taken.
#[must_use = "its frames are owned until they are freed"]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TakenRun {
    /// Its huge frames.
    pub range: HugeRange,
    /// How many of them are not backed: [`Tenant::self_install`] or an install comes first.
    pub evicted: u32,
}

/// Where a search for a run may end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Behind {
    /// All of it is backed by memory.
    Memory,
    /// Wherever most of it is.
    Any,
}

impl Tenant<'_> {
    /// Takes `huge_frames` side by side, searching on from `near`, which afterwards is where the run ends.
    ///
    /// # Errors
    /// [`RunError::Empty`], or [`RunError::OutOfMemory`] if at some moment there was no such run. Frames that a host
    /// has in hand for a moment count as not free.
    pub fn alloc_run(&self, huge_frames: u32, behind: Behind, near: &mut HugeId) -> Result<TakenRun, RunError> {
        if huge_frames == 0 {
            return Err(RunError::Empty);
        }
        let mut from = *near;
        while let Some(range) = self.find_run(huge_frames, behind, from) {
            match self.take_run(range) {
                Ok(run) => {
                    *near = range.end();
                    return Ok(run);
                }
                // Behind the frame that was taken from under us. Of two runs that are taken at the same time each
                // frame in turn, the one that began farther behind meets nobody: somebody makes progress.
                Err(at) => from = HugeId(at.0 + 1),
            }
        }
        Err(RunError::OutOfMemory { huge_frames })
    }

    /// Takes exactly these huge frames: to let an object grow where it is.
    ///
    /// # Errors
    /// [`RunError::OutOfRange`], or [`RunError::NotFree`].
    pub fn alloc_run_at(&self, range: HugeRange) -> Result<TakenRun, RunError> {
        if range.end().0 > self.huge_frames() {
            return Err(RunError::OutOfRange(range));
        }
        // First a look, so that hopeless attempts do not make frames look taken to everybody else.
        if !self.lower.entries(range).all(HugeEntry::is_all_free) {
            return Err(RunError::NotFree(range));
        }
        self.take_run(range).map_err(|_| RunError::NotFree(range))
    }

    /// Gives huge frames back that were allocated as a run, as several, or one by one.
    ///
    /// # Errors
    /// [`RunError::OutOfRange`], or [`RunError::NotAllocated`].
    pub fn free_run(&self, range: HugeRange) -> Result<(), RunError> {
        if range.end().0 > self.huge_frames() {
            return Err(RunError::OutOfRange(range));
        }
        if !self.lower.entries(range).all(|entry| entry.give_huge().is_some()) {
            return Err(RunError::NotAllocated(range));
        }
        for huge in range {
            let after = self.lower.give_one_huge(huge).ok_or(RunError::NotAllocated(range))?;
            self.note_free(huge, after, Order::HUGE.frames());
        }
        Ok(())
    }

    /// In a process, [as for a block](crate::EvictedBlock::self_install): huge frames of which the caller owns a part,
    /// and whose first touch brings memory.
    pub fn self_install(&self, range: HugeRange) {
        for huge in range {
            if self.entry(huge).is_some_and(HugeEntry::is_evicted) {
                self.lower.self_install(huge);
            }
        }
    }

    /// Takes all frames of a range, or none and says which one was not free.
    fn take_run(&self, range: HugeRange) -> Result<TakenRun, HugeId> {
        let mut evicted = 0;
        for (index, huge) in range.iter().enumerate() {
            match self.lower.take_huge_if(huge, |_| true) {
                Some(taken) => evicted += u32::from(taken.evicted),
                None => {
                    // Exactly those that this call took, and no other; who looked meanwhile has to be told.
                    let (taken, _) = range.split(index as u32);
                    for huge in taken {
                        if let Some(after) = self.lower.give_one_huge(huge) {
                            self.note_free(huge, after, Order::HUGE.frames());
                        }
                    }
                    return Err(huge);
                }
            }
        }
        Ok(TakenRun { range, evicted })
    }

    /// A window of free huge frames.
    fn find_run(&self, count: u32, behind: Behind, near: HugeId) -> Option<HugeRange> {
        let all = self.huge_frames();
        if count > all {
            return None;
        }
        let near = if near.0 < all { near.0 } else { 0 };
        let backed = |entry: HugeEntry| entry.is_all_free() && !entry.is_evicted();
        // A run that begins before `near` may end behind it.
        let before = HugeRange::between(HugeId(0), HugeId(near.saturating_add(count - 1).min(all)));
        let parts = [HugeRange::between(HugeId(near), HugeId(all)), before];
        let first = parts.into_iter().find_map(|part| self.first_window(part, count, backed));
        if first.is_some() || behind == Behind::Memory {
            return first;
        }
        self.best_window(count)
    }

    /// The first window of which each entry suits.
    #[inline]
    fn first_window(&self, part: HugeRange, count: u32, suits: impl Fn(HugeEntry) -> bool) -> Option<HugeRange> {
        let mut length = 0;
        for (entry, at) in self.lower.entries(part).zip(part.first().0..) {
            length = if suits(entry) { length + 1 } else { 0 };
            if length == count {
                return Some(HugeRange::saturating(HugeId(at + 1 - count), count));
            }
        }
        None
    }

    /// The window of free frames of which the most are backed by memory, the first of several.
    fn best_window(&self, count: u32) -> Option<HugeRange> {
        let (mut length, mut backed, mut best) = (0, 0, None);
        for (entry, at) in self.lower.entries(self.lower.all()).zip(0..) {
            if !entry.is_all_free() {
                (length, backed) = (0, 0);
                continue;
            }
            length += 1;
            backed += u32::from(!entry.is_evicted());
            if length > count {
                // One leaves the window behind.
                let left = self.lower.entry(HugeId(at - count)).is_some_and(|entry| !entry.is_evicted());
                backed = backed.saturating_sub(u32::from(left));
            }
            if length >= count && best.is_none_or(|(most, _)| backed > most) {
                best = Some((backed, at + 1 - count));
            }
        }
        best.map(|(_, first)| HugeRange::saturating(HugeId(first), count))
    }
}
