//! [`Work`]: the thread that carries out what is asked of an area, one request after the other, and audits in between.
//!
//! A pass over much memory takes long. The thread that watches the process does not wait for it: dropped, the work ends at
//! its next batch.

use crate::requests::Answering;
use llfree_base::thread::{Role, Spawner};
use llfree_base::{RateLimit, error_line};
use llfree_control::jobs::{JobSender, Jobs, NoJob, jobs};
use llfree_control::protocol::Request;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The thread that works on one area.
const WORK: Role = Role::new("area-work", &[]);
/// Between two audits.
const AUDIT: Duration = Duration::from_secs(1);

pub(crate) struct Work {
    answering: Arc<Answering>,
    thread: Option<JoinHandle<()>>,
}

impl Work {
    /// Starts it, with the end of the queue that requests are put in; it ends when that is dropped.
    pub(crate) fn start(answering: Arc<Answering>) -> io::Result<(Self, JobSender<Request>)> {
        let (sender, queue) = jobs();
        let of_thread = answering.clone();
        let thread = Spawner::default().spawn("area-work", WORK, move || run(&of_thread, &queue))?;
        Ok((Self { answering, thread: Some(thread) }, sender))
    }
}

impl Drop for Work {
    /// The queue's other end must be gone. Afterwards nobody is at work on the area.
    fn drop(&mut self) {
        self.answering.area.stop();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("{}: the thread of its requests panicked", self.answering.name);
        }
    }
}

fn run(answering: &Answering, queue: &Jobs<Request>) {
    let failures = RateLimit::default();
    let mut due = Instant::now() + AUDIT;
    loop {
        match queue.next_within(due.saturating_duration_since(Instant::now())) {
            Ok((request, responder)) => responder.answer(&answering.answer(request)),
            Err(NoJob::AnyMore) => return,
            Err(NoJob::Yet) => {}
        }
        if Instant::now() < due {
            continue;
        }
        if let Err(error) = answering.area.audit()
            && let Some(number) = failures.tick()
        {
            log::warn!("{}: an audit failed ({number} so far): {}", answering.name, error_line(&error));
        }
        due = Instant::now() + AUDIT;
    }
}
