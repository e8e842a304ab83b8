//! What reclaim promises about frames that lie apart, about memory that the kernel keeps, and about
//! trees that a vCPU works in. Real machines on /dev/kvm, through the library.

use llfree_monitor::MonitorError;
use llfree_monitor::memory::Backing;
use shared_layout::{HUGE_SIZE, HugeId};
use test_machine::MIB;
use test_machine::machine::{FREE_EVICTED, FREE_INSTALLED, Locked, fill, frames_with, free, launch, resident, verify};
use vm_memory::{Bytes as _, GuestAddress};

#[test]
fn scattered_free_frames_go_back_and_their_neighbours_stay() {
    for backing in [Backing::Anon, Backing::Memfd] {
        let Some(vm) = launch(256, 1, backing) else { return };
        fill(&vm, 200);
        free(&vm, Some(100), true);
        let free_frames = frames_with(&vm, FREE_INSTALLED);
        let before = resident(&vm);
        let pass = vm.monitor().evict(u32::MAX).expect("nothing is locked");
        assert_eq!(pass.discarded as usize, free_frames.len(), "{backing}");
        assert_eq!(before - resident(&vm), u64::from(pass.discarded) * HUGE_SIZE, "{backing}");
        verify(&vm, 100);
        assert_eq!(vm.monitor().audit().expect("the kernel answers"), 0);
        assert!(free_frames.iter().all(|huge| frames_with(&vm, FREE_EVICTED).contains(huge)));
    }
}

#[test]
fn a_frame_that_the_kernel_keeps_stays_with_the_guest_and_no_other_does() {
    let Some(vm) = launch(256, 1, Backing::Anon) else { return };
    fill(&vm, 200);
    free(&vm, Some(140), true);
    let free_frames = frames_with(&vm, FREE_INSTALLED);
    let kept = free_frames[free_frames.len() / 2];
    let Some(locked) = Locked::new(&vm, kept, 1) else { return };
    let (mut refusals, mut taken) = (0, 0);
    // A refusal ends a pass after its batch; the next pass continues after it.
    while frames_with(&vm, FREE_INSTALLED) != [kept] {
        match vm.monitor().evict(u32::MAX) {
            Ok(pass) => taken += pass.discarded,
            Err(MonitorError::Discard { first, frames, done, .. }) => {
                assert_eq!((first, frames), (kept, 1), "only the locked frame is named");
                taken += done.discarded;
                refusals += 1;
            }
            Err(error) => panic!("{error}"),
        }
        assert!(refusals < 16, "{:?} are left", frames_with(&vm, FREE_INSTALLED));
    }
    assert!(refusals > 0);
    assert_eq!(taken as usize, free_frames.len() - 1, "a refusal says what was taken all the same");
    let census = vm.monitor().census();
    assert_eq!(census.installed, resident(&vm).div_ceil(HUGE_SIZE), "R is what the kernel says");
    assert_eq!((census.free_installed, census.corrupt), (1, 0));

    // A shrink meets it too: all others are taken.
    let error = vm.shrink(72 * MIB, |_| false).expect_err("one frame cannot be had");
    assert!(llfree_base::error_line(&error).contains(&format!("the first of them frame {kept};")), "{error}");
    drop(locked);
    assert_eq!(vm.shrink(72 * MIB, |_| false).expect("nothing is locked").actual, 72 * MIB);
    verify(&vm, 60);
    vm.grow(256 * MIB).expect("in range");
    fill(&vm, 120);
    verify(&vm, 180);
    assert_eq!(vm.monitor().audit().expect("the kernel answers"), 0);
}

#[test]
fn frames_of_a_tree_that_a_vcpu_works_in_are_evicted() {
    // One tree, which the only vCPU has reserved from its first block on.
    let Some(vm) = launch(64, 1, Backing::Anon) else { return };
    fill(&vm, 40);
    free(&vm, Some(30), false);
    let free_frames = frames_with(&vm, FREE_INSTALLED).len();
    assert!(free_frames >= 15, "{free_frames}");
    let pass = vm.monitor().evict(u32::MAX).expect("nothing is locked");
    assert_eq!(pass.discarded as usize, free_frames, "all that is free, without a drain");
    verify(&vm, 10);
    fill(&vm, 30);
    verify(&vm, 40);
}

#[test]
fn what_the_guest_writes_where_nothing_lies_is_not_kept_by_a_reclaim() {
    let Some(vm) = launch(64, 1, Backing::Anon) else { return };
    fill(&vm, 20);
    free(&vm, None, false);
    let at = |huge: u32| GuestAddress(HugeId(huge).byte_offset());
    let free_frames = frames_with(&vm, FREE_INSTALLED);
    for huge in &free_frames {
        vm.monitor().ram().guest_memory().write_obj(u64::MAX, at(*huge)).expect("in RAM");
    }
    vm.monitor().evict(u32::MAX).expect("nothing is locked");
    for huge in free_frames {
        let word: u64 = vm.monitor().ram().guest_memory().read_obj(at(huge)).expect("in RAM");
        assert_eq!(word, 0);
    }
}
