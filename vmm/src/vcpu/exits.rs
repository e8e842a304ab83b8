//! What each of KVM's exits leads to: one function per exit, each of which handles anything the guest
//! may have caused it with.

use super::VcpuContext;
use crate::boot::BootError;
use crate::doorbell::Flow;
use crate::exit::ExitReason;
use guest_abi::Call;
use guest_abi::call::{DOORBELL_BYTES, DOORBELL_PORTS};
use kvm_ioctls::{VcpuExit, VcpuFd};
use llfree_base::{error_line, faults};
use std::sync::atomic::Ordering;

/// What the vCPU does after an exit.
pub(super) enum Step {
    /// It goes on.
    Continue,
    /// A signal or `immediate_exit` made KVM return; no access is left to complete.
    Interrupted,
    /// The VM pauses in the middle of this call, which must be made again.
    Unanswered(Call),
    /// The VM stops.
    Leave,
    /// The guest ends.
    End(ExitReason),
}

/// An access to the doorbell that is still to be served, or one that is complete.
enum Access {
    Done,
    Rings(Option<Call>),
    Ends(ExitReason),
}

/// Enters KVM and acts on the exit; with `complete_only`, KVM only completes a pending access.
pub(super) fn enter(fd: &mut VcpuFd, complete_only: bool, context: &VcpuContext) -> Step {
    let counters = context.vcpu.counters();
    fd.set_kvm_immediate_exit(complete_only.into());
    let access = match faults::point(faults::VCPU_RUN).map_err(Into::into).and_then(|()| fd.run()) {
        Ok(VcpuExit::MmioWrite(address, data)) => {
            counters.exits.mmio.inc();
            mmio_write(address, data, context)
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            counters.exits.mmio.inc();
            mmio_read(address, data, context)
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            counters.exits.pio.inc();
            port_write(port, data, context)
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            counters.exits.pio.inc();
            port_read(port, data, context)
        }
        Ok(exit) => {
            counters.exits.other.inc();
            let what = unexpected(exit);
            return cannot_go_on(what + &position(fd, context), context);
        }
        Err(error) => {
            counters.exits.other.inc();
            return refused(error, fd, context);
        }
    };
    match access {
        Access::Done => Step::Continue,
        Access::Ends(reason) => Step::End(reason),
        Access::Rings(call) => {
            counters.rings.calls.inc();
            ring(fd, call, context)
        }
    }
}

/// Serves a call, for the first time or again; `None` is a ring without a call.
pub(super) fn ring(fd: &VcpuFd, call: Option<Call>, context: &VcpuContext) -> Step {
    if call == Some(Call::Exception) {
        return Step::End(exception(fd, context));
    }
    let counters = context.vcpu.counters();
    counters.busy.store(call != Some(Call::Wait), Ordering::Relaxed);
    let flow = context.doorbell.ring(context.vcpu.index(), call);
    match (flow, call) {
        // `busy` stays as it is: a call that waits goes on waiting.
        (Flow::Again, Some(call)) => return Step::Unanswered(call),
        (Flow::Leave, _) => return Step::Leave,
        (Flow::End(reason), _) => return Step::End(reason),
        (Flow::Continue | Flow::Again, _) => {}
    }
    counters.busy.store(true, Ordering::Relaxed);
    Step::Continue
}

fn mmio_write(address: u64, data: &[u8], context: &VcpuContext) -> Access {
    match address.checked_sub(context.platform.doorbell_gpa()) {
        Some(offset) if offset < DOORBELL_BYTES => Access::Rings(Call::from_offset(offset)),
        _ => {
            // If no device is there, the write is lost, as on a bus.
            context.devices.write(address, data);
            Access::Done
        }
    }
}

fn mmio_read(address: u64, data: &mut [u8], context: &VcpuContext) -> Access {
    if !context.devices.read(address, data) {
        data.fill(0xff);
    }
    Access::Done
}

fn port_write(port: u16, data: &[u8], context: &VcpuContext) -> Access {
    if DOORBELL_PORTS.contains(&port) {
        return Access::Rings(Call::from_port(port));
    }
    context.guest.write_port(port, data).map_or(Access::Done, Access::Ends)
}

fn port_read(port: u16, data: &mut [u8], context: &VcpuContext) -> Access {
    context.guest.read_port(port, data);
    Access::Done
}

fn unexpected(exit: VcpuExit<'_>) -> String {
    match exit {
        VcpuExit::Hlt => "it halted with interrupts off".into(),
        VcpuExit::Shutdown => "triple fault".into(),
        VcpuExit::FailEntry(reason, _) => format!("KVM refused to enter the guest, reason {reason:#x}"),
        VcpuExit::InternalError => "KVM could not emulate an instruction".into(),
        other => format!("unexpected exit {other:?}"),
    }
}

/// `KVM_RUN` returned an error.
fn refused(error: kvm_ioctls::Error, fd: &VcpuFd, context: &VcpuContext) -> Step {
    match error.errno() {
        libc::EINTR => Step::Interrupted,
        // Another vCPU started this one: it may run now.
        libc::EAGAIN => Step::Continue,
        libc::EFAULT => {
            let what = "no host memory backs an address that the guest used";
            cannot_go_on(what.to_string() + &position(fd, context), context)
        }
        _ => cannot_go_on(format!("KVM_RUN failed: {error}"), context),
    }
}

fn cannot_go_on(what: String, context: &VcpuContext) -> Step {
    Step::End(ExitReason::Vcpu { vcpu: context.vcpu.index(), what })
}

/// The exception entry was reached: says what happened, judging by the registers.
fn exception(fd: &VcpuFd, context: &VcpuContext) -> ExitReason {
    let (index, kernel) = (context.vcpu.index(), context.guest.kernel());
    let (what, details) = match context.platform.crash_report(fd, index) {
        Ok(frame) => (frame.summary(index, kernel), frame.details(kernel)),
        Err(error @ BootError::NoException { .. }) => (error_line(&error) + &position(fd, context), String::new()),
        Err(error) => {
            let why = error_line(&error);
            (format!("an exception on vCPU {index}, whose registers cannot be read: {why}"), String::new())
        }
    };
    ExitReason::Exception { what, details }
}

/// The guest's position, for a report.
fn position(fd: &VcpuFd, context: &VcpuContext) -> String {
    match fd.get_regs() {
        Ok(regs) => {
            let name = context.guest.kernel().and_then(|kernel| kernel.symbolize(regs.rip));
            let name = name.unwrap_or_else(|| "unknown code".into());
            format!(" (rip {:#x}, {name})", regs.rip)
        }
        Err(_) => String::new(),
    }
}
