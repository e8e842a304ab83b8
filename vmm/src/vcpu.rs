//! A vCPU's thread: enters the guest, and turns each of KVM's exits into a step or an end.
//!
//! The thread owns its `VcpuFd`. It leaves the guest when the VM stops: [`kick`] sends a signal
//! whose only effect is that `KVM_RUN` returns `EINTR`, and goes on sending until the thread is
//! gone, so a signal that arrives just before `KVM_RUN` loses nothing.

use crate::boot::{BootError, Platform};
use crate::devices::Devices;
use crate::doorbell::{Doorbell, Flow};
use crate::exit::ExitReason;
use crate::guest::Guest;
use guest_abi::Call;
use guest_abi::call::{DOORBELL_BYTES, DOORBELL_PORTS};
use kvm_ioctls::{VcpuExit, VcpuFd};
use llfree_base::counters::{CallCounters, ExitCounters};
use llfree_base::{error_line, faults};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// What a vCPU did since it started.
#[derive(Default, Debug)]
pub struct VcpuCounters {
    /// Its exits.
    pub exits: ExitCounters,
    /// Its rings of the doorbell.
    pub rings: CallCounters,
    /// In the guest, as opposed to asleep in a `Wait`.
    pub busy: AtomicBool,
    /// The kernel's number of its thread; 0 before it runs.
    pub thread: AtomicI32,
}

/// What a vCPU thread shares with the rest of the VM.
pub struct VcpuContext {
    /// What it runs. First, as it may share the VM, which goes before its memory does.
    pub guest: Arc<dyn Guest>,
    /// The platform region.
    pub platform: Arc<Platform>,
    /// Serves its calls.
    pub doorbell: Arc<Doorbell>,
    /// Behind the doorbell's page.
    pub devices: Arc<Devices>,
    /// Set before the kick.
    pub stop: Arc<AtomicBool>,
    /// See [`VcpuCounters`].
    pub counters: Arc<VcpuCounters>,
}

/// How long the kicked threads may take together.
const KICK: Duration = Duration::from_secs(5);

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Makes the kick harmless for this process; call once before the first vCPU runs.
///
/// # Errors
/// If the kernel refuses the signal handler.
pub fn prepare_kick() -> Result<(), vmm_sys_util::errno::Error> {
    register_signal_handler(SIGRTMIN(), on_kick)
}

/// Gets vCPU threads out of the guest and joins them; their stop flag must be set. One that does
/// not come, because nobody reads what it logs, is left behind: it owns all it uses.
pub fn kick(threads: Vec<JoinHandle<()>>) {
    let deadline = Instant::now() + KICK;
    for thread in threads {
        while !thread.is_finished() && Instant::now() < deadline {
            // A thread that is gone meanwhile needs no signal.
            let _ = thread.kill(SIGRTMIN());
            std::thread::sleep(Duration::from_micros(200));
        }
        if thread.is_finished() && thread.join().is_err() {
            log::error!("a vCPU thread panicked");
        }
    }
}

/// Runs vCPU `index` until the VM stops (`None`) or the guest ends.
pub fn run(mut fd: VcpuFd, index: u32, context: &VcpuContext) -> Option<ExitReason> {
    let counters = &context.counters;
    let cannot = |what: String| Some(ExitReason::Vcpu { vcpu: index, what });
    counters.busy.store(true, Ordering::Relaxed);
    counters.thread.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Relaxed);
    while !context.stop.load(Ordering::Acquire) {
        let call = match faults::point(faults::VCPU_RUN).map_err(Into::into).and_then(|()| fd.run()) {
            Ok(VcpuExit::MmioWrite(address, data)) => {
                counters.exits.mmio.inc();
                match address.checked_sub(context.platform.doorbell_gpa()) {
                    Some(offset) if offset < DOORBELL_BYTES => Call::from_offset(offset),
                    _ => {
                        // Without a device there, as on a bus: the write is lost.
                        context.devices.write(address, data);
                        continue;
                    }
                }
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                counters.exits.mmio.inc();
                if !context.devices.read(address, data) {
                    data.fill(0xff);
                }
                continue;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                counters.exits.pio.inc();
                if DOORBELL_PORTS.contains(&port) {
                    Call::from_port(port)
                } else {
                    match context.guest.write_port(port, data) {
                        Some(end) => return Some(end),
                        None => continue,
                    }
                }
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                counters.exits.pio.inc();
                context.guest.read_port(port, data);
                continue;
            }
            Ok(exit) => {
                counters.exits.other.inc();
                return cannot(
                    match exit {
                        VcpuExit::Hlt => "it halted with interrupts off".into(),
                        VcpuExit::Shutdown => "triple fault".into(),
                        VcpuExit::FailEntry(reason, _) => format!("KVM refused to enter the guest, reason {reason:#x}"),
                        VcpuExit::InternalError => "KVM could not emulate an instruction".into(),
                        other => format!("unexpected exit {other:?}"),
                    } + &position(&fd, context),
                );
            }
            Err(error) => {
                counters.exits.other.inc();
                match error.errno() {
                    libc::EINTR | libc::EAGAIN => continue,
                    libc::EFAULT => {
                        let what = "the host has no memory behind an address that the guest used";
                        return cannot(what.to_string() + &position(&fd, context));
                    }
                    _ => return cannot(format!("KVM_RUN failed: {error}")),
                }
            }
        };
        counters.rings.calls.inc();
        if call == Some(Call::Exception) {
            let (what, details) = match context.platform.crash_report(&fd, index) {
                Ok(frame) => {
                    let kernel = context.guest.kernel();
                    (frame.summary(index, kernel), frame.details(kernel))
                }
                Err(error @ BootError::NoException { .. }) => {
                    (error_line(&error) + &position(&fd, context), String::new())
                }
                Err(error) => {
                    let why = error_line(&error);
                    (format!("an exception on vCPU {index}, whose registers cannot be read: {why}"), String::new())
                }
            };
            return Some(ExitReason::Exception { what, details });
        }
        counters.busy.store(call != Some(Call::Wait), Ordering::Relaxed);
        let flow = context.doorbell.ring(index, call);
        counters.busy.store(true, Ordering::Relaxed);
        match flow {
            Flow::Continue => {}
            Flow::Leave => return None,
            Flow::End(end) => return Some(end),
        }
    }
    None
}

/// Where the guest was, for a report.
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
