//! Something that one thread owns and another has while the owner does not use it: never both, and each sees what the
//! other did. What it is is memory of loom's, which knows a race when it sees one.

use super::walk::walk;
use crate::biased::{Biased, FullFence};
use crate::cpu::Cpu;
use crate::sync::Ordering;
use loom::sync::Arc;
use loom::thread;
use shared_layout::{HugeEntry, Order};

#[test]
fn an_owner_and_others_never_meet() {
    let mut model = loom::model::Builder::new();
    // All of them take half a minute.
    model.preemption_bound = Some(6);
    walk(&model, || {
        let shared = Arc::new(Biased::new(0, FullFence));
        let other = shared.clone();
        let others = thread::spawn(move || other.try_with(|count| *count += 1).is_some());
        let mut done = 0;
        for _ in 0..2 {
            // SAFETY: this thread alone does so.
            done += u32::from(unsafe { shared.with(|count| *count += 1) }.is_some());
        }
        let others = others.join().expect("no panic");
        assert_eq!(shared.try_with(|count| *count), Some(done + u32::from(others)), "no step is lost");
    });
}

#[test]
fn two_others_never_meet_and_what_is_used_is_left_alone() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    walk(&model, || {
        let shared = Arc::new(Biased::new(0, FullFence));
        assert_eq!(shared.try_with_idle(|count| *count += 1), None, "it is new");
        let others: Vec<_> = (0..2)
            .map(|_| {
                let other = shared.clone();
                thread::spawn(move || other.try_with_idle(|count| *count += 1).is_some())
            })
            .collect();
        // SAFETY: this thread alone does so.
        let done = unsafe { shared.with(|count| *count += 1) }.is_some();
        let others: u32 = others.into_iter().map(|other| u32::from(other.join().expect("no panic"))).sum();
        assert_eq!(shared.try_with(|count| *count), Some(u32::from(done) + others));
    });
}

#[test]
fn two_owners_never_meet_one_who_has_both_behind_one_fence() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    walk(&model, || {
        let shared: Arc<[_; 2]> = Arc::new([0, 0].map(|count| Biased::new(count, FullFence)));
        let others = shared.clone();
        let others = thread::spawn(move || {
            let mut had = [0; 2];
            let count = Biased::try_with_each(&*others, |place, count| {
                *count += 1;
                had[place] += 1;
            });
            assert_eq!(count, had[0] + had[1], "as many as it says");
            had
        });
        let owner = shared.clone();
        // SAFETY: each has one owner.
        let owner = thread::spawn(move || usize::from(unsafe { owner[1].with(|count| *count += 1) }.is_some()));
        // SAFETY: as above.
        let first = usize::from(unsafe { shared[0].with(|count| *count += 1) }.is_some());
        let second = owner.join().expect("no panic");
        let others = others.join().expect("no panic");
        let mut counts = [0; 2];
        let all = Biased::try_with_each(&*shared, |place, count| counts[place] = *count);
        assert_eq!((all, counts), (2, [first + others[0], second + others[1]]), "no step is lost");
    });
}

#[test]
fn a_handle_that_others_drain_gives_each_frame_once() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    model.max_branches = 20_000;
    walk(&model, || {
        let entry = HugeEntry::FREE_INSTALLED.take(510).expect("in range");
        let rows = |row| if row == 0 { !0b11 } else { u64::MAX };
        let shared = Arc::new(super::shared::Shared::new(&[(entry, crate::host::Residency::Installed)], rows));
        // SAFETY: all that has it ends before what it borrows from: in this very closure.
        let tenant = unsafe { core::mem::transmute::<crate::Tenant<'_>, crate::Tenant<'static>>(shared.tenant()) };
        let biased = Arc::new(Biased::new(tenant.cpu(), FullFence));
        let other = biased.clone();
        let drainer = thread::spawn(move || other.try_with(Cpu::drain).is_some());
        // SAFETY: this thread alone does so.
        let alloc = || unsafe { biased.with(|cpu| cpu.alloc(Order::BASE).ok()) };
        let frames: Vec<_> = [alloc(), alloc()].into_iter().flatten().flatten().map(|a| a.position().0).collect();
        drainer.join().expect("no panic");
        assert!(frames.len() < 2 || frames[0] != frames[1], "a frame has one owner");
        assert!(biased.drain(), "nobody is at work");
        let left: u32 = shared.rows.iter().map(|row| row.load(Ordering::Relaxed).count_zeros()).sum();
        assert_eq!(left as usize + frames.len(), 2, "none is lost");
        shared.tenant().validate().expect("counters fit the bits");
        drop(biased);
    });
}
