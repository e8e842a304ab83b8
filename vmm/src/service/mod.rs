//! Requests from the control socket, carried out.
//!
//! [`Service::dispatch`] runs on the event loop and only sorts: whatever may take long goes to one of
//! five threads, each with its own queue.
//!
//! | file | what lives there |
//! |---|---|
//! | `life` | pause and resume, and what a status says about them |
//! | `queues` | the threads, their queues, and audits between jobs |
//! | `execute` | what a request does to the VM, and the reply to it |
//! | `report` | the VM's state and what it did, as the protocol reports them |

mod execute;
mod life;
mod queues;
mod report;

pub use execute::{auto_reclaim, validate};
pub use report::{resize_report, status};

use crate::agent::AgentError;
use crate::vm::{Vm, VmError};
use execute::{Resizing, answer};
use life::Change;
use llfree_base::lock;
use llfree_control::protocol::{Reply, Request};
use llfree_control::server::Responder;
use queues::Queues;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The threads that carry out requests. Dropping it ends them after their current jobs.
pub struct Service {
    vm: Arc<Vm>,
    name: String,
    /// `None` once they have ended.
    queues: Mutex<Option<Queues>>,
}

impl Service {
    /// Starts the threads.
    ///
    /// # Errors
    /// The host cannot start a thread.
    pub fn start(vm: Arc<Vm>, name: &str) -> std::io::Result<Self> {
        let queues = Mutex::new(Some(Queues::start(&vm, name)?));
        Ok(Self { vm, name: name.to_owned(), queues })
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
                queues.resize(Resizing::Shrink { goal, wait: Duration::from_millis(wait_ms) }, responder);
            }
            Request::Grow { to_bytes } => queues.resize(Resizing::Grow { to_bytes }, responder),
            Request::Reclaim { bytes } => match execute::check_reclaim(&self.vm) {
                Ok(_) => queues.resize(Resizing::Reclaim { bytes }, responder),
                Err(error) => responder.answer(&answer(Err(error))),
            },
            // Queued after a running command it would wait for the resume.
            Request::Guest(_) if self.vm.is_paused() => responder.answer(&answer(Err(VmError::Paused))),
            Request::Guest(command) => queues.guest(command, responder),
            Request::Pause => queues.change(Change::Pause, responder),
            Request::Resume => queues.change(Change::Resume, responder),
        }
        false
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

impl Drop for Service {
    fn drop(&mut self) {
        self.finish();
    }
}
