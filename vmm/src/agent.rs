//! The host's half of the agent protocol: hands commands to vCPUs and adds up their reports. A guest
//! whose agent is a program is served by [`linux`] instead.
//!
//! Each vCPU is an agent with a seat. Its thread waits in [`Agents::next_command`] when the guest
//! calls `Wait`, and leaves a report when the guest calls `Done`. One command runs at a time, split
//! into one share per vCPU. Reports are a guest's claims: numbers are added with saturation and shown,
//! but decide nothing. A guest that never answers costs the caller its timeout.

pub mod linux;

use agent_abi::{Command, Outcome, Report, Samples};
use llfree_base::lock;
use shared_layout::Order;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// Why a command has no reports.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AgentError {
    /// The guest did not answer in time.
    #[error("the guest's agent did not answer within {0:?}; it may be busy, or may not run the agent protocol")]
    Timeout(Duration),
    /// The guest ended.
    #[error("the guest has ended")]
    Gone,
    /// Nobody waits for the report any more.
    #[error("nobody waits for the guest's report any more")]
    Unwanted,
    /// A Linux guest in which no agent has opened the port and said hello.
    #[error("the guest's agent is not up: start llfree-agent in the guest, and give it the virtio_console driver")]
    NotUp,
    /// The same, after waiting for it.
    #[error(
        "the guest's agent did not come up within {0:?}: have the guest start llfree-agent, with the virtio_console \
         driver"
    )]
    NeverUp(Duration),
    /// The agent closed the port.
    #[error("the guest's agent went away before it answered; see the guest's console, and start llfree-agent again")]
    Lost,
    /// The agent does not read its commands.
    #[error("the guest's agent does not read its commands; see what it is doing, or start llfree-agent again")]
    NotReading,
    /// The agent was built for another VMM.
    #[error("the guest's agent speaks ABI version {agent}, but this VMM {host}; install the agent built with this VMM")]
    Version {
        /// The agent's version.
        agent: u64,
        /// Our version.
        host: u32,
    },
}

#[derive(Default)]
struct Seat {
    /// Work for the vCPU's next `Wait`; stamped, to tell a late report from an awaited one.
    pending: Option<(u64, Command)>,
    /// The command the vCPU is working on.
    working: Option<u64>,
    report: Option<(u64, Report)>,
    /// Bytes held, by the last report: how frees are split.
    held_bytes: u64,
}

#[derive(Default)]
struct Seats {
    seats: Vec<Seat>,
    stopped: bool,
    last_ticket: u64,
    /// A device has notified the drivers, which run on vCPU 0.
    notified: bool,
}

/// The outcome of a vCPU's wait for work.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Next {
    /// Work.
    Command(Command),
    /// Nothing for now: the VM pauses, and the vCPU must ask again when it resumes.
    Paused,
    /// No more work: the VM stops.
    Stopped,
}

/// All vCPUs' seats.
pub struct Agents {
    seats: Mutex<Seats>,
    changed: Condvar,
    /// Held while a command runs.
    turn: Mutex<()>,
    /// How often vCPU 0 runs its drivers even without a notification.
    tick: Option<Duration>,
    /// No work is handed out. Changed under the seats' lock, so that no waiter misses the change.
    paused: AtomicBool,
}

/// How often to look whether somebody still wants the report.
const WANTED_POLL: Duration = Duration::from_millis(50);
/// The ticket of work whose report is not awaited.
const UNASKED: u64 = 0;
/// The vCPU that runs the device drivers.
const DRIVER_VCPU: u32 = 0;

impl Agents {
    /// A seat for each of `vcpus`.
    #[must_use]
    pub fn new(vcpus: u32) -> Self {
        let seats = (0..vcpus).map(|_| Seat::default()).collect();
        let seats = Mutex::new(Seats { seats, ..Seats::default() });
        Self { seats, changed: Condvar::new(), turn: Mutex::new(()), tick: None, paused: AtomicBool::new(false) }
    }

    /// The same, for a guest whose drivers run at least every `tick`, as if on a timer.
    #[must_use]
    pub fn with_tick(self, tick: Option<Duration>) -> Self {
        Self { tick, ..self }
    }

    /// A device notifies its driver: wakes an idle guest, as an interrupt would.
    pub fn notify_driver(&self) {
        self.lock().notified = true;
        self.changed.notify_all();
    }

    /// Sends back vCPUs that wait for work, and gives none until [`resume`](Self::resume). The vCPUs must
    /// have their orders to pause by then, or they would ask again at once.
    pub fn pause(&self) {
        self.set_paused(true);
    }

    /// Gives out work again, including what came in the meantime.
    pub fn resume(&self) {
        self.set_paused(false);
    }

    fn set_paused(&self, paused: bool) {
        let seats = self.lock();
        self.paused.store(paused, Ordering::Release);
        drop(seats);
        self.changed.notify_all();
    }

    /// Between [`pause`](Self::pause) and [`resume`](Self::resume).
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    /// vCPU thread: sleeps until there is work, or the VM pauses or stops.
    pub fn next_command(&self, vcpu: u32) -> Next {
        let mut seats = self.lock();
        let drives = vcpu == DRIVER_VCPU;
        loop {
            if seats.stopped {
                return Next::Stopped;
            }
            if self.is_paused() {
                return Next::Paused;
            }
            let notified = drives && seats.notified;
            let Some(seat) = seats.seats.get_mut(vcpu as usize) else { return Next::Stopped };
            if let Some((ticket, command)) = seat.pending.take() {
                seat.working = Some(ticket);
                return Next::Command(command);
            }
            if notified {
                seat.working = Some(UNASKED);
                seats.notified = false;
                return Next::Command(Command::Devices);
            }
            seats = match self.tick.filter(|_| drives) {
                None => self.changed.wait(seats).unwrap_or_else(PoisonError::into_inner),
                Some(tick) => {
                    let (mut seats, wait) =
                        self.changed.wait_timeout(seats, tick).unwrap_or_else(PoisonError::into_inner);
                    seats.notified |= wait.timed_out();
                    seats
                }
            };
        }
    }

    /// vCPU thread: a report came; false if none was asked for.
    pub fn report(&self, vcpu: u32, report: Report) -> bool {
        let mut seats = self.lock();
        let Some(seat) = seats.seats.get_mut(vcpu as usize) else { return false };
        let Some(ticket) = seat.working.take() else { return false };
        seat.held_bytes = report.held_bytes;
        // An awaited report must not be overwritten by one that is not.
        if ticket != UNASKED {
            seat.report = Some((ticket, report));
        }
        seats.notified |= vcpu == DRIVER_VCPU && report.more != 0;
        drop(seats);
        self.changed.notify_all();
        true
    }

    /// Wakes all waiters, for good.
    pub fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// Gives every vCPU its share of a command and waits for all reports.
    ///
    /// # Errors
    /// [`AgentError`]; a share that was not picked up by then is withdrawn.
    pub fn run(&self, command: Command, timeout: Duration) -> Result<Vec<Report>, AgentError> {
        self.run_while(command, timeout, &|| true)
    }

    /// The same, while the reports are `wanted`.
    ///
    /// # Errors
    /// As [`run`](Self::run), and [`AgentError::Unwanted`].
    pub fn run_while(
        &self,
        command: Command,
        timeout: Duration,
        wanted: &dyn Fn() -> bool,
    ) -> Result<Vec<Report>, AgentError> {
        let deadline = Instant::now() + timeout;
        let _turn = lock(&self.turn);
        self.run_in_turn(command, deadline, timeout, wanted)
    }

    /// Asks idle vCPUs to give back cached frames, unless a command runs: busy vCPUs look at `wanted`
    /// on their own. True if they did; those of a paused VM do not.
    pub fn drain_if_idle(&self, timeout: Duration) -> bool {
        if self.is_paused() {
            return false;
        }
        let _turn = match self.turn.try_lock() {
            Ok(turn) => turn,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        self.run_in_turn(Command::Drain, Instant::now() + timeout, timeout, &|| true).is_ok()
    }

    fn run_in_turn(
        &self,
        command: Command,
        deadline: Instant,
        timeout: Duration,
        wanted: &dyn Fn() -> bool,
    ) -> Result<Vec<Report>, AgentError> {
        let mut seats = self.lock();
        if seats.stopped {
            return Err(AgentError::Gone);
        }
        seats.last_ticket += 1;
        let ticket = seats.last_ticket;
        let held: Vec<u64> = seats.seats.iter().map(|seat| seat.held_bytes).collect();
        for (seat, share) in seats.seats.iter_mut().zip(shares(command, &held)) {
            seat.pending = Some((ticket, share));
            seat.report = None;
        }
        self.changed.notify_all();
        loop {
            let reports: Vec<Report> = seats
                .seats
                .iter()
                .filter_map(|seat| seat.report.filter(|(t, _)| *t == ticket))
                .map(|(_, r)| r)
                .collect();
            if reports.len() == seats.seats.len() {
                return Ok(reports);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let error = match () {
                () if seats.stopped => Some(AgentError::Gone),
                () if left.is_zero() => Some(AgentError::Timeout(timeout)),
                () if !wanted() => Some(AgentError::Unwanted),
                () => None,
            };
            if let Some(error) = error {
                seats.seats.iter_mut().for_each(|seat| seat.pending = None);
                return Err(error);
            }
            let pause = left.min(WANTED_POLL);
            seats = self.changed.wait_timeout(seats, pause).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Seats> {
        // Every update is one assignment; a panic in between cannot tear it.
        lock(&self.seats)
    }
}

/// Splits a command into one share per vCPU: allocations evenly in whole blocks, frees by what each
/// vCPU said it holds.
fn shares(command: Command, held: &[u64]) -> Vec<Command> {
    let vcpus = held.len().max(1) as u64;
    let seeded = |seed: u64, vcpu: usize| seed.wrapping_add((vcpu as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let split = |bytes: u64, block: u64, vcpu: usize| {
        let blocks = bytes.div_ceil(block);
        (blocks / vcpus + u64::from((vcpu as u64) < blocks % vcpus)).saturating_mul(block)
    };
    let mut left = match command {
        Command::Free { bytes, .. } => bytes,
        _ => 0,
    };
    let mut total = held.iter().fold(0u64, |sum, h| sum.saturating_add(*h));
    let share = |(vcpu, held): (usize, &u64)| match command {
        Command::Alloc { bytes, order, seed } => {
            Command::Alloc { bytes: split(bytes, order.bytes(), vcpu), order, seed: seeded(seed, vcpu) }
        }
        Command::Burst { bytes, touch, keep, single } => {
            Command::Burst { bytes: split(bytes, Order::HUGE.bytes(), vcpu), touch, keep, single }
        }
        Command::Stream { millis, bytes, beside } => {
            Command::Stream { millis, bytes: bytes / vcpus, beside: beside / vcpus }
        }
        Command::Ftq { millis, quantum_us, beside } => Command::Ftq { millis, quantum_us, beside: beside / vcpus },
        Command::Churn { millis, bytes, seed } => {
            Command::Churn { millis, bytes: bytes / vcpus, seed: seeded(seed, vcpu) }
        }
        Command::Free { bytes, random, seed } => {
            let share = if bytes == u64::MAX {
                u64::MAX
            } else {
                // In proportion to what is left here; the last one with anything gets the rest. Not
                // in parts of a block, of which every vCPU would free the whole.
                let part = u128::from(left) * u128::from(*held) / u128::from(total.max(1));
                let part = part.next_multiple_of(u128::from(Order::MAX.bytes()));
                u64::try_from(part).unwrap_or(left).min(*held).min(left)
            };
            if bytes != u64::MAX {
                left -= share;
                total = total.saturating_sub(*held);
            }
            Command::Free { bytes: share, random, seed: seeded(seed, vcpu) }
        }
        Command::Verify | Command::Drain | Command::Stats | Command::Devices => command,
    };
    held.iter().enumerate().map(share).collect()
}

/// Adds up the vCPUs' reports: sums, the first fault, the slowest clock. The free memory of the whole
/// table is left out, as each vCPU looked at a different time.
#[must_use]
pub fn total(reports: &[Report]) -> Report {
    let mut sum = Report::default();
    for r in reports {
        if sum.outcome == Outcome::Ok as u64 {
            sum.outcome = r.outcome;
            sum.detail = r.detail;
        }
        if sum.mismatches == 0 && r.mismatches > 0 {
            (sum.bad_address, sum.expected, sum.found) = (r.bad_address, r.expected, r.found);
        }
        for (to, from) in [
            (&mut sum.bytes, r.bytes),
            (&mut sum.blocks, r.blocks),
            (&mut sum.held_bytes, r.held_bytes),
            (&mut sum.held_blocks, r.held_blocks),
            (&mut sum.mismatches, r.mismatches),
            (&mut sum.allocs, r.allocs),
            (&mut sum.frees, r.frees),
            (&mut sum.installs, r.installs),
            (&mut sum.ahead, r.ahead),
            (&mut sum.beside_nanos, r.beside_nanos),
        ] {
            *to = to.saturating_add(from);
        }
        sum.nanos = sum.nanos.max(r.nanos);
    }
    let samples: Vec<Samples> = reports.iter().map(|r| r.samples).filter(|samples| samples.count > 0).collect();
    sum.samples = total_samples(&samples);
    sum
}

/// Combines samples of several vCPUs. Percentiles of the whole cannot be computed from those of the
/// parts, so this reports the worst of them, and the mean for mean and median.
fn total_samples(parts: &[Samples]) -> Samples {
    let least = |of: fn(&Samples) -> u64| parts.iter().map(of).min().unwrap_or(0);
    let most = |of: fn(&Samples) -> u64| parts.iter().map(of).max().unwrap_or(0);
    let count = parts.iter().fold(0u64, |sum, part| sum.saturating_add(part.count));
    let weighted = |of: fn(&Samples) -> u64| {
        let sum = parts.iter().fold(0u128, |sum, part| {
            // A u128 always holds the product of two u64.
            sum.saturating_add(u128::from(of(part)) * u128::from(part.count))
        });
        sum.checked_div(u128::from(count)).map_or(0, |mean| u64::try_from(mean).unwrap_or(u64::MAX))
    };
    Samples {
        count,
        mean: weighted(|part| part.mean),
        min: least(|part| part.min),
        p1: least(|part| part.p1),
        p50: weighted(|part| part.p50),
        p99: most(|part| part.p99),
        p999: most(|part| part.p999),
        max: most(|part| part.max),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent_abi::Touch;

    fn bytes(shares: &[Command]) -> Vec<u64> {
        let of = |c: &Command| match *c {
            Command::Alloc { bytes, .. } | Command::Free { bytes, .. } => bytes,
            _ => 0,
        };
        shares.iter().map(of).collect()
    }

    #[test]
    fn an_allocation_is_split_into_whole_blocks() {
        let alloc = |bytes, order| Command::Alloc { bytes, order, seed: 1 };
        assert_eq!(bytes(&shares(alloc(8 << 30, Order::HUGE), &[0, 0])), [4 << 30, 4 << 30]);
        assert_eq!(bytes(&shares(alloc(3 << 21, Order::HUGE), &[0, 0])), [4 << 20, 2 << 20]);
        assert_eq!(bytes(&shares(alloc(1, Order::BASE), &[0, 0, 0])), [4096, 0, 0]);
        assert_eq!(bytes(&shares(alloc(u64::MAX, Order::BASE), &[0])).len(), 1);
    }

    #[test]
    fn a_free_is_taken_from_those_who_hold() {
        let free = |bytes| Command::Free { bytes, random: false, seed: 0 };
        let mib = |count: u64| count << 20;
        assert_eq!(bytes(&shares(free(mib(100)), &[mib(100), mib(300)])), [mib(28), mib(72)]);
        assert_eq!(bytes(&shares(free(mib(100)), &[0, mib(300)])), [0, mib(100)]);
        assert_eq!(bytes(&shares(free(mib(500)), &[mib(100), mib(300)])), [mib(100), mib(300)]);
        assert_eq!(bytes(&shares(free(u64::MAX), &[100, 300])), [u64::MAX, u64::MAX]);
        assert_eq!(bytes(&shares(free(100), &[u64::MAX, u64::MAX])).iter().sum::<u64>(), 100);
    }

    #[test]
    fn no_two_vcpus_free_a_part_of_a_block_each() {
        let free = |bytes| Command::Free { bytes, random: false, seed: 0 };
        assert_eq!(bytes(&shares(free(2 << 20), &[2 << 20, 2 << 20])), [2 << 20, 0]);
        assert_eq!(bytes(&shares(free(6 << 20), &[4 << 20, 4 << 20, 4 << 20])), [4 << 20, 2 << 20, 0]);
    }

    #[test]
    fn a_silent_guest_costs_the_timeout_and_its_share_is_withdrawn() {
        let agents = Agents::new(1);
        let short = Duration::from_millis(5);
        assert_eq!(agents.run(Command::Stats, short), Err(AgentError::Timeout(short)));
        agents.stop();
        assert_eq!(agents.run(Command::Stats, short), Err(AgentError::Gone));
        assert_eq!(agents.next_command(0), Next::Stopped);
    }

    #[test]
    fn a_report_that_nobody_wants_any_more_is_not_waited_for() {
        let agents = Agents::new(1);
        let wanted = AtomicBool::new(true);
        let long = Duration::from_secs(60);
        std::thread::scope(|scope| {
            let first = scope.spawn(|| agents.run_while(Command::Verify, long, &|| wanted.load(Ordering::Relaxed)));
            assert_eq!(agents.next_command(0), Next::Command(Command::Verify));
            wanted.store(false, Ordering::Relaxed);
            assert_eq!(first.join().expect("no panic"), Err(AgentError::Unwanted));
            // The next command has its turn, and its own report.
            let next = scope.spawn(|| agents.run(Command::Stats, long));
            assert!(agents.report(0, Report { bytes: 1, ..Report::default() }), "the late one");
            assert_eq!(agents.next_command(0), Next::Command(Command::Stats));
            assert!(agents.report(0, Report { bytes: 2, ..Report::default() }));
            assert_eq!(next.join().expect("no panic").expect("answered")[0].bytes, 2);
        });
    }

    #[test]
    fn a_late_report_is_not_taken_for_the_next_command() {
        let agents = Agents::new(1);
        std::thread::scope(|scope| {
            let late = scope.spawn(|| agents.run(Command::Verify, Duration::from_millis(20)));
            assert_eq!(agents.next_command(0), Next::Command(Command::Verify));
            assert!(late.join().expect("no panic").is_err());
            assert!(agents.report(0, Report { bytes: 1, ..Report::default() }));
            assert!(!agents.report(0, Report::default()), "nobody asked");
            let next = scope.spawn(|| agents.run(Command::Stats, Duration::from_secs(60)));
            assert_eq!(agents.next_command(0), Next::Command(Command::Stats));
            assert!(agents.report(0, Report { bytes: 2, ..Report::default() }));
            assert_eq!(next.join().expect("no panic").expect("answered")[0].bytes, 2);
        });
    }

    #[test]
    fn a_notified_guest_looks_after_its_devices_until_it_has_no_more_to_do() {
        let agents = Agents::new(2);
        agents.notify_driver();
        assert_eq!(agents.next_command(0), Next::Command(Command::Devices));
        assert!(agents.report(0, Report { more: 1, ..Report::default() }));
        assert_eq!(agents.next_command(0), Next::Command(Command::Devices));
        assert!(agents.report(0, Report::default()));
        agents.stop();
        assert_eq!((agents.next_command(0), agents.next_command(1)), (Next::Stopped, Next::Stopped));
    }

    #[test]
    fn a_pause_sends_those_back_that_wait_and_loses_no_work() {
        let agents = Agents::new(2);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| agents.next_command(1));
            agents.pause();
            assert_eq!(waits.join().expect("no panic"), Next::Paused);
            agents.notify_driver();
            let asked = scope.spawn(|| agents.run(Command::Stats, Duration::from_secs(60)));
            assert_eq!(agents.next_command(0), Next::Paused);
            assert!(!agents.drain_if_idle(Duration::from_secs(60)), "at once, and not after the minute");
            agents.resume();
            // The command may not be there yet, and then the notification comes first.
            while agents.next_command(0) != Next::Command(Command::Stats) {
                agents.report(0, Report::default());
            }
            assert_eq!(agents.next_command(1), Next::Command(Command::Stats));
            assert!(agents.report(0, Report::default()) && agents.report(1, Report::default()));
            assert!(asked.join().expect("no panic").is_ok());
        });
        agents.pause();
        agents.stop();
        assert_eq!(agents.next_command(0), Next::Stopped);
    }

    #[test]
    fn looking_after_devices_hides_no_report() {
        let agents = Agents::new(2);
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| agents.run(Command::Stats, Duration::from_secs(60)));
            assert_eq!(agents.next_command(0), Next::Command(Command::Stats));
            assert!(agents.report(0, Report { bytes: 7, ..Report::default() }));
            agents.notify_driver();
            assert_eq!(agents.next_command(0), Next::Command(Command::Devices));
            assert!(agents.report(0, Report::default()));
            assert_eq!(agents.next_command(1), Next::Command(Command::Stats));
            assert!(agents.report(1, Report::default()));
            assert_eq!(asked.join().expect("no panic").expect("answered")[0].bytes, 7);
        });
    }

    #[test]
    fn samples_of_all_vcpus_are_weighted_by_their_number() {
        let report = |count, value, max| {
            let samples = Samples { count, mean: value, p50: value, p1: value, p99: max, max, ..Samples::default() };
            Report { samples, beside_nanos: 1, ..Report::default() }
        };
        let sum = total(&[report(3, 10, 50), report(1, 30, 40), report(0, 0, 0)]);
        let expected = Samples { count: 4, mean: 15, p50: 15, p1: 10, p99: 50, max: 50, ..Samples::default() };
        assert_eq!((sum.samples, sum.beside_nanos), (expected, 3));
        assert_eq!(total(&[Report::default()]).samples, Samples::default());
    }

    #[test]
    fn measuring_commands_are_shared_out() {
        let burst = Command::Burst { bytes: 6 << 20, touch: Touch::Pages, keep: false, single: false };
        let of = |c: &Command| match *c {
            Command::Burst { bytes, .. } | Command::Stream { bytes, .. } => bytes,
            _ => 0,
        };
        assert_eq!(shares(burst, &[0, 0]).iter().map(of).collect::<Vec<_>>(), [4 << 20, 2 << 20]);
        let stream = Command::Stream { millis: 1, bytes: 100, beside: 50 };
        assert_eq!(shares(stream, &[0, 0])[1], Command::Stream { millis: 1, bytes: 50, beside: 25 });
        let ftq = Command::Ftq { millis: 1, quantum_us: 9, beside: 50 };
        assert_eq!(shares(ftq, &[0, 0])[0], Command::Ftq { millis: 1, quantum_us: 9, beside: 25 });
    }

    #[test]
    fn hostile_numbers_saturate() {
        let huge = Report { bytes: u64::MAX, held_bytes: u64::MAX, ..Report::default() };
        assert_eq!(total(&[huge, huge]).bytes, u64::MAX);
        let samples = Samples { count: u64::MAX, mean: u64::MAX, ..Samples::default() };
        let wild = Report { samples, ..huge };
        assert_eq!(total(&[wild; 1024]).samples.count, u64::MAX);
    }
}
