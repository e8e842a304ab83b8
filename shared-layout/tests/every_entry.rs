//! Every transition of [`HugeEntry`] against a model, for all 2^16 words and all arguments that a counter can
//! hold. There are no others, so this is a proof, not a sample.
//!
//! The model shares nothing with the implementation: a state is an `enum`, a word is looked up in the list of
//! all states, and a transition is a `match`.

use State::{Held, Huge, Small};
use shared_layout::{HugeEntry, Order, Run};
use std::collections::HashMap;
use std::thread;

/// Base frames of a huge frame.
const ALL: u16 = 512;
/// What the counter of a word can say at most, and one more.
const COUNTS: std::ops::RangeInclusive<u16> = 0..=1024;
/// The longest run of a huge frame that is used in part.
const ANY: u16 = 8;

/// What a huge frame is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum State {
    /// Out of the guest's reach.
    Held,
    /// Given out as one block.
    Huge { evicted: bool },
    /// Given out frame by frame; `run` is 0 unless some are free and others are not.
    Small { free: u16, run: u16, evicted: bool },
}

impl State {
    fn every() -> impl Iterator<Item = Self> {
        let partial = (1..ALL).flat_map(|free| (0..=ANY).map(move |run| (free, run)));
        let small = [(0, 0), (ALL, 0)].into_iter().chain(partial);
        let backed = |evicted| {
            let small = small.clone().map(move |(free, run)| Small { free, run, evicted });
            small.chain([Huge { evicted }])
        };
        [Held].into_iter().chain(backed(false)).chain(backed(true))
    }

    /// As the picture in `entry.rs` has it.
    fn bits(self) -> u16 {
        let backing = |evicted| u16::from(evicted) << 14;
        match self {
            Held => 1 << 15 | 1 << 14,
            Huge { evicted } => backing(evicted) | ANY << 10,
            Small { free, run, evicted } => backing(evicted) | run << 10 | free,
        }
    }

    fn is_partial(self) -> bool {
        matches!(self, Small { free, .. } if (1..ALL).contains(&free))
    }

    fn is_evicted(self) -> bool {
        match self {
            Held => true,
            Huge { evicted } | Small { evicted, .. } => evicted,
        }
    }

    fn take(self, frames: u16) -> Option<Self> {
        let Small { free, run, evicted } = self else { return None };
        let left = free.checked_sub(frames).filter(|_| frames > 0)?;
        let run = if free == ALL { ANY } else { run };
        Some(Small { free: left, run: if left == 0 { 0 } else { run }, evicted })
    }

    fn give(self, frames: u16, beside: u16) -> Option<Self> {
        let Small { free, run, evicted } = self else { return None };
        match u32::from(free) + u32::from(frames) {
            _ if frames == 0 => None,
            512 => Some(Small { free: ALL, run: 0, evicted }),
            0..512 => Some(Small { free: free + frames, run: run.max(beside), evicted }),
            _ => None,
        }
    }

    /// The bound on free runs becomes another, `if` it moves that way.
    fn bound(self, to: u16, moves: impl Fn(u16, u16) -> bool) -> Option<Self> {
        match self {
            Small { free, run, evicted } if self.is_partial() && moves(run, to) => {
                Some(Small { free, run: to, evicted })
            }
            _ => None,
        }
    }

    fn take_huge(self) -> Option<Self> {
        match self {
            Small { free: ALL, evicted, .. } => Some(Huge { evicted }),
            _ => None,
        }
    }

    fn give_huge(self) -> Option<Self> {
        match self {
            Huge { evicted } => Some(Small { free: ALL, run: 0, evicted }),
            _ => None,
        }
    }

    fn evict(self) -> Option<Self> {
        match self {
            Small { free: ALL, evicted: false, .. } => Some(Small { free: ALL, run: 0, evicted: true }),
            _ => None,
        }
    }

    fn hold(self) -> Option<Self> {
        match self {
            Small { free: ALL, .. } => Some(Held),
            _ => None,
        }
    }

    fn release(self) -> Option<Self> {
        (self == Held).then_some(Small { free: ALL, run: 0, evicted: true })
    }

    fn installed(self) -> Option<Self> {
        match self {
            Huge { evicted: true } => Some(Huge { evicted: false }),
            Small { free, run, evicted: true } => Some(Small { free, run, evicted: false }),
            _ => None,
        }
    }
}

/// Calls `check` for every word, with the state that it stands for if it stands for one.
fn for_every_word(check: impl Fn(HugeEntry, Option<State>) + Sync) {
    let states: HashMap<u16, State> = State::every().map(|state| (state.bits(), state)).collect();
    assert_eq!(states.len(), State::every().count(), "no two states have one word");
    let parts = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for part in 0..parts {
            let (check, states) = (&check, &states);
            scope.spawn(move || {
                for bits in (0..=u16::MAX).skip(part).step_by(parts) {
                    check(HugeEntry::from_bits(bits), states.get(&bits).copied());
                }
            });
        }
    });
}

fn word(state: Option<State>) -> Option<HugeEntry> {
    state.map(|state| HugeEntry::from_bits(state.bits()))
}

fn orders() -> impl Iterator<Item = Order> {
    (0..=10).map(|order| Order::new(order).expect("in range"))
}

#[test]
fn every_word_is_read_as_the_model_reads_it() {
    for_every_word(|entry, state| {
        assert_eq!(entry.is_valid(), state.is_some(), "{entry:?}");
        // Any bits may be asked anything; what they mean is said of those that mean something.
        let fits = orders().filter(|order| !order.is_huge()).map(|order| (order, entry.may_fit(order)));
        let facts = (entry.free(), entry.is_huge(), entry.is_held(), entry.is_evicted(), entry.is_all_free());
        let (room, run) = (entry.has_room(), entry.run());
        let Some(state) = state else {
            assert!(!room && fits.into_iter().all(|(_, fits)| !fits), "{entry:?} is nothing to allocate in");
            return;
        };
        let free = if let Small { free, .. } = state { free } else { 0 };
        let huge = matches!(state, Huge { .. });
        assert_eq!(facts, (free, huge, state == Held, state.is_evicted(), free == ALL), "{entry:?}");
        assert_eq!(room, state.is_partial(), "{entry:?}");
        let bound = match state {
            Small { free: ALL, .. } => ANY,
            Small { run, .. } => run,
            Held | Huge { .. } => 0,
        };
        assert_eq!(run, Run::from_bits(bound), "{entry:?}");
        for (order, fits) in fits {
            let may = u64::from(free) >= order.frames() && bound >= u16::from(order.get());
            assert_eq!(fits, may, "{entry:?} and order {}", order.get());
            if room {
                assert_eq!(entry.may_fit_in_part(order), may, "{entry:?} and order {}", order.get());
                assert_eq!(entry.run_bits(), bound, "{entry:?}");
            }
        }
    });
}

#[test]
fn every_transition_of_a_count_is_the_one_of_the_model() {
    for_every_word(|entry, state| {
        for frames in COUNTS {
            assert_eq!(entry.take(frames), word(state.and_then(|s| s.take(frames))), "{entry:?}.take({frames})");
            for run in 0..=ANY {
                let given = word(state.and_then(|s| s.give(frames, run)));
                assert_eq!(entry.give(frames, Run::from_bits(run)), given, "{entry:?}.give({frames}, {run})");
            }
        }
        for order in orders() {
            let frames = (!order.is_huge()).then(|| order.frames() as u16);
            let taken = word(frames.and_then(|frames| state?.take(frames)));
            assert_eq!(entry.take_order(order), taken, "{entry:?}.take_order({})", order.get());
        }
    });
}

#[test]
fn every_other_transition_is_the_one_of_the_model() {
    for_every_word(|entry, state| {
        for run in 0..=ANY {
            let lowered = word(state.and_then(|s| s.bound(run, |now, to| to < now)));
            assert_eq!(entry.lower(Run::from_bits(run)), lowered, "{entry:?}.lower({run})");
            let raised = word(state.and_then(|s| s.bound(run, |now, to| to > now)));
            assert_eq!(entry.raise(Run::from_bits(run)), raised, "{entry:?}.raise({run})");
        }
        assert_eq!(entry.take_huge(), word(state.and_then(State::take_huge)), "{entry:?}.take_huge()");
        assert_eq!(entry.give_huge(), word(state.and_then(State::give_huge)), "{entry:?}.give_huge()");
        assert_eq!(entry.evict(), word(state.and_then(State::evict)), "{entry:?}.evict()");
        assert_eq!(entry.hold(), word(state.and_then(State::hold)), "{entry:?}.hold()");
        assert_eq!(entry.release(), word(state.and_then(State::release)), "{entry:?}.release()");
        assert_eq!(entry.installed(), word(state.and_then(State::installed)), "{entry:?}.installed()");
    });
}
