//! What the host does when a vCPU rings: one handler per call.
//!
//! The request is copied out of the mailbox once, decoded totally, served, and answered in the
//! reply half. Whatever a guest puts into its words, the worst outcome is an error status and a
//! counted bad call.

use crate::agent::{Agents, Next};
use crate::boot::Platform;
use crate::exit::ExitReason;
use agent_abi::Report;
use guest_abi::call::{HELLO_BY_TOUCH, HELLO_OWN_ALLOCATOR};
use guest_abi::header::ABI_VERSION;
use guest_abi::mailbox::{WORDS, Words, text_bytes};
use guest_abi::{Call, Request, Status};
use llfree_base::counters::DoorbellCounters;
use llfree_base::histogram::Durations;
use llfree_base::{RateLimit, printable};
use llfree_monitor::{HandOver, InstallError, Monitor};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// How many lines of one guest reach the log.
const LOG_LINES: u64 = 10_000;

/// What the vCPU does after a call.
#[derive(Debug)]
pub enum Flow {
    /// It goes on.
    Continue,
    /// The VM pauses, and the call has no reply yet: it must be made again when the VM resumes.
    Again,
    /// The VM is stopping: leave the guest.
    Leave,
    /// The guest ends, for this reason.
    End(ExitReason),
}

/// Serves the calls of all vCPUs.
pub struct Doorbell {
    platform: Arc<Platform>,
    monitor: Arc<Monitor>,
    agents: Arc<Agents>,
    /// Calls that were refused.
    pub counters: DoorbellCounters,
    /// How long install calls took.
    pub install_durations: Durations,
    /// Whether a guest in need gets held frames back.
    grows_on_need: bool,
    log_lines: AtomicU64,
    hellos: RateLimit,
    refused_hellos: RateLimit,
}

impl Doorbell {
    /// A doorbell for the guest that these parts belong to.
    #[must_use]
    pub fn new(platform: Arc<Platform>, monitor: Arc<Monitor>, agents: Arc<Agents>, grows_on_need: bool) -> Self {
        Self {
            platform,
            monitor,
            agents,
            counters: DoorbellCounters::default(),
            install_durations: Durations::default(),
            grows_on_need,
            log_lines: AtomicU64::new(0),
            hellos: RateLimit::default(),
            refused_hellos: RateLimit::default(),
        }
    }

    /// Serves one ring of `vcpu`; `call` is `None` for an offset or port without a call.
    pub fn ring(&self, vcpu: u32, call: Option<Call>) -> Flow {
        let mut reply = [0; WORDS];
        let (status, flow) = match self.decode(vcpu, call) {
            Ok(request) => self.serve(vcpu, request, &mut reply),
            Err(status) => (status, Flow::Continue),
        };
        if matches!(flow, Flow::Again) {
            return flow;
        }
        if matches!(status, Status::UnknownCall | Status::BadArgument) {
            self.counters.bad_calls.inc();
        }
        reply[0] = status as u64;
        // A vCPU always has a mailbox: both were counted by the same configuration.
        let _ = self.platform.write_reply(vcpu, &reply);
        flow
    }

    fn decode(&self, vcpu: u32, call: Option<Call>) -> Result<Request, Status> {
        let call = call.ok_or(Status::UnknownCall)?;
        let words = self.platform.read_request(vcpu).ok_or(Status::BadArgument)?;
        Request::decode(call, &words)
    }

    fn serve(&self, vcpu: u32, request: Request, reply: &mut [u64; WORDS]) -> (Status, Flow) {
        match request {
            Request::Hello { abi_version: ABI_VERSION, flags } => {
                if flags & HELLO_OWN_ALLOCATOR != 0 && !self.hand_over(flags & HELLO_BY_TOUCH != 0) {
                    return (Status::HostError, Flow::Continue);
                }
                if let Some(number) = self.hellos.tick() {
                    log::debug!("vCPU {vcpu}: hello, ABI version {ABI_VERSION} ({number} so far)");
                }
                (Status::Ok, Flow::Continue)
            }
            Request::Hello { abi_version: guest, .. } => {
                (Status::AbiMismatch, Flow::End(ExitReason::AbiMismatch { guest }))
            }
            Request::Wait => match self.agents.next_command(vcpu) {
                Next::Command(command) => {
                    *reply = command.encode();
                    (Status::Ok, Flow::Continue)
                }
                Next::Paused => (Status::Ok, Flow::Again),
                Next::Stopped => (Status::Ok, Flow::Leave),
            },
            Request::Done(words) => {
                let expected = self.agents.report(vcpu, Report::decode(&words));
                (if expected { Status::Ok } else { Status::BadArgument }, Flow::Continue)
            }
            Request::Install { frames } => {
                let start = Instant::now();
                // One that gives way to a pause is made again, and counts then.
                let Some(installed) = self.monitor.install_while(frames, || !self.agents.is_paused()) else {
                    return (Status::Ok, Flow::Again);
                };
                self.install_durations.record(start.elapsed());
                (install_status(installed), Flow::Continue)
            }
            Request::Log(words) => {
                match self.log_lines.fetch_add(1, Ordering::Relaxed) {
                    line if line < LOG_LINES => log::info!("guest vCPU {vcpu}: {}", guest_text(&words)),
                    LOG_LINES => log::warn!("the guest logged {LOG_LINES} lines; the rest is dropped"),
                    _ => {}
                }
                (Status::Ok, Flow::Continue)
            }
            Request::Panic(words) => (Status::Ok, Flow::End(ExitReason::Panicked(guest_text(&words)))),
            Request::Exit { code } => (Status::Ok, Flow::End(ExitReason::Exited(code))),
            // A mailbox call like this is a lie: the VMM's own exception entry does not use the
            // mailbox, and the vCPU loop handles it before it gets here.
            Request::Exception => (Status::BadArgument, Flow::Continue),
            Request::Need { huge_frames } => {
                self.counters.needs.inc();
                reply[1] = self.release(huge_frames);
                (Status::Ok, Flow::Continue)
            }
        }
    }
}

impl Doorbell {
    /// A guest with an allocator of its own shares what is free; it may say so again, and as often as it likes. False
    /// if a device moves its memory instead.
    fn hand_over(&self, by_touch: bool) -> bool {
        let (before, now) = (self.monitor.handed_over(), if by_touch { HandOver::ByTouch } else { HandOver::Complete });
        if !self.monitor.hand_over(now) {
            if let Some(number) = self.refused_hellos.tick() {
                log::warn!(
                    "the guest says that it shares its free memory, but its balloon has a driver at work: the balloon stays \
                     ({number} so far)"
                );
            }
            return false;
        }
        if now <= before {
            return true;
        }
        // That it has memory by touch still, is for the host to believe.
        match self.monitor.handed_over() {
            HandOver::ByTouch => log::warn!(
                "the guest shares its free memory, but the host had none for all that it uses: that comes by touch still"
            ),
            _ if before == HandOver::ByTouch => log::info!("the guest has got the memory for all that it uses"),
            _ => log::info!("the guest shares its free memory"),
        }
        true
    }

    /// Held frames that a guest in need gets back; none if its limit is strict.
    fn release(&self, huge_frames: u32) -> u64 {
        if !self.grows_on_need {
            return 0;
        }
        let limit = self.monitor.limit();
        let released = self.monitor.grow(limit.saturating_add(huge_frames).min(self.monitor.huge_frames())).frames;
        self.counters.released.add(released.into());
        released.into()
    }
}

fn install_status(installed: Result<(), InstallError>) -> Status {
    match installed {
        Ok(()) => Status::Ok,
        Err(InstallError::OutOfRange) => Status::BadArgument,
        Err(InstallError::Held) => Status::Held,
        Err(InstallError::NoMemory) => Status::NoMemory,
        Err(InstallError::Refused | InstallError::Stopping) => Status::HostError,
    }
}

/// The text of a log or panic call, UTF-8 or not.
fn guest_text(words: &Words) -> String {
    printable(&String::from_utf8_lossy(text_bytes(words)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use llfree_base::faults::{self, Scenario};
    use llfree_base::thread::Spawner;
    use llfree_monitor::TenantStart;
    use llfree_monitor::memory::{Backing, GuestRam, PoolConfig, Supply, UseUserfaultfd};
    use shared_layout::{HUGE_SIZE, HugeEntry, HugeId, HugeRange};

    const FRAMES: u32 = 32;

    /// A guest with an allocator of its own, and its host's end.
    struct Guest {
        platform: Arc<Platform>,
        monitor: Arc<Monitor>,
        doorbell: Doorbell,
    }

    impl Guest {
        fn new(grows_on_need: bool) -> Self {
            let bytes = u64::from(FRAMES) * HUGE_SIZE;
            let platform = Arc::new(Platform::above(bytes, bytes, 1, 40).expect("small"));
            let ram = Arc::new(GuestRam::new(bytes, Backing::Anon).expect("small"));
            let off = UseUserfaultfd::Off;
            let supply = Supply::new(ram.clone(), PoolConfig::default(), off, &Spawner::default()).expect("no pool");
            let start = TenantStart { threads: 1, taken: 0..FRAMES, ..TenantStart::default() };
            let monitor = Monitor::new(ram, supply, platform.table().clone(), start).expect("nothing to fail");
            let monitor = Arc::new(monitor);
            let agents = Arc::new(Agents::new(1));
            let doorbell = Doorbell::new(platform.clone(), monitor.clone(), agents, grows_on_need);
            Self { platform, monitor, doorbell }
        }

        /// Makes a call and returns the first words of the reply.
        fn call(&self, request: &Request) -> (u64, u64) {
            let (call, words) = request.encode();
            let mailbox = self.platform.layout().mailbox(0).expect("a vCPU") as usize;
            let bytes = words.iter().flat_map(|word| word.to_le_bytes());
            for (to, from) in self.platform.shared_bytes()[mailbox..].iter().zip(bytes) {
                to.store(from, Ordering::Relaxed);
            }
            assert!(matches!(self.doorbell.ring(0, Some(call)), Flow::Continue));
            let reply = |word: usize| {
                let at = mailbox + WORDS * 8 + word * 8;
                let bytes = self.platform.shared_bytes()[at..at + 8].iter().map(|byte| byte.load(Ordering::Relaxed));
                u64::from_le_bytes(Vec::from_iter(bytes).try_into().expect("eight bytes"))
            };
            (reply(0), reply(1))
        }

        fn hold(&self, frames: u32) {
            for entry in &self.platform.table().entries()[..frames as usize] {
                entry.store(HugeEntry::FREE_EVICTED.bits(), Ordering::Relaxed);
            }
            assert_eq!(self.monitor.shrink(FRAMES - frames).expect("no memory to discard").frames, frames);
        }
    }

    #[test]
    fn only_a_hello_that_says_so_hands_over() {
        let guest = Guest::new(false);
        assert_eq!(guest.call(&Request::Hello { abi_version: ABI_VERSION, flags: 0 }).0, Status::Ok as u64);
        assert!(guest.monitor.is_booting());
        let flags = HELLO_OWN_ALLOCATOR | 1 << 63;
        assert_eq!(guest.call(&Request::Hello { abi_version: ABI_VERSION, flags }).0, Status::Ok as u64);
        assert_eq!(guest.monitor.handed_over(), HandOver::Complete, "unknown flags are ignored");
    }

    #[test]
    fn a_hello_by_touch_hands_over_in_part_and_there_is_no_way_back() {
        test_support::in_own_process(|| {
            let scenario = Scenario::start();
            let guest = Guest::new(false);
            scenario.set(faults::POPULATE, "return(12)").expect("it is a point");
            let install = Request::Install { frames: HugeRange::saturating(HugeId(8), 4) };
            assert_eq!(guest.call(&install).0, Status::NoMemory as u64);
            let hello = |flags| guest.call(&Request::Hello { abi_version: ABI_VERSION, flags }).0;
            let steps = [
                (HELLO_BY_TOUCH, HandOver::Booting),
                (HELLO_OWN_ALLOCATOR | HELLO_BY_TOUCH, HandOver::ByTouch),
                (0, HandOver::ByTouch),
                (HELLO_OWN_ALLOCATOR, HandOver::Complete),
                (HELLO_OWN_ALLOCATOR | HELLO_BY_TOUCH, HandOver::Complete),
            ];
            for (flags, expected) in steps {
                let found = (hello(flags), guest.monitor.handed_over());
                assert_eq!(found, (Status::Ok as u64, expected), "flags {flags:#b}");
            }
        });
    }

    #[test]
    fn a_hello_by_touch_is_a_whole_hand_over_where_the_host_had_all_memory() {
        let guest = Guest::new(false);
        let flags = HELLO_OWN_ALLOCATOR | HELLO_BY_TOUCH;
        assert_eq!(guest.call(&Request::Hello { abi_version: ABI_VERSION, flags }).0, Status::Ok as u64);
        assert_eq!(guest.monitor.handed_over(), HandOver::Complete);
    }

    #[test]
    fn a_hello_is_refused_once_a_balloon_serves() {
        let guest = Guest::new(false);
        assert!(guest.monitor.leave_to_device());
        for flags in [HELLO_OWN_ALLOCATOR, HELLO_OWN_ALLOCATOR | HELLO_BY_TOUCH] {
            assert_eq!(guest.call(&Request::Hello { abi_version: ABI_VERSION, flags }).0, Status::HostError as u64);
            assert!(guest.monitor.is_left_to_device());
        }
        // What it believes it has to ask for is there.
        let install = Request::Install { frames: HugeRange::saturating(HugeId(8), 4) };
        assert_eq!(guest.call(&install).0, Status::Ok as u64);
        assert_eq!(guest.call(&Request::Hello { abi_version: ABI_VERSION, flags: 0 }).0, Status::Ok as u64);
    }

    #[test]
    fn a_guest_in_need_gets_held_frames_back_where_it_may() {
        let guest = Guest::new(true);
        guest.hold(10);
        assert_eq!(guest.call(&Request::Need { huge_frames: 4 }), (Status::Ok as u64, 4));
        assert_eq!(guest.monitor.limit(), FRAMES - 6);
        assert_eq!(guest.call(&Request::Need { huge_frames: u32::MAX }), (Status::Ok as u64, 6), "all there is");
        assert_eq!((guest.doorbell.counters.needs.get(), guest.doorbell.counters.released.get()), (2, 10));
    }

    #[test]
    fn a_strict_limit_stays_whatever_the_guest_needs() {
        let guest = Guest::new(false);
        guest.hold(10);
        assert_eq!(guest.call(&Request::Need { huge_frames: 4 }), (Status::Ok as u64, 0));
        assert_eq!((guest.monitor.limit(), guest.doorbell.counters.needs.get()), (FRAMES - 10, 1));
    }
}
