//! [`Supervision`]: what the service manager is told of a running VM, from the event loop.
//!
//! It hears that the VM is ready, its limit as the status, and that the loop turns (the watchdog). All of it comes from the
//! loop itself: a loop that hangs says nothing, and is restarted.

use super::events::Part;
use crate::args::Ready;
use crate::service_manager::ServiceManager;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use llfree_base::units::Bytes;
use llfree_control::watch::watch;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm::vm::Vm;
use vmm_sys_util::timerfd::TimerFd;

/// Between two looks at the limit.
const LOOK: Duration = Duration::from_secs(1);
/// Between two looks whether a guest's agent is there.
const SOON: Duration = Duration::from_millis(50);

/// A service manager on the loop.
pub(super) struct Supervision {
    manager: Arc<ServiceManager>,
    vm: Arc<Vm>,
    ready: Ready,
    timer: TimerFd,
    told: Told,
    deaf: Option<io::Error>,
}

/// What the service manager knows.
#[derive(Default)]
struct Told {
    is_ready: bool,
    status: String,
    watchdog: Option<Instant>,
}

impl Supervision {
    pub(super) fn new(manager: Arc<ServiceManager>, vm: Arc<Vm>, ready: Option<Ready>) -> io::Result<Self> {
        let mut timer = TimerFd::new().map_err(from_errno)?;
        // At the loop's first turn.
        timer.reset(Duration::from_nanos(1), None).map_err(from_errno)?;
        let default = if vm.guest().agent_status().is_some() { Ready::Agent } else { Ready::Up };
        Ok(Self { manager, vm, ready: ready.unwrap_or(default), timer, told: Told::default(), deaf: None })
    }

    /// The time until the next look.
    fn look(&mut self) -> Duration {
        // A guest of ours has its agent from the start.
        let is_ready = self.told.is_ready
            || self.ready == Ready::Up
            || self.vm.guest().agent_status().is_none_or(|agent| agent.open);
        let status = match is_ready {
            true => format!("limit {} of {}", Bytes(self.vm.limit()), self.vm.config().memory),
            false => "waiting for the guest's agent".to_owned(),
        };
        let words = self.told.words(is_ready, status, self.manager.watchdog(), Instant::now());
        // What is not taken is said again.
        if !words.is_empty() && !self.manager.say(&words) {
            self.told = Told::default();
        }
        let half = self.manager.watchdog().map_or(LOOK, |time| time / 2);
        half.min(if is_ready { LOOK } else { SOON }).max(Duration::from_micros(1))
    }
}

impl Told {
    /// What is new.
    fn words(&mut self, is_ready: bool, status: String, watchdog: Option<Duration>, now: Instant) -> String {
        let mut words = Vec::new();
        if is_ready && !std::mem::replace(&mut self.is_ready, is_ready) {
            words.push("READY=1".to_owned());
        }
        if self.status != status {
            words.push(format!("STATUS={status}"));
            self.status = status;
        }
        // At half the time: there is another look before that half is over, or this is the last one.
        let half = watchdog.map(|time| time / 2);
        let is_due = |half: Duration| self.watchdog.is_none_or(|last| now + half.min(LOOK) > last + half);
        if half.is_some_and(is_due) {
            words.push("WATCHDOG=1".to_owned());
            self.watchdog = Some(now);
        }
        words.join("\n")
    }
}

fn from_errno(error: vmm_sys_util::errno::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

impl Part for Supervision {
    fn take_failure(&mut self) -> Option<io::Error> {
        self.deaf.take()
    }
}

impl MutEventSubscriber for Supervision {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        if let Err(error) = self.timer.wait() {
            log::debug!("a timer that was readable has nothing to read: {error}");
        }
        let next = self.look();
        if let Err(error) = self.timer.reset(next, None) {
            log::warn!("the service manager hears nothing any more: {error}");
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        self.deaf = watch(ops, Events::new(&self.timer, EventSet::IN)).err();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_new_is_said() {
        let (mut told, start) = (Told::default(), Instant::now());
        assert_eq!(told.words(false, "waiting".into(), None, start), "STATUS=waiting");
        assert_eq!(told.words(false, "waiting".into(), None, start), "");
        assert_eq!(told.words(true, "limit 1".into(), None, start), "READY=1\nSTATUS=limit 1");
        assert_eq!(told.words(true, "limit 2".into(), None, start), "STATUS=limit 2");
        assert_eq!(told.words(true, "limit 2".into(), None, start), "");
    }

    #[test]
    fn the_watchdog_hears_of_the_loop_before_half_its_time_is_over() {
        let start = Instant::now();
        for seconds in [1, 2, 3, 10, 60] {
            let watchdog = Duration::from_secs(seconds);
            let (mut told, mut last, mut said) = (Told::default(), Duration::ZERO, 0);
            told.words(true, String::new(), Some(watchdog), start);
            let step = LOOK.min(watchdog / 2);
            for look in 1..200 {
                let now = step * look;
                if told.words(true, String::new(), Some(watchdog), start + now) == "WATCHDOG=1" {
                    (last, said) = (now, said + 1);
                }
                assert!(now - last <= watchdog / 2, "{seconds} s: nothing between {last:?} and {now:?}");
            }
            let most = (step * 200).as_secs_f64() / (watchdog / 2).as_secs_f64() * 2.0 + 1.0;
            assert!(f64::from(said) <= most, "{seconds} s: {said} times");
        }
    }
}
