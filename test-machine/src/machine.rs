//! Machines on /dev/kvm through the library: launched, asked, looked at.
//!
//! Sizes are in MiB. Whatever a guest answers, its memory must hold what it wrote: each request is
//! checked for that.

use crate::MIB;
use crate::skipped;
use llfree_base::units::Bytes;
use llfree_control::protocol::GuestRequest;
use llfree_control::report::{GuestOutcome, GuestReport};
use llfree_monitor::install_config::InstallConfig;
use llfree_monitor::memory::{Backing, UseUserfaultfd};
use shared_layout::{HUGE_SIZE, HugeId};
use std::sync::atomic::Ordering;
use vmm::vm::{Vm, VmConfig};

/// The entry of a free, backed frame.
pub const FREE_INSTALLED: u16 = 0x0200;
/// The entry of a free frame without.
pub const FREE_EVICTED: u16 = 0x4200;
/// The entry of a frame that the host holds.
pub const HELD: u16 = 0xc000;

/// A guest that waits for commands, or `None` with the reason on stderr where there is no KVM.
pub fn launch(mib: u64, cpus: u32, backing: Backing) -> Option<Vm> {
    start(VmConfig::new(Bytes(mib * MIB), cpus, backing))
}

/// Likewise, one whose cheating nobody sees in the act: that is in tests/violations.rs.
pub fn launch_unwatched(mib: u64, cpus: u32, backing: Backing) -> Option<Vm> {
    let install = InstallConfig { userfaultfd: UseUserfaultfd::Off, ..InstallConfig::default() };
    start(VmConfig { install, ..VmConfig::new(Bytes(mib * MIB), cpus, backing) })
}

/// Likewise, of any kind.
pub fn start(config: VmConfig) -> Option<Vm> {
    if let Some(reason) = crate::no_kvm() {
        skipped(reason);
        return None;
    }
    let backing = config.backing;
    match Vm::launch(config) {
        Ok(vm) => {
            guest(&vm, &GuestRequest::Stats);
            Some(vm)
        }
        // The pool is the administrator's; nobody else can make this test run.
        Err(error) if backing == Backing::Hugetlb => {
            skipped(llfree_base::error_line(&error));
            None
        }
        Err(error) => panic!("{}", llfree_base::error_line(&error)),
    }
}

/// Asks the guest, which may have done a part only.
#[track_caller]
pub fn ask(vm: &Vm, request: &GuestRequest) -> GuestReport {
    let report = vm.run_guest(request).unwrap_or_else(|error| panic!("{}", llfree_base::error_line(&error)));
    assert!(report.outcome != GuestOutcome::Corrupt && report.mismatches == 0, "{report:?}");
    report
}

/// Asks the guest, which must have done all of it.
#[track_caller]
pub fn guest(vm: &Vm, request: &GuestRequest) -> GuestReport {
    let report = ask(vm, request);
    assert_eq!(report.outcome, GuestOutcome::Ok, "{report:?}");
    report
}

/// Has the guest allocate and stamp as much as it can get of this.
#[track_caller]
pub fn alloc(vm: &Vm, mib: u64, order: u8) -> GuestReport {
    ask(vm, &GuestRequest::Alloc { bytes: mib * MIB, order })
}

/// Has the guest allocate and stamp whole huge frames, all of it.
#[track_caller]
pub fn fill(vm: &Vm, mib: u64) {
    guest(vm, &GuestRequest::Alloc { bytes: mib * MIB, order: 9 });
}

/// Has the guest free so much, or all.
#[track_caller]
pub fn free(vm: &Vm, mib: Option<u64>, random: bool) -> GuestReport {
    guest(vm, &GuestRequest::Free { bytes: mib.map(|mib| mib * MIB), random })
}

/// Has the guest check what it wrote, which is so much.
#[track_caller]
pub fn verify(vm: &Vm, mib: u64) {
    assert_eq!(guest(vm, &GuestRequest::Verify).bytes, mib * MIB);
}

/// Guest memory that is resident, in bytes by the kernel's account.
#[track_caller]
pub fn resident(vm: &Vm) -> u64 {
    vm.monitor().ram().residency().expect("the kernel answers").resident_bytes
}

/// The huge frames whose entries are this.
pub fn frames_with(vm: &Vm, entry: u16) -> Vec<u32> {
    let entries = vm.platform().table().entries().iter().zip(0..);
    entries.filter(|(word, _)| word.load(Ordering::Relaxed) == entry).map(|(_, huge)| huge).collect()
}

/// Keeps the kernel from taking a stretch of guest memory back, until it is dropped.
pub struct Locked(*mut libc::c_void, usize);

impl Locked {
    /// `None` with the reason on stderr where no memory may be locked.
    pub fn new(vm: &Vm, huge: u32, frames: u32) -> Option<Self> {
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
