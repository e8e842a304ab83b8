//! [`End`]: why the guest ended, and who is told.
//!
//! Several vCPUs may come to an end at nearly the same time, and which of their threads gets here first is up to the
//! host's scheduler. The reason must not be: what the guest *asked* for stands. It is neither replaced by what happens
//! to another vCPU afterwards, nor lost because that was noticed an instant before. Hence two rules: the first end
//! tells all vCPUs to stop, so that no more of the guest runs than was under way; and a fault of a vCPU yields to an
//! end that the guest asked for or that the host decided, as one may come to light while the others stop. Once [`Vm::stop`](super::Vm::stop) is
//! through, the reason is final.

use crate::agent::Agents;
use crate::exit::ExitReason;
use crate::guest::Guest;
use crate::vcpu::{self, VcpuHandle};
use llfree_base::faults;
use llfree_base::lock;
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// Why the guest ended, once it has, and the condition that waiters sleep on.
#[derive(Default)]
pub(super) struct End {
    reason: Mutex<Option<ExitReason>>,
    changed: Condvar,
}

impl End {
    /// Notes a reason, unless there is one that stands.
    fn note(&self, reason: ExitReason) {
        let mut noted = lock(&self.reason);
        // Of two alike, the first is the cause and the later one its consequence.
        if noted.as_ref().is_none_or(|noted| noted.yields_to(&reason)) {
            *noted = Some(reason);
        }
        drop(noted);
        self.changed.notify_all();
    }

    pub(super) fn reason(&self) -> Option<ExitReason> {
        lock(&self.reason).clone()
    }

    /// Waits until there is a reason, for at most `timeout`.
    pub(super) fn wait(&self, timeout: Duration) -> Option<ExitReason> {
        let waited = self.changed.wait_timeout_while(lock(&self.reason), timeout, |reason| reason.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.clone()
    }
}

/// Tells everybody that the guest has ended.
#[derive(Clone)]
pub(super) struct ExitNotifier {
    pub(super) end: Arc<End>,
    pub(super) event: Arc<EventFd>,
    pub(super) agents: Arc<Agents>,
    /// Not its owner: the guest may share KVM's VM, which must go before guest memory does.
    pub(super) guest: Weak<dyn Guest>,
    pub(super) vcpus: Vec<Arc<VcpuHandle>>,
}

impl ExitNotifier {
    pub(super) fn notify(&self, reason: ExitReason) {
        // Before anything else: the other vCPUs run on until then.
        vcpu::order_stop(&self.vcpus);
        self.end.note(reason);
        self.agents.stop();
        if let Some(guest) = self.guest.upgrade() {
            guest.stop();
        }
        if let Err(error) = faults::point(faults::EVENTFD).and_then(|()| self.event.write(1)) {
            log::error!("the guest's end could not be announced: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llfree_monitor::Violation;

    #[test]
    fn what_a_guest_asked_for_stands_whichever_vcpu_is_noticed_first() {
        let fault = |vcpu| ExitReason::Vcpu { vcpu, what: "triple fault".to_owned() };
        let crash = ExitReason::Exception { what: "page fault".to_owned(), details: String::new() };
        let asked = [
            ExitReason::PoweredOff,
            ExitReason::Rebooted,
            ExitReason::Exited(0),
            ExitReason::Exited(7),
            ExitReason::Panicked("no memory".to_owned()),
            ExitReason::KernelPanic("it says so itself"),
        ];
        let touch = Violation { address: 0, held: true, write: true, vcpu: Some(1) };
        let decided = [
            ExitReason::Violation(touch),
            ExitReason::Unwatched("gone".to_owned()),
            ExitReason::AbiMismatch { guest: 7 },
        ];
        let of = |first: &ExitReason, second: &ExitReason| {
            let end = End::default();
            end.note(first.clone());
            end.note(second.clone());
            end.reason().expect("a reason")
        };
        for asked in &asked {
            for failed in [&fault(1), &crash] {
                assert_eq!(of(asked, failed), *asked);
                assert_eq!(of(failed, asked), *asked);
            }
            // What the host decided is no accident that the guest may talk over.
            for decided in &decided {
                assert_eq!(of(decided, asked), *decided);
                assert_eq!(of(asked, decided), *asked);
            }
        }
        for decided in &decided {
            for failed in [&fault(1), &crash] {
                assert_eq!((of(decided, failed), of(failed, decided)), (decided.clone(), decided.clone()));
            }
        }
        assert_eq!(of(&fault(0), &fault(1)), fault(0), "the cause and its consequence");
        assert_eq!(of(&fault(0), &crash), fault(0));
        assert_eq!(of(&asked[0], &asked[1]), asked[0], "the first wish");
    }
}
