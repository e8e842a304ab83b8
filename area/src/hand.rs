//! [`Grip`] and [`Hand`]: what one thread needs to take from an area's table and to give back to it.
//!
//! A handle of the table and a place to look for runs.

use crate::error::{AllocError, FreeError};
use crate::fork::Maker;
use crate::membarrier::Membarrier;
use crate::space::Space;
use llfree::run::{Behind, TakenRun};
use llfree::{Allocation, Biased, Cpu};
use shared_layout::{FrameId, HUGE_SIZE, HugeEntry, HugeId, HugeRange, Order};
use std::mem::ManuallyDrop;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Looks at a grip that others have, and the time between two of them: they give back a few rows.
const PATIENCE: u32 = 100;
const PAUSE: Duration = Duration::from_micros(50);

/// What a thread keeps of a table, not of the memory that it lies in. Dropped without [`let_go`](Grip::let_go), it touches
/// nothing: by then that memory may be gone.
#[derive(Debug)]
pub(crate) struct Grip {
    /// Borrows from the table of the space that every call is given.
    cpu: ManuallyDrop<Option<Cpu<'static>>>,
    /// Where the last run ended, or was freed.
    near: HugeId,
}

/// A block that was taken; it is installed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taken {
    pub(crate) frame: FrameId,
    pub(crate) is_zeroed: bool,
}

impl Grip {
    pub(crate) fn new(space: &Space) -> Self {
        let cpu = (!space.is_missing()).then(|| space.tenant().cpu());
        Self { cpu: ManuallyDrop::new(cpu), near: HugeId(0) }
    }

    /// Takes a block of an order.
    #[inline]
    pub(crate) fn take(&mut self, space: &Space, order: Order) -> Result<Taken, AllocError> {
        let cpu = match &mut *self.cpu {
            Some(cpu) if !space.is_missing() => cpu,
            _ => return Err(AllocError::Forked),
        };
        Self::installed(space, order, cpu.alloc(order))
    }

    /// The same by somebody who has no grip at the moment.
    #[cold]
    pub(crate) fn take_without(space: &Space, order: Order) -> Result<Taken, AllocError> {
        if space.is_missing() {
            return Err(AllocError::Forked);
        }
        Self::installed(space, order, space.tenant().alloc(order))
    }

    #[inline]
    fn installed(
        space: &Space,
        order: Order,
        taken: Result<Allocation, llfree::AllocError>,
    ) -> Result<Taken, AllocError> {
        Ok(install(space, taken.map_err(|_| AllocError::OutOfMemory { bytes: order.bytes() })?))
    }

    /// Takes a run; the marks of evicted frames are as they were.
    pub(crate) fn take_run(&mut self, space: &Space, huge_frames: u32, behind: Behind) -> Result<TakenRun, AllocError> {
        Self::take_run_near(&mut self.near, space, huge_frames, behind)
    }

    /// The same beginning at a place.
    pub(crate) fn take_run_near(
        near: &mut HugeId,
        space: &Space,
        huge_frames: u32,
        behind: Behind,
    ) -> Result<TakenRun, AllocError> {
        if space.is_missing() {
            return Err(AllocError::Forked);
        }
        let out = AllocError::OutOfMemory { bytes: u64::from(huge_frames) * HUGE_SIZE };
        space.tenant().alloc_run(huge_frames, behind, near).map_err(|_| out)
    }

    #[inline]
    pub(crate) fn give(&mut self, space: &Space, frame: FrameId, order: Order) -> Result<(), FreeError> {
        space.mark_freed(Space::huge_range(frame, order.frames()));
        let Some(cpu) = &mut *self.cpu else { return Err(FreeError::Forked) };
        Ok(cpu.free(frame, order)?)
    }

    pub(crate) fn give_run(&mut self, space: &Space, range: HugeRange) -> Result<(), FreeError> {
        space.mark_freed(range);
        // Warm: the next one begins here.
        self.near = range.first();
        Ok(space.tenant().free_run(range)?)
    }

    /// Gives back what it keeps to be fast.
    pub(crate) fn drain(&mut self, space: &Space) {
        if let Some(cpu) = &mut *self.cpu
            && !space.is_missing()
        {
            cpu.drain();
        }
    }

    /// Its end, while the space is there.
    pub(crate) fn let_go(&mut self, space: &Space) {
        let cpu = self.cpu.take();
        if space.is_missing() {
            // Its table is not in this process.
            std::mem::forget(cpu);
        }
    }
}

/// What those who keep memory to be fast give back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Flushed {
    /// What nobody took or put since the last such call.
    Idle,
    /// All of it.
    All,
}

/// A grip that others drain while its owner does not use it, and the space that it is of. Keeps the table mapped, but not the area
/// alive.
#[derive(Debug)]
pub(crate) struct Hand {
    shared: Arc<SharedHand>,
}

/// On cache lines of its own: it is written to at every step.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct SharedHand {
    grip: Biased<Grip, Membarrier>,
    space: Arc<Space>,
    maker: Maker,
}

impl SharedHand {
    fn new(space: Arc<Space>) -> Arc<Self> {
        let grip = Biased::new(Grip::new(&space), Membarrier);
        Arc::new(Self { grip, space, maker: Maker::new() })
    }

    /// Has those that their threads do not use give back what they hold back; with `Flushed::Idle` those that they have not used since
    /// the last such call. One membarrier is enough for many: it interrupts every CPU that runs this process.
    pub(crate) fn flush(hands: &[Arc<Self>], what: Flushed) {
        let grips = hands.iter().map(|hand| &hand.grip);
        let drain = |place: usize, grip: &mut Grip| {
            if let Some(hand) = hands.get(place) {
                grip.drain(&hand.space);
            }
        };
        match what {
            Flushed::Idle => Biased::try_with_each_idle(grips, drain),
            Flushed::All => Biased::try_with_each(grips, drain),
        };
    }
}

impl Hand {
    pub(crate) fn new(space: Arc<Space>) -> Self {
        Self { shared: SharedHand::new(space) }
    }

    /// For those who drain what sleeps.
    pub(crate) fn others(&self) -> Weak<SharedHand> {
        Arc::downgrade(&self.shared)
    }

    /// Calls `with` with the grip, or `without` while others have it.
    #[inline]
    pub(crate) fn work<T>(
        &mut self,
        with: impl FnOnce(&mut Grip, &Space) -> T,
        without: impl FnOnce(&Space) -> T,
    ) -> T {
        let SharedHand { grip, space, .. } = &*self.shared;
        // SAFETY: there is one of us, borrowed for the whole call, and `with` has no way to it.
        let done = unsafe { grip.with(|grip| with(grip, space)) };
        done.unwrap_or_else(|| without(self.space_without()))
    }

    /// Others have the grip. If they stayed with the parent of this process they have it for ever: then it is theirs.
    #[cold]
    fn space_without(&mut self) -> &Space {
        if self.shared.maker.is_gone() {
            let new = SharedHand::new(self.shared.space.clone());
            std::mem::forget(std::mem::replace(&mut self.shared, new));
        }
        &self.shared.space
    }

    /// The same, by somebody who found nothing in a hurry: what others have in hand is waited for, a moment at most.
    #[cold]
    pub(crate) fn insist<T>(
        &mut self,
        mut with: impl FnMut(&mut Grip, &Space) -> T,
        without: impl FnOnce(&Space) -> T,
    ) -> T {
        for _ in 0..PATIENCE {
            let done = self.work(|grip, space| Some(with(grip, space)), |_| None);
            if let Some(done) = done {
                return done;
            }
            std::thread::sleep(PAUSE);
        }
        self.work(with, without)
    }
}

impl Drop for Hand {
    fn drop(&mut self) {
        // Others may keep the rest for a moment.
        self.work(|grip, space| grip.let_go(space), |_| ());
    }
}

impl Drop for SharedHand {
    fn drop(&mut self) {
        let Self { grip, space, .. } = self;
        grip.get_mut().let_go(space);
    }
}

/// Makes what was taken ready to be touched.
#[inline]
pub(crate) fn install(space: &Space, taken: Allocation) -> Taken {
    let (frame, _) = taken.position();
    match taken {
        Allocation::Ready(_) => Taken { frame, is_zeroed: false },
        Allocation::Evicted(block) => {
            let tenant = space.tenant();
            // Nobody has touched what is evicted, and of two huge frames one may not be. We look now that the block is
            // ours: when it was counted for us an owner before us may still have had it.
            let is_evicted = |huge| tenant.entry(huge).is_some_and(HugeEntry::is_evicted);
            let is_zeroed = block.huge_range().iter().all(is_evicted);
            let _ = block.self_install(&tenant);
            Taken { frame, is_zeroed }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fork::tests::holds_in_a_child;
    use crate::membarrier::HEAVY;
    use crate::{Area, MemoryKind};
    use llfree::Fence;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;

    /// A hand, and somebody else who has its grip until `release` is passed.
    fn while_others_have_it(work: impl FnOnce(&mut Hand, &dyn Fn())) {
        let area = Area::builder().size(8 << 20).memory(MemoryKind::Private).build().expect("built");
        let mut hand = Hand::new(area.space.clone());
        let (taken, release, has_it) = (Barrier::new(2), Barrier::new(2), AtomicBool::new(false));
        std::thread::scope(|threads| {
            let shared = hand.shared.clone();
            let (taken, release, has_it) = (&taken, &release, &has_it);
            threads.spawn(move || {
                let had = shared.grip.try_with(|_| {
                    has_it.store(true, Ordering::Relaxed);
                    taken.wait();
                    release.wait();
                });
                if had.is_none() {
                    taken.wait();
                }
            });
            taken.wait();
            if !has_it.load(Ordering::Relaxed) {
                return test_support::skipped("no membarrier here");
            }
            work(&mut hand, &|| _ = release.wait());
        });
    }

    #[test]
    fn many_hands_are_flushed_behind_one_membarrier() {
        let area = Area::builder().size(8 << 20).memory(MemoryKind::Private).build().expect("built");
        if !Membarrier.heavy() {
            return test_support::skipped("no membarrier here");
        }
        let free = || area.space.tenant().stats().free_frames;
        let all = free();
        let mut hands: Vec<_> = (0..40).map(|_| Hand::new(area.space.clone())).collect();
        let mut work = || {
            for hand in &mut hands {
                hand.work(
                    |grip, space| {
                        let taken = grip.take(space, Order::BASE).expect("free");
                        grip.give(space, taken.frame, Order::BASE).expect("ours");
                    },
                    |_| panic!("nobody else has it"),
                );
            }
            assert!(free() < all, "they hold something back");
            hands.iter().map(|hand| hand.shared.clone()).collect::<Vec<_>>()
        };
        let calls = |flush: &dyn Fn()| {
            let before = HEAVY.get();
            flush();
            HEAVY.get() - before
        };
        let shared = work();
        assert_eq!(calls(&|| SharedHand::flush(&shared, Flushed::All)), 1);
        assert_eq!(free(), all);
        work();
        assert_eq!(calls(&|| SharedHand::flush(&shared, Flushed::Idle)), 0, "they were at work");
        assert!(free() < all);
        assert_eq!(calls(&|| SharedHand::flush(&shared, Flushed::Idle)), 1);
        assert_eq!(free(), all);
    }

    #[test]
    fn what_others_have_is_waited_for_a_moment() {
        while_others_have_it(|hand, release| {
            assert!(!hand.work(|_, _| true, |_| false));
            let start = Instant::now();
            assert!(!hand.insist(|_, _| true, |_| false), "they do not let go");
            assert!(start.elapsed() >= PAUSE * PATIENCE && start.elapsed() < Duration::from_secs(10));
            release();
            assert!(hand.insist(|_, _| true, |_| false));
        });
    }

    #[test]
    fn a_child_whose_grip_others_had_in_the_parent_gets_another() {
        while_others_have_it(|hand, release| {
            let in_child = || {
                let first = hand.work(|_, _| true, |_| false);
                let block = hand.work(|grip, space| grip.take(space, Order::BASE).ok(), |_| None);
                !first && block.is_some()
            };
            assert!(holds_in_a_child(in_child));
            release();
        });
    }
}
