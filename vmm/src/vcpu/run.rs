//! The loop of a vCPU's thread: obeys its orders, enters the guest, and acts on the outcome.
//!
//! **Pausing.** KVM finishes an access to a device or a port when `KVM_RUN` is called again: only then
//! are the guest's registers past the instruction (`complete_userspace_io` in the kernel). A vCPU that
//! is told to pause therefore enters KVM once more with `immediate_exit` set: KVM completes the pending
//! access and returns `EINTR` before the guest runs. If completing it exits again, as for a wide or a
//! repeated access, that exit is served like any other, and KVM is entered again. KVM bounds that.
//!
//! **Calls that wait** (`Wait`, and an `Install` of many frames) come back unanswered when the VM pauses.
//! The vCPU parks like any other and makes the call again when it is told to run. The guest sees one
//! call that took longer.

use super::VcpuContext;
use super::exits::{self, Step};
use crate::exit::ExitReason;
use crate::parking::Order;
use guest_abi::Call;
use kvm_ioctls::VcpuFd;
use std::sync::atomic::Ordering;

/// Runs a vCPU until the VM stops (`None`) or the guest ends.
pub fn run(mut fd: VcpuFd, context: &VcpuContext) -> Option<ExitReason> {
    let (counters, parking) = (context.vcpu.counters(), context.vcpu.parking());
    counters.busy.store(true, Ordering::Relaxed);
    counters.thread.store(llfree_base::identity::this_thread(), Ordering::Relaxed);
    let mut unanswered: Option<Call> = None;
    loop {
        let order = parking.order();
        if order == Order::Stop {
            return None;
        }
        let step = match unanswered.take_if(|_| order == Order::Run) {
            Some(call) => exits::ring(&fd, Some(call), context),
            None => exits::enter(&mut fd, order == Order::Pause, context),
        };
        match step {
            Step::Continue => {}
            Step::Interrupted if order == Order::Pause => {
                parking.park();
                // Tells a guest with a paravirtual clock that it was stopped, so that its watchdogs do
                // not fire; KVM refuses for a guest without one, which needs nothing.
                let _ = fd.kvmclock_ctrl();
            }
            Step::Interrupted => {}
            Step::Unanswered(call) => unanswered = Some(call),
            Step::Leave => return None,
            Step::End(reason) => return Some(reason),
        }
    }
}
