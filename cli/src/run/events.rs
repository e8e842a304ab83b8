//! [`EventLoop`]: what all descriptors of a launch hang on.

use super::error::{RunError, host};
use super::stop::{Stop, StopCell, StopOn};
use event_manager::{EventManager, MutEventSubscriber, SubscriberId, SubscriberOps};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// The loop runs on after the VM stopped, so that the last replies get out: at most this
/// long, and until nothing moves for a while.
const LAST_REPLIES: Duration = Duration::from_secs(1);
const REPLY_GAP: Duration = Duration::from_millis(20);

/// The loop of one launch; nothing on it blocks.
pub(super) struct EventLoop(EventManager<Box<dyn MutEventSubscriber>>);

impl EventLoop {
    /// A loop that watches for signals.
    pub(super) fn new(signals: Vec<StopOn<UnixStream>>) -> Result<Self, RunError> {
        let mut events = Self(EventManager::new().map_err(broken)?);
        for signal in signals {
            events.add(signal);
        }
        Ok(events)
    }

    /// Hangs a part on it.
    pub(super) fn add(&mut self, part: impl MutEventSubscriber + 'static) -> SubscriberId {
        self.0.add_subscriber(Box::new(part))
    }

    /// Takes a part off.
    pub(super) fn remove(&mut self, part: SubscriberId) {
        drop(self.0.remove_subscriber(part));
    }

    /// Stops, for this reason, once `event` is readable.
    pub(super) fn stop_on(&mut self, event: &EventFd, reason: Stop, stop: &StopCell) -> Result<(), RunError> {
        let source = event.try_clone().map_err(host("duplicate an event"))?;
        self.add(StopOn { source, reason, cell: stop.clone() });
        Ok(())
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
