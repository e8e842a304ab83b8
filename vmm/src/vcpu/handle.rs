//! [`VcpuHandle`]: a vCPU as the rest of the VM sees it, and the kick that gets vCPUs out of the guest.
//!
//! A kick is a signal whose only effect is that `KVM_RUN` returns `EINTR`. One that arrives just before
//! `KVM_RUN` is lost, so kicks come in rounds, until each vCPU has settled. A round kicks all that have
//! not: vCPUs leave the guest in parallel, and a slow one does not hold up the others.

use crate::parking::{Order, Parking};
use llfree_base::counters::{CallCounters, ExitCounters};
use llfree_base::lock;
use std::sync::atomic::{AtomicBool, AtomicI32};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// How long all vCPUs together may take to end.
const STOP: Duration = Duration::from_secs(5);
/// The interval between two rounds of kicks.
const ROUND: Duration = Duration::from_micros(200);

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Makes the kick harmless for this process; call once before the first vCPU runs.
///
/// # Errors
/// If the kernel refuses the signal handler.
pub fn prepare_kick() -> Result<(), vmm_sys_util::errno::Error> {
    register_signal_handler(SIGRTMIN(), on_kick)
}

/// What a vCPU did since it started.
#[derive(Default, Debug)]
pub struct VcpuCounters {
    /// Its exits.
    pub exits: ExitCounters,
    /// Its rings of the doorbell.
    pub rings: CallCounters,
    /// Whether it is in the guest, as opposed to asleep in a `Wait`.
    pub busy: AtomicBool,
    /// The kernel's number of its thread; 0 before it runs.
    pub thread: AtomicI32,
}

/// One vCPU, as the rest of the VM sees it.
#[derive(Debug)]
pub struct VcpuHandle {
    index: u32,
    counters: VcpuCounters,
    parking: Parking,
    /// `None` before it is started and after it was joined.
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl VcpuHandle {
    /// A vCPU whose thread has not been started yet.
    #[must_use]
    pub fn new(index: u32) -> Self {
        Self { index, counters: VcpuCounters::default(), parking: Parking::default(), thread: Mutex::new(None) }
    }

    /// Its number, from 0.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Its counters.
    #[must_use]
    pub fn counters(&self) -> &VcpuCounters {
        &self.counters
    }

    /// Its orders.
    #[must_use]
    pub fn parking(&self) -> &Parking {
        &self.parking
    }

    /// Takes over its thread.
    pub fn started(&self, thread: JoinHandle<()>) {
        *lock(&self.thread) = Some(thread);
    }

    fn has_settled(&self) -> bool {
        self.parking.has_settled() || lock(&self.thread).is_none()
    }

    fn kick(&self) {
        if let Some(thread) = &*lock(&self.thread) {
            // A thread that has ended in the meantime needs no signal.
            let _ = thread.kill(SIGRTMIN());
        }
    }

    /// Joins its thread, unless that still runs at `deadline`: then it is left behind.
    fn join(&self, deadline: Instant) {
        let Some(thread) = lock(&self.thread).take() else { return };
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(ROUND);
        }
        if thread.is_finished() && thread.join().is_err() {
            log::error!("a vCPU thread panicked");
        }
    }
}

/// Kicks vCPUs that were told to pause or to stop until all have settled, at most until `deadline`.
///
/// # Errors
/// The number of the first vCPU that has not settled by then.
pub fn settle(vcpus: &[Arc<VcpuHandle>], deadline: Instant) -> Result<(), u32> {
    loop {
        let busy: Vec<_> = vcpus.iter().filter(|vcpu| !vcpu.has_settled()).collect();
        let Some(first) = busy.first() else { return Ok(()) };
        if Instant::now() >= deadline {
            return Err(first.index);
        }
        busy.iter().for_each(|vcpu| vcpu.kick());
        let _ = first.parking.wait_settled_for(ROUND);
    }
}

/// Tells vCPUs to stop and gets them out of the guest, at once but not for sure: see [`stop`].
pub fn order_stop(vcpus: &[Arc<VcpuHandle>]) {
    vcpus.iter().for_each(|vcpu| vcpu.parking.give(Order::Stop));
    vcpus.iter().filter(|vcpu| !vcpu.has_settled()).for_each(|vcpu| vcpu.kick());
}

/// Stops vCPUs and joins their threads. A thread that does not end, because the host does not answer it,
/// is left behind: it owns all it uses.
pub fn stop(vcpus: &[Arc<VcpuHandle>]) {
    order_stop(vcpus);
    let deadline = Instant::now() + STOP;
    // `join` leaves behind those that do not end.
    let _ = settle(vcpus, deadline);
    vcpus.iter().for_each(|vcpu| vcpu.join(deadline));
}
