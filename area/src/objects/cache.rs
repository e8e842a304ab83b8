//! [`Cache`]: the objects that one thread freed and has not used again, a few of each class.
//!
//! Only its owner puts objects in; anybody may take them out, each with one swap: the owner from the top, thieves and the
//! reclaimer's thread from the bottom. All else in it is the owner's, and read by others for statistics. No lock that two
//! threads ask for, so that a fork at any moment leaves a cache that works.

use super::class::Class;
use crate::hand::Grip;
use crate::space::Space;
use shared_layout::FrameId;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Classes that are cached: up to 64 MiB.
pub(crate) const CLASSES: usize = 41;
/// Objects of a class.
const SLOTS: usize = 16;

/// The objects of one class.
#[derive(Default)]
struct Bin {
    /// A frame's number and one; zero is nobody.
    slots: [AtomicU64; SLOTS],
    /// The slots from here on are empty; the owner's.
    top: AtomicU32,
    /// Objects that the owner allocated here, from the cache or elsewhere; and freed.
    allocations: AtomicU64,
    deallocations: AtomicU64,
    /// The sum of these when somebody looked for idle classes last.
    looked: AtomicU64,
}

#[repr(align(128))]
pub(crate) struct Cache {
    bins: [Bin; CLASSES],
    /// Bytes that the owner put in less those it took out.
    put: AtomicU64,
    /// Bytes that others took out.
    stolen: AtomicU64,
    /// Some thread is its owner.
    is_owned: AtomicBool,
    /// The owner's hold on the table; nobody else asks for it, so that no one ever waits. It lies here so that the end of the list
    /// ends it, however long its thread goes on.
    grip: Mutex<Option<Grip>>,
    next: AtomicPtr<Cache>,
}

/// Adds where only one thread ever writes.
#[inline]
fn bump(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

impl Cache {
    fn new() -> Self {
        Self {
            bins: std::array::from_fn(|_| Bin::default()),
            put: AtomicU64::new(0),
            stolen: AtomicU64::new(0),
            is_owned: AtomicBool::new(true),
            grip: Mutex::new(None),
            next: AtomicPtr::default(),
        }
    }

    /// Owner: the object that was put in last.
    #[inline]
    pub(crate) fn pop(&self, class: Class) -> Option<FrameId> {
        let bin = self.bins.get(class.index())?;
        let mut top = bin.top.load(Ordering::Relaxed) as usize % (SLOTS + 1);
        while let Some(below) = top.checked_sub(1) {
            top = below;
            // Acquire: whoever put it in had done with it.
            let found = bin.slots[below].swap(0, Ordering::Acquire);
            if let Some(frame) = found.checked_sub(1) {
                bin.top.store(below as u32, Ordering::Relaxed);
                bump(&bin.allocations, 1);
                bump(&self.put, (class.bytes() as u64).wrapping_neg());
                return Some(FrameId(frame));
            }
        }
        bin.top.store(0, Ordering::Relaxed);
        None
    }

    /// Owner: puts an object in, if the cache then holds no more than `most` bytes.
    #[inline]
    pub(crate) fn push(&self, class: Class, frame: FrameId, most: u64) -> bool {
        let Some(bin) = self.bins.get(class.index()) else { return false };
        let bytes = class.bytes() as u64;
        let held = self.put.load(Ordering::Relaxed).wrapping_sub(self.stolen.load(Ordering::Relaxed));
        if held + bytes > most {
            return false;
        }
        let mut top = bin.top.load(Ordering::Relaxed) as usize;
        if top >= SLOTS {
            // Others may have emptied what is below.
            top = bin.slots.iter().rposition(|slot| slot.load(Ordering::Relaxed) != 0).map_or(0, |last| last + 1);
            if top == SLOTS {
                return false;
            }
        }
        // Release: who takes it out may write to it at once.
        bin.slots[top].store(frame.0 + 1, Ordering::Release);
        bin.top.store(top as u32 + 1, Ordering::Relaxed);
        bump(&bin.deallocations, 1);
        bump(&self.put, bytes);
        true
    }

    /// Owner: an object of a class came from elsewhere, or went there.
    pub(crate) fn count(&self, class: Class, allocated: bool) {
        if let Some(bin) = self.bins.get(class.index()) {
            bump(if allocated { &bin.allocations } else { &bin.deallocations }, 1);
        }
    }

    /// Anybody: the object that was put in first.
    pub(crate) fn steal(&self, class: Class) -> Option<FrameId> {
        let bin = self.bins.get(class.index())?;
        let mut full = bin.slots.iter().filter(|slot| slot.load(Ordering::Relaxed) != 0);
        let frame = full.find_map(|slot| slot.swap(0, Ordering::Acquire).checked_sub(1))?;
        self.stolen.fetch_add(class.bytes() as u64, Ordering::Relaxed);
        Some(FrameId(frame))
    }

    /// One thread at a time: whether the owner neither allocated nor freed in a class since this was asked last.
    pub(crate) fn is_idle(&self, class: Class) -> bool {
        let Some(bin) = self.bins.get(class.index()) else { return true };
        let (allocations, deallocations) = self.counts(class);
        let sum = allocations.wrapping_add(deallocations);
        bin.looked.swap(sum, Ordering::Relaxed) == sum
    }

    /// Objects of a class that the owner allocated and freed.
    pub(crate) fn counts(&self, class: Class) -> (u64, u64) {
        let counts = self
            .bins
            .get(class.index())
            .map(|bin| (bin.allocations.load(Ordering::Relaxed), bin.deallocations.load(Ordering::Relaxed)));
        counts.unwrap_or_default()
    }

    /// Objects of a class in the cache.
    pub(crate) fn cached(&self, class: Class) -> u64 {
        let bin = self.bins.get(class.index());
        bin.map_or(0, |bin| bin.slots.iter().filter(|slot| slot.load(Ordering::Relaxed) != 0).count() as u64)
    }

    /// Owner: calls `work` with the hold on the table; `None` from within itself.
    pub(crate) fn with_grip<T>(&self, space: &Space, work: impl FnOnce(&mut Grip) -> T) -> Option<T> {
        let mut grip = self.grip.try_lock().ok()?;
        Some(work(grip.get_or_insert_with(|| Grip::new(space))))
    }

    /// Owner: its thread ends, and the next one may have it.
    pub(crate) fn disown(&self, space: &Space) {
        if let Ok(mut grip) = self.grip.try_lock()
            && let Some(mut grip) = grip.take()
        {
            grip.let_go(space);
        }
        self.is_owned.store(false, Ordering::Release);
    }
}

/// All caches there ever were. They stay until the list goes.
#[derive(Default)]
pub(crate) struct List(AtomicPtr<Cache>);

impl List {
    /// A cache for a thread: one whose owner is gone, or a new one.
    pub(crate) fn own(&self) -> &Cache {
        let is_free = |cache: &&Cache| {
            !cache.is_owned.load(Ordering::Relaxed)
                && cache.is_owned.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        if let Some(cache) = self.iter().find(is_free) {
            return cache;
        }
        let new = Box::into_raw(Box::new(Cache::new()));
        let mut head = self.0.load(Ordering::Acquire);
        loop {
            // SAFETY: it was just made, and is freed with the list only.
            unsafe { &*new }.next.store(head, Ordering::Relaxed);
            match self.0.compare_exchange(head, new, Ordering::AcqRel, Ordering::Acquire) {
                // SAFETY: as above.
                Ok(_) => return unsafe { &*new },
                Err(seen) => head = seen,
            }
        }
    }

    /// The end of all holds on the table, of threads that go on, too.
    pub(crate) fn let_go(&mut self, space: &Space) {
        let mut at = *self.0.get_mut();
        // SAFETY: null, or a cache of this list, of which nobody else has anything while it is borrowed for writing.
        while let Some(cache) = unsafe { at.as_mut() } {
            if let Some(mut grip) = cache.grip.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
                grip.let_go(space);
            }
            at = *cache.next.get_mut();
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Cache> {
        let mut at = self.0.load(Ordering::Acquire);
        std::iter::from_fn(move || {
            // SAFETY: null, or a cache of this list: none is freed while the list is borrowed.
            let cache = unsafe { at.as_ref() }?;
            at = cache.next.load(Ordering::Acquire);
            Some(cache)
        })
    }
}

impl Drop for List {
    fn drop(&mut self) {
        let mut at = *self.0.get_mut();
        while !at.is_null() {
            // SAFETY: each was made by `own` as a box, is in the list once, and nobody borrows from it any more.
            let mut cache = unsafe { Box::from_raw(at) };
            at = *cache.next.get_mut();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::MemoryKind;

    const MIB: usize = 1 << 20;

    fn class(mib: usize) -> Class {
        Class::of(mib * MIB, 1).expect("in range")
    }

    #[test]
    fn the_last_in_is_the_first_out_and_the_bytes_are_bounded() {
        let cache = Cache::new();
        assert!(cache.push(class(2), FrameId(0), 6 << 20) && cache.push(class(4), FrameId(512), 6 << 20));
        assert!(!cache.push(class(2), FrameId(2048), 6 << 20), "6 MiB are in it");
        assert!(cache.push(class(2), FrameId(2048), 8 << 20));
        assert_eq!(
            [cache.pop(class(2)), cache.pop(class(2)), cache.pop(class(2))],
            [Some(FrameId(2048)), Some(FrameId(0)), None]
        );
        assert_eq!(cache.pop(class(4)), Some(FrameId(512)));
        assert_eq!(cache.counts(class(2)), (2, 2));
        assert!(!cache.push(class(80), FrameId(0), u64::MAX >> 1), "not such large ones");
    }

    #[test]
    fn what_is_stolen_makes_room() {
        let cache = Cache::new();
        for i in 0..16 {
            assert!(cache.push(class(2), FrameId(i * 512), 32 << 20));
        }
        assert!(!cache.push(class(2), FrameId(9000), 64 << 20), "no slot");
        assert_eq!(cache.steal(class(2)), Some(FrameId(0)), "the oldest");
        assert!(!cache.push(class(2), FrameId(9000), 64 << 20), "the hole is below others");
        for _ in 0..15 {
            assert!(cache.steal(class(2)).is_some());
        }
        assert_eq!(cache.steal(class(2)), None);
        assert!(cache.push(class(2), FrameId(9000), 2 << 20), "it is empty");
        assert_eq!((cache.pop(class(2)), cache.pop(class(2))), (Some(FrameId(9000)), None));
    }

    #[test]
    fn a_class_is_idle_if_nothing_happened_between_two_looks() {
        let cache = Cache::new();
        cache.push(class(2), FrameId(0), 2 << 20);
        assert_eq!([cache.is_idle(class(2)), cache.is_idle(class(2))], [false, true]);
        cache.pop(class(2));
        assert_eq!([cache.is_idle(class(2)), cache.is_idle(class(2))], [false, true]);
    }

    #[test]
    fn no_object_is_taken_twice_and_none_is_lost() {
        let list = List::default();
        let cache = list.own();
        let c = class(2);
        let taken: Vec<_> = (0..64).map(|_| AtomicU32::new(0)).collect();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        if let Some(FrameId(frame)) = cache.steal(c) {
                            assert_eq!(taken[frame as usize].fetch_sub(1, Ordering::Relaxed), 1, "in nobody's hands");
                        }
                    }
                });
            }
            let mut random = fastrand::Rng::with_seed(3);
            for _ in 0..200_000 {
                let frame = random.u64(..64);
                // Only what is nowhere may be put in.
                if taken[frame as usize].load(Ordering::Relaxed) == 0 {
                    taken[frame as usize].store(1, Ordering::Relaxed);
                    if !cache.push(c, FrameId(frame), 1 << 30) {
                        taken[frame as usize].store(0, Ordering::Relaxed);
                    }
                }
                if random.bool()
                    && let Some(FrameId(frame)) = cache.pop(c)
                {
                    assert_eq!(taken[frame as usize].fetch_sub(1, Ordering::Relaxed), 1);
                }
            }
            over.store(true, Ordering::Relaxed);
        });
        while let Some(FrameId(frame)) = cache.pop(c) {
            assert_eq!(taken[frame as usize].fetch_sub(1, Ordering::Relaxed), 1);
        }
        assert!(taken.iter().all(|taken| taken.load(Ordering::Relaxed) == 0));
    }

    #[test]
    fn a_cache_outlives_its_thread_and_has_one_owner() {
        let (space, _) = Space::new(2 << 20, MemoryKind::Private).expect("address space");
        let list = List::default();
        let first = list.own();
        assert!(!std::ptr::eq(first, list.own()));
        first.disown(&space);
        assert!(std::ptr::eq(first, list.own()));
        assert_eq!(list.iter().count(), 2);
    }
}
