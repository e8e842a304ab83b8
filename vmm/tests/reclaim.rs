//! What reclaim promises about frames that lie apart, about memory that the kernel keeps, and about
//! trees that a vCPU works in. Real machines on /dev/kvm, through the library.

#[path = "common/skipped.rs"]
mod skipped;

use shared_layout::{HUGE_SIZE, HugeId};
use skipped::skipped;
use std::sync::atomic::Ordering;
use vm_memory::{Bytes as _, GuestAddress};
use vmm::control::protocol::GuestRequest;
use vmm::control::report::{GuestOutcome, GuestReport};
use vmm::memory::Backing;
use vmm::monitor::MonitorError;
use vmm::service;
use vmm::units::Bytes;
use vmm::vm::{Vm, VmConfig};

const MIB: u64 = 1 << 20;
const FREE_INSTALLED: u16 = 0x0200;
const FREE_EVICTED: u16 = 0x4200;

/// A guest that waits for commands, or `None` with the reason on stderr where there is no KVM.
fn launch(mib: u64, cpus: u32, backing: Backing) -> Option<Vm> {
    if let Err(error) = vmm::boot::open_kvm() {
        skipped(vmm::error_line(&error));
        return None;
    }
    let config = VmConfig::new(Bytes(mib * MIB), cpus, backing);
    let vm = Vm::launch(config).unwrap_or_else(|error| panic!("{}", vmm::error_line(&error)));
    guest(&vm, &GuestRequest::Stats);
    Some(vm)
}

fn guest(vm: &Vm, request: &GuestRequest) -> GuestReport {
    let report = service::guest(vm, request).unwrap_or_else(|error| panic!("{}", vmm::error_line(&error)));
    assert_eq!((report.outcome, report.mismatches), (GuestOutcome::Ok, 0), "{report:?}");
    report
}

fn alloc(vm: &Vm, mib: u64) {
    guest(vm, &GuestRequest::Alloc { bytes: mib * MIB, order: 9 });
}

fn free(vm: &Vm, mib: Option<u64>, random: bool) {
    guest(vm, &GuestRequest::Free { bytes: mib.map(|mib| mib * MIB), random });
}

fn resident(vm: &Vm) -> u64 {
    vm.monitor().ram().residency().expect("the kernel answers").resident_bytes
}

fn frames_with(vm: &Vm, entry: u16) -> Vec<u32> {
    let entries = vm.platform().entries().iter().zip(0..);
    entries.filter(|(word, _)| word.load(Ordering::Relaxed) == entry).map(|(_, huge)| huge).collect()
}

/// Keeps the kernel from taking a stretch of guest memory back, until it is dropped.
struct Locked(*mut libc::c_void, usize);

impl Locked {
    fn new(vm: &Vm, huge: u32, frames: u32) -> Option<Self> {
        let address = vm.monitor().ram().host_address() + HugeId(huge).byte_offset();
        let (address, len) =
            (std::ptr::with_exposed_provenance_mut(address as usize), frames as usize * HUGE_SIZE as usize);
        // SAFETY: inside guest RAM, which outlives this; what it holds does not change.
        if unsafe { libc::mlock(address, len) } != 0 {
            skipped(format_args!("no memory may be locked here: {}", std::io::Error::last_os_error()));
            return None;
        }
        Some(Self(address, len))
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { libc::munlock(self.0, self.1) };
    }
}

#[test]
fn scattered_free_frames_go_back_and_their_neighbours_stay() {
    for backing in [Backing::Anon, Backing::Memfd] {
        let Some(vm) = launch(256, 1, backing) else { return };
        alloc(&vm, 200);
        free(&vm, Some(100), true);
        let free_frames = frames_with(&vm, FREE_INSTALLED);
        let before = resident(&vm);
        let pass = vm.monitor().evict(u32::MAX).expect("nothing is locked");
        assert_eq!(pass.discarded as usize, free_frames.len(), "{backing}");
        assert_eq!(before - resident(&vm), u64::from(pass.discarded) * HUGE_SIZE, "{backing}");
        assert_eq!(guest(&vm, &GuestRequest::Verify).bytes, 100 * MIB, "{backing}");
        assert_eq!(vm.monitor().audit().expect("the kernel answers"), 0);
        assert!(free_frames.iter().all(|huge| frames_with(&vm, FREE_EVICTED).contains(huge)));
    }
}

#[test]
fn a_frame_that_the_kernel_keeps_stays_with_the_guest_and_no_other_does() {
    let Some(vm) = launch(256, 1, Backing::Anon) else { return };
    alloc(&vm, 200);
    free(&vm, Some(140), true);
    let free_frames = frames_with(&vm, FREE_INSTALLED);
    let kept = free_frames[free_frames.len() / 2];
    let Some(locked) = Locked::new(&vm, kept, 1) else { return };
    let mut refusals = 0;
    // A refusal ends a pass after its batch; the next one goes on behind it.
    while frames_with(&vm, FREE_INSTALLED) != [kept] {
        match vm.monitor().evict(u32::MAX) {
            Ok(_) => {}
            Err(MonitorError::Discard { first, frames, .. }) => {
                assert_eq!((first, frames), (kept, 1), "only the locked frame is named");
                refusals += 1;
            }
            Err(error) => panic!("{error}"),
        }
        assert!(refusals < 16, "{:?} are left", frames_with(&vm, FREE_INSTALLED));
    }
    assert!(refusals > 0);
    let census = vm.monitor().census();
    assert_eq!(census.installed * HUGE_SIZE, resident(&vm), "R is what the kernel says");
    assert_eq!((census.free_installed, census.corrupt), (1, 0));

    // A shrink meets it too: all others are taken.
    let error = vm.shrink(72 * MIB, |_| false).expect_err("one frame cannot be had");
    assert!(vmm::error_line(&error).contains(&format!("the first of them frame {kept};")), "{error}");
    drop(locked);
    assert_eq!(vm.shrink(72 * MIB, |_| false).expect("nothing is locked").actual, 72 * MIB);
    assert_eq!(guest(&vm, &GuestRequest::Verify).bytes, 60 * MIB);
    vm.grow(256 * MIB).expect("in range");
    alloc(&vm, 120);
    assert_eq!(guest(&vm, &GuestRequest::Verify).bytes, 180 * MIB);
    assert_eq!(vm.monitor().audit().expect("the kernel answers"), 0);
}

#[test]
fn frames_of_a_tree_that_a_vcpu_works_in_are_evicted() {
    // One tree, which the only vCPU has reserved from its first block on.
    let Some(vm) = launch(64, 1, Backing::Anon) else { return };
    alloc(&vm, 40);
    free(&vm, Some(30), false);
    let free_frames = frames_with(&vm, FREE_INSTALLED).len();
    assert!(free_frames >= 15, "{free_frames}");
    let pass = vm.monitor().evict(u32::MAX).expect("nothing is locked");
    assert_eq!(pass.discarded as usize, free_frames, "all that is free, without a drain");
    assert_eq!(guest(&vm, &GuestRequest::Verify).bytes, 10 * MIB);
    alloc(&vm, 30);
    assert_eq!(guest(&vm, &GuestRequest::Verify).bytes, 40 * MIB);
}

#[test]
fn what_the_guest_writes_where_nothing_lies_is_not_kept_by_a_reclaim() {
    let Some(vm) = launch(64, 1, Backing::Anon) else { return };
    alloc(&vm, 20);
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
