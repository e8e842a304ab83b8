//! What `validate` promises: no findings in a sound VM, even a busy one, and the right findings in
//! one that is not. Real machines on /dev/kvm, through the library.

use llfree_control::protocol::GuestRequest;
use llfree_control::report::ValidateReport;
use llfree_monitor::memory::Backing;
use shared_layout::{HUGE_SIZE, HugeEntry, HugeId, HugeRange};
use std::sync::atomic::{AtomicBool, Ordering};
use test_machine::MIB;
use test_machine::machine::{FREE_EVICTED, HELD, fill, free, guest, launch_unwatched};
use vm_memory::{Bytes as _, GuestAddress};
use vmm::service;
use vmm::vm::Vm;

fn validate(vm: &Vm) -> ValidateReport {
    let report = service::validate(vm).unwrap_or_else(|error| panic!("{}", llfree_base::error_line(&error)));
    assert_eq!(report.clean, report.findings.is_empty());
    assert_eq!(report.installed + report.evicted + report.held, report.huge_frames);
    report
}

#[track_caller]
fn is_clean(vm: &Vm) {
    let report = validate(vm);
    assert!(report.clean, "{report:?}");
}

/// The findings as words, counts and frames.
fn findings(vm: &Vm) -> Vec<(String, u64, Vec<u32>, bool)> {
    let report = validate(vm);
    report.findings.into_iter().map(|f| (f.check.to_string(), f.count, f.first_frames, f.guest_can_cause)).collect()
}

fn found(check: &str, frames: &[u32], guest_can_cause: bool) -> (String, u64, Vec<u32>, bool) {
    (check.to_owned(), frames.len() as u64, frames.to_vec(), guest_can_cause)
}

fn frame_with(vm: &Vm, entry: u16) -> u32 {
    let at = vm.platform().table().entries().iter().rposition(|word| word.load(Ordering::Relaxed) == entry);
    at.expect("there is such a frame") as u32
}

/// Overwrites a frame's entry as a guest could, and returns the old one.
fn lie(vm: &Vm, huge: u32, entry: u16) -> u16 {
    vm.platform().table().entries()[huge as usize].swap(entry, Ordering::Relaxed)
}

fn touch(vm: &Vm, huge: u32) {
    let at = GuestAddress(HugeId(huge).byte_offset());
    vm.monitor().ram().guest_memory().write_obj(1u64, at).expect("in RAM");
}

#[test]
fn a_sound_vm_is_clean_at_every_stage_of_its_life() {
    for backing in Backing::ALL {
        let Some(vm) = launch_unwatched(256, 2, backing) else { continue };
        is_clean(&vm);
        fill(&vm, 160);
        is_clean(&vm);
        guest(&vm, &GuestRequest::Alloc { bytes: 16 * MIB, order: 0 });
        free(&vm, Some(120), true);
        is_clean(&vm);
        vm.shrink(128 * MIB, |_| false).expect("in range");
        is_clean(&vm);
        vm.monitor().evict(u32::MAX).expect("nothing is locked");
        is_clean(&vm);
        vm.grow(192 * MIB).expect("in range");
        let report = validate(&vm);
        assert!(report.clean && report.held * HUGE_SIZE == 64 * MIB, "{report:?}");
    }
}

#[test]
fn a_vm_at_work_is_clean_at_any_moment() {
    let Some(vm) = launch_unwatched(256, 2, Backing::Anon) else { return };
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let churn = scope.spawn(|| {
            guest(&vm, &GuestRequest::Churn { millis: 2000 });
            over.store(true, Ordering::Relaxed);
        });
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                vm.shrink(160 * MIB, |_| false).expect("in range");
                vm.monitor().evict(u32::MAX).expect("nothing is locked");
                vm.grow(256 * MIB).expect("in range");
            }
        });
        while !churn.is_finished() {
            is_clean(&vm);
        }
    });
    is_clean(&vm);
}

#[test]
fn lies_in_the_entries_are_named_with_their_frames() {
    let Some(vm) = launch_unwatched(64, 2, Backing::Anon) else { return };
    vm.shrink(48 * MIB, |_| false).expect("in range");
    let (held, evicted) = (frame_with(&vm, HELD), frame_with(&vm, FREE_EVICTED));
    // The image is the only frame with memory.
    let image = frame_with(&vm, 0x2000);
    for (huge, lie_told, check) in [
        (held, FREE_EVICTED, "held_entry"),
        (held, 0x0200, "held_entry"),
        (evicted, HELD, "held_entry"),
        (evicted, 0x0200, "evicted_entry"),
        (image, 0x6000, "evicted_entry"),
        (evicted, 0xffff, "invalid_entry"),
        (evicted, 0x43ff, "invalid_entry"),
    ] {
        let truth = lie(&vm, huge, lie_told);
        assert_eq!(findings(&vm), [found(check, &[huge], true)], "{lie_told:#06x} instead of {truth:#06x}");
        lie(&vm, huge, truth);
        is_clean(&vm);
    }
    for huge in 0..32 {
        lie(&vm, huge, 0xffff);
    }
    let all = findings(&vm);
    assert_eq!(all, [("invalid_entry".to_owned(), 32, (0..8).collect(), true)], "all are counted, eight are named");
}

#[test]
fn memory_that_nobody_asked_for_and_memory_that_is_gone_are_told_apart() {
    let Some(vm) = launch_unwatched(64, 2, Backing::Anon) else { return };
    vm.shrink(48 * MIB, |_| false).expect("in range");
    let (held, evicted) = (frame_with(&vm, HELD), frame_with(&vm, FREE_EVICTED));
    touch(&vm, held);
    touch(&vm, evicted);
    let mut both = [held, evicted];
    both.sort_unstable();
    assert_eq!(findings(&vm), [found("unasked_memory", &both, true)]);
    assert_eq!(findings(&vm), [found("unasked_memory", &both, true)], "it only looks");
    assert_eq!(vm.monitor().audit().expect("the kernel answers"), 2);
    is_clean(&vm);

    // What no guest can do: an installed frame loses its memory without the monitor.
    vm.monitor().ram().discard(HugeId(evicted)).expect("in RAM");
    assert_eq!(findings(&vm), [found("missing_memory", &[evicted], false)]);
}

#[test]
fn a_header_that_was_written_over_is_found() {
    let Some(vm) = launch_unwatched(64, 2, Backing::Anon) else { return };
    vm.shrink(48 * MIB, |_| false).expect("in range");
    for at in [0x100, 0x108, 0x110] {
        vm.platform().shared_bytes()[at].fetch_xor(0xff, Ordering::Relaxed);
    }
    let header = ("header".to_owned(), 3, Vec::new(), true);
    assert_eq!(findings(&vm), [header], "limit, wanted and return epoch");
    // A grow rewrites all three.
    vm.grow(64 * MIB).expect("in range");
    is_clean(&vm);
}

#[test]
fn a_guest_that_writes_all_the_time_cannot_hold_it_up() {
    let Some(vm) = launch_unwatched(64, 2, Backing::Anon) else { return };
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let hostile = scope.spawn(|| {
            let mut random = fastrand::Rng::with_seed(7);
            while !over.load(Ordering::Relaxed) {
                let bytes = vm.platform().shared_bytes();
                bytes[0x100 + random.usize(..0x18)].store(random.u8(..), Ordering::Relaxed);
                lie(&vm, random.u32(..32), random.u16(..));
                let _ = vm.monitor().install(HugeRange::saturating(HugeId(random.u32(..40)), random.u32(..8)));
            }
        });
        for _ in 0..50 {
            for finding in validate(&vm).findings {
                assert!(finding.guest_can_cause && finding.count <= 32, "{finding:?}");
            }
        }
        over.store(true, Ordering::Relaxed);
        hostile.join().expect("no panic");
    });
}

#[test]
fn zeroes_that_the_kernel_shares_are_no_fault_of_the_host_and_free_nothing() {
    let Some(vm) = launch_unwatched(64, 1, Backing::Anon) else { return };
    fill(&vm, 32);
    free(&vm, None, false);
    guest(&vm, &GuestRequest::Idle);
    let resident = || vm.monitor().ram().residency().expect("the kernel answers").resident_bytes;
    let all = resident();
    let frames: Vec<u32> = (0..32).filter(|huge| is_free_and_backed(&vm, *huge)).collect();
    assert!(frames.len() >= 16, "{frames:?}");
    // Under pressure the kernel takes pages of zeroes and maps the page that all share, as a read of missing
    // memory does.
    let ram = vm.monitor().ram();
    for huge in &frames[..8] {
        ram.discard(HugeId(*huge)).expect("in RAM");
        let at = GuestAddress(HugeId(*huge).byte_offset());
        assert_eq!(ram.guest_memory().read_obj::<u64>(at).expect("in RAM"), 0);
    }
    assert_eq!(all - resident(), 8 * HUGE_SIZE);
    is_clean(&vm);
    // What is not there cannot go back.
    let before = resident();
    let pass = vm.monitor().evict(u32::MAX).expect("nothing is locked");
    assert_eq!(pass.discarded as usize, frames.len());
    assert_eq!(pass.freed_bytes, before - resident());
    assert_eq!(pass.freed_bytes, (frames.len() as u64 - 8) * HUGE_SIZE);
    is_clean(&vm);
}

/// Whether the frame is free and has memory.
fn is_free_and_backed(vm: &Vm, huge: u32) -> bool {
    vm.platform().table().entries()[huge as usize].load(Ordering::Relaxed) == HugeEntry::FREE_INSTALLED.bits()
}
