//! What the registers of a CPU's handle must never do: give out a frame without memory as usable,
//! a frame twice, or keep one forever.

use crate::common::{Table, order, ready};
use llfree::biased::TOGETHER;
use llfree::{Allocation, Biased, Class, Cpu, Fence, FreeError, FullFence, HANDLE_FRAMES, Reclaim, Tenant};
use shared_layout::{FrameId, HugeEntry, HugeId, Order};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

#[test]
fn a_row_that_was_away_is_not_believed_to_have_memory() {
    // All frames of the handle's row go back past the handle, the host evicts them, and one
    // comes back through the handle without ever having been installed.
    let table = Table::installed(1);
    let tenant = table.tenant();
    let mut cpu = tenant.cpu();
    let row: Vec<_> = (0..64).map(|_| ready(cpu.alloc(Order::BASE).expect("free"))).collect();
    row.iter().for_each(|frame| tenant.free(*frame, Order::BASE).expect("ours"));
    assert!(table.reclaim(0, Reclaim::Soft));
    let Ok(Allocation::Evicted(block)) = tenant.alloc_at(row[0], Order::BASE) else { panic!("it was evicted") };
    let (frame, order) = block.release();
    cpu.free(frame, order).expect("ours");
    assert!(matches!(cpu.alloc(Order::BASE), Ok(Allocation::Evicted(_))), "nothing is behind it");
}

#[test]
fn one_handle_alone_cannot_fool_itself_about_memory() {
    // The same with a single handle: a row filled by base frames goes back as one block.
    let table = Table::installed(1);
    let tenant = table.tenant();
    let mut cpu = tenant.cpu();
    let row: Vec<_> = (0..64).map(|_| ready(cpu.alloc(Order::BASE).expect("free"))).collect();
    let first = *row.iter().min().expect("64 frames");
    cpu.free(first, Order::ROW).expect("ours");
    assert!(table.reclaim(0, Reclaim::Soft));
    let Ok(Allocation::Evicted(block)) = cpu.alloc(Order::ROW) else { panic!("it was evicted") };
    let (frame, _) = block.release();
    (frame.0..frame.0 + 64).for_each(|f| cpu.free(FrameId(f), Order::BASE).expect("ours"));
    assert!(matches!(cpu.alloc(Order::BASE), Ok(Allocation::Evicted(_))), "nothing is behind it");
}

#[test]
fn an_install_is_seen_by_a_row_that_was_evicted() {
    let table = Table::evicted(1);
    let tenant = table.tenant();
    let mut cpu = tenant.cpu();
    assert!(matches!(cpu.alloc(Order::BASE), Ok(Allocation::Evicted(_))));
    table.install(0);
    assert!(matches!(cpu.alloc(Order::BASE), Ok(Allocation::Ready(_))));
}

#[test]
fn no_frame_is_in_two_registers() {
    // Frees into the row, its neighbours and the rest of a crowded huge frame, then all out again.
    let table = Table::installed(1);
    let tenant = table.tenant();
    let mut all: Vec<_> = (0..512).map(|f| ready(tenant.alloc_at(FrameId(f), Order::BASE).expect("free"))).collect();
    let mut cpu = tenant.cpu();
    let mut rng = fastrand::Rng::with_seed(3);
    for _ in 0..20_000 {
        if rng.bool() && !all.is_empty() {
            let frame = all.swap_remove(rng.usize(..all.len()));
            if rng.u8(..4) == 0 {
                tenant.free(frame, Order::BASE).expect("ours");
            } else {
                cpu.free(frame, Order::BASE).expect("ours");
                assert_eq!(cpu.free(frame, Order::BASE), Err(FreeError::NotAllocated(frame, Order::BASE)));
            }
        } else if let Ok(allocation) = cpu.alloc(Order::BASE) {
            let frame = ready(allocation);
            assert!(!all.contains(&frame), "{frame:?} has two owners");
            all.push(frame);
        } else {
            assert_eq!(all.len(), 512, "a handle that fails has nothing left");
        }
        let outside = tenant.stats().free_frames + all.len() as u64;
        assert!(512 - outside <= HANDLE_FRAMES, "a handle holds back {}", 512 - outside);
    }
    cpu.drain();
    assert_eq!(tenant.stats().free_frames + all.len() as u64, 512);
    tenant.validate().expect("counters fit the bits");
}

#[test]
fn orders_and_classes_mix_on_one_handle() {
    let table = Table::installed(33);
    let tenant = table.tenant();
    let mut cpu = tenant.cpu();
    let mut rng = fastrand::Rng::with_seed(11);
    let mut owned = vec![false; 33 * 512];
    let mut blocks = Vec::new();
    for _ in 0..30_000 {
        if rng.u8(..100) < 55 {
            let o = order([0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10][rng.usize(..13)]);
            let class = Class::new(rng.u8(..7)).expect("in range");
            match cpu.alloc_class(o, class) {
                Ok(allocation) => {
                    let frame = ready(allocation);
                    for f in frame.0..frame.0 + o.frames() {
                        assert!(!std::mem::replace(&mut owned[f as usize], true), "frame {f} has two owners");
                    }
                    blocks.push((frame, o));
                }
                Err(_) => assert!(!table.has_free_block(o), "order {} is free in the table", o.get()),
            }
        } else if !blocks.is_empty() {
            let (frame, o) = blocks.swap_remove(rng.usize(..blocks.len()));
            owned[frame.0 as usize..(frame.0 + o.frames()) as usize].fill(false);
            cpu.free(frame, o).expect("ours");
        }
    }
    blocks.into_iter().for_each(|(frame, o)| cpu.free(frame, o).expect("ours"));
    cpu.drain();
    assert_eq!(tenant.stats().free_huge, 33);
    tenant.validate().expect("counters fit the bits");
}

#[test]
fn a_class_of_the_users_own_keeps_its_huge_blocks_apart() {
    let table = Table::installed(64);
    let tenant = table.tenant();
    let mut cpu = tenant.cpu();
    let own = Class::new(4).expect("in range");
    let tree = |frame: FrameId| frame.0 / 512 / 16;
    for _ in 0..8 {
        let huge = ready(cpu.alloc(Order::HUGE).expect("free"));
        let other = ready(cpu.alloc_class(Order::HUGE, own).expect("free"));
        assert_ne!(tree(huge), tree(other), "two classes share a tree while there are fresh ones");
    }
}

#[test]
fn single_frames_fill_a_tree_before_the_next() {
    let table = Table::installed(4 * 32);
    let tenant = table.tenant();
    let mut cpu = tenant.cpu();
    for n in 0..32 * 512 {
        let frame = ready(cpu.alloc(Order::BASE).expect("free"));
        assert!(frame.0 < 32 * 512, "frame {n} is {frame:?}");
    }
    // Frames that come free where it went through are found before another tree is begun.
    for n in 0..512 {
        tenant.free(FrameId(32 * n), Order::BASE).expect("ours");
    }
    for n in 0..512 {
        let frame = ready(cpu.alloc(Order::BASE).expect("free"));
        assert!(frame.0 < 32 * 512, "frame {n} is {frame:?}");
    }
}

/// A place is looked at again when it is used: by then its huge frame may be free as a whole.
#[test]
fn a_block_does_not_cut_up_what_came_free_as_a_whole() {
    let table = Table::installed(64);
    let tenant = table.tenant();
    let mut cpu = tenant.cpu();
    let blocks: Vec<FrameId> = (0..128).map(|_| ready(cpu.alloc(order(3)).expect("free"))).collect();
    // Of the first huge frame a block of each row by the handle, which remembers it, and the rest by others.
    let (first, second): (Vec<FrameId>, Vec<_>) = blocks.into_iter().partition(|block| block.0 / 512 == 0);
    for block in &first {
        let freed = if block.0 % 64 == 0 { cpu.free(*block, order(3)) } else { tenant.free(*block, order(3)) };
        freed.expect("ours");
    }
    assert!(tenant.entry(HugeId(0)).is_some_and(HugeEntry::is_all_free));
    tenant.free(second[0], order(3)).expect("ours");
    assert_eq!(ready(cpu.alloc(order(3)).expect("free")), second[0], "there is room in use");
}

/// Two handles in one tree pay for each other's cache lines: each has a part of memory, and all of it if need be.
#[test]
fn handles_divide_memory_among_themselves() {
    let table = Table::installed(512);
    let tenant = table.tenant();
    let mut cpus: Vec<_> = (0..4).map(|_| tenant.cpu()).collect();
    let mut rng = fastrand::Rng::with_seed(3);
    let mut trees = vec![BTreeSet::new(); cpus.len()];
    let mut held = vec![Vec::new(); cpus.len()];
    // Each at half of its share at most, by turns.
    for step in 0..40_000 {
        let (cpu, held, trees) = (&mut cpus[step % 4], &mut held[step % 4], &mut trees[step % 4]);
        let used: u64 = held.iter().map(|(_, order): &(FrameId, Order)| order.frames()).sum();
        if used < 64 * 512 {
            let order = order(rng.u8(..=10));
            let frame = ready(cpu.alloc(order).expect("half is free"));
            trees.insert(frame.0 / 512 / 32);
            held.push((frame, order));
        } else {
            let (frame, order) = held.swap_remove(rng.usize(..held.len()));
            cpu.free(frame, order).expect("ours");
        }
    }
    // Without homes nearly all trees would be shared by all: some 80 pairs. With them a large block may be nowhere else.
    let pairs = trees.iter().enumerate().flat_map(|(n, some)| trees[n + 1..].iter().map(move |others| (some, others)));
    let shared: usize = pairs.map(|(some, others)| some.intersection(others).count()).sum();
    assert!(shared <= 4, "{trees:?}");
    // The last one has all that the others leave, far beyond its share.
    let mut last = cpus.pop().expect("four");
    for (held, mut cpu) in held.iter_mut().zip(cpus) {
        held.drain(..).for_each(|(frame, order)| cpu.free(frame, order).expect("ours"));
    }
    let used: u64 = held[3].iter().map(|(_, order)| order.frames()).sum();
    let found = std::iter::from_fn(|| last.alloc(Order::BASE).ok()).count() as u64;
    assert_eq!(found + used, 512 * 512);
}

/// A handle that had all of memory went on in the tree in hand when that became a newcomer's.
#[test]
fn a_handle_leaves_its_trees_to_a_newcomer_that_lives_around_them() {
    let table = Table::installed(512);
    let tenant = table.tenant();
    let mut first = tenant.cpu();
    // More than half of memory, then half of that goes back, a row of two.
    let blocks: Vec<_> = (0..316 * 512 / 64).map(|_| ready(first.alloc(Order::ROW).expect("free"))).collect();
    let last = blocks.iter().map(|block| block.0 / 512 / 32).max().expect("some");
    assert!(last > 8, "up to tree {last}");
    blocks.iter().step_by(2).for_each(|block| tenant.free(*block, Order::ROW).expect("ours"));
    let mut second = tenant.cpu();
    let home = ready(second.alloc(Order::ROW).expect("free")).0 / 512 / 32;
    assert_eq!(home, 8, "the middle");
    let abroad = (0..1000).filter(|_| ready(first.alloc(Order::ROW).expect("free")).0 / 512 / 32 >= home).count();
    assert!(abroad <= 16, "{abroad} of 1000 blocks where the other one lives");
}

/// Where home had nothing left a handle takes a tree elsewhere. It stayed there when there was room at home again.
#[test]
fn a_handle_comes_home_when_there_is_room() {
    let table = Table::installed(512);
    let tenant = table.tenant();
    let (mut first, mut second) = (tenant.cpu(), tenant.cpu());
    let is_lower = |frame: &FrameId| frame.0 < 256 * 512;
    let take = |cpu: &mut Cpu<'_>| ready(cpu.alloc(Order::BASE).expect("free"));
    assert!(is_lower(&take(&mut first)) && !is_lower(&take(&mut second)));
    // Of every second frame that is in use in its half a handle makes a free one.
    let thin = |frames: &[FrameId]| {
        frames.iter().step_by(2).for_each(|frame| tenant.free(*frame, Order::BASE).expect("ours"));
    };
    thin(&std::iter::from_fn(|| Some(take(&mut second)).filter(|frame| !is_lower(frame))).collect::<Vec<_>>());
    thin(&std::iter::from_fn(|| Some(take(&mut first)).filter(is_lower)).collect::<Vec<_>>());
    // It is abroad now, with a part of a huge frame in hand.
    let abroad = (0..4000).filter(|_| !is_lower(&take(&mut first))).count();
    assert!(abroad <= 512, "{abroad} of 4000 frames");
}

/// Both handles of a table of 512 huge frames have taken all blocks of an order in their halves, and every second one in the upper
/// half is free. Those of the lower half.
fn all_but_half_of_the_upper_half(tenant: &Tenant<'_>, cpus: [&mut Cpu<'_>; 2], order: Order) -> Vec<FrameId> {
    let [first, second] = cpus;
    let is_lower = |frame: &FrameId| frame.0 < 256 * 512;
    let take = |cpu: &mut Cpu<'_>| cpu.alloc(order).ok().map(ready);
    let (one, other) = (take(first).expect("free"), take(second).expect("free"));
    assert!(is_lower(&one) && !is_lower(&other));
    let upper: Vec<_> = std::iter::from_fn(|| take(second).filter(|frame| !is_lower(frame))).collect();
    upper.iter().step_by(2).for_each(|frame| tenant.free(*frame, order).expect("ours"));
    std::iter::from_fn(|| take(first).filter(is_lower)).collect()
}

/// Where home had no block left a handle took all that it needed from the tree where it found one, whatever came free at home; now a
/// few.
#[test]
fn the_next_block_comes_from_home_if_it_has_one_again() {
    for o in [6, 7, 8] {
        let table = Table::installed(512);
        let tenant = table.tenant();
        let (mut first, mut second) = (tenant.cpu(), tenant.cpu());
        let lower = all_but_half_of_the_upper_half(&tenant, [&mut first, &mut second], order(o));
        let is_lower = |frame: FrameId| frame.0 < 256 * 512;
        assert!(!is_lower(ready(first.alloc(order(o)).expect("free"))), "order {o}: home has none");
        lower.iter().step_by(2).for_each(|frame| tenant.free(*frame, order(o)).expect("ours"));
        let abroad = (0..100).filter(|_| !is_lower(ready(first.alloc(order(o)).expect("free")))).count();
        assert!(abroad <= 40, "order {o}: {abroad} of 100 blocks");
    }
}

/// A block that was freed abroad came back from there, so that blocks among others' never became fewer.
#[test]
fn places_at_home_come_before_those_abroad() {
    for o in [3, 6, 8] {
        let table = Table::installed(512);
        let tenant = table.tenant();
        let (mut first, mut second) = (tenant.cpu(), tenant.cpu());
        let lower = all_but_half_of_the_upper_half(&tenant, [&mut first, &mut second], order(o));
        let abroad = ready(first.alloc(order(o)).expect("free"));
        assert!(abroad.0 >= 256 * 512, "order {o}");
        // No two in one row: these would gather in a register.
        let home = lower[lower.len() / 2];
        for block in [home, abroad] {
            first.free(block, order(o)).expect("ours");
        }
        assert_eq!(ready(first.alloc(order(o)).expect("free")), home, "order {o}");
    }
}

/// Memory that needs an install was taken near by while there was backed memory elsewhere.
#[test]
fn no_handle_takes_evicted_memory_while_there_is_other() {
    for o in [0, 3, 6, 9, 10] {
        let table = Table::installed(512);
        (256..512).for_each(|huge| assert!(table.reclaim(huge, Reclaim::Soft)));
        let tenant = table.tenant();
        let mut cpus = [tenant.cpu(), tenant.cpu()];
        // A quarter of memory each, which is all that is backed.
        for _ in 0..(128 * 512) >> o {
            for cpu in &mut cpus {
                let block = cpu.alloc(order(o)).expect("free");
                assert!(matches!(block, Allocation::Ready(_)), "order {o}: {block:?}");
            }
        }
    }
}

/// A handle put its blocks among those of another class because that was near.
#[test]
fn no_handle_steals_near_by_while_there_are_free_trees() {
    let table = Table::installed(512);
    let tenant = table.tenant();
    // A movable frame in each tree of one half.
    for tree in 0..8 {
        let _ = ready(tenant.alloc_at(FrameId(tree * 32 * 512), Order::BASE).expect("free"));
    }
    let mut cpus = [tenant.cpu(), tenant.cpu()];
    for (cpu, class) in cpus.iter_mut().zip([Class::IMMOVABLE, Class::new(3).expect("in range")]) {
        for o in [0, 4, 8] {
            let frame = ready(cpu.alloc_class(order(o), class).expect("free"));
            assert!(frame.0 >= 256 * 512, "{class:?}, order {o}: among movable blocks at {frame:?}");
        }
    }
}

/// More handles than trees: those without a part of their own work everywhere.
#[test]
fn more_handles_than_trees_find_all_memory() {
    let table = Table::installed(64);
    let tenant = table.tenant();
    let mut cpus: Vec<_> = (0..7).map(|_| tenant.cpu()).collect();
    let found: usize = cpus.iter_mut().map(|cpu| (0..8).map_while(|_| cpu.alloc(Order::HUGE).ok()).count()).sum();
    assert_eq!(found, 56);
    assert_eq!(std::iter::from_fn(|| cpus[0].alloc(Order::HUGE).ok()).count(), 8);
}

/// Somebody was stopped in the middle of an allocation, its frame counted and its bit not set yet: handles
/// refused blocks that were free.
#[test]
fn a_party_that_stopped_half_way_hides_no_block() {
    for o in 0..=5 {
        let table = Table::installed(1);
        let tenant = table.tenant();
        for f in 0..448 {
            let _ = ready(tenant.alloc_at(FrameId(f), Order::BASE).expect("free"));
        }
        let entry = HugeEntry::from_bits(table.entries[0].load(Ordering::Relaxed));
        table.entries[0].store(entry.take(1).expect("64 are free").bits(), Ordering::Relaxed);
        let mut cpu = tenant.cpu();
        let blocks = (0..).map_while(|_| cpu.alloc(order(o)).ok()).count();
        assert_eq!(blocks, 63 >> o, "blocks of order {o} in 63 frames");
        assert!(o > 0 || tenant.stats().free_frames == 0);
    }
}

/// Frames exchanged at random move together: fuller trees are filled first, so that others come free. One in 25 did not where a
/// tree with more room came before one with little, and where the tree beside the last one was entered whatever room it had.
#[test]
fn memory_gets_tidier_while_it_is_used() {
    // A table whose hints are looked at one by one, and one whose trees are listed.
    for (huge, in_pairs) in [(512, false), (512, true), (4096, false), (4096, true)] {
        let table = Table::installed(huge);
        let tenant = table.tenant();
        let mut cpu = tenant.cpu();
        let take = |cpu: &mut Cpu<'_>| ready(cpu.alloc(Order::BASE).expect("half is free"));
        let mut held: Vec<_> = (0..huge * 512).map(|_| take(&mut cpu)).collect();
        let mut rng = fastrand::Rng::with_seed(1);
        let mut free_any = |held: &mut Vec<_>, cpu: &mut Cpu<'_>| {
            let frame = held.swap_remove(rng.usize(..held.len()));
            cpu.free(frame, Order::BASE).expect("ours");
        };
        (0..held.len() / 2).for_each(|_| free_any(&mut held, &mut cpu));
        assert_eq!(tenant.stats().free_huge, 0);
        let exchanged = held.len() / 10;
        for _ in 0..100 {
            if in_pairs {
                for _ in 0..exchanged {
                    free_any(&mut held, &mut cpu);
                    held.push(take(&mut cpu));
                }
            } else {
                (0..exchanged).for_each(|_| free_any(&mut held, &mut cpu));
                held.extend((0..exchanged).map(|_| take(&mut cpu)));
            }
        }
        let (free, possible) = (tenant.stats().free_huge as usize, huge / 2);
        println!("{huge} huge frames, in pairs: {in_pairs}: {free} of {possible}");
        assert!(
            free * 100 >= possible * 98,
            "{free} of {possible} huge frames that could be free, in pairs: {in_pairs}"
        );
    }
}

/// Handles that did little hold back little: 64 idle ones once hid an eighth of 128 MiB.
#[test]
fn idle_handles_hold_back_no_more_than_they_gave_out() {
    let table = Table::installed(64);
    let tenant = table.tenant();
    let mut idle: Vec<_> = (0..64).map(|_| tenant.cpu()).collect();
    idle.iter_mut().for_each(|cpu| _ = ready(cpu.alloc(Order::BASE).expect("free")));
    let mut cpu = tenant.cpu();
    let found = std::iter::from_fn(|| cpu.alloc(Order::BASE).ok()).count();
    let hidden = 64 * 512 - 64 - found;
    assert!(hidden * 4096 <= 1 << 20, "{hidden} frames are hidden");
    // Nor do they keep what they freed, once drained.
    idle.iter_mut().for_each(Cpu::drain);
    assert_eq!(std::iter::from_fn(|| cpu.alloc(Order::BASE).ok()).count(), hidden);
}

#[test]
fn handles_that_sleep_hide_nothing_once_others_drained_them() {
    // 64 handles that each worked, and do nothing more.
    let table = Table::installed(64);
    let tenant = table.tenant();
    let mut handles: Vec<_> = (0..64).map(|_| Biased::new(tenant.cpu(), FullFence)).collect();
    let mut kept = Vec::new();
    for handle in &mut handles {
        let (mut owner, _) = handle.owner();
        let frames =
            owner.with(|cpu| (0..300).map(|_| ready(cpu.alloc(Order::BASE).expect("free"))).collect::<Vec<_>>());
        let mut frames = frames.expect("nobody else is here");
        kept.push(frames.split_off(200));
        owner.with(|cpu| frames.iter().for_each(|frame| cpu.free(*frame, Order::BASE).expect("ours")));
    }
    let hidden = || {
        let all = 64 * 512 - kept.iter().flatten().count() as u64;
        all - tenant.stats().free_frames
    };
    assert!(hidden() * 4096 > 1 << 20, "what they hold back is worth it: {} frames", hidden());
    // Whoever comes by takes note of what was used, and drains it the next time.
    assert!(!handles.iter().any(Biased::drain_idle));
    assert!(handles.iter().all(Biased::drain_idle));
    assert_eq!(hidden(), 0);
    assert!(!handles.iter().any(Biased::drain_idle), "nobody used them since");
    tenant.validate().expect("counters fit the bits");
    // Their owners go on.
    for (handle, kept) in handles.iter_mut().zip(kept) {
        let (mut owner, others) = handle.owner();
        owner.with(|cpu| kept.iter().for_each(|frame| cpu.free(*frame, Order::BASE).expect("ours"))).expect("alone");
        assert!(others.drain());
    }
    assert_eq!(tenant.stats().free_frames, 64 * 512);
}

/// Counts the heavy ones, and has none while that is said.
#[derive(Clone, Copy)]
struct Counting<'c> {
    heavy: &'c AtomicU32,
    fails: &'c AtomicBool,
}

impl PartialEq for Counting<'_> {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.heavy, other.heavy)
    }
}

// SAFETY: the fences are the usual ones.
unsafe impl Fence for Counting<'_> {
    fn light(&self) {
        FullFence.light();
    }

    fn heavy(&self) -> bool {
        self.heavy.fetch_add(1, Ordering::Relaxed);
        FullFence.heavy() && !self.fails.load(Ordering::Relaxed)
    }
}

#[test]
fn many_handles_are_drained_behind_one_fence() {
    let table = Table::installed(64);
    let tenant = table.tenant();
    let (count, other, fails) = (AtomicU32::new(0), AtomicU32::new(0), AtomicBool::new(false));
    let fence = Counting { heavy: &count, fails: &fails };
    let heavy = |count: &AtomicU32| count.swap(0, Ordering::Relaxed);
    let free = || tenant.stats().free_frames;
    let mut handles: Vec<_> = (0..3 * TOGETHER).map(|_| Biased::new(tenant.cpu(), fence)).collect();
    let work = |handle: &mut Biased<_, _>| {
        let (mut owner, _) = handle.owner();
        owner.with(|cpu: &mut Cpu<'_>| {
            let frame = ready(cpu.alloc(Order::BASE).expect("free"));
            cpu.free(frame, Order::BASE).expect("ours");
        })
    };
    handles.iter_mut().take(TOGETHER).for_each(|handle| work(handle).expect("alone"));
    assert!(free() < 64 * 512, "they hold something back");
    assert_eq!((Biased::drain_all(&handles[..TOGETHER]), heavy(&count)), (TOGETHER, 1));
    assert_eq!(free(), 64 * 512);
    // One that is named twice is drained once, one that is at work not at all.
    assert_eq!((Biased::drain_all([&handles[0], &handles[0], &handles[1]]), heavy(&count)), (2, 1));
    let (mut owner, others) = handles[0].owner();
    assert_eq!(owner.with(|_| Biased::drain_all([others])), Some(0));
    assert_eq!(heavy(&count), 0, "nor does that cost anything");
    assert_eq!((Biased::drain_all(&handles), heavy(&count)), (3 * TOGETHER, 3));

    // Of those that sleep the same: what was used is noted first.
    for _ in 0..2 {
        assert_eq!(Biased::drain_all_idle(&handles), 0);
        assert_eq!(heavy(&count), 0);
        assert_eq!((Biased::drain_all_idle(&handles), heavy(&count)), (3 * TOGETHER, 3));
        assert_eq!((Biased::drain_all_idle(&handles), heavy(&count)), (0, 0), "nobody used them since");
        handles.iter_mut().for_each(|handle| work(handle).expect("others are gone"));
    }

    // Without a fence nobody has anything, and owners go on.
    fails.store(true, Ordering::Relaxed);
    assert_eq!((Biased::drain_all(&handles), heavy(&count)), (0, 3));
    fails.store(false, Ordering::Relaxed);
    handles.iter_mut().for_each(|handle| work(handle).expect("others are gone"));

    // A fence of its own.
    handles.truncate(2);
    let stranger = Biased::new(tenant.cpu(), Counting { heavy: &other, fails: &fails });
    assert_eq!(Biased::drain_all([&handles[0], &stranger, &handles[1]]), 3);
    assert_eq!((heavy(&count), heavy(&other)), (2, 1));
    drop((handles, stranger));
    assert_eq!(free(), 64 * 512);
}

#[test]
fn a_handle_at_work_and_those_who_drain_it_lose_nothing() {
    let table = Table::installed(2);
    let tenant = table.tenant();
    let mut handle = Biased::new(tenant.cpu(), FullFence);
    let (mut owner, others) = handle.owner();
    let (end, drains) = (AtomicBool::new(false), AtomicU32::new(0));
    let start = Instant::now();
    thread::scope(|threads| {
        let drain = || {
            while !end.load(Ordering::Relaxed) {
                let drained = u32::from(others.drain()) + u32::from(Biased::drain_all([others]) == 1);
                drains.fetch_add(drained, Ordering::Relaxed);
            }
        };
        // Also if something below fails.
        struct End<'a>(&'a AtomicBool);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let ends = End(&end);
        (0..2).for_each(|_| _ = threads.spawn(drain));
        let mut held: Vec<FrameId> = Vec::new();
        // On a machine at work the others may come late.
        let is_enough = |step| step >= 200_000 && drains.load(Ordering::Relaxed) >= 100;
        for step in (0..u32::MAX).take_while(|step| !is_enough(*step) && start.elapsed() < Duration::from_secs(20)) {
            // Now more, now less, and never one from two sides.
            if step % 96 < 48 || held.is_empty() {
                let got = owner.with(|cpu| cpu.alloc(Order::BASE));
                held.push(ready(got.unwrap_or_else(|| tenant.alloc(Order::BASE)).expect("there is more")));
            } else {
                let frame = held.swap_remove(step as usize * 31 % held.len());
                let done = owner.with(|cpu| cpu.free(frame, Order::BASE));
                done.unwrap_or_else(|| tenant.free(frame, Order::BASE)).expect("ours");
            }
        }
        let mut each = held.clone();
        each.sort_unstable();
        each.dedup();
        assert_eq!(each.len(), held.len(), "a frame has one owner");
        held.iter().for_each(|frame| tenant.free(*frame, Order::BASE).expect("ours"));
        drop(ends);
    });
    assert!(drains.into_inner() > 0, "nobody else ever had it");
    drop(handle);
    assert_eq!(tenant.stats().free_frames, 1024);
    tenant.validate().expect("counters fit the bits");
}

#[test]
fn a_panic_of_its_owner_leaves_a_handle_to_others() {
    let mut thing = Biased::new(1, FullFence);
    let (mut owner, others) = thing.owner();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| owner.with(|_| panic!("on purpose"))));
    assert!(panicked.is_err());
    assert_eq!(others.try_with(|thing| *thing), Some(1));
    assert_eq!(owner.with(|thing| *thing), Some(1));
}
