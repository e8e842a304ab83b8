//! From the launch to the agent's first answer, and what a bare KVM machine takes for one exit.
//!
//! The baseline makes a VM with the same memory slot and one vCPU, and runs a single `hlt`: what
//! KVM itself needs, whatever the VMM above it does.

use crate::error::BenchError;
use crate::interrupt;
use crate::progress::{Progress, Show};
use crate::series::{Row, Series};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VcpuExit;
use llfree_base::units::Bytes;
use llfree_control::protocol::GuestRequest;
use llfree_monitor::memory::{Backing, GuestRam};
use shared_layout::HugeId;
use std::time::{Duration, Instant};
use vm_memory::{Bytes as _, GuestAddress};
use vmm::vm::{Vm, VmConfig};

/// What a boot takes, and the end of the VM.
const USUAL: Duration = Duration::from_millis(40);

/// Measures `iterations` boots of each, after one to warm up.
pub(crate) fn run(mem: Bytes, iterations: u32, show: Show) -> Result<Vec<Row>, BenchError> {
    let (mut ours, mut bare) = (Series::default(), Series::default());
    let rounds = iterations + 1;
    let mut progress = Progress::new(show, "boot", [("llfree", rounds, USUAL), ("raw", rounds, USUAL)]);
    for round in 0..rounds {
        if interrupt::requested() {
            break;
        }
        let guest = progress.step("llfree", "", || guest_boot(mem))?;
        let kvm = progress.step("raw", "", || bare_boot(mem))?;
        if round > 0 {
            ours.add(guest, 1);
            bare.add(kvm, 1);
        }
    }
    Ok(vec![ours.row("llfree", "boot_to_first_answer", 1, &bare), bare.row("raw", "kvm_to_first_exit", 1, &bare)])
}

fn guest_boot(mem: Bytes) -> Result<Duration, BenchError> {
    let start = Instant::now();
    let vm = Vm::launch(VmConfig::new(mem, 1, Backing::Anon))?;
    vm.run_guest(&GuestRequest::Stats)?;
    Ok(start.elapsed())
}

fn bare_boot(mem: Bytes) -> Result<Duration, BenchError> {
    const HLT: u8 = 0xf4;
    let failed = |step| move |source| BenchError::Kvm { step, source };
    let start = Instant::now();
    let ram = GuestRam::new(mem.0, Backing::Anon)?;
    ram.populate(HugeId(0))?;
    ram.guest_memory().write_obj(HLT, GuestAddress(0x1000)).map_err(|error| BenchError::Guest(error.to_string()))?;
    let vm = vmm::boot::open_kvm()?.create_vm().map_err(failed("create a VM"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: ram.bytes(),
        userspace_addr: ram.host_address(),
    };
    // SAFETY: the mapping lives until the end of this function, longer than the VM and its vCPU.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("map guest memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("create a vCPU"))?;
    let mut sregs = vcpu.get_sregs().map_err(failed("read registers"))?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).map_err(failed("set registers"))?;
    let mut regs = vcpu.get_regs().map_err(failed("read registers"))?;
    (regs.rip, regs.rflags) = (0x1000, 2);
    vcpu.set_regs(&regs).map_err(failed("set registers"))?;
    match vcpu.run().map_err(failed("run a vCPU"))? {
        VcpuExit::Hlt => Ok(start.elapsed()),
        other => Err(BenchError::Guest(format!("a machine that only halts left with {other:?}"))),
    }
}
