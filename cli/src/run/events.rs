//! [`EventLoop`]: what all descriptors of a launch hang on.

use super::error::{RunError, host};
use super::stop::{Stop, StopCell, StopOn};
use crate::terminal::Input;
use event_manager::{EventManager, MutEventSubscriber, SubscriberId, SubscriberOps};
use llfree_control::protocol::Request;
use llfree_control::server::{ControlServer, Responder};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// The loop runs on after the VM stopped, so that the last replies get out: at most this
/// long, and until nothing moves for a while.
const LAST_REPLIES: Duration = Duration::from_secs(1);
const REPLY_GAP: Duration = Duration::from_millis(20);

/// A part of the launch that hangs on the loop. It registers its descriptors itself, and keeps the error if
/// it cannot.
pub(super) trait Part: MutEventSubscriber {
    /// Why it would not hear of what it is there for.
    fn take_failure(&mut self) -> Option<io::Error>;
}

impl<F: AsRawFd> Part for StopOn<F> {
    fn take_failure(&mut self) -> Option<io::Error> {
        self.deaf.take()
    }
}

impl<D: FnMut(Request, Responder)> Part for ControlServer<D> {
    fn take_failure(&mut self) -> Option<io::Error> {
        Self::take_failure(self)
    }
}

impl<L: FnMut()> Part for Input<L> {
    fn take_failure(&mut self) -> Option<io::Error> {
        Self::take_failure(self)
    }
}

/// The loop of one launch; nothing on it blocks.
pub(super) struct EventLoop(EventManager<Box<dyn Part>>);

impl EventLoop {
    /// A loop that watches for signals.
    pub(super) fn new(signals: Vec<StopOn<UnixStream>>) -> Result<Self, RunError> {
        let mut events = Self(EventManager::new().map_err(broken)?);
        for signal in signals {
            events.add(signal)?;
        }
        Ok(events)
    }

    /// Hangs a part on it.
    ///
    /// # Errors
    /// The loop cannot watch what the part needs: a launch must not go on with a part that is deaf.
    pub(super) fn add(&mut self, part: impl Part + 'static) -> Result<SubscriberId, RunError> {
        let id = self.0.add_subscriber(Box::new(part));
        match self.0.subscriber_mut(id).map_err(broken)?.take_failure() {
            Some(error) => Err(host("watch a descriptor on the event loop")(error)),
            None => Ok(id),
        }
    }

    /// Takes a part off.
    pub(super) fn remove(&mut self, part: SubscriberId) {
        drop(self.0.remove_subscriber(part));
    }

    /// Stops, for this reason, once `event` is readable.
    pub(super) fn stop_on(&mut self, event: &EventFd, reason: Stop, stop: &StopCell) -> Result<(), RunError> {
        let source = event.try_clone().map_err(host("duplicate an event"))?;
        self.add(StopOn::new(source, reason, stop)).map(drop)
    }

    /// Serves until there is a reason to stop.
    pub(super) fn run_until(&mut self, stop: &StopCell) -> Result<Stop, RunError> {
        loop {
            if let Some(reason) = stop.get() {
                return Ok(reason);
            }
            match self.0.run() {
                Ok(_) => {}
                Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(broken(error)),
            }
        }
    }

    /// Goes on for a moment, until nothing moves any more.
    pub(super) fn send_last_replies(&mut self) {
        let deadline = Instant::now() + LAST_REPLIES;
        let mut moving = true;
        while moving && Instant::now() < deadline {
            moving = self.0.run_with_timeout(REPLY_GAP.as_millis() as i32).is_ok_and(|events| events > 0);
        }
    }
}

fn broken(error: event_manager::Error) -> RunError {
    RunError::Loop(format!("{error:?}"))
}
