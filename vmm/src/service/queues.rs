//! The threads that carry out requests that may take long, and their queues.
//!
//! One thread each for resizes, guest commands, pauses and reports, so that a status is answered while
//! the guest churns and a shrink waits for neither. Each queue has its own job type, so a job cannot end
//! up on the wrong thread. Every job is answered: by its thread or, if that is gone, by its responder
//! when it is dropped. Between jobs, the reports thread audits the guest's memory.

use super::events::Events;
use super::execute::{self, Resizing, answer};
use super::life::{self, Change};
use super::report;
use crate::roles;
use crate::vm::{Step, Vm};
use llfree_base::thread::Role;
use llfree_base::{RateLimit, error_line, faults};
use llfree_control::protocol::{GuestRequest, Reply};
use llfree_control::report::LifeReport;
use llfree_control::server::Responder;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
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

/// Requests that only look at the VM.
#[derive(Clone, Copy, Debug)]
pub(super) enum Look {
    /// All the numbers.
    Status,
    /// Is any frame lost, or owned twice?
    Validate,
}

/// Jobs for one thread, in their order.
struct Queue<J>(Sender<(J, Responder)>);

impl<J: Send + 'static> Queue<J> {
    /// Starts the thread that serves the queue until its sender is dropped.
    fn start(
        vm: &Arc<Vm>,
        threads: &mut Vec<JoinHandle<()>>,
        name: &str,
        role: Role,
        serve: impl FnOnce(&Vm, &Receiver<(J, Responder)>) + Send + 'static,
    ) -> io::Result<Self> {
        let (sender, jobs) = channel();
        let of_thread = vm.clone();
        threads.push(vm.config().threads.spawn(name, role, move || serve(&of_thread, &jobs))?);
        Ok(Self(sender))
    }

    fn push(&self, job: J, responder: Responder) {
        // If the thread is gone, the job is dropped, and its responder tells the client.
        let _ = self.0.send((job, responder));
    }
}

/// The queues and their threads.
pub(super) struct Queues {
    resizes: Queue<Resizing>,
    guest: Queue<GuestRequest>,
    looks: Queue<Look>,
    life: Queue<Change>,
    threads: Vec<JoinHandle<()>>,
    /// Resizes in the queue: a shrink that is only waiting for its guest makes way for them.
    queued_resizes: Arc<AtomicUsize>,
}

impl Queues {
    /// Starts the threads. `name` is the VM's.
    pub(super) fn start(vm: &Arc<Vm>, name: &str, events: &Arc<Events>) -> io::Result<Self> {
        let queued_resizes = Arc::new(AtomicUsize::new(0));
        let (queued, name) = (queued_resizes.clone(), name.to_owned());
        let mut threads = Vec::new();
        let of_resizes = events.clone();
        let resizes = Queue::start(vm, &mut threads, "resizes", roles::RESIZES, move |vm, jobs| {
            resize_and_pursue(vm, jobs, &queued, &of_resizes);
        })?;
        let guest = Queue::start(vm, &mut threads, "guest-commands", roles::GUEST_COMMANDS, |vm, jobs| {
            serve(jobs, |command: GuestRequest| answer(vm.run_guest(&command).map(Reply::Guest)));
        })?;
        let of_looks = events.clone();
        let looks = Queue::start(vm, &mut threads, "reports", roles::REPORTS, move |vm, jobs| {
            look_and_audit(vm, &name, jobs, &of_looks);
        })?;
        let of_life = events.clone();
        // A pause waits for vCPUs and devices: neither a waiting shrink nor a command may hold it up.
        let life = Queue::start(vm, &mut threads, "life", roles::LIFE, move |vm, jobs| {
            serve(jobs, |change| {
                let result = life::change(vm, change);
                if let (Ok(LifeReport { changed: true, .. }), change) = (&result, change) {
                    of_life.say(&change.event());
                }
                answer(result.map(Reply::Life))
            });
        })?;
        Ok(Self { resizes, guest, looks, life, threads, queued_resizes })
    }

    pub(super) fn resize(&self, job: Resizing, responder: Responder) {
        self.queued_resizes.fetch_add(1, Ordering::Relaxed);
        self.resizes.push(job, responder);
    }

    pub(super) fn guest(&self, command: GuestRequest, responder: Responder) {
        self.guest.push(command, responder);
    }

    pub(super) fn look(&self, job: Look, responder: Responder) {
        self.looks.push(job, responder);
    }

    pub(super) fn change(&self, job: Change, responder: Responder) {
        self.life.push(job, responder);
    }

    /// Ends the threads after their current jobs.
    pub(super) fn finish(self) {
        let Self { resizes, guest, looks, life, threads, .. } = self;
        // Without senders the threads run out of jobs.
        drop((resizes, guest, looks, life));
        for thread in threads {
            if thread.join().is_err() {
                log::error!("a thread of the control service panicked");
            }
        }
    }
}

/// Carries out one job after the other.
fn serve<J>(jobs: &Receiver<(J, Responder)>, mut execute: impl FnMut(J) -> Reply) {
    for (job, responder) in jobs {
        if faults::point(faults::THREAD_DEATH).is_err() {
            return;
        }
        responder.answer(&execute(job));
    }
}

/// The resizes thread. Between jobs it pursues what the last resize did not reach: soon after something moved, and
/// ever more rarely while nothing does.
fn resize_and_pursue(vm: &Vm, jobs: &Receiver<(Resizing, Responder)>, queued: &AtomicUsize, events: &Events) {
    let failures = RateLimit::default();
    let mut pause = SHORTEST_LOOK;
    loop {
        let next = match vm.target() {
            Some(_) => jobs.recv_timeout(pause),
            None => jobs.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match next {
            Ok((job, responder)) => {
                queued.fetch_sub(1, Ordering::Relaxed);
                if faults::point(faults::THREAD_DEATH).is_err() {
                    return;
                }
                let reply = execute::resize(vm, job, &|| queued.load(Ordering::Relaxed) > 0);
                if let Reply::Resize(report) = &reply {
                    events.resized(vm, report);
                    pause = SHORTEST_LOOK;
                }
                responder.answer(&reply);
            }
            Err(RecvTimeoutError::Timeout) => match vm.look_again() {
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
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// The reports thread. A status audits on its own; the audits in between find a guest that uses memory it
/// does not have even if nobody asks.
fn look_and_audit(vm: &Vm, name: &str, jobs: &Receiver<(Look, Responder)>, events: &Events) {
    let failures = RateLimit::default();
    let mut pause = AUDIT_PAUSE;
    loop {
        match jobs.recv_timeout(pause) {
            Ok((Look::Validate, responder)) => {
                responder.answer(&answer(execute::validate(vm).map(Reply::Validate)));
            }
            Ok((Look::Status, responder)) => {
                if faults::point(faults::THREAD_DEATH).is_err() {
                    return;
                }
                responder.answer(&answer(report::status(vm, name).map(|report| Reply::Status(Box::new(report)))));
            }
            Err(RecvTimeoutError::Timeout) => pause = audit(vm, &failures),
            Err(RecvTimeoutError::Disconnected) => break,
        }
        events.look(vm);
    }
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
