//! Requests from the control socket, carried out.
//!
//! [`Service::dispatch`] runs on the event loop and only sorts: what may take long goes to one of
//! four threads (resizes, the guest's agent, pauses, reports), each with a queue, so that a status is
//! answered while the guest churns and a shrink waits for neither. The thread of reports also
//! audits the guest's memory whenever nobody asked for a while. The functions below them turn what
//! the VM did into the reports of the protocol.

mod life;

use crate::agent::AgentError;
use crate::devices::mmio::Transport;
use crate::devices::net::{NetConfig, NetCounters};
use crate::elastic::ResizeError;
use crate::exit::ExitReason;
use crate::roles;
use crate::vm::{Resize, Vm, VmError};
use llfree_base::RateLimit;
use llfree_base::choices::Switch;
use llfree_base::thread::Role;
use llfree_base::units::Bytes;
use llfree_base::{error_line, faults};
use llfree_control::protocol::{BurstTouch, ErrorKind, GuestRequest, Reply, Request, ShrinkGoal};
use llfree_control::report::{
    AutoReclaimReport, BadPage, CgroupStatus, DeviceStatus, FindingReport, GuestOutcome, GuestReport,
    InstallPoolStatus, NetReport, ReclaimReport, ResizeReport, SampleReport, Shortfall, StatusReport, ValidateReport,
};
use llfree_control::server::Responder;
use llfree_monitor::auto::{AutoStatus, SwitchError};
use llfree_monitor::{Finding, MonitorError};
use shared_layout::agent::{Command, Outcome, Report, Touch};
use shared_layout::{FRAME_SIZE, HUGE_SIZE, Order};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a guest may take over one command, beyond a churn's own time: touching memory that
/// the host must first find can take milliseconds a huge frame.
const GUEST_TIMEOUT: Duration = Duration::from_secs(9 * 60);

/// Between two audits, while they are cheap: how long a guest may use what it does not have.
const AUDIT_PAUSE: Duration = Duration::from_secs(1);
/// The same where an audit costs 5 ms or more, as with much memory on kernels before 6.7.
const LONGEST_AUDIT_PAUSE: Duration = Duration::from_secs(10);
/// Pause for each unit of time that an audit took: at most 1/2000 of a CPU.
const PAUSE_PER_AUDIT: u32 = 2000;

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
    life: Sender<Job>,
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
        let mut worker = |thread: &str, role: Role, serve: Box<dyn FnOnce(Receiver<Job>) + Send>| {
            let (sender, jobs): (Sender<Job>, Receiver<Job>) = channel();
            threads.push(vm.config().threads.spawn(thread, role, move || serve(jobs))?);
            Ok::<_, std::io::Error>(sender)
        };
        let (of_resizes, queued) = (vm.clone(), queued_resizes.clone());
        let resizes = worker(
            "resizes",
            roles::RESIZES,
            Box::new(move |jobs| {
                for (request, responder) in jobs {
                    if faults::point(faults::THREAD_DEATH).is_err() {
                        return;
                    }
                    queued.fetch_sub(1, Ordering::Relaxed);
                    let superseded = || queued.load(Ordering::Relaxed) > 0;
                    responder.answer(&answer(resize(&of_resizes, &request, &superseded)));
                }
            }),
        )?;
        let of_guest = vm.clone();
        let guest = worker(
            "guest-commands",
            roles::GUEST_COMMANDS,
            Box::new(move |jobs| {
                for (request, responder) in jobs {
                    if faults::point(faults::THREAD_DEATH).is_err() {
                        return;
                    }
                    let Request::Guest(command) = request else { continue };
                    responder.answer(&answer(guest(&of_guest, &command).map(Reply::Guest)));
                }
            }),
        )?;
        let (of_reports, report_name) = (vm.clone(), name.to_owned());
        let reports = worker(
            "reports",
            roles::REPORTS,
            Box::new(move |jobs| report_and_audit(&of_reports, &report_name, &jobs)),
        )?;
        let of_life = vm.clone();
        // A pause waits for vCPUs and devices: neither a waiting shrink nor a command may hold it up.
        let life = worker(
            "life",
            roles::LIFE,
            Box::new(move |jobs| {
                for (request, responder) in jobs {
                    if faults::point(faults::THREAD_DEATH).is_err() {
                        return;
                    }
                    responder.answer(&answer(life::change(&of_life, request == Request::Pause).map(Reply::Life)));
                }
            }),
        )?;
        let workers = Mutex::new(Some(Workers { resizes, guest, reports, life, threads }));
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
            Request::AutoReclaim { settings } => {
                responder.answer(&answer(auto_reclaim(&self.vm, settings).map(Reply::AutoReclaim)));
                return false;
            }
            Request::Status | Request::Validate => &workers.reports,
            Request::Shrink { .. } | Request::Grow { .. } | Request::Reclaim { .. } => {
                self.queued_resizes.fetch_add(1, Ordering::Relaxed);
                &workers.resizes
            }
            // Behind a command at work it would wait for the resume.
            Request::Guest(_) if self.vm.is_paused() => {
                responder.answer(&answer(Err(VmError::Paused)));
                return false;
            }
            Request::Guest(_) => &workers.guest,
            Request::Pause | Request::Resume => &workers.life,
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

/// The thread of reports. A status audits too; in between, audits see to it that a guest which uses
/// what it does not have is found without one.
fn report_and_audit(vm: &Vm, name: &str, jobs: &Receiver<Job>) {
    let failures = RateLimit::default();
    let mut pause = AUDIT_PAUSE;
    loop {
        match jobs.recv_timeout(pause) {
            Ok((Request::Validate, responder)) => responder.answer(&answer(validate(vm).map(Reply::Validate))),
            Ok((_, responder)) => {
                if faults::point(faults::THREAD_DEATH).is_err() {
                    return;
                }
                responder.answer(&answer(status(vm, name).map(|report| Reply::Status(Box::new(report)))));
            }
            Err(RecvTimeoutError::Timeout) => {
                let start = Instant::now();
                if let Err(error) = vm.monitor().audit()
                    && let Some(number) = failures.tick()
                {
                    log::warn!("the guest's memory could not be audited ({number} so far): {}", error_line(&error));
                }
                // A maximum that could not fall right after a shrink can by now.
                vm.settle_cgroup();
                pause = start.elapsed().saturating_mul(PAUSE_PER_AUDIT).clamp(AUDIT_PAUSE, LONGEST_AUDIT_PAUSE);
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
}

fn not_here() -> Reply {
    Reply::error(ErrorKind::Internal, "the request went to the wrong queue")
}

fn answer(result: Result<Reply, VmError>) -> Reply {
    result.unwrap_or_else(|error| {
        let kind = match &error {
            VmError::Size(_) | VmError::Resize(_) | VmError::Paused => ErrorKind::Refused,
            VmError::Agent(AgentError::Gone) => ErrorKind::Stopping,
            VmError::Agent(_) => ErrorKind::Guest,
            VmError::Ended(ExitReason::Exited(0)) => ErrorKind::Stopping,
            VmError::Ended(_) => ErrorKind::Crashed,
            VmError::AutoReclaim(SwitchError::KeepTooLarge(_)) => ErrorKind::Refused,
            VmError::Monitor(_)
            | VmError::AutoReclaim(SwitchError::Thread(_))
            | VmError::Cgroup(_)
            | VmError::Pause(_) => ErrorKind::Internal,
        };
        Reply::error(kind, error_line(&error))
    })
}

fn resize(vm: &Vm, request: &Request, superseded: &dyn Fn() -> bool) -> Result<Reply, VmError> {
    match *request {
        Request::Shrink { goal, wait_ms } => {
            let wait = Duration::from_millis(wait_ms);
            let target = target(vm, goal)?;
            // A device's driver needs time in any case: as long as it gets somewhere, unless people
            // say how long.
            let more = |elapsed| elapsed < wait || wait_ms == 0 && vm.is_moving(elapsed);
            let resize = vm.shrink(target, |elapsed| more(elapsed) && !superseded())?;
            let advice = match () {
                () if superseded() => "another resize took over",
                () if vm.is_paused() => "resume the VM, so that its guest can free some",
                () if vm.shares_table() && !vm.elastic().status().driven => "it has no driver for its device",
                () if wait_ms > 0 => "free memory in the guest",
                () => "free memory in the guest, or wait for it with --wait",
            };
            Ok(Reply::Resize(resize_report(vm, &resize, advice)))
        }
        Request::Grow { to_bytes } => Ok(Reply::Resize(resize_report(vm, &vm.grow(to_bytes)?, ""))),
        Request::Reclaim { bytes } => {
            let kind = vm.config().elastic.name();
            let monitor = vm.elastic().table().ok_or(ResizeError::NoReclaim(kind))?;
            let start = Instant::now();
            let frames = bytes.map_or(u32::MAX, |bytes| u32::try_from(bytes / HUGE_SIZE).unwrap_or(u32::MAX));
            let pass = monitor.evict(frames)?;
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
    let limit = vm.limit();
    // A balloon of small pages may have left it anywhere.
    let whole = |bytes: u64| bytes - bytes % HUGE_SIZE;
    match goal {
        ShrinkGoal::ToBytes(to) => Ok(to),
        ShrinkGoal::ByBytes(by) => match limit.checked_sub(by).map(whole) {
            Some(0) => Err(VmError::Size(format!(
                "cannot shrink by {}: that is all of the limit, and the smallest limit is 2 MiB",
                Bytes(by)
            ))),
            None => Err(VmError::Size(format!("cannot shrink by {}: the limit is only {}", Bytes(by), Bytes(limit)))),
            Some(left) => Ok(left),
        },
    }
}

/// What a resize did, as the protocol says it; `advice` ends the sentence about a shortfall.
#[must_use]
pub fn resize_report(vm: &Vm, resize: &Resize, advice: &str) -> ResizeReport {
    let elastic = vm.elastic().status();
    let view = vm.view(&elastic, &vm.monitor().census());
    let complete = resize.actual == resize.target;
    let shortfall = (!complete).then(|| Shortfall {
        in_use_bytes: view.used,
        fragmented_bytes: view.fragmented,
        wording: vm.why_short(&view, &elastic, resize.actual < resize.target, advice),
    });
    ResizeReport {
        target_bytes: resize.target,
        actual_bytes: resize.actual,
        reclaimable_now_bytes: view.reclaimable,
        complete,
        shortfall,
        huge_frames: resize.pass.frames.into(),
        freed_bytes: u64::from(resize.pass.discarded) * HUGE_SIZE,
        duration_us: micros(resize.duration),
        waited_us: micros(resize.waited),
        guest: elastic.balloon.and_then(|balloon| balloon.guest).filter(|_| !vm.shares_table()),
    }
}

/// Runs a guest command on all vCPUs.
///
/// # Errors
/// If the guest does not answer, or has ended.
pub fn guest(vm: &Vm, request: &GuestRequest) -> Result<GuestReport, VmError> {
    let seed = vm.next_seed();
    let timeout = GUEST_TIMEOUT + Duration::from_millis(request.millis());
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
            // Half of what the guest may hold: room for what it holds already, and for luck.
            let bytes = vm.limit() / 2;
            Command::Churn { millis, bytes, seed }
        }
        GuestRequest::Idle => Command::Drain,
        GuestRequest::Stats => Command::Stats,
        GuestRequest::Burst { bytes, touch, keep, single } => {
            let touch = match touch {
                BurstTouch::Nothing => Touch::Nothing,
                BurstTouch::Frames => Touch::Frames,
                BurstTouch::Pages => Touch::Pages,
            };
            Command::Burst { bytes, touch, keep, single }
        }
        GuestRequest::Stream { millis, bytes, beside_bytes } => Command::Stream { millis, bytes, beside: beside_bytes },
        GuestRequest::Ftq { millis, quantum_us, beside_bytes } => {
            Command::Ftq { millis, quantum_us, beside: beside_bytes }
        }
    };
    let start = Instant::now();
    let report = vm.command(command, timeout)?;
    let took = start.elapsed();
    let unit = match request {
        GuestRequest::Burst { .. } => Some("ns"),
        GuestRequest::Stream { .. } => Some("MB/s"),
        GuestRequest::Ftq { .. } => Some("units"),
        _ => None,
    };
    let samples = unit.map(|unit| sample_report(unit, &report));
    let mut report = GuestReport { samples, ..guest_report(vm, &report, took) };
    if let GuestRequest::Free { bytes: Some(bytes), .. } = *request
        && report.outcome == GuestOutcome::Ok
        && report.bytes < bytes
    {
        report.outcome = GuestOutcome::FellShort;
    }
    Ok(report)
}

fn sample_report(unit: &str, report: &Report) -> SampleReport {
    let s = report.samples;
    SampleReport {
        unit: unit.to_owned(),
        count: s.count,
        mean: s.mean,
        min: s.min,
        p1: s.p1,
        p50: s.p50,
        p99: s.p99,
        p999: s.p999,
        max: s.max,
        beside_ns: report.beside_nanos,
    }
}

fn guest_report(vm: &Vm, r: &Report, took: Duration) -> GuestReport {
    let claimed = (r.free_frames.saturating_mul(FRAME_SIZE), r.free_huge.saturating_mul(HUGE_SIZE));
    let (free_bytes, free_huge_bytes) = vm.free_by_table().unwrap_or(claimed);
    GuestReport {
        outcome: Outcome::from_word(r.outcome).map_or(GuestOutcome::Unknown, outcome_report),
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
        install_calls: r.installs,
        ahead_frames: r.ahead,
        free_bytes,
        free_huge_bytes,
        duration_us: micros(took),
        samples: None,
    }
}

/// Switches automatic reclaim.
///
/// # Errors
/// A VM with a device instead of the shared table, settings that keep more than its memory, or a host
/// that has no thread to give.
pub fn auto_reclaim(vm: &Vm, switch: Switch) -> Result<AutoReclaimReport, VmError> {
    vm.config().elastic.way().check_switch(switch)?;
    vm.auto_reclaim().switch(switch)?;
    Ok(auto_report(&vm.auto_reclaim().status()))
}

fn auto_report(status: &AutoStatus) -> AutoReclaimReport {
    let settings = status.switch.0;
    AutoReclaimReport {
        on: settings.is_some(),
        settings: settings.map(|settings| settings.to_string()),
        evicted_bytes: status.evicted * HUGE_SIZE,
        scans: status.scans,
        last_scan_ms_ago: status.last_scan.map(|last| u64::try_from(last.elapsed().as_millis()).unwrap_or(u64::MAX)),
        free_bytes: u64::from(status.last.free) * HUGE_SIZE,
        headroom_bytes: u64::from(status.last.headroom) * HUGE_SIZE,
        back_off_bytes: u64::from(status.last.back_off) * HUGE_SIZE,
    }
}

/// Checks that no frame is lost or owned twice, by all that the host can know. Repairs nothing.
///
/// # Errors
/// A VM with a device instead of the shared table, or a kernel that does not answer.
pub fn validate(vm: &Vm) -> Result<ValidateReport, VmError> {
    let monitor = vm.tracked("validate")?;
    let start = Instant::now();
    let seen = monitor.validate()?;
    let finding = |finding: &Finding| FindingReport {
        check: finding.check.name().to_owned(),
        count: finding.count,
        first_frames: finding.first.iter().map(|huge| huge.0).collect(),
        guest_can_cause: finding.check.is_claim(),
        wording: finding.check.meaning().to_owned(),
    };
    Ok(ValidateReport {
        clean: seen.findings.is_empty(),
        huge_frames: seen.census.huge_frames,
        held: seen.census.held,
        evicted: seen.census.evicted,
        installed: seen.census.installed,
        findings: seen.findings.iter().map(finding).collect(),
        duration_us: micros(start.elapsed()),
    })
}

/// All numbers about a VM. Audits residency on the way, so that `violations` is up to date; what
/// is resident is what the audit found, not what it left.
///
/// # Errors
/// If the kernel does not answer, or does not take violating memory back.
pub fn status(vm: &Vm, name: &str) -> Result<StatusReport, VmError> {
    let monitor = vm.monitor();
    let ram = monitor.ram().residency().map_err(MonitorError::Residency)?;
    let overhead = vm.resident_bytes().map(|all| all.saturating_sub(ram.resident_bytes));
    let (supply, pool) = (monitor.supply(), monitor.supply().pool_status());
    let overhead = overhead.map(|overhead| overhead.saturating_sub(pool.resident_bytes));
    monitor.audit()?;
    let census = monitor.census();
    let elastic = vm.elastic().status();
    let view = vm.view(&elastic, &census);
    let counters = &monitor.counters;
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let (state, paused_ms) = life::state(vm);
    Ok(StatusReport {
        name: name.to_owned(),
        pid: std::process::id(),
        uptime_ms: life::millis(vm.uptime()),
        state,
        paused_ms,
        backing: vm.config().backing.name().to_owned(),
        memory_bytes: vm.config().memory.0,
        limit_bytes: vm.limit(),
        wanted_bytes: vm.elastic().wanted(),
        resident_bytes: ram.resident_bytes,
        huge_page_bytes: ram.huge_bytes,
        held_bytes: vm.config().memory.0.saturating_sub(vm.limit()),
        evicted_bytes: census.evicted * HUGE_SIZE,
        installed_bytes: vm.elastic().table().map_or(0, |_| census.installed * HUGE_SIZE),
        guest_says: view.says,
        guest_used_bytes: view.used,
        guest_free_bytes: view.free,
        reclaimable_now_bytes: view.reclaimable,
        vmm_overhead_bytes: overhead.unwrap_or_default(),
        installs: count(&counters.installs),
        install_failures: count(&counters.install_failures),
        violations: count(&counters.violations),
        held_violations: count(&counters.held_violations),
        enforcement: match vm.elastic().table() {
            Some(_) if vm.is_enforced() => "userfaultfd",
            Some(_) => "audit",
            None => "none",
        }
        .to_owned(),
        on_violation: vm.config().install.on_violation.unwrap_or_default().name().to_owned(),
        install_pool: InstallPoolStatus {
            size_bytes: pool.size_bytes,
            resident_bytes: pool.resident_bytes,
            hits: supply.hits(),
            misses: supply.misses(),
            given_back: pool.given_back,
        },
        corrupt_entries: census.corrupt,
        bad_calls: count(&vm.doorbell().bad_calls),
        auto_reclaim: auto_report(&vm.auto_reclaim().status()),
        cgroup: vm.cgroup().and_then(|cgroup| cgroup.usage().ok()).map(|usage| CgroupStatus {
            path: usage.path.to_string_lossy().into_owned(),
            memory_max_bytes: usage.max,
            memory_current_bytes: usage.current,
        }),
        vcpus: vm.vcpus().iter().map(|vcpu| life::vcpu_status(vcpu)).collect(),
        elastic,
        disks: vm.disks().iter().map(|disk| disk.status()).collect(),
        nets: vm.nets().map(net_report).collect(),
        agent: vm.guest().agent_status(),
        devices: vm.devices().iter().map(|(_, device)| device_status(device)).collect(),
    })
}

fn net_report((config, counters): (&NetConfig, &NetCounters)) -> NetReport {
    NetReport { tap: config.tap.clone(), mac: config.mac.to_string(), traffic: counters.status() }
}

fn device_status(device: &Transport) -> DeviceStatus {
    DeviceStatus { name: device.name().to_owned(), driven: device.is_driven(), errors: device.driver_errors() }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn outcome_report(outcome: Outcome) -> GuestOutcome {
    match outcome {
        Outcome::Ok => GuestOutcome::Ok,
        Outcome::OutOfMemory => GuestOutcome::OutOfMemory,
        Outcome::InstallFailed => GuestOutcome::InstallFailed,
        Outcome::Corrupt => GuestOutcome::Corrupt,
        Outcome::Unknown => GuestOutcome::Unknown,
    }
}
