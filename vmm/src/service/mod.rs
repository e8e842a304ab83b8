//! Requests from the control socket, carried out.
//!
//! [`Service::dispatch`] runs on the event loop and only sorts: whatever may take long goes to one of
//! five threads, each with its own queue.
//!
//! | file | what lives there |
//! |---|---|
//! | `life` | pause and resume, and what a status says about them |
//! | `queues` | the threads, their queues, and audits between jobs |
//! | `events` | what happens to the VM, for those who follow it |
//! | `execute` | what a request does to the VM, and the reply to it |
//! | `report` | the VM's state and what it did, as the protocol reports them |

mod events;
mod execute;
mod life;
mod queues;
mod report;

pub use execute::{auto_reclaim, start_with_limit, validate};
pub use report::{resize_report, status};

use crate::agent::AgentError;
use crate::vm::{Vm, VmError};
use events::Events;
use execute::{Resizing, answer};
use life::Change;
use llfree_base::lock;
use llfree_control::protocol::{ErrorKind, Reply, Request, ResizeGoal};
use llfree_control::report::{Event, Reason, StatusReport};
use llfree_control::server::Responder;
use queues::Queues;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The threads that carry out requests. Dropping it ends them after their current jobs.
pub struct Service {
    vm: Arc<Vm>,
    name: String,
    events: Arc<Events>,
    /// `None` once they have ended.
    queues: Mutex<Option<Queues>>,
}

impl Service {
    /// Starts the threads.
    ///
    /// # Errors
    /// The host cannot start a thread.
    pub fn start(vm: Arc<Vm>, name: &str) -> std::io::Result<Self> {
        let events = Arc::new(Events::new());
        let queues = Mutex::new(Some(Queues::start(&vm, name, &events)?));
        Ok(Self { vm, name: name.to_owned(), events, queues })
    }

    /// Answers a request, or hands it to the thread that will. True if the VM is to stop.
    pub fn dispatch(&self, request: Request, responder: Responder) -> bool {
        if let Some(end) = self.vm.ended() {
            responder.answer(&answer(Err(end.into())));
            return false;
        }
        let queues = lock(&self.queues);
        let Some(queues) = queues.as_ref() else {
            responder.answer(&answer(Err(AgentError::Gone.into())));
            return false;
        };
        match request {
            Request::Ping => responder.answer(&Reply::Pong { name: self.name.clone(), pid: std::process::id() }),
            Request::Stop => {
                responder.answer(&Reply::Stopping);
                return true;
            }
            Request::AutoReclaim { settings } => {
                responder.answer(&answer(auto_reclaim(&self.vm, settings).map(Reply::AutoReclaim)));
            }
            Request::Status => queues.status(responder),
            Request::Validate => queues.validate(responder),
            Request::Shrink { goal, wait_ms } => {
                queues.resize(resizing(goal.into(), wait_ms, false), responder);
            }
            Request::Grow { to_bytes } => {
                queues.resize(resizing(ResizeGoal::UpToBytes(to_bytes), 0, false), responder);
            }
            Request::Resize { goal, wait_ms, once } => queues.resize(resizing(goal, wait_ms, once), responder),
            Request::ShrinkByForce { goal, wait_ms } => {
                let wait = Duration::from_millis(wait_ms);
                queues.resize(Resizing::Move { goal: goal.into(), wait, once: true, force: true }, responder);
            }
            Request::Events => responder.stream(self.events.subscribe()),
            // The process that the VM runs in may have these; a VM has not.
            Request::Logs { .. } | Request::Console => {
                let message = "there is no such stream here";
                responder.answer(&Reply::refusal(ErrorKind::Refused, Some(Reason::NoConsole), message));
            }
            Request::Reclaim { bytes } => self.reclaim(queues, bytes, false, responder),
            Request::ReclaimByForce { bytes } => self.reclaim(queues, bytes, true, responder),
            // Queued after a running command it would wait for the resume.
            Request::Guest(_) if self.vm.is_paused() => responder.answer(&answer(Err(VmError::Paused))),
            Request::Guest(command) => queues.guest(command, responder),
            Request::Pause => queues.change(Change::Pause, responder),
            Request::Resume => queues.change(Change::Resume, responder),
            Request::PowerButton => queues.press_power_button(responder),
        }
        false
    }

    /// What a status request is answered with, made on the calling thread.
    ///
    /// # Errors
    /// As [`status`], and [`AgentError::Gone`] once the threads have ended.
    pub fn status(&self) -> Result<StatusReport, VmError> {
        let completion = lock(&self.queues).as_ref().map(Queues::completion).ok_or(AgentError::Gone)?;
        status(&self.vm, &self.name).map(completion)
    }

    fn reclaim(&self, queues: &Queues, bytes: Option<u64>, force: bool, responder: Responder) {
        match execute::check_reclaim(&self.vm) {
            Ok(_) => queues.resize(Resizing::Reclaim { bytes, force }, responder),
            Err(error) => responder.answer(&answer(Err(error))),
        }
    }

    /// Adds to the events that clients may follow.
    pub fn say(&self, event: &Event) {
        self.events.say(event);
    }

    /// The last event: why the VM ends, and with which exit code.
    pub fn say_end(&self, reason: String, exit_code: u8) {
        self.events.end(&self.vm, reason, exit_code);
    }

    /// Ends the threads after their current jobs: every request has its answer then, or is known not to
    /// come to an end. Call it once the VM has stopped, as their jobs may take long before that.
    pub fn finish(&self) {
        let queues = lock(&self.queues).take();
        if let Some(queues) = queues {
            queues.finish();
        }
    }
}

fn resizing(goal: ResizeGoal, wait_ms: u64, once: bool) -> Resizing {
    Resizing::Move { goal, wait: Duration::from_millis(wait_ms), once, force: false }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.finish();
    }
}
