//! Violations: touches of memory that the guest does not have, seen in the act.
//!
//! With guest RAM under a userfaultfd, a thread that touches a missing page sleeps until the thread in
//! here has decided: by R, under a claim of the frame, like everything else. It waits for nobody:
//! a fault on a frame that somebody is at is looked at again later, and faults of the VMM's own
//! threads are served as those of vCPUs are. What it decides keeps the limit: an evicted frame is
//! the guest's to have, a held one never comes back. A page there is only *lent*: 4 KiB, at most
//! [`LENT_PER_VCPU`](super::lent::LENT_PER_VCPU) a vCPU at a time, the oldest taken back for the next.

use super::{CLAIM_POLL, Monitor};
use crate::memory::{Fault, Userfault};
use crate::roles;
use llfree::{Claim, Residency};
use llfree_base::choices::OnViolation;
use llfree_base::thread::Spawner;
use llfree_base::{RateLimit, error_line, lock};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, OwnedFd};
use shared_layout::{HUGE_SIZE, HugeId};
use std::fmt;
use std::io;
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often in a row the kernel may refuse to tell of faults. A vCPU sleeps in its fault meanwhile.
const ATTEMPTS: u32 = 100;
/// Between two of these attempts.
const RETRY: Duration = Duration::from_millis(10);

/// One touch of memory that the guest does not have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Violation {
    /// Guest-physical address.
    pub address: u64,
    /// Whether the frame is held; else it is evicted.
    pub held: bool,
    /// Whether it was written to.
    pub write: bool,
    /// Who; `None` for a device of the VMM that the guest sent there.
    pub vcpu: Option<u32>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.vcpu {
            Some(vcpu) => write!(f, "vCPU {vcpu}")?,
            None => f.write_str("a device")?,
        }
        let how = if self.write { "wrote to" } else { "read" };
        let state = if self.held { "held: the limit excludes it" } else { "evicted: it has to be installed first" };
        write!(f, " {how} {:#x} in huge frame {}, which is {state}", self.address, self.address / HUGE_SIZE)
    }
}

/// Why a guest has to end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ending {
    /// It touched memory that it does not have.
    Violation(Violation),
    /// The kernel no longer tells of its faults, and nothing else may take the place of that.
    Unwatched(String),
}

/// A fault that somebody sleeps in.
struct Waiting {
    fault: Fault,
    /// Whether it is among the violations already, and waits to be served only.
    is_counted: bool,
}

/// What a fault came to.
enum Verdict {
    /// Nobody waits for it any more.
    Served,
    /// Somebody is at the frame: ask again.
    Later,
    /// The guest ends. A vCPU sleeps on until it is stopped.
    End(Violation),
}

impl Monitor {
    /// Decides about a fault of `vcpu`, or of another thread.
    fn judge(&self, userfault: &Userfault, waiting: &mut Waiting, vcpu: Option<u32>, policy: OnViolation) -> Verdict {
        let Waiting { fault, is_counted } = waiting;
        let huge = HugeId((fault.offset / HUGE_SIZE) as u32);
        let Some(claim) = self.host().claim(huge) else { return Verdict::Later };
        let residency = claim.residency();
        if residency == Residency::Installed {
            // It was installed since, or lost a page to something that we do not know: zeroes are
            // right for both, as they change nothing where there is a page.
            lend(userfault, fault.offset);
            return Verdict::Served;
        }
        if self.is_stopping() {
            return self.lend(userfault, fault.offset, &claim);
        }
        let held = residency == Residency::Held;
        // A kernel that boots has memory by touching it; some of it for longer, if the host had none to install.
        if self.comes_by_touch() && !held {
            self.counters.boot_touches.inc();
            return self.serve_touch(userfault, fault, claim);
        }
        let violation = Violation { address: fault.offset, held, write: fault.write, vcpu };
        let ends = policy == OnViolation::Stop || (policy == OnViolation::Install && held);
        if !mem::replace(is_counted, true) {
            self.counters.violations.inc();
            self.counters.held_violations.add(held.into());
            if !ends && let Some(number) = self.violations_found.tick() {
                log::warn!("{violation}; the guest had not asked for it ({number} so far)");
            }
        }
        match (policy, held) {
            (OnViolation::Stop, _) | (OnViolation::Install, true) => {
                // Other threads have no signal that gets them out.
                if vcpu.is_none() {
                    let _ = self.lend(userfault, fault.offset, &claim);
                }
                Verdict::End(violation)
            }
            (OnViolation::Log, true) => self.lend(userfault, fault.offset, &claim),
            (OnViolation::Install | OnViolation::Log, false) => self.serve_touch(userfault, fault, claim),
        }
    }

    /// Puts memory behind an evicted frame that somebody waits for.
    fn serve_touch(&self, userfault: &Userfault, fault: &Fault, claim: Claim<'_>) -> Verdict {
        let huge = claim.huge();
        match self.supply_memory(huge) {
            Ok(()) => {
                self.lent.forget(huge);
                if let Ok(installing) = claim.install() {
                    installing.done();
                }
                Verdict::Served
            }
            Err(short) => {
                if let Some(number) = self.host_failures.tick() {
                    log::warn!(
                        "install of huge frame {} failed ({number} so far): {}",
                        huge.0,
                        error_line(&short.error)
                    );
                }
                // It is the tenant's by right: it gets this page, and the frame's others as it touches them, and
                // keeps what it has there.
                if self.comes_by_touch() {
                    lend(userfault, fault.offset);
                    if let Ok(installing) = claim.install() {
                        installing.done();
                    }
                    return Verdict::Served;
                }
                // Whatever came of it must not stay. Not in the middle of an audit, which would take it
                // for the guest's.
                let Some(turn) = self.discards.try_lock() else { return Verdict::Later };
                if let Err(error) = self.ram.discard(huge)
                    && self.host_failures.tick().is_some()
                {
                    log::warn!("what a failed install left stays: {}", error_line(&error));
                }
                drop(turn);
                self.lend(userfault, fault.offset, &claim)
            }
        }
    }

    /// Lets somebody use a page of the claimed frame for a while; takes another back for it.
    fn lend(&self, userfault: &Userfault, offset: u64, claim: &Claim<'_>) -> Verdict {
        if !self.make_room(claim.huge()) {
            return Verdict::Later;
        }
        self.lent.add(offset);
        lend(userfault, offset);
        Verdict::Served
    }

    /// Takes lent pages back until one more may be lent. False if all are in frames that others are
    /// at, or somebody else discards; `own` is ours.
    fn make_room(&self, own: HugeId) -> bool {
        if self.lent.has_room() {
            return true;
        }
        let candidates = self.lent.pages();
        for page in candidates {
            let huge = HugeId((page / HUGE_SIZE) as u32);
            let claim = if huge == own { None } else { self.host().claim(huge) };
            if claim.is_none() && huge != own {
                continue;
            }
            // An install since has replaced what was lent.
            let lost = claim.as_ref().is_none_or(|claim| claim.residency() != Residency::Installed);
            // An audit that is under way has seen the pages, and is to find them lent.
            let Some(_turn) = self.discards.try_lock() else { return false };
            // All that lies there is lent, so the whole frame goes, and its page table with it.
            if lost && let Err(error) = self.ram.discard(huge) {
                if let Some(number) = self.host_failures.tick() {
                    log::warn!("what was lent cannot be taken back ({number} so far): {}", error_line(&error));
                }
                continue;
            }
            self.lent.forget(huge);
            if self.lent.has_room() {
                return true;
            }
        }
        false
    }
}

fn lend(userfault: &Userfault, offset: u64) {
    if let Err(error) = userfault.lend_zeroes(offset) {
        // Without memory for a page table, a waiting thread faults again when it is woken.
        log::trace!("no page for {offset:#x}: {error}");
        userfault.wake_all();
    }
}

/// What the thread shares with the thread that stops it.
struct Shared {
    event: OwnedFd,
    over: AtomicBool,
}

impl Shared {
    fn wake(&self) {
        // It fails only when its counter is full, and then the thread is awake already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

/// The thread that sees violations. Dropping it ends it, and guest RAM is ordinary memory then.
pub struct Violations {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Violations {
    /// Starts to watch, if guest RAM is under a userfaultfd. `identify` tells which vCPU a thread of
    /// this process is, and `end` is called when the guest has to end. Where the kernel does not tell of
    /// faults any more, that is the case if they `must` be seen; else audits have to do.
    ///
    /// # Errors
    /// If the host has no thread or event to give.
    pub fn watch(
        monitor: Arc<Monitor>,
        identify: impl Fn(i32) -> Option<u32> + Send + 'static,
        policy: OnViolation,
        must: bool,
        end: impl Fn(Ending) + Send + 'static,
        threads: &Spawner,
    ) -> io::Result<Option<Self>> {
        if monitor.supply.userfault().is_none() {
            return Ok(None);
        }
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared { event, over: AtomicBool::new(false) });
        let of_thread = shared.clone();
        let thread = threads.spawn("userfault", roles::USERFAULT, move || {
            let Some(userfault) = monitor.supply.userfault() else { return };
            let keep = |waiting: &mut Waiting| {
                let vcpu = identify(waiting.fault.thread);
                match monitor.judge(userfault, waiting, vcpu, policy) {
                    Verdict::Served => false,
                    Verdict::Later => true,
                    Verdict::End(violation) => {
                        end(Ending::Violation(violation));
                        false
                    }
                }
            };
            let mut waiting = Vec::new();
            let failures = RateLimit::default();
            let mut in_a_row = 0;
            // Where a device moves memory, a missing page is the kernel's to give.
            while !of_thread.over.load(Ordering::Acquire) && !monitor.is_left_to_device() {
                let Err(error) = serve(&monitor, userfault, &of_thread, &mut waiting, &keep) else {
                    in_a_row = 0;
                    continue;
                };
                in_a_row += 1;
                if in_a_row < ATTEMPTS {
                    if let Some(number) = failures.tick() {
                        log::warn!("the guest's faults could not be read ({number} so far), trying again: {error}");
                    }
                    std::thread::sleep(RETRY);
                    continue;
                }
                if must {
                    log::error!("the guest's faults cannot be read, so the guest ends: {error}");
                    end(Ending::Unwatched(error.to_string()));
                } else {
                    log::error!("the guest's faults cannot be read, audits have to enforce its limit: {error}");
                }
                break;
            }
            // Nobody would wake them any more.
            monitor.supply.detach();
        })?;
        Ok(Some(Self { shared, thread: Mutex::new(Some(thread)) }))
    }

    /// Gets vCPUs out that sleep in a fault: after [`Monitor::stop`], nobody is kept there.
    pub fn release(&self) {
        self.shared.wake();
    }

    /// Ends the thread. Call it when no vCPU runs any more.
    pub fn finish(&self) {
        self.shared.over.store(true, Ordering::Release);
        self.shared.wake();
        let thread = lock(&self.thread).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread that sees violations panicked");
        }
    }
}

impl Drop for Violations {
    fn drop(&mut self) {
        self.finish();
    }
}

/// One round: waits, reads, and lets `keep` say which faults are to be asked about again.
fn serve(
    monitor: &Monitor,
    userfault: &Userfault,
    shared: &Shared,
    waiting: &mut Vec<Waiting>,
    keep: &impl Fn(&mut Waiting) -> bool,
) -> io::Result<()> {
    let pause = (!waiting.is_empty()).then_some(CLAIM_POLL);
    if userfault.wait(shared.event.as_fd(), pause)? {
        let _ = rustix::io::read(&shared.event, &mut [0; 8]);
        if monitor.is_stopping() {
            // Whoever still misses its page faults again, and gets one now.
            userfault.wake_all();
        }
    }
    let mut new = Vec::new();
    userfault.read(&mut new)?;
    waiting.extend(new.into_iter().map(|fault| Waiting { fault, is_counted: false }));
    waiting.retain_mut(keep);
    Ok(())
}
