//! [`jobs`]: a bounded queue of requests between the event loop and the thread that carries them out.
//!
//! The one place that bounds what clients leave behind. A client has one request at work at a time, so those
//! of clients that are there are as few as the clients. A client that left is owed nothing: its jobs are
//! passed over when their turn comes, and make room when there is none. Every other job is answered: by
//! its thread or, if that is gone, by its responder when it is dropped.

use crate::protocol::{ErrorKind, Reply};
use crate::server::Responder;
use llfree_base::lock;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The most jobs in a queue, those of clients that left included. No fewer than there can be clients, so
/// that no client is refused because of others.
pub const MOST_JOBS: usize = 256;

/// A queue's two ends.
#[must_use]
pub fn jobs<J>() -> (JobSender<J>, Jobs<J>) {
    let state = State { jobs: VecDeque::new(), over: false };
    let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
    (JobSender(shared.clone()), Jobs(shared))
}

struct State<J> {
    jobs: VecDeque<(J, Responder)>,
    /// One of the two ends is gone.
    over: bool,
}

struct Shared<J> {
    state: Mutex<State<J>>,
    changed: Condvar,
}

impl<J> Shared<J> {
    fn lock(&self) -> MutexGuard<'_, State<J>> {
        // A queue is whole between any two of its calls.
        lock(&self.state)
    }
}

/// Where jobs are put in. When it is dropped, the thread ends after those that are left.
pub struct JobSender<J>(Arc<Shared<J>>);

impl<J> JobSender<J> {
    /// Puts a job at the end of the queue. Never waits; a queue without room, or without its thread,
    /// refuses.
    pub fn push(&self, job: J, responder: Responder) {
        let mut state = self.0.lock();
        if state.over {
            drop(state);
            // Its drop tells the client.
            drop(responder);
            return;
        }
        if state.jobs.len() >= MOST_JOBS {
            state.jobs.retain(|(_, responder)| !responder.is_abandoned());
        }
        if state.jobs.len() >= MOST_JOBS {
            drop(state);
            let message = format!("{MOST_JOBS} requests of this kind wait already; try again");
            responder.answer(&Reply::error(ErrorKind::Busy, message));
            return;
        }
        state.jobs.push_back((job, responder));
        drop(state);
        self.0.changed.notify_one();
    }
}

impl<J> JobSender<J> {
    /// Jobs that wait, for clients that are there.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.0.lock().jobs.iter().filter(|(_, responder)| !responder.is_abandoned()).count() as u64
    }
}

impl<J> Drop for JobSender<J> {
    fn drop(&mut self) {
        self.0.lock().over = true;
        self.0.changed.notify_all();
    }
}

/// Why there is no job.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NoJob {
    /// None came in time.
    Yet,
    /// None will come any more.
    AnyMore,
}

/// Where jobs are taken out, by one thread. When it is dropped, those that wait are refused.
pub struct Jobs<J>(Arc<Shared<J>>);

impl<J> Jobs<J> {
    /// The next job whose client is there; `None` when there will be no more.
    #[must_use]
    pub fn next(&self) -> Option<(J, Responder)> {
        loop {
            match self.next_within(Duration::from_secs(60 * 60)) {
                Ok(job) => return Some(job),
                Err(NoJob::Yet) => {}
                Err(NoJob::AnyMore) => return None,
            }
        }
    }

    /// The next job whose client is there, if one comes within `timeout`.
    ///
    /// # Errors
    /// Why there is none.
    pub fn next_within(&self, timeout: Duration) -> Result<(J, Responder), NoJob> {
        let deadline = Instant::now() + timeout;
        let mut state = self.0.lock();
        loop {
            while let Some((job, responder)) = state.jobs.pop_front() {
                if !responder.is_abandoned() {
                    return Ok((job, responder));
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match () {
                () if state.over => return Err(NoJob::AnyMore),
                () if left.is_zero() => return Err(NoJob::Yet),
                () => state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
            }
        }
    }

    /// Whether a job like this waits, for a client that is there.
    #[must_use]
    pub fn has_waiting(&self, like: impl Fn(&J) -> bool) -> bool {
        self.0.lock().jobs.iter().any(|(job, responder)| like(job) && !responder.is_abandoned())
    }
}

impl<J> Drop for Jobs<J> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.over = true;
        let refused = std::mem::take(&mut state.jobs);
        drop(state);
        drop(refused);
    }
}
