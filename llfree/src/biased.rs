//! [`Biased`]: something of one thread's that another may have while that thread sleeps.
//!
//! A handle's registers are plain memory, which is why they are fast, and why what a sleeping CPU holds back is out of
//! everybody's reach. A lock would cost each allocation as much as it takes now. So the owner only says that it is at
//! work, and looks whether somebody else is, with a store and a load; what orders the two costs the owner nothing and the
//! others, who come once in a while, an interrupt of it ([`Fence`]). Nobody waits: an owner that finds somebody
//! at its things does without them ([`Tenant::alloc`](crate::Tenant::alloc)), and others leave an owner that is at work alone.
//!
//! ```text
//! owner:  steps is odd;  light fence;  is it wanted? then without;  work;  steps is even again
//! other:  wanted is set; heavy fence;  is the owner at work? then not now;  drain;  wanted is reset
//! ```
//!
//! Of the two looks one sees the other's store, for there is a fence between each of them and its own. An owner whose steps
//! are at the next look what they were at the last one was asleep.
//!
//! A heavy fence is all that the others' way costs, and one is enough for many things that are wanted before it
//! ([`Biased::try_with_each`]).

use crate::cpu::Cpu;
use crate::sync::{AtomicU8, AtomicU64, Ordering, UnsafeCell, full_fence};
use core::fmt;

/// How owners and others order their stores before their loads.
///
/// # Safety
/// Of two parties that each store to one word and then load the other's, with [`light`](Self::light) between on one side and a
/// [`heavy`](Self::heavy) that returned true on the other, one loads what the other stored; and after such a `heavy` loads see
/// what the other side stored before its last `light`, and what it stored before that. (`membarrier(2)` says that of threads of a
/// process, an interrupt of the other CPU with a handler that has a barrier says it of a kernel's.) That holds between any two
/// fences that are equal, for all words at once.
pub unsafe trait Fence: PartialEq {
    /// The owner's, at every step.
    fn light(&self);

    /// The others'. False if that is not possible now.
    fn heavy(&self) -> bool;
}

/// The same fence for both, which every machine has.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct FullFence;

// SAFETY: that is what sequentially consistent fences do.
unsafe impl Fence for FullFence {
    #[inline]
    fn light(&self) {
        full_fence();
    }

    fn heavy(&self) -> bool {
        full_fence();
        true
    }
}

/// As many are wanted for one fence at most, since the owner of each does without it until the others had their turn.
pub const TOGETHER: usize = 64;

/// A thing of one owner's, and of others' while the owner does not use it.
pub struct Biased<T, F> {
    /// The owner's steps in and out: it is at work while this is odd.
    steps: AtomicU64,
    /// Others have it, or want to.
    wanted: AtomicU8,
    /// Twice the steps that there were at the last look, and one if it was idle then and others had it.
    looked: AtomicU64,
    fence: F,
    thing: UnsafeCell<T>,
}

// SAFETY: two parties never have the thing at the same moment, as the module's first lines say.
unsafe impl<T: Send, F: Sync> Sync for Biased<T, F> {}

impl<T, F: Fence> Biased<T, F> {
    /// A thing that nobody uses yet.
    pub fn new(thing: T, fence: F) -> Self {
        Self {
            steps: AtomicU64::new(0),
            wanted: AtomicU8::new(0),
            // Of something that was never used, too, the first look only takes note.
            looked: AtomicU64::new(u64::MAX),
            fence,
            thing: UnsafeCell::new(thing),
        }
    }

    /// The one who may use it at any time. Others have the rest of the calls.
    pub fn owner(&mut self) -> (Owner<'_, T, F>, &Self) {
        let this = &*self;
        (Owner(this), this)
    }

    /// The thing, for somebody who has all of it.
    pub fn get_mut(&mut self) -> &mut T {
        // SAFETY: borrowed by nobody else.
        self.thing.with_mut(|thing| unsafe { &mut *thing })
    }

    /// Calls `work` with the thing; `None` if others have it at this moment.
    ///
    /// # Safety
    /// The caller is the owner, of whom there is one, and does so from one thread at a time and not from within `work`.
    #[inline]
    pub unsafe fn with<R>(&self, work: impl FnOnce(&mut T) -> R) -> Option<R> {
        // Nobody else writes this word.
        let steps = self.steps.load(Ordering::Relaxed);
        self.steps.store(steps.wrapping_add(1), Ordering::Relaxed);
        // Also if `work` panics.
        let _end = AtEnd { steps: &self.steps, next: steps.wrapping_add(2) };
        self.fence.light();
        // Acquire: what others did to it is seen.
        if self.wanted.load(Ordering::Acquire) != 0 {
            return None;
        }
        // SAFETY: others come in after they saw, behind a heavy fence, that we are not at work, and while they are here we see it.
        Some(self.thing.with_mut(|thing| work(unsafe { &mut *thing })))
    }

    /// Calls `work` with the thing, by somebody who is not its owner; `None` if the owner or somebody else has it, or there is
    /// no fence to be sure.
    pub fn try_with<R>(&self, work: impl FnOnce(&mut T) -> R) -> Option<R> {
        self.try_as(Look::Any, work)
    }

    /// The same for something that was not used since the last look of this kind, once until it is used again.
    pub fn try_with_idle<R>(&self, work: impl FnOnce(&mut T) -> R) -> Option<R> {
        self.try_as(Look::Idle, work)
    }

    /// [`try_with`](Self::try_with) for many, behind one fence for [`TOGETHER`] of them whose fences are equal: `work` gets the
    /// place of each among those, and the thing. Returns for how many it was called.
    pub fn try_with_each<'b>(those: impl IntoIterator<Item = &'b Self>, work: impl FnMut(usize, &mut T)) -> usize
    where
        Self: 'b,
    {
        Self::each(Look::Any, those, work)
    }

    /// [`try_with_idle`](Self::try_with_idle) for many, in the same way.
    pub fn try_with_each_idle<'b>(those: impl IntoIterator<Item = &'b Self>, work: impl FnMut(usize, &mut T)) -> usize
    where
        Self: 'b,
    {
        Self::each(Look::Idle, those, work)
    }

    fn try_as<R>(&self, look: Look, work: impl FnOnce(&mut T) -> R) -> Option<R> {
        let wanted = Wanted::new(self, look)?;
        // SAFETY: it is wanted by now.
        if self.fence.heavy() { unsafe { wanted.with(work) } } else { None }
    }

    fn each<'b>(look: Look, those: impl IntoIterator<Item = &'b Self>, mut work: impl FnMut(usize, &mut T)) -> usize
    where
        Self: 'b,
    {
        let (mut batch, mut done) = (Batch::new(), 0);
        for (place, biased) in those.into_iter().enumerate() {
            if !batch.has_room_for(biased) {
                done += batch.have(&mut work);
            }
            batch.add(place, Wanted::new(biased, look));
        }
        done + batch.have(&mut work)
    }

    /// Whether the look is for it: if that is for what is idle, it takes note of its steps.
    fn is_for(&self, look: Look) -> bool {
        // A look that costs the owner nothing.
        let steps = self.steps.load(Ordering::Relaxed);
        if look == Look::Idle {
            let (mark, looked) = (mark(steps), self.looked.load(Ordering::Relaxed));
            if looked != mark {
                if looked != mark | 1 {
                    self.looked.store(mark, Ordering::Relaxed);
                }
                return false;
            }
        }
        steps.is_multiple_of(2)
    }
}

/// What others look for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Look {
    /// What its owner does not use at the moment.
    Any,
    /// What it has not used since the last such look.
    Idle,
}

fn mark(steps: u64) -> u64 {
    steps.wrapping_mul(2)
}

/// Somebody else wants it: while this is there its owner does without it, and nobody else has it.
struct Wanted<'b, T, F> {
    biased: &'b Biased<T, F>,
    look: Look,
}

impl<'b, T, F: Fence> Wanted<'b, T, F> {
    /// `None` if the look is not for it, or somebody wants it already.
    fn new(biased: &'b Biased<T, F>, look: Look) -> Option<Self> {
        if !biased.is_for(look) {
            return None;
        }
        // Acquire: of others one after the other.
        biased.wanted.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).ok()?;
        Some(Self { biased, look })
    }

    /// Calls `work` with the thing; `None` if its owner is at work.
    ///
    /// # Safety
    /// `heavy` of a fence that is equal to its own was called since this is there, and returned true.
    unsafe fn with<R>(self, work: impl FnOnce(&mut T) -> R) -> Option<R> {
        let Biased { steps, looked, thing, .. } = self.biased;
        // Acquire: what the owner did to it is seen.
        let steps = steps.load(Ordering::Acquire);
        if steps % 2 == 1 {
            return None;
        }
        // SAFETY: the owner is not at work, and if it begins from now on it sees that the thing is wanted.
        let done = thing.with_mut(|thing| work(unsafe { &mut *thing }));
        if self.look == Look::Idle {
            looked.store(mark(steps) | 1, Ordering::Relaxed);
        }
        Some(done)
    }
}

/// Others go: what they did is for the owner to see.
impl<T, F> Drop for Wanted<'_, T, F> {
    fn drop(&mut self) {
        self.biased.wanted.store(0, Ordering::Release);
    }
}

/// What waits for one fence.
struct Batch<'b, T, F> {
    wanted: [Option<(usize, Wanted<'b, T, F>)>; TOGETHER],
    count: usize,
}

impl<'b, T, F: Fence> Batch<'b, T, F> {
    fn new() -> Self {
        Self { wanted: [const { None }; TOGETHER], count: 0 }
    }

    /// The fence that is enough for all of them.
    fn fence(&self) -> Option<&'b F> {
        self.wanted.first()?.as_ref().map(|(_, wanted)| &wanted.biased.fence)
    }

    fn has_room_for(&self, biased: &Biased<T, F>) -> bool {
        self.count < TOGETHER && self.fence().is_none_or(|fence| *fence == biased.fence)
    }

    /// Adds one for which there is room.
    fn add(&mut self, place: usize, wanted: Option<Wanted<'b, T, F>>) {
        let Some(wanted) = wanted else { return };
        if let Some(free) = self.wanted.get_mut(self.count) {
            *free = Some((place, wanted));
            self.count += 1;
        }
    }

    /// Calls `work` with all of them that their owners leave, for how many it returns, and is empty.
    fn have(&mut self, mut work: impl FnMut(usize, &mut T)) -> usize {
        let is_fenced = self.fence().is_some_and(Fence::heavy);
        let mut done = 0;
        for slot in self.wanted.iter_mut().take(core::mem::take(&mut self.count)) {
            let Some((place, wanted)) = slot.take() else { continue };
            // SAFETY: all were wanted before that fence, which is equal to theirs.
            if is_fenced && unsafe { wanted.with(|thing| work(place, thing)) }.is_some() {
                done += 1;
            }
        }
        done
    }
}

impl<F: Fence> Biased<Cpu<'_>, F> {
    /// Gives back what a CPU's handle holds back, from any thread. False if its owner is at work, somebody else drains it, or
    /// there is no fence: then others find that memory when it drains itself, or at another call.
    pub fn drain(&self) -> bool {
        self.try_with(Cpu::drain).is_some()
    }

    /// The same if it was not used since the last such call. Who calls this every second drains what sleeps for so long.
    pub fn drain_idle(&self) -> bool {
        self.try_with_idle(Cpu::drain).is_some()
    }

    /// The same for many handles, as [`try_with_each`](Self::try_with_each) does it: returns how many were drained.
    pub fn drain_all<'b>(those: impl IntoIterator<Item = &'b Self>) -> usize
    where
        Self: 'b,
    {
        Self::try_with_each(those, |_, cpu| cpu.drain())
    }

    /// [`drain_idle`](Self::drain_idle) for many handles.
    pub fn drain_all_idle<'b>(those: impl IntoIterator<Item = &'b Self>) -> usize
    where
        Self: 'b,
    {
        Self::try_with_each_idle(those, |_, cpu| cpu.drain())
    }
}

impl<T, F> fmt::Debug for Biased<T, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Biased").finish_non_exhaustive()
    }
}

/// The owner of something biased.
#[derive(Debug)]
pub struct Owner<'b, T, F>(&'b Biased<T, F>);

impl<T, F: Fence> Owner<'_, T, F> {
    /// Calls `work` with the thing; `None` if others have it at this moment.
    #[inline]
    pub fn with<R>(&mut self, work: impl FnOnce(&mut T) -> R) -> Option<R> {
        // SAFETY: there is one of us, borrowed for the whole call.
        unsafe { self.0.with(work) }
    }
}

/// The owner goes: what it did to the thing is for others to see.
struct AtEnd<'b> {
    steps: &'b AtomicU64,
    next: u64,
}

impl Drop for AtEnd<'_> {
    #[inline]
    fn drop(&mut self) {
        self.steps.store(self.next, Ordering::Release);
    }
}
