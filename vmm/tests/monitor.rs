//! What the monitor promises under concurrency: the VM stops, the host asks for a status, a guest
//! cheats. Real machines on /dev/kvm, through the library.

use llfree_control::protocol::GuestRequest;
use llfree_monitor::memory::Backing;
use llfree_monitor::{Direction, InstallError, MonitorError};
use shared_layout::table::HELD_STAYS;
use shared_layout::{HUGE_SIZE, HugeId, HugeRange};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use test_machine::MIB;
use test_machine::machine::{FREE_EVICTED, HELD, Locked, launch_unwatched};
use vm_memory::{Bytes as _, GuestAddress};
use vmm::service::{self, Service};
use vmm::vm::Vm;

/// More time than the step needs, however slow the machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Does what a guest would that touches a frame without asking; which, says its entry.
fn touch_unasked(vm: &Vm, entry: u16) {
    let index = vm.platform().table().entries().iter().position(|word| word.load(Ordering::Relaxed) == entry);
    let at = GuestAddress(index.expect("there is such a frame") as u64 * HUGE_SIZE);
    vm.monitor().ram().guest_memory().write_obj(1u64, at).expect("in RAM");
}

#[test]
fn a_waiting_shrink_ends_when_the_vm_stops() {
    let Some(vm) = launch_unwatched(64, 1, Backing::Anon) else { return };
    vm.run_guest(&GuestRequest::Alloc { bytes: 48 * MIB, order: 9 }).expect("it answers");
    std::thread::scope(|scope| {
        let begin = Instant::now();
        let shrink = scope.spawn(|| vm.shrink(16 * MIB, |waited| waited < 2 * PATIENCE));
        while vm.monitor().wanted() == 0 {
            std::thread::yield_now();
        }
        vm.stop();
        assert!(shrink.join().expect("no panic").expect("in range").actual > 16 * MIB);
        assert!(begin.elapsed() < PATIENCE, "it waited to the end");
    });
}

#[test]
fn a_resize_that_another_one_overtook_does_not_turn_around() {
    let Some(vm) = launch_unwatched(64, 1, Backing::Anon) else { return };
    let monitor = vm.monitor();
    let resize = |direction, frames| {
        let resize = monitor.resize(direction, frames, || (), |_| false).expect("the kernel takes it");
        (resize.pass.frames, monitor.limit())
    };
    assert_eq!(resize(Direction::Shrink, 16), (16, 16));
    assert_eq!(resize(Direction::Shrink, 24), (0, 16), "the limit is below already");
    assert_eq!(resize(Direction::Grow, 28), (12, 28));
    assert_eq!(resize(Direction::Grow, 20), (0, 28), "the limit is above already");
}

#[test]
fn installs_and_passes_end_when_the_vm_stops() {
    let Some(vm) = launch_unwatched(512, 1, Backing::Anon) else { return };
    let monitor = vm.monitor();
    assert_eq!(monitor.install(HugeRange::saturating(HugeId(8), 64)), Ok(()));
    vm.stop();
    let resident = monitor.ram().residency().expect("the kernel answers");
    assert_eq!(monitor.install(HugeRange::saturating(HugeId(100), 100)), Err(InstallError::Stopping));
    assert_eq!(monitor.evict(u32::MAX).expect("nothing to refuse").frames, 0);
    assert_eq!(monitor.ram().residency().expect("the kernel answers"), resident);
}

#[test]
fn what_a_guest_writes_over_the_header_is_not_believed() {
    let Some(vm) = launch_unwatched(64, 1, Backing::Anon) else { return };
    let word = |at: usize| {
        u64::from_le_bytes(std::array::from_fn(|i| vm.platform().shared_bytes()[at + i].load(Ordering::Relaxed)))
    };
    let (limit, wanted, epoch) = (0x100, 0x108, 0x110);
    vm.shrink(32 * MIB, |_| false).expect("in range");
    for byte in &vm.platform().shared_bytes()[limit..epoch + 8] {
        byte.store(0xff, Ordering::Relaxed);
    }
    assert_eq!((vm.monitor().limit(), vm.monitor().wanted()), (16, 0));
    assert_eq!(service::status(&vm, "liar").expect("status answers").wanted_bytes, 0);
    vm.grow(64 * MIB).expect("in range");
    // Raised at the start, before the return and after it.
    assert_eq!((word(limit), word(wanted), word(epoch)), (32, 0, HELD_STAYS | 3), "the host's own numbers");
}

#[test]
fn a_status_is_answered_in_the_middle_of_a_shrink() {
    // Of 4 KiB pages, so that the pass has many batches that take their time.
    let Some(vm) = launch_unwatched(512, 1, Backing::Memfd) else { return };
    let in_the_middle = |_| {
        assert_eq!(vm.monitor().install(HugeRange::saturating(HugeId(8), 240)), Ok(()));
        let seen = std::thread::scope(|scope| {
            let shrink = scope.spawn(|| vm.shrink(64 * MIB, |_| false).expect("in range"));
            while vm.monitor().limit() == 256 && !shrink.is_finished() {
                std::thread::yield_now();
            }
            let seen = service::status(&vm, "busy").expect("status answers").limit_bytes;
            assert_eq!(shrink.join().expect("no panic").actual, 64 * MIB);
            seen
        });
        vm.grow(512 * MIB).expect("in range");
        64 * MIB < seen && seen < 512 * MIB
    };
    // Whether this thread runs during a pass is up to the scheduler, so try a few passes.
    assert!((0..20).any(in_the_middle), "every status waited for the whole pass");
}

#[test]
fn a_status_reports_what_a_guest_used_beyond_its_limit() {
    let Some(vm) = launch_unwatched(64, 1, Backing::Anon) else { return };
    vm.shrink(8 * MIB, |_| false).expect("in range");
    for index in 4..16 {
        let at = GuestAddress(index * 2 * HUGE_SIZE);
        vm.monitor().ram().guest_memory().write_obj(1u64, at).expect("in RAM");
    }
    let first = service::status(&vm, "cheat").expect("status answers");
    assert!(first.monitor.violations >= 11, "{first:?}");
    let second = service::status(&vm, "cheat").expect("status answers");
    assert_eq!(second.monitor.violations, first.monitor.violations);
    assert!(first.resident_bytes > second.resident_bytes, "it says what it found, not what it left");
}

#[test]
fn a_cheat_is_found_without_anybody_asking() {
    let Some(vm) = launch_unwatched(64, 1, Backing::Anon) else { return };
    let vm = Arc::new(vm);
    let _service = Service::start(vm.clone(), "watched").expect("threads");
    vm.shrink(32 * MIB, |_| false).expect("in range");
    touch_unasked(&vm, HELD);
    touch_unasked(&vm, FREE_EVICTED);
    let start = Instant::now();
    while vm.monitor().counters.violations.get() < 2 {
        assert!(start.elapsed() < PATIENCE, "nobody looked");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(vm.monitor().audit().expect("the kernel answers"), 0, "both were settled");
}

#[test]
fn the_frame_that_nobody_may_use_is_not_called_used() {
    let Some(vm) = launch_unwatched(64, 1, Backing::Anon) else { return };
    vm.run_guest(&GuestRequest::Idle).expect("it answers");
    let status = service::status(&vm, "new").expect("status answers");
    assert_eq!(status.guest_used_bytes, Some(2 * MIB), "its image alone");
    assert_eq!(status.guest_free_bytes, Some(60 * MIB));
    assert_eq!(status.limit_bytes, 64 * MIB);
}

#[test]
fn what_the_kernel_keeps_of_a_cheat_does_not_keep_an_audit_from_the_rest() {
    let Some(vm) = launch_unwatched(64, 1, Backing::Anon) else { return };
    vm.shrink(16 * MIB, |_| false).expect("in range");
    let held: Vec<u32> = test_machine::machine::frames_with(&vm, HELD).into_iter().take(4).collect();
    for huge in &held {
        let at = GuestAddress(HugeId(*huge).byte_offset());
        vm.monitor().ram().guest_memory().write_obj(1u64, at).expect("in RAM");
    }
    let Some(locked) = Locked::new(&vm, held[1], 1) else { return };
    let error = vm.monitor().audit().expect_err("one frame is locked");
    assert!(matches!(error, MonitorError::Repair { first, frames: 1, .. } if first == held[1]), "{error}");
    assert_eq!(vm.monitor().counters.held_violations.get(), 3, "the others went back");
    drop(locked);
    assert_eq!(vm.monitor().audit().expect("nothing is locked"), 1);
}
