//! What happens to the VM, as a feed of lines for those who follow it.
//!
//! Some things are said when they happen. What a guest can do as often as it likes (violations, errors of its
//! drivers) is read from counters now and then instead, so that it makes a line a look at most.

use crate::vm::{Target, Vm};
use llfree_base::lock;
use llfree_control::feed::{Feed, Subscription};
use llfree_control::report::{Event, ResizeReport};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Bytes of lines that are kept: some hundred events.
const KEPT: usize = 64 << 10;
/// Between two looks at the counters.
const LOOK: Duration = Duration::from_millis(500);

/// The events of one VM.
pub(super) struct Events {
    feed: Arc<Feed>,
    seen: Mutex<Seen>,
}

/// The counters at the last look.
#[derive(Default)]
struct Seen {
    violations: u64,
    /// One a device, in their order.
    device_errors: Vec<u64>,
    at: Option<Instant>,
}

impl Events {
    pub(super) fn new() -> Self {
        Self { feed: Arc::new(Feed::new(KEPT, lost)), seen: Mutex::default() }
    }

    /// All events that are kept, and those to come.
    pub(super) fn subscribe(&self) -> Subscription {
        Subscription::to(self.feed.clone())
    }

    pub(super) fn say(&self, event: &Event) {
        self.feed.push(event.to_line().as_bytes());
    }

    /// A resize has had its reply.
    pub(super) fn resized(&self, vm: &Vm, report: &ResizeReport) {
        self.say(&Event::Resized {
            target_bytes: report.target_bytes,
            limit_bytes: vm.limit(),
            complete: report.complete,
            pursued: report.pursued,
        });
    }

    /// A target was reached after the reply.
    pub(super) fn reached(&self, vm: &Vm, target: Target) {
        let limit_bytes = vm.limit();
        self.say(&Event::Resized { target_bytes: target.bytes, limit_bytes, complete: true, pursued: true });
    }

    /// Says what the guest did since the last look, unless that was a moment ago.
    pub(super) fn look(&self, vm: &Vm) {
        let mut seen = lock(&self.seen);
        if seen.at.is_none_or(|at| at.elapsed() >= LOOK) {
            seen.at = Some(Instant::now());
            self.say_news(vm, &mut seen);
        }
    }

    /// The VM ends: says what is not said yet, and that.
    pub(super) fn end(&self, vm: &Vm, reason: String, exit_code: u8) {
        self.say_news(vm, &mut lock(&self.seen));
        self.say(&Event::End { reason, exit_code });
        self.feed.close();
    }

    fn say_news(&self, vm: &Vm, seen: &mut Seen) {
        let counts = vm.monitor().counters.counts();
        if let Some(count) = news(&mut seen.violations, counts.violations) {
            self.say(&Event::Violation { count, total: counts.violations, beyond_limit: counts.held_violations });
        }
        let devices: Vec<_> = vm.devices().iter().collect();
        seen.device_errors.resize(devices.len(), 0);
        for ((_, device), seen) in devices.into_iter().zip(&mut seen.device_errors) {
            let total = device.counts().errors;
            if let Some(count) = news(seen, total) {
                self.say(&Event::DeviceError { device: device.name().to_owned(), count, total });
            }
        }
    }
}

/// How much a counter rose since it was `seen`, if it did.
fn news(seen: &mut u64, now: u64) -> Option<u64> {
    let more = now.saturating_sub(std::mem::replace(seen, now));
    (more > 0).then_some(more)
}

fn lost(records: u64, _: u64) -> Vec<u8> {
    Event::Lost { count: records }.to_line().into_bytes()
}
