//! Unit tests of private parts that need atomics: they stay out of the files which the model
//! checkers compile against atomics of their own.

use crate::class::Class;
use crate::hint::{TreeHint, Trees, Want, bitmap_words};
use crate::sync::{AtomicU16, AtomicU64, Ordering};
use shared_layout::HugeEntry;
use std::vec::Vec;

#[test]
fn a_lap_visits_every_listed_tree_once_from_home_on() {
    for count in [1usize, 63, 64, 65, 130, 200] {
        let hints: Vec<_> = (0..count).map(|_| AtomicU16::new(0)).collect();
        let summary: Vec<_> = (0..bitmap_words(count)).map(|_| AtomicU64::new(0)).collect();
        let trees = Trees::new(&hints, &summary).expect("lengths fit");
        let free = TreeHint::count([HugeEntry::FREE_EVICTED].into_iter(), false, Class::HUGE);
        let listed: Vec<u32> = (0..count as u32).filter(|tree| tree % 3 == 0 || tree % 64 == 63).collect();
        listed.iter().for_each(|tree| trees.set(*tree, free));
        for home in [0, 1, 62, 63, 64, 65, 129, 199, 500] {
            let mut seen: Vec<u32> = trees.listed(Want::Free, home, false).collect();
            let from = if (home as usize) < count { home } else { 0 };
            let first = listed.iter().find(|tree| **tree >= from).or(listed.first());
            assert_eq!(seen.first(), first, "{count} trees from {home}");
            seen.sort_unstable();
            assert_eq!(seen, listed);
        }
        assert_eq!(trees.listed(Want::Installed, 0, false).next(), None);
    }
}

#[test]
fn bits_behind_the_last_tree_vanish() {
    let hints: Vec<_> = (0..70).map(|_| AtomicU16::new(0)).collect();
    let summary: Vec<_> = (0..bitmap_words(70)).map(|_| AtomicU64::new(u64::MAX)).collect();
    let trees = Trees::new(&hints, &summary).expect("lengths fit");
    assert_eq!(trees.listed(Want::Free, 0, false).count(), 128, "memory that was used before");
    trees.unlist_all();
    assert_eq!(trees.listed(Want::Free, 0, false).count(), 0);
    assert!(summary.iter().all(|word| word.load(Ordering::Relaxed) == 0));
}
