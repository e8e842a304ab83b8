//! The host's words: when a return of it has been seen, and by whom.

use super::aside::all_aside;
use super::*;

/// The host returns something, be it elsewhere.
fn raise_epoch() {
    EPOCH.fetch_add(1, Ordering::Relaxed);
}

/// As the worker, after a notice.
fn look() {
    // SAFETY: the lock is held.
    unsafe { llfree_follow_host(false) };
}

/// As an allocation that has found nothing.
fn find_nothing() {
    // SAFETY: the lock is held.
    unsafe { __llfree_check_returned() };
}

fn number_aside() -> usize {
    (0..FRAMES).filter(|&frame| state(frame) == 2).count()
}

/// What the OOM killer is told of.
fn host_returns() -> i64 {
    // SAFETY: the lock is held.
    unsafe { model_host_returns() }
}

fn release(frames: impl Iterator<Item = usize>) {
    for frame in frames {
        set(frame, entry(frame).release().expect("a held one"));
    }
}

/// A host that has returned some may have memory for what failed. Whenever it does so, also between two looks at its
/// epoch: once that counts as seen, what failed has been tried again.
#[test]
fn an_epoch_is_seen_when_what_failed_was_tried_again() {
    let _alone = alone();
    for (version, reads) in VERSIONS.into_iter().flat_map(|version| (1..6).map(move |reads| (version, reads))) {
        started(version, true);
        look();
        offer(&[5, 9, 13, 17, 21], MOVABLE, true);
        assert_eq!(alloc(0, MOVABLE), None);
        look();
        assert!(number_aside() > 0, "{version:?}: nothing is aside, or was tried again without a reason");
        RAISED_AFTER.store(reads, Ordering::Relaxed);
        let before = EPOCH.load(Ordering::Relaxed);
        // The read after the return is that of some look, and the next one finds nothing new.
        for _ in 0..8 {
            look();
        }
        assert_eq!(EPOCH.load(Ordering::Relaxed), before + 1, "the host returned some");
        assert_eq!(number_aside(), 0, "{version:?}, after {reads} reads: they wait for the next return");
        assert_eq!(host_returns(), 0, "{version:?}: the host gave none of these");
    }
}

/// What the host returns while somebody walks the list, behind that one's back, is found by the next.
#[test]
fn what_is_returned_during_a_walk_is_for_the_next_one() {
    let _alone = alone();
    for version in VERSIONS {
        all_aside(version);
        look();
        RETURNED_ASLEEP.store(true, Ordering::Relaxed);
        look();
        assert!(!RETURNED_ASLEEP.load(Ordering::Relaxed), "the walk did not sleep");
        assert_eq!(number_aside(), FRAMES, "{version:?}: it was not behind the walk's back");
        find_nothing();
        assert_eq!(number_aside(), FRAMES - 1, "{version:?}: the epoch counts as seen");
    }
}

/// The first allocation after a return calls the worker, the others take batches; none does anything once it was there.
#[test]
fn the_first_allocation_after_a_return_calls_the_worker() {
    let _alone = alone();
    for version in VERSIONS {
        all_aside(version);
        look();
        let before = SOON.load(Ordering::Relaxed);
        let calls = || SOON.load(Ordering::Relaxed) - before;
        find_nothing();
        assert_eq!((calls(), number_aside()), (0, FRAMES), "{version:?}: nothing was returned");
        release(0..44);
        raise_epoch();
        find_nothing();
        assert_eq!((calls(), number_aside()), (1, FRAMES - 32), "{version:?}");
        find_nothing();
        assert_eq!((calls(), number_aside()), (1, 4), "{version:?}");
        assert_eq!(host_returns(), 44, "{version:?}: allocations took them back");
        release(44..46);
        look();
        assert_eq!((number_aside(), host_returns()), (2, 46), "{version:?}");
        release(46..48);
        find_nothing();
        assert_eq!((calls(), number_aside()), (1, 2), "{version:?}: that return was seen");
    }
}

/// A limit that fell, rose and fell again between two looks is what it was, and other huge frames are held.
#[test]
fn what_is_held_is_set_aside_though_the_limit_is_as_before() {
    let _alone = alone();
    for version in VERSIONS {
        started(version, false);
        offer(&(0..FRAMES).collect::<Vec<_>>(), MOVABLE, false);
        LIMIT.store(FRAMES as u64, Ordering::Relaxed);
        look();
        LIMIT.store(FRAMES as u64 - 6, Ordering::Relaxed);
        for frame in 0..6 {
            set(frame, entry(frame).hold().expect("a free one"));
        }
        look();
        assert!((0..FRAMES).all(|frame| (state(frame) == 2) == (frame < 6)), "{version:?}");
        release(0..6);
        raise_epoch();
        for frame in 30..36 {
            set(frame, entry(frame).hold().expect("a free one"));
        }
        look();
        assert!((0..FRAMES).all(|frame| (state(frame) == 2) == (30..36).contains(&frame)), "{version:?}");
    }
}
