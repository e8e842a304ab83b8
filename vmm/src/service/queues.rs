//! The threads that carry out requests that may take long, and their queues.
//!
//! One thread each for resizes, guest commands, pauses, checks and reports, so that a status is answered
//! while the guest churns and a shrink waits for neither. Each queue has its own job type, so a job cannot
//! end up on the wrong thread. Between jobs, the reports thread audits the guest's memory.

use super::events::Events;
use super::execute::{self, Resizing, answer};
use super::life::{self, Change, LifeJob};
use super::report;
use crate::roles;
use crate::vm::{Step, Vm};
use llfree_base::histogram::Durations;
use llfree_base::thread::Role;
use llfree_base::{RateLimit, error_line, faults, lock};
use llfree_control::jobs::{JobSender, Jobs, NoJob, jobs};
use llfree_control::protocol::{GuestRequest, Reply};
use llfree_control::report::{GuestCommandsReport, LifeReport, StatusReport};
use llfree_control::server::Responder;
use std::io;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The interval between audits while they are cheap: how long a guest may use memory it does not have.
const AUDIT_PAUSE: Duration = Duration::from_secs(1);
/// The same where an audit costs 5 ms or more, as with much memory on kernels before 6.7.
const LONGEST_AUDIT_PAUSE: Duration = Duration::from_secs(10);
/// Pause for each unit of time that an audit took: at most 1/2000 of a CPU.
const PAUSE_PER_AUDIT: u32 = 2000;

/// The pauses between two looks at a target that was not reached.
const SHORTEST_LOOK: Duration = Duration::from_millis(5);
const LONGEST_LOOK: Duration = Duration::from_millis(250);
/// Without a target there is nothing to look at.
const NO_TARGET: Duration = Duration::from_secs(60 * 60);

/// How long the threads may take for their current jobs, all together, once the VM has stopped.
const LAST_JOBS: Duration = Duration::from_secs(5);

/// A request for all the numbers.
struct Status {
    /// Guest commands that wait then.
    guest_commands: u64,
}
/// A request to check that no frame is lost, or owned twice.
struct Validate;

/// What the threads are at and did, as far as a status tells of it.
#[derive(Default)]
struct Work {
    /// The guest command at work, if there is one: its name, and since when.
    command: Mutex<Option<(&'static str, Instant)>>,
    /// How long resizes took.
    resizes: Durations,
}

/// Jobs for one thread, in their order.
struct Queue<J>(JobSender<J>);

impl<J: Send + 'static> Queue<J> {
    /// Starts the thread that serves the queue until its sender is dropped.
    fn start(
        vm: &Arc<Vm>,
        threads: &mut Vec<JoinHandle<()>>,
        name: &str,
        role: Role,
        serve: impl FnOnce(&Vm, &Jobs<J>) + Send + 'static,
    ) -> io::Result<Self> {
        let (sender, jobs) = jobs();
        let of_thread = vm.clone();
        threads.push(vm.config().threads.spawn(name, role, move || serve(&of_thread, &jobs))?);
        Ok(Self(sender))
    }

    fn push(&self, job: J, responder: Responder) {
        self.0.push(job, responder);
    }
}

/// The queues and their threads.
pub(super) struct Queues {
    resizes: Queue<Resizing>,
    guest: Queue<GuestRequest>,
    reports: Queue<Status>,
    checks: Queue<Validate>,
    life: Queue<LifeJob>,
    work: Arc<Work>,
    threads: Vec<JoinHandle<()>>,
}

impl Queues {
    /// Starts the threads. `name` is the VM's.
    pub(super) fn start(vm: &Arc<Vm>, name: &str, events: &Arc<Events>) -> io::Result<Self> {
        let name = name.to_owned();
        let mut threads = Vec::new();
        let [of_resizes, of_reports, of_life] = std::array::from_fn(|_| events.clone());
        let work = Arc::new(Work::default());
        let [at_resizes, at_guest, at_reports] = std::array::from_fn(|_| work.clone());
        let resizes = Queue::start(vm, &mut threads, "resizes", roles::RESIZES, move |vm, jobs| {
            resize_and_pursue(vm, jobs, &at_resizes, &of_resizes);
        })?;
        let guest = Queue::start(vm, &mut threads, "guest-commands", roles::GUEST_COMMANDS, move |vm, jobs| {
            serve(jobs, |command: GuestRequest, responder| {
                *lock(&at_guest.command) = Some((command.verb(), Instant::now()));
                let result = vm.run_guest_while(&command, &|| !responder.is_abandoned());
                *lock(&at_guest.command) = None;
                answer(result.map(Reply::Guest))
            });
        })?;
        let reports = Queue::start(vm, &mut threads, "reports", roles::REPORTS, move |vm, jobs| {
            report_and_audit(vm, &name, jobs, &at_reports, &of_reports);
        })?;
        // Waits for installs at work, for seconds if need be, and a status does not.
        let checks = Queue::start(vm, &mut threads, "checks", roles::CHECKS, |vm, jobs| {
            serve(jobs, |Validate, _| answer(execute::validate(vm).map(Reply::Validate)));
        })?;
        // A pause waits for vCPUs and devices: neither a waiting shrink nor a command may hold it up.
        let life = Queue::start(vm, &mut threads, "life", roles::LIFE, move |vm, jobs| {
            serve(jobs, |job, _| {
                let LifeJob::Change(change) = job else {
                    return answer(vm.press_power_button().map(|()| Reply::Pressed));
                };
                let result = life::change(vm, change);
                if let Ok(LifeReport { changed: true, .. }) = result {
                    of_life.say(&change.event());
                }
                answer(result.map(Reply::Life))
            });
        })?;
        Ok(Self { resizes, guest, reports, checks, life, work, threads })
    }

    pub(super) fn resize(&self, job: Resizing, responder: Responder) {
        self.resizes.push(job, responder);
    }

    pub(super) fn guest(&self, command: GuestRequest, responder: Responder) {
        self.guest.push(command, responder);
    }

    pub(super) fn status(&self, responder: Responder) {
        self.reports.push(Status { guest_commands: self.guest.0.waiting() }, responder);
    }

    /// What adds to a report on the VM what a status says of these threads. It may be used later, elsewhere.
    pub(super) fn completion(&self) -> impl Fn(StatusReport) -> StatusReport + use<> {
        let (work, queued) = (self.work.clone(), self.guest.0.waiting());
        move |report| with_work(report, &work, queued)
    }

    pub(super) fn validate(&self, responder: Responder) {
        self.checks.push(Validate, responder);
    }

    pub(super) fn change(&self, job: Change, responder: Responder) {
        self.life.push(LifeJob::Change(job), responder);
    }

    pub(super) fn press_power_button(&self, responder: Responder) {
        self.life.push(LifeJob::PowerButton, responder);
    }

    /// Ends the threads after their current jobs. One whose job does not finish, because the host does not
    /// answer, is left behind: it owns all it uses.
    pub(super) fn finish(self) {
        let Self { resizes, guest, reports, checks, life, work: _, threads } = self;
        // Without senders the threads run out of jobs.
        drop((resizes, guest, reports, checks, life));
        let deadline = Instant::now() + LAST_JOBS;
        for thread in threads {
            while !thread.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_micros(200));
            }
            if !thread.is_finished() {
                let name = thread.thread().name().unwrap_or("control");
                log::warn!("{name}: a request did not finish within {LAST_JOBS:?}; the VM ends without it");
            } else if thread.join().is_err() {
                log::error!("a thread of the control service panicked");
            }
        }
    }
}

/// Carries out one job after the other.
fn serve<J>(jobs: &Jobs<J>, mut execute: impl FnMut(J, &Responder) -> Reply) {
    while let Some((job, responder)) = jobs.next() {
        if faults::point(faults::THREAD_DEATH).is_err() {
            return;
        }
        let reply = execute(job, &responder);
        responder.answer(&reply);
    }
}

/// The resizes thread. Between jobs it pursues what the last resize did not reach: soon after something moved, and
/// ever more rarely while nothing does.
fn resize_and_pursue(vm: &Vm, jobs: &Jobs<Resizing>, work: &Work, events: &Events) {
    let failures = RateLimit::default();
    // One that is only waiting for its guest makes way for the next.
    let superseded = || jobs.has_waiting(|_| true);
    let mut pause = SHORTEST_LOOK;
    loop {
        match jobs.next_within(if vm.target().is_some() { pause } else { NO_TARGET }) {
            Ok((job, responder)) => {
                if faults::point(faults::THREAD_DEATH).is_err() {
                    return;
                }
                let reply = execute::resize(vm, job, &superseded);
                if let Reply::Resize(report) = &reply {
                    work.resizes.record_us(report.duration_us);
                    events.resized(vm, report);
                    pause = SHORTEST_LOOK;
                }
                responder.answer(&reply);
            }
            Err(NoJob::Yet) => match vm.look_again() {
                Ok(Step::Reached(target)) => events.reached(vm, target),
                Ok(Step::Closer(_) | Step::None) => pause = SHORTEST_LOOK,
                Ok(Step::Same) => pause = (pause * 2).min(LONGEST_LOOK),
                Err(error) => {
                    pause = LONGEST_LOOK;
                    if let Some(number) = failures.tick() {
                        log::warn!("the limit could not be pursued ({number} so far): {}", error_line(&error));
                    }
                }
            },
            Err(NoJob::AnyMore) => return,
        }
    }
}

/// The reports thread. A status audits on its own; the audits in between find a guest that uses memory it
/// does not have even if nobody asks.
fn report_and_audit(vm: &Vm, name: &str, jobs: &Jobs<Status>, work: &Work, events: &Events) {
    let failures = RateLimit::default();
    let mut pause = AUDIT_PAUSE;
    loop {
        match jobs.next_within(pause) {
            Ok((Status { guest_commands }, responder)) => {
                if faults::point(faults::THREAD_DEATH).is_err() {
                    return;
                }
                let report = report::status(vm, name).map(|report| with_work(report, work, guest_commands));
                responder.answer(&answer(report.map(|report| Reply::Status(Box::new(report)))));
            }
            Err(NoJob::Yet) => pause = audit(vm, &failures),
            Err(NoJob::AnyMore) => break,
        }
        events.look(vm);
    }
}

/// Adds how long resizes took, and what the guest's agent is at, if it is at something.
fn with_work(report: StatusReport, work: &Work, queued: u64) -> StatusReport {
    let report = StatusReport { resize_durations: work.resizes.counts(), ..report };
    let Some((verb, since)) = *lock(&work.command) else { return report };
    let age_ms = Some(report::millis(since.elapsed()));
    let guest_commands = Some(GuestCommandsReport { at_work: Some(verb.to_owned()), age_ms, queued });
    StatusReport { guest_commands, ..report }
}

/// Looks for memory that the guest should not have. Returns the pause until the next audit.
fn audit(vm: &Vm, failures: &RateLimit) -> Duration {
    let start = Instant::now();
    if let Err(error) = vm.monitor().audit()
        && let Some(number) = failures.tick()
    {
        log::warn!("the guest's memory could not be audited ({number} so far): {}", error_line(&error));
    }
    // A maximum that could not be lowered right after a shrink may be lowered by now.
    vm.settle_cgroup();
    start.elapsed().saturating_mul(PAUSE_PER_AUDIT).clamp(AUDIT_PAUSE, LONGEST_AUDIT_PAUSE)
}
