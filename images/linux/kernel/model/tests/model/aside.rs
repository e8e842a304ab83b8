//! What is set aside, for the host holds it or had no memory for it, and how it comes back.

use super::*;

/// What an install that failed put aside is tried again: somebody is told to, for no one else may come by.
#[test]
fn what_is_put_aside_for_want_of_memory_is_tried_again() {
    let _alone = alone();
    for version in VERSIONS {
        started(version, true);
        offer(&[5, 9, 13, 17, 21], MOVABLE, true);
        let before = LATER.load(Ordering::Relaxed);
        assert_eq!(alloc(0, MOVABLE), None);
        assert!(state(5) == 2 || state(9) == 2 || state(13) == 2, "something is aside");
        assert!(LATER.load(Ordering::Relaxed) > before, "{version:?}: nobody will try again");
        // Who does asks the host at once, however lately it had nothing.
        FAIL_ONE_IN.store(0, Ordering::Relaxed);
        // SAFETY: the lock is held.
        unsafe { llfree_return_blocks(true) };
        assert!(alloc(0, MOVABLE).is_some(), "{version:?}: still paused");
    }
}

/// Of many that are aside, in more than one go of the lock, those come back that the host has returned, wherever they lie.
#[test]
fn whatever_was_returned_comes_back() {
    let _alone = alone();
    for version in VERSIONS {
        all_aside(version);
        for (rest, expected) in [(2, 16), (1, 16), (0, 16)] {
            for frame in (0..FRAMES).filter(|frame| frame % 3 == rest) {
                set(frame, entry(frame).release().expect("a held one"));
            }
            // SAFETY: the lock is held.
            assert_eq!(unsafe { llfree_return_blocks(false) }, expected, "{version:?}");
            assert!((0..FRAMES).all(|frame| (state(frame) == 2) == (frame % 3 < rest)), "{version:?}");
        }
        // SAFETY: the lock is held.
        assert_eq!(unsafe { llfree_return_blocks(false) }, 0, "{version:?}: there is no more");
    }
}

/// All huge frames, in blocks that are held and set aside.
pub(super) fn all_aside(version: Version) {
    started(version, false);
    offer(&(0..FRAMES).collect::<Vec<_>>(), MOVABLE, false);
    for frame in 0..FRAMES {
        set(frame, entry(frame).hold().expect("a free one"));
    }
    // SAFETY: the lock is held.
    unsafe { llfree_set_held_aside() };
    assert!((0..FRAMES).all(|frame| state(frame) == 2), "{version:?}: some are not aside");
}

/// An allocation that may not sleep takes no more back than one batch, whatever it meets before that.
#[test]
fn who_may_not_sleep_takes_one_batch_back() {
    let _alone = alone();
    for version in VERSIONS {
        all_aside(version);
        assert_eq!(take_some_back(true), 0, "{version:?}: they are held");
        for frame in FRAMES - 40..FRAMES {
            set(frame, entry(frame).release().expect("a held one"));
        }
        assert_eq!([take_some_back(false), take_some_back(false), take_some_back(false)], [32, 8, 0], "{version:?}");
    }
}

/// Who walks the list looks at each block, though others take batches off it meanwhile; of those that walk it, all but
/// one wait.
#[test]
fn a_walk_sees_all_whatever_others_take() {
    let _alone = alone();
    for (version, retry) in VERSIONS.into_iter().flat_map(|version| [(version, false), (version, true)]) {
        all_aside(version);
        // The first of them stay, the installs of the rest failed. The others take none of these, or as many as they may.
        for frame in 16..FRAMES {
            set(frame, HugeEntry::HUGE_EVICTED);
        }
        BATCHES.store(0, Ordering::Relaxed);
        TAKEN.store(0, Ordering::Relaxed);
        OTHERS_RETRY.store(retry, Ordering::Relaxed);
        OTHERS.store(true, Ordering::Relaxed);
        // SAFETY: the lock is held.
        let returned = unsafe { llfree_return_blocks(true) };
        OTHERS.store(false, Ordering::Relaxed);
        let taken = TAKEN.load(Ordering::Relaxed);
        assert!(BATCHES.load(Ordering::Relaxed) > 0, "{version:?}: nobody came between");
        assert_eq!((taken > 0, returned + taken), (retry, FRAMES as u64 - 16), "{version:?}");
        assert!((16..FRAMES).all(|frame| state(frame) == 1), "{version:?}: some are still aside");
    }
}
