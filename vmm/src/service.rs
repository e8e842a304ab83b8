//! Requests from the control socket, carried out.
//!
//! [`Service::dispatch`] runs on the event loop and only sorts: what may take long goes to one of
//! three threads (resizes, the guest's agent, reports), each with a queue, so that a status is
//! answered while the guest churns and a shrink waits for neither. The functions below them turn
//! what the VM did into the reports of the protocol.

use crate::agent::AgentError;
use crate::control::protocol::{ErrorKind, GuestRequest, Reply, Request, ShrinkGoal};
use crate::control::report::{
    BadPage, ExitCounts, GuestOutcome, GuestReport, ReclaimReport, ResizeReport, Shortfall, StatusReport, VcpuStatus,
};
use crate::control::server::Responder;
use crate::doorbell::GuestEnd;
use crate::error_line;
use crate::units::Bytes;
use crate::vm::{Resize, Vm, VmError};
use llfree::Census;
use shared_layout::agent::{Command, Outcome, Report};
use shared_layout::{FRAME_SIZE, HUGE_SIZE, Order};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a guest may take over one command, beyond a churn's own time: touching memory that
/// the host must first find can take milliseconds a huge frame.
const GUEST_TIMEOUT: Duration = Duration::from_secs(9 * 60);

type Job = (Request, Responder);

/// The threads that carry requests out. Dropping it ends them, after what they are at.
pub struct Service {
    vm: Arc<Vm>,
    name: String,
    /// `None` once they have ended.
    workers: Mutex<Option<Workers>>,
    /// Resizes that wait for their turn: a shrink that only waits for its guest makes way.
    queued_resizes: Arc<AtomicUsize>,
}

struct Workers {
    resizes: Sender<Job>,
    guest: Sender<Job>,
    reports: Sender<Job>,
    threads: Vec<JoinHandle<()>>,
}

impl Service {
    /// Starts the threads.
    ///
    /// # Errors
    /// If the host has no thread to give.
    pub fn start(vm: Arc<Vm>, name: &str) -> std::io::Result<Self> {
        let queued_resizes = Arc::new(AtomicUsize::new(0));
        let mut threads = Vec::new();
        let mut worker = |thread: &str, work: Box<dyn Fn(Request) -> Reply + Send>| {
            let (sender, jobs): (Sender<Job>, Receiver<Job>) = channel();
            let serve = move || {
                for (request, responder) in jobs {
                    responder.answer(&work(request));
                }
            };
            threads.push(std::thread::Builder::new().name(thread.to_owned()).spawn(serve)?);
            Ok::<_, std::io::Error>(sender)
        };
        let (of_resizes, queued) = (vm.clone(), queued_resizes.clone());
        let resizes = worker(
            "resizes",
            Box::new(move |request| {
                queued.fetch_sub(1, Ordering::Relaxed);
                let superseded = || queued.load(Ordering::Relaxed) > 0;
                answer(resize(&of_resizes, &request, &superseded))
            }),
        )?;
        let of_guest = vm.clone();
        let guest = worker(
            "guest-commands",
            Box::new(move |request| {
                let Request::Guest(command) = request else { return not_here() };
                answer(guest(&of_guest, &command).map(Reply::Guest))
            }),
        )?;
        let (of_reports, report_name) = (vm.clone(), name.to_owned());
        let reports = worker(
            "reports",
            Box::new(move |_| answer(status(&of_reports, &report_name).map(|report| Reply::Status(Box::new(report))))),
        )?;
        let workers = Mutex::new(Some(Workers { resizes, guest, reports, threads }));
        Ok(Self { vm, name: name.to_owned(), workers, queued_resizes })
    }

    /// Answers a request, or hands it to the thread that will. True if the VM is to stop.
    pub fn dispatch(&self, request: Request, responder: Responder) -> bool {
        if let Some(end) = self.vm.ended() {
            responder.answer(&answer(Err(end.into())));
            return false;
        }
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(workers) = workers.as_ref() else {
            responder.answer(&answer(Err(AgentError::Gone.into())));
            return false;
        };
        let queue = match request {
            Request::Ping => {
                responder.answer(&Reply::Pong { name: self.name.clone(), pid: std::process::id() });
                return false;
            }
            Request::Stop => {
                responder.answer(&Reply::Stopping);
                return true;
            }
            Request::Status => &workers.reports,
            Request::Shrink { .. } | Request::Grow { .. } | Request::Reclaim { .. } => {
                self.queued_resizes.fetch_add(1, Ordering::Relaxed);
                &workers.resizes
            }
            Request::Guest(_) => &workers.guest,
        };
        // A queue without a thread drops the job, whose responder then says so.
        let _ = queue.send((request, responder));
        false
    }

    /// Ends the threads, after what they are at: every request has its answer then. Call it when
    /// the VM has stopped, or they may be at something for long.
    pub fn finish(&self) {
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Without senders the threads run out of jobs.
        let threads = workers.map_or_else(Vec::new, |workers| workers.threads);
        for thread in threads {
            if thread.join().is_err() {
                log::error!("a thread of the control service panicked");
            }
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.finish();
    }
}

fn not_here() -> Reply {
    Reply::error(ErrorKind::Internal, "the request went to the wrong queue")
}

fn answer(result: Result<Reply, VmError>) -> Reply {
    result.unwrap_or_else(|error| {
        let kind = match &error {
            VmError::Size(_) => ErrorKind::Refused,
            VmError::Stopping | VmError::Agent(AgentError::Gone) => ErrorKind::Stopping,
            VmError::Agent(_) => ErrorKind::Guest,
            VmError::Ended(GuestEnd::Exited(0)) => ErrorKind::Stopping,
            VmError::Ended(_) => ErrorKind::Crashed,
            VmError::Monitor(_) => ErrorKind::Internal,
        };
        Reply::error(kind, error_line(&error))
    })
}

fn resize(vm: &Vm, request: &Request, superseded: &dyn Fn() -> bool) -> Result<Reply, VmError> {
    match *request {
        Request::Shrink { goal, wait_ms } => {
            let wait = Duration::from_millis(wait_ms);
            let target = target(vm, goal)?;
            let resize = vm.shrink(target, |elapsed| elapsed < wait && !superseded())?;
            Ok(Reply::Resize(resize_report(vm, &resize)))
        }
        Request::Grow { to_bytes } => Ok(Reply::Resize(resize_report(vm, &vm.grow(to_bytes)?))),
        Request::Reclaim { bytes } => {
            let start = Instant::now();
            let frames = bytes.map_or(u32::MAX, |bytes| u32::try_from(bytes / HUGE_SIZE).unwrap_or(u32::MAX));
            let pass = vm.monitor().evict(frames)?;
            Ok(Reply::Reclaim(ReclaimReport {
                huge_frames: pass.frames.into(),
                freed_bytes: u64::from(pass.discarded) * HUGE_SIZE,
                duration_us: micros(start.elapsed()),
            }))
        }
        _ => Ok(not_here()),
    }
}

fn target(vm: &Vm, goal: ShrinkGoal) -> Result<u64, VmError> {
    let limit = u64::from(vm.monitor().limit()) * HUGE_SIZE;
    match goal {
        ShrinkGoal::ToBytes(to) => Ok(to),
        ShrinkGoal::ByBytes(by) => limit.checked_sub(by).ok_or_else(|| {
            VmError::Size(format!("cannot shrink by {}: the limit is only {}", Bytes(by), Bytes(limit)))
        }),
    }
}

/// What a resize did, as the protocol says it.
#[must_use]
pub fn resize_report(vm: &Vm, resize: &Resize) -> ResizeReport {
    let census = vm.monitor().census();
    let (in_use_bytes, fragmented_bytes) = (census.used_frames * FRAME_SIZE, census.fragmented_frames * FRAME_SIZE);
    let complete = resize.actual == resize.target;
    let shortfall = (!complete).then(|| Shortfall {
        in_use_bytes,
        fragmented_bytes,
        wording: format!(
            "the guest uses {}, and {} lie free between used pages, in frames that are not wholly free; \
             free memory in the guest, or give it time with --wait",
            Bytes(in_use_bytes),
            Bytes(fragmented_bytes)
        ),
    });
    ResizeReport {
        target_bytes: resize.target,
        actual_bytes: resize.actual,
        reclaimable_now_bytes: (census.free_installed + census.free_evicted) * HUGE_SIZE,
        complete,
        shortfall,
        huge_frames: resize.pass.frames.into(),
        freed_bytes: u64::from(resize.pass.discarded) * HUGE_SIZE,
        duration_us: micros(resize.duration),
    }
}

/// Runs a guest command on all vCPUs.
///
/// # Errors
/// If the guest does not answer, or has ended.
pub fn guest(vm: &Vm, request: &GuestRequest) -> Result<GuestReport, VmError> {
    let seed = vm.next_seed();
    let mut timeout = GUEST_TIMEOUT;
    let command = match *request {
        GuestRequest::Alloc { bytes, order } => {
            let order = Order::new(order).ok_or_else(|| {
                VmError::Size(format!("order {order} is out of range; use 0 to {}", Order::MAX.get()))
            })?;
            Command::Alloc { bytes, order, seed }
        }
        GuestRequest::Verify => Command::Verify,
        GuestRequest::Free { bytes, random } => Command::Free { bytes: bytes.unwrap_or(u64::MAX), random, seed },
        GuestRequest::Churn { millis } => {
            timeout += Duration::from_millis(millis);
            // Half of what the guest may hold: room for what it holds already, and for luck.
            let bytes = u64::from(vm.monitor().limit()) * HUGE_SIZE / 2;
            Command::Churn { millis, bytes, seed }
        }
        GuestRequest::Idle => Command::Drain,
        GuestRequest::Stats => Command::Stats,
    };
    let start = Instant::now();
    let report = vm.guest(command, timeout)?;
    let took = start.elapsed();
    Ok(guest_report(&report, &vm.monitor().census(), took))
}

fn guest_report(r: &Report, census: &Census, took: Duration) -> GuestReport {
    let free_huge_bytes = (census.free_installed + census.free_evicted) * HUGE_SIZE;
    GuestReport {
        outcome: Outcome::from_word(r.outcome).map_or(GuestOutcome::Unknown, GuestOutcome::from),
        bytes: r.bytes,
        blocks: r.blocks,
        held_bytes: r.held_bytes,
        held_blocks: r.held_blocks,
        mismatches: r.mismatches,
        first_bad: (r.mismatches > 0).then_some(BadPage {
            address: r.bad_address,
            expected: r.expected,
            found: r.found,
        }),
        allocs: r.allocs,
        frees: r.frees,
        installs: r.installs,
        free_bytes: free_huge_bytes + census.fragmented_frames * FRAME_SIZE,
        free_huge_bytes,
        duration_us: micros(took),
    }
}

/// All numbers about a VM. Audits residency on the way, so that `violations` is up to date.
///
/// # Errors
/// If the kernel does not answer, or does not take violating memory back.
pub fn status(vm: &Vm, name: &str) -> Result<StatusReport, VmError> {
    let monitor = vm.monitor();
    monitor.audit()?;
    let ram = monitor.ram().residency().map_err(crate::monitor::MonitorError::Residency)?;
    let census = monitor.census();
    let counters = &monitor.counters;
    let overhead = vm.resident_bytes().map(|all| all.saturating_sub(ram.resident_bytes));
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let vcpu = |(index, c): (usize, &Arc<crate::vcpu::VcpuCounters>)| VcpuStatus {
        index: index as u32,
        exits: ExitCounts { mmio: count(&c.mmio), pio: count(&c.pio), other: count(&c.other) },
        calls: count(&c.calls),
        state: if c.busy.load(Ordering::Relaxed) { "running" } else { "waiting" }.to_owned(),
    };
    Ok(StatusReport {
        name: name.to_owned(),
        pid: std::process::id(),
        uptime_ms: u64::try_from(vm.uptime().as_millis()).unwrap_or(u64::MAX),
        backing: vm.config().backing.name().to_owned(),
        memory_bytes: vm.config().memory.0,
        limit_bytes: (census.huge_frames - census.held) * HUGE_SIZE,
        wanted_bytes: monitor.wanted().saturating_mul(HUGE_SIZE),
        resident_bytes: ram.resident_bytes,
        huge_page_bytes: ram.huge_bytes,
        held_bytes: census.held * HUGE_SIZE,
        evicted_bytes: census.evicted * HUGE_SIZE,
        installed_bytes: census.installed * HUGE_SIZE,
        guest_used_bytes: census.used_frames * FRAME_SIZE,
        guest_free_bytes: (census.free_installed + census.free_evicted) * HUGE_SIZE
            + census.fragmented_frames * FRAME_SIZE,
        reclaimable_now_bytes: (census.free_installed + census.free_evicted) * HUGE_SIZE,
        vmm_overhead_bytes: overhead.unwrap_or_default(),
        installs: count(&counters.installs),
        install_failures: count(&counters.install_failures),
        violations: count(&counters.violations),
        corrupt_entries: census.corrupt,
        bad_calls: count(&vm.doorbell().bad_calls),
        vcpus: vm.vcpus().iter().enumerate().map(vcpu).collect(),
    })
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
