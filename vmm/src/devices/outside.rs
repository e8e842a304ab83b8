//! [`Outside`]: the requests of a device that are carried out without its lock, by helper threads.
//!
//! Its own lock is held for an instant only, never during a request: so the end of a VM waits for no
//! storage. Whoever also has the device's lock took that one first.

use super::Task;
use super::request::Buffer;
use llfree_base::lock;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often a thread that waits for the last request looks whether it should go on.
const LOOK: Duration = Duration::from_millis(5);

/// A request to carry out. It is in flight from [`Outside::begin`] to [`Outside::done`].
pub(super) struct Job {
    pub(super) queue: usize,
    pub(super) head: u16,
    pub(super) buffers: Vec<Buffer>,
    pub(super) task: Task,
}

#[derive(Default)]
struct Flight {
    /// Requests that are not given back yet.
    in_flight: u32,
    /// Those of them that wait for a helper.
    jobs: VecDeque<Job>,
    helpers: u32,
    /// The VM ends.
    over: bool,
}

/// What is in flight, and who helps.
#[derive(Default)]
pub(super) struct Outside {
    flight: Mutex<Flight>,
    /// Signalled when there is a job, or no more.
    work: Condvar,
    /// Signalled when nothing is in flight any more, or the VM ends.
    idle: Condvar,
}

impl Outside {
    /// Whether one more request may be begun: there are no more of them than helpers, and one without any.
    pub(super) fn has_place(&self) -> bool {
        let flight = self.lock();
        flight.in_flight < flight.helpers.max(1)
    }

    /// Hands a job to a helper; back to the caller where there is none.
    pub(super) fn begin(&self, job: Job) -> Option<Job> {
        let mut flight = self.lock();
        flight.in_flight += 1;
        if flight.helpers == 0 || flight.over {
            return Some(job);
        }
        flight.jobs.push_back(job);
        drop(flight);
        self.work.notify_one();
        None
    }

    /// A request was given back.
    pub(super) fn done(&self) {
        let mut flight = self.lock();
        flight.in_flight -= 1;
        let idle = flight.in_flight == 0;
        drop(flight);
        if idle {
            self.idle.notify_all();
        }
    }

    /// One more thread will ask for jobs.
    pub(super) fn add_helper(&self) {
        self.lock().helpers += 1;
    }

    /// The next job for a helper; `None` when the VM ends.
    pub(super) fn next(&self) -> Option<Job> {
        let idle = |flight: &mut Flight| flight.jobs.is_empty() && !flight.over;
        let waited = self.work.wait_while(self.lock(), idle);
        waited.unwrap_or_else(PoisonError::into_inner).jobs.pop_front()
    }

    /// Waits until nothing is in flight, or the VM ends.
    pub(super) fn wait_until_idle(&self) {
        let busy = |flight: &mut Flight| flight.in_flight > 0 && !flight.over;
        drop(self.idle.wait_while(self.lock(), busy));
    }

    /// The same, but only while `go_on` says so; true if nothing is in flight.
    pub(super) fn wait_until_idle_while(&self, go_on: impl Fn() -> bool) -> bool {
        let mut flight = self.lock();
        while flight.in_flight > 0 && go_on() {
            flight = self.idle.wait_timeout(flight, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        flight.in_flight == 0
    }

    /// Ends the helpers after their current requests, and lets go of whoever waits for those.
    pub(super) fn release(&self) {
        self.lock().over = true;
        self.work.notify_all();
        self.idle.notify_all();
    }

    #[cfg(test)]
    pub(super) fn helpers(&self) -> u32 {
        self.lock().helpers
    }

    fn lock(&self) -> MutexGuard<'_, Flight> {
        lock(&self.flight)
    }
}
