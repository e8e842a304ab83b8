//! [`HugeEntry`]: the one word per huge frame that host and guest both change.
//!
//! ```text
//!  15     14        13..10             9..0
//! +------+---------+------------------+-----------+
//! | held | evicted | run 0-8, or huge | free 0-512|
//! +------+---------+------------------+-----------+
//! ```
//!
//! Where some frames are free and others are not, `run` bounds the order of the longest free run
//! from above, so that a search passes over frames whose free frames are scattered. Where nothing is
//! free its highest bit says that the huge frame is allocated as a whole.
//!
//! The named transitions below are the only way to make a new value. Each is a total function
//! from an entry to `Option<HugeEntry>`: any bits at all may be fed to it, and bits that no
//! transition could have produced (a hostile or broken guest wrote them) yield `None`.

use crate::units::{FRAMES_PER_HUGE, Order};

/// State of one huge frame; see the [module](self) for its bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct HugeEntry(u16);

const FREE_MASK: u16 = 0x03ff;
const RUN_SHIFT: u16 = 10;
const RUN_MASK: u16 = 15 << RUN_SHIFT;
const HUGE: u16 = 1 << 13;
const EVICTED: u16 = 1 << 14;
const HELD: u16 = 1 << 15;
const ALL_FREE: u16 = FRAMES_PER_HUGE as u16;

/// The order of the longest free run in a huge frame that is partly used, 0 to 8, or an upper bound.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Run(u16);

impl Run {
    /// Frames one by one.
    pub const SINGLE: Self = Self(0);
    /// Any run may be there.
    pub const ANY: Self = Self(8);

    /// A run of this order; of a larger one than a huge frame has in parts, [`ANY`](Self::ANY).
    #[must_use]
    #[inline]
    pub const fn of(order: Order) -> Self {
        Self::from_bits(order.get() as u16)
    }

    /// A number, 8 if it is larger.
    #[must_use]
    #[inline]
    pub const fn from_bits(bits: u16) -> Self {
        if bits < Self::ANY.0 { Self(bits) } else { Self::ANY }
    }

    /// The order.
    #[must_use]
    #[inline]
    pub const fn order(self) -> Order {
        match Order::new(self.0 as u8) {
            Some(order) => order,
            None => Order::BASE,
        }
    }
}

impl HugeEntry {
    /// All frames free, backed by host memory.
    pub const FREE_INSTALLED: Self = Self(ALL_FREE);
    /// All frames free, not backed: the initial state of every frame.
    pub const FREE_EVICTED: Self = Self(ALL_FREE | EVICTED);
    /// Allocated as a whole, backed by host memory: the initial state of a boot image's frames.
    pub const HUGE_INSTALLED: Self = Self(HUGE);
    /// Allocated as a whole, not backed: an address range that is never to be used.
    pub const HUGE_EVICTED: Self = Self(HUGE | EVICTED);

    /// Any bits, unchecked: the transitions check.
    #[must_use]
    #[inline]
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// The word as stored.
    #[must_use]
    #[inline]
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// Free base frames, as claimed: `0..=1023`, above 512 only if somebody broke the rules.
    #[must_use]
    #[inline]
    pub const fn free(self) -> u16 {
        self.0 & FREE_MASK
    }

    /// The host took this frame out of the guest's reach.
    #[must_use]
    #[inline]
    pub const fn is_held(self) -> bool {
        self.0 & HELD != 0
    }

    /// Not backed by host memory: install before use.
    #[must_use]
    #[inline]
    pub const fn is_evicted(self) -> bool {
        self.0 & EVICTED != 0
    }

    /// Allocated as one block of order 9 (or half of an order 10).
    #[must_use]
    #[inline]
    pub const fn is_huge(self) -> bool {
        self.0 & HUGE != 0 && self.free() == 0
    }

    /// The bound on its free runs: [`Run::ANY`] if all is free, [`Run::SINGLE`] if nothing is.
    #[must_use]
    #[inline]
    pub const fn run(self) -> Run {
        if self.is_all_free() {
            return Run::ANY;
        }
        if self.has_room() { Run::from_bits((self.0 & RUN_MASK) >> RUN_SHIFT) } else { Run::SINGLE }
    }

    /// Whether some sequence of transitions leads here.
    #[must_use]
    #[inline]
    pub const fn is_valid(self) -> bool {
        // Held implies evicted; held and huge both imply that nothing is free.
        if self.is_held() {
            return self.0 == HELD | EVICTED;
        }
        self.0 & !EVICTED == HUGE || self.is_small()
    }

    /// Every base frame is free and the guest may take it.
    #[must_use]
    #[inline]
    pub const fn is_all_free(self) -> bool {
        self.0 & !EVICTED == ALL_FREE
    }

    /// Some base frames are in use, and others the guest may take.
    #[must_use]
    #[inline]
    pub const fn has_room(self) -> bool {
        self.is_partial()
    }

    /// Base frames are given out one by one here: neither held nor huge, and valid.
    #[inline]
    const fn is_small(self) -> bool {
        self.is_partial() || self.0 & !EVICTED & !ALL_FREE == 0
    }

    /// Some base frames are free and others are not.
    #[inline]
    const fn is_partial(self) -> bool {
        self.0 & HELD == 0 && self.free().wrapping_sub(1) < ALL_FREE - 1 && self.0 & RUN_MASK <= Run::ANY.0 << RUN_SHIFT
    }

    /// Whether a block of `order` below 9 may be free here: surely not where it says no.
    #[must_use]
    #[inline]
    pub const fn may_fit(self, order: Order) -> bool {
        self.is_small() && self.free() >= order.frames() as u16 && self.run().0 >= Run::of(order).0
    }

    /// The same for a huge frame that [has room](Self::has_room).
    #[must_use]
    #[inline]
    pub const fn may_fit_in_part(self, order: Order) -> bool {
        self.free() >= order.frames() as u16 && self.run_bits() >= order.get() as u16
    }

    /// The bits of [`run`](Self::run), for what [has room](Self::has_room).
    #[must_use]
    #[inline]
    pub const fn run_bits(self) -> u16 {
        (self.0 & RUN_MASK) >> RUN_SHIFT
    }

    /// Guest: take `frames` base frames (1..=511 or a whole row), keeping `evicted` and `run`. That fewer are left
    /// than a run has says nothing: frames that are about to be counted are clear before.
    #[must_use]
    #[inline]
    pub const fn take(self, frames: u16) -> Option<Self> {
        if !self.is_small() || frames == 0 || self.free() < frames {
            return None;
        }
        let rest = self.0 - frames;
        Some(Self(match self.free() - frames {
            0 => rest & !RUN_MASK,
            // All were free: now any run may be, but not all.
            _ if self.free() == ALL_FREE => rest | Run::ANY.0 << RUN_SHIFT,
            _ => rest,
        }))
    }

    /// Guest: give `frames` base frames back, after which the free runs around them are bounded by `run`.
    #[must_use]
    #[inline]
    pub const fn give(self, frames: u16, run: Run) -> Option<Self> {
        if !self.is_small() || frames == 0 || frames > ALL_FREE || self.free() + frames > ALL_FREE {
            return None;
        }
        if self.free() + frames == ALL_FREE {
            return Some(Self(self.0 & EVICTED | ALL_FREE));
        }
        let bound = if run.0 > self.run_bits() { run.0 } else { self.run_bits() };
        Some(Self((self.0 & !RUN_MASK | bound << RUN_SHIFT) + frames))
    }

    /// Guest: a look at the bits found no run above `run`. The caller looks once more afterwards, for
    /// a run that came meanwhile, and [raises](Self::raise) the bound again.
    #[must_use]
    #[inline]
    pub const fn lower(self, run: Run) -> Option<Self> {
        if self.has_room() && run.0 < self.run().0 { Some(Self(self.0 & !RUN_MASK | run.0 << RUN_SHIFT)) } else { None }
    }

    /// Guest: a run of this order is, or may be, free.
    #[must_use]
    #[inline]
    pub const fn raise(self, run: Run) -> Option<Self> {
        if self.has_room() && run.0 > self.run().0 { Some(Self(self.0 & !RUN_MASK | run.0 << RUN_SHIFT)) } else { None }
    }

    /// Guest: take the huge frame as one block, keeping `evicted`.
    #[must_use]
    #[inline]
    pub const fn take_huge(self) -> Option<Self> {
        if self.is_all_free() { Some(Self((self.0 & EVICTED) | HUGE)) } else { None }
    }

    /// Guest: give a block of order 9 back.
    #[must_use]
    #[inline]
    pub const fn give_huge(self) -> Option<Self> {
        if self.0 & !EVICTED == HUGE { Some(Self((self.0 & EVICTED) | ALL_FREE)) } else { None }
    }

    /// Host, soft reclaim: a free frame loses its memory and stays free.
    #[must_use]
    #[inline]
    pub const fn evict(self) -> Option<Self> {
        if self.0 == Self::FREE_INSTALLED.0 { Some(Self::FREE_EVICTED) } else { None }
    }

    /// Host, hard reclaim: a free frame leaves the guest's reach.
    #[must_use]
    #[inline]
    pub const fn hold(self) -> Option<Self> {
        if self.is_all_free() { Some(Self(HELD | EVICTED)) } else { None }
    }

    /// Host: a held frame is free for the guest again, still evicted.
    #[must_use]
    #[inline]
    pub const fn release(self) -> Option<Self> {
        if self.0 == HELD | EVICTED { Some(Self::FREE_EVICTED) } else { None }
    }

    /// Host: an evicted frame was backed with memory.
    #[must_use]
    #[inline]
    pub const fn installed(self) -> Option<Self> {
        if self.is_valid() && self.is_evicted() && !self.is_held() { Some(Self(self.0 & !EVICTED)) } else { None }
    }

    /// Host, of a tenant that [installs by itself](Self::self_install): a held frame that kept its memory is free
    /// again. One step: who finds it evicted in between would take its old contents for zeroes.
    #[must_use]
    #[inline]
    pub const fn keep(self) -> Option<Self> {
        if self.0 == HELD | EVICTED { Some(Self::FREE_INSTALLED) } else { None }
    }

    /// Process: the caller owns a part of an evicted frame, and its first touch brings memory. The kernel's page
    /// fault is the install, so nobody is asked, and whoever takes a part next finds nothing left to do.
    #[must_use]
    #[inline]
    pub const fn self_install(self) -> Option<Self> {
        if self.is_all_free() { None } else { self.installed() }
    }

    /// Guest: take a block of `order` below 9 whose bits are seen to be clear, whatever `run` says.
    #[must_use]
    #[inline]
    pub const fn take_order(self, order: Order) -> Option<Self> {
        if order.is_huge() { None } else { self.take(order.frames() as u16) }
    }
}

/// What is set in any of some entries: a look at a whole table reads each once and asks of many together.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Glance(u16);

impl Glance {
    /// The same with one more entry.
    #[must_use]
    #[inline]
    pub const fn and(self, entry: HugeEntry) -> Self {
        Self(self.0 | entry.0)
    }

    /// Whether one of the entries may have a block of `order` below 9: surely not where it says no.
    #[must_use]
    #[inline]
    pub const fn may_fit(self, order: Order) -> bool {
        // The bits of several bounds together are no less than each of them.
        self.has_all_free() || self.0 & FREE_MASK != 0 && (self.0 & RUN_MASK) >> RUN_SHIFT >= Run::of(order).0
    }

    /// Whether none of the entries has a free frame; of those that the host holds it does not say so.
    #[must_use]
    #[inline]
    pub const fn has_nothing(self) -> bool {
        self.0 & FREE_MASK == 0
    }

    /// Whether one of the entries is free as a whole.
    #[must_use]
    #[inline]
    pub const fn has_all_free(self) -> bool {
        self.0 & ALL_FREE != 0
    }

    /// Whether the host holds one of the entries.
    #[must_use]
    #[inline]
    pub const fn has_held(self) -> bool {
        self.0 & HELD != 0
    }
}

impl core::fmt::Debug for HugeEntry {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "HugeEntry({:#06x}: free {}", self.0, self.free())?;
        if self.has_room() {
            write!(f, " in runs of order {} at most", self.run().order().get())?;
        }
        for (set, name) in [(self.is_huge(), "huge"), (self.is_evicted(), "evicted"), (self.is_held(), "held")] {
            if set {
                write!(f, " {name}")?;
            }
        }
        write!(f, "{})", if self.is_valid() { "" } else { " INVALID" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every() -> impl Iterator<Item = HugeEntry> {
        (0..=u16::MAX).map(HugeEntry::from_bits)
    }

    fn transitions(e: HugeEntry) -> impl Iterator<Item = HugeEntry> {
        let runs = || (0..=8).map(Run);
        let sized = (0..=513).flat_map(move |n| runs().map(move |run| e.give(n, run)).chain([e.take(n)]));
        let bounds = runs().flat_map(move |run| [e.lower(run), e.raise(run)]);
        sized
            .chain(bounds)
            .chain([e.take_huge(), e.give_huge(), e.evict(), e.hold(), e.release(), e.installed()])
            .chain([e.keep(), e.self_install()])
            .flatten()
    }

    #[test]
    fn valid_entries_are_exactly_the_reachable_ones() {
        let mut reached = [false; 1 << 16];
        let mut todo = [HugeEntry::FREE_EVICTED; 1 << 14];
        let mut len = 1;
        reached[HugeEntry::FREE_EVICTED.bits() as usize] = true;
        while len > 0 {
            len -= 1;
            for next in transitions(todo[len]) {
                if !reached[next.bits() as usize] {
                    reached[next.bits() as usize] = true;
                    todo[len] = next;
                    len += 1;
                }
            }
        }
        for e in every() {
            assert_eq!(e.is_valid(), reached[e.bits() as usize], "{e:?}");
        }
    }

    #[test]
    fn invalid_bits_have_no_transition() {
        for e in every().filter(|e| !e.is_valid()) {
            assert_eq!(transitions(e).next(), None, "{e:?}");
        }
    }

    #[test]
    fn guest_transitions_keep_evicted_and_never_touch_held() {
        for e in every().filter(|e| e.is_valid()) {
            for n in [1, 2, 64, 256, 512] {
                let bounds = [e.lower(Run::SINGLE), e.raise(Run::ANY)];
                let moves = [e.take(n), e.give(n, Run::ANY), e.take_huge(), e.give_huge()];
                for next in moves.into_iter().chain(bounds).flatten() {
                    assert_eq!(next.is_evicted(), e.is_evicted());
                    assert!(!e.is_held() && !next.is_held());
                }
            }
        }
    }

    #[test]
    fn the_host_takes_only_frames_that_are_wholly_free() {
        for e in every() {
            if e.evict().is_some() || e.hold().is_some() {
                assert_eq!((e.free(), e.is_huge(), e.is_held()), (512, false, false));
            }
        }
    }

    #[test]
    fn a_process_installs_what_it_owns_a_part_of_and_nothing_else() {
        for e in every() {
            let owned = e.is_valid() && !e.is_held() && !e.is_all_free();
            let expected = (owned && e.is_evicted()).then(|| HugeEntry::from_bits(e.bits() & !EVICTED));
            assert_eq!(e.self_install(), expected, "{e:?}");
            if let Some(next) = e.self_install() {
                assert_eq!((next.free(), next.is_huge(), next.run()), (e.free(), e.is_huge(), e.run()));
                assert_eq!(next.evict().or(next.hold()), None, "no reclaimer meddles: a part of it has an owner");
            }
        }
    }

    #[test]
    fn only_a_held_frame_is_kept() {
        for e in every() {
            let held = e.is_held() && e.is_valid();
            assert_eq!(e.keep(), held.then_some(HugeEntry::FREE_INSTALLED), "{e:?}");
        }
    }

    #[test]
    fn a_bound_never_falls_below_what_was_given() {
        let half = HugeEntry::FREE_INSTALLED.take(256).expect("free");
        assert_eq!(half.run(), Run::ANY, "any run may be left");
        let low = half.lower(Run(2)).expect("above");
        assert_eq!(low.take(8).map(HugeEntry::run), Some(Run(2)));
        assert_eq!(low.give(8, Run(1)).map(HugeEntry::run), Some(Run(2)));
        assert_eq!(low.give(8, Run(3)).map(HugeEntry::run), Some(Run(3)));
        assert_eq!(low.give(256, Run(3)), Some(HugeEntry::FREE_INSTALLED));
        let order = |o| Order::new(o).expect("in range");
        assert!(low.may_fit(order(2)) && !low.may_fit(order(3)));
        let any = low.raise(Run::ANY).expect("below");
        assert!(any.may_fit(order(8)) && !any.take(8).expect("room").may_fit(order(8)), "the counter counts too");
        assert!(HugeEntry::FREE_EVICTED.may_fit(order(8)) && !HugeEntry::HUGE_INSTALLED.may_fit(order(0)));
    }

    #[test]
    fn a_glance_denies_nothing_that_one_of_the_entries_has() {
        let others = [HugeEntry::HUGE_EVICTED, HugeEntry(0), HugeEntry(EVICTED), HugeEntry(7 | 3 << RUN_SHIFT)];
        for e in every() {
            let alone = Glance::default().and(e);
            let glances = others.map(|other| alone.and(other));
            for order in (0..9).filter_map(Order::new) {
                let fits = e.has_room() && e.run() >= Run::of(order) || e.is_all_free();
                assert!(!fits || alone.may_fit(order) && glances.iter().all(|glance| glance.may_fit(order)), "{e:?}");
                assert!(!e.is_valid() || alone.may_fit(order) == fits, "{e:?} {order:?}");
            }
            assert_eq!((alone.has_all_free(), alone.has_held()), (e.free() >= 512, e.is_held()));
            assert!(glances.iter().all(|g| g.has_all_free() == (e.free() >= 512) && g.has_held() == e.is_held()));
        }
    }

    #[test]
    fn a_transition_and_its_inverse_cancel() {
        for e in every().filter(|e| e.is_valid()) {
            if let Some(t) = e.take(8) {
                assert_eq!(t.give(8, e.run()), Some(e));
            }
            if let Some(l) = e.lower(Run::SINGLE) {
                assert_eq!(l.raise(e.run()), Some(e));
            }
            if let Some(t) = e.take_huge() {
                assert_eq!(t.give_huge(), Some(e));
            }
            if let Some(t) = e.hold() {
                assert_eq!(t.release(), Some(HugeEntry::FREE_EVICTED));
            }
        }
    }
}
