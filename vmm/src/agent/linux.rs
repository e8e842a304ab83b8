//! The host's half of the agent protocol over a port: [`LinuxAgent`] asks a program in a Linux guest.
//!
//! One command runs at a time; its ticket tells its report from a late one. Everything that comes
//! through the port is a guest's claim: frames that answer no command are counted and skipped, and a
//! guest that floods the port or stays silent costs the caller its timeout.

use super::{AgentError, WANTED_POLL};
use crate::devices::console::{Port, PortError};
use agent_abi::channel::{FRAME_BYTES, Frame};
use agent_abi::{Command, Report};
use guest_abi::header::ABI_VERSION;
use llfree_base::counters::AgentCounters;
use llfree_base::lock;
use llfree_control::report::LinuxAgentStatus;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What is known of the agent; the command whose turn it is holds it.
#[derive(Default)]
struct Peer {
    /// The connection that it said hello on, and the version it said.
    hello: Option<(u64, u64)>,
    last_ticket: u64,
}

/// Why no frame came.
enum NoFrame {
    Port(PortError),
    Unwanted,
}

/// An agent at the other end of a port.
pub struct LinuxAgent {
    port: Arc<Port>,
    /// Held while a command runs.
    turn: Mutex<Peer>,
    counters: AgentCounters,
}

impl LinuxAgent {
    /// The agent at the other end of `port`.
    #[must_use]
    pub fn new(port: Arc<Port>) -> Self {
        Self { port, turn: Mutex::default(), counters: AgentCounters::default() }
    }

    /// Has the agent carry out a command once it is this command's turn, and returns its report.
    ///
    /// # Errors
    /// [`AgentError`]. A command that was sent and not answered in time is still carried out.
    pub fn run(&self, command: Command, timeout: Duration) -> Result<Report, AgentError> {
        self.run_while(command, timeout, &|| true)
    }

    /// The same, while the report is `wanted`.
    ///
    /// # Errors
    /// As [`run`](Self::run), and [`AgentError::Unwanted`].
    pub fn run_while(
        &self,
        command: Command,
        timeout: Duration,
        wanted: &dyn Fn() -> bool,
    ) -> Result<Report, AgentError> {
        let deadline = Instant::now() + timeout;
        let mut peer = lock(&self.turn);
        let connection = self.greet(&mut peer, deadline, wanted)?;
        if Instant::now() >= deadline {
            // Other commands used up the time: do not send a command whose report nobody would wait for.
            return Err(AgentError::Timeout(timeout));
        }
        peer.last_ticket += 1;
        let ticket = peer.last_ticket;
        self.port.send(&Frame::command(ticket, &command).to_bytes()).map_err(|error| match error {
            PortError::Stopped => AgentError::Gone,
            PortError::Full => AgentError::NotReading,
            PortError::Closed | PortError::TimedOut => AgentError::NotUp,
        })?;
        loop {
            let (from, frame) = self.receive(deadline, wanted).map_err(|error| match error {
                NoFrame::Unwanted => AgentError::Unwanted,
                NoFrame::Port(PortError::Stopped) => AgentError::Gone,
                NoFrame::Port(PortError::Closed) => AgentError::Lost,
                NoFrame::Port(PortError::TimedOut | PortError::Full) => AgentError::Timeout(timeout),
            })?;
            if from != connection {
                // Another agent, which does not know the command. Its first words are not lost.
                self.meet(&mut peer, from, &frame);
                return Err(AgentError::Lost);
            }
            match frame.ticket {
                number if number == ticket => return Ok(frame.to_report()),
                number if (1..ticket).contains(&number) => self.counters.late_reports.inc(),
                _ => self.counters.garbage_frames.inc(),
            }
        }
    }

    /// Waits until the agent of a booting guest is there, for at most `patience`.
    ///
    /// # Errors
    /// If it does not come, or the VM ends.
    pub fn wait_until_up(&self, patience: Duration) -> Result<(), AgentError> {
        self.port.wait_for_opening(Instant::now() + patience).map_err(|error| match error {
            PortError::Stopped => AgentError::Gone,
            PortError::Closed | PortError::TimedOut | PortError::Full => AgentError::NeverUp(patience),
        })
    }

    /// Wakes all waiters, for good.
    pub fn stop(&self) {
        self.port.stop();
    }

    /// The agent's numbers, for a status.
    #[must_use]
    pub fn status(&self) -> LinuxAgentStatus {
        LinuxAgentStatus {
            open: self.port.is_open(),
            counts: self.counters.counts(),
            ignored_bytes: self.port.ignored_bytes(),
        }
    }

    /// Makes sure that the agent has said hello on the current connection; returns the connection's number.
    fn greet(&self, peer: &mut Peer, deadline: Instant, wanted: &dyn Fn() -> bool) -> Result<u64, AgentError> {
        if !self.port.is_open() {
            // Also keeps a command from waiting for an agent that was never started.
            return Err(if self.port.is_stopped() { AgentError::Gone } else { AgentError::NotUp });
        }
        loop {
            let connection = self.port.connection();
            match peer.hello {
                Some((on, version)) if on == connection && version == u64::from(ABI_VERSION) => return Ok(connection),
                Some((on, version)) if on == connection => {
                    return Err(AgentError::Version { agent: version, host: ABI_VERSION });
                }
                _ => {}
            }
            // A program that opens the port must say hello.
            let (from, frame) = self.receive(deadline, wanted).map_err(|error| match error {
                NoFrame::Unwanted => AgentError::Unwanted,
                NoFrame::Port(PortError::Stopped) => AgentError::Gone,
                NoFrame::Port(PortError::Closed | PortError::TimedOut | PortError::Full) => AgentError::NotUp,
            })?;
            self.meet(peer, from, &frame);
        }
    }

    /// Handles a frame of an agent that has not said hello yet.
    fn meet(&self, peer: &mut Peer, connection: u64, frame: &Frame) {
        match frame.hello_version() {
            Some(version) => peer.hello = Some((connection, version)),
            None => self.counters.garbage_frames.inc(),
        }
    }

    /// The next frame, and its connection.
    fn receive(&self, deadline: Instant, wanted: &dyn Fn() -> bool) -> Result<(u64, Frame), NoFrame> {
        let mut bytes = [0; FRAME_BYTES];
        loop {
            // Also between two frames: a guest may send any number of them.
            if !wanted() {
                return Err(NoFrame::Unwanted);
            }
            let now = Instant::now();
            match self.port.receive(&mut bytes, deadline.min(now + WANTED_POLL)) {
                Ok(connection) => return Ok((connection, Frame::from_bytes(bytes))),
                Err(PortError::TimedOut) if now < deadline => {}
                Err(error) => return Err(NoFrame::Port(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::console::BUFFER_BYTES;
    use agent_abi::channel::HELLO;
    use llfree_base::counters::AgentCounts;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    const LONG: Duration = Duration::from_secs(60);

    fn agent() -> (LinuxAgent, Arc<Port>) {
        let port = Arc::new(Port::new().expect("events"));
        (LinuxAgent::new(port.clone()), port)
    }

    fn says(port: &Port, frame: &Frame) {
        port.give(&frame.to_bytes());
    }

    fn report(bytes: u64) -> Report {
        Report { bytes, ..Report::default() }
    }

    /// Waits, as the guest's program would, for the next command.
    fn hears(port: &Port) -> Frame {
        let mut bytes = Vec::new();
        let start = Instant::now();
        while bytes.len() < FRAME_BYTES {
            assert!(start.elapsed() < LONG, "no command within a minute");
            bytes.extend(port.take(FRAME_BYTES - bytes.len()));
            thread::yield_now();
        }
        Frame::from_bytes(bytes.try_into().expect("a whole frame"))
    }

    #[test]
    fn a_command_gets_its_report() {
        let (agent, port) = agent();
        port.open();
        says(&port, &Frame::hello());
        thread::scope(|scope| {
            for bytes in 1..=3 {
                let run = scope.spawn(|| agent.run(Command::Verify, LONG));
                let heard = hears(&port);
                assert_eq!((heard.ticket, heard.to_command()), (bytes, Some(Command::Verify)));
                says(&port, &Frame::report(heard.ticket, &report(bytes)));
                assert_eq!(run.join().expect("no panic"), Ok(report(bytes)));
            }
        });
        let quiet = LinuxAgentStatus { open: true, counts: AgentCounts::default(), ignored_bytes: 0 };
        assert_eq!(agent.status(), quiet);
    }

    #[test]
    fn without_an_agent_the_line_says_what_to_do() {
        let (agent, port) = agent();
        assert_eq!(agent.run(Command::Stats, LONG), Err(AgentError::NotUp), "at once, and not after the minute");
        assert!(AgentError::NotUp.to_string().contains("start llfree-agent in the guest"));
        // Something else has the port open.
        port.open();
        assert_eq!(agent.run(Command::Stats, Duration::from_millis(5)), Err(AgentError::NotUp));
        port.close();
        port.open();
        let mut foreign = Frame::hello();
        foreign.words[0] = 9;
        says(&port, &foreign);
        let refused = agent.run(Command::Stats, LONG);
        assert_eq!(refused, Err(AgentError::Version { agent: 9, host: ABI_VERSION }));
        // Again, though its hello was taken before.
        assert_eq!(agent.run(Command::Stats, LONG), refused);
    }

    #[test]
    fn a_late_report_is_not_taken_for_the_next_command() {
        let (agent, port) = agent();
        port.open();
        says(&port, &Frame::hello());
        let short = Duration::from_millis(5);
        assert_eq!(agent.run(Command::Verify, short), Err(AgentError::Timeout(short)));
        let late = hears(&port);
        says(&port, &Frame::report(late.ticket, &report(1)));
        thread::scope(|scope| {
            let run = scope.spawn(|| agent.run(Command::Stats, LONG));
            let heard = hears(&port);
            // Answers to questions never asked and not asked yet, and a second hello.
            for ticket in [0, heard.ticket + 1, HELLO] {
                says(&port, &Frame::report(ticket, &report(2)));
            }
            says(&port, &Frame::report(heard.ticket, &report(3)));
            assert_eq!(run.join().expect("no panic"), Ok(report(3)));
        });
        assert_eq!((agent.status().counts.late_reports, agent.status().counts.garbage_frames), (1, 3));
    }

    #[test]
    fn an_agent_that_is_silent_or_floods_the_port_keeps_nobody_who_gave_up() {
        let (agent, port) = agent();
        port.open();
        let (wanted, over) = (AtomicBool::new(true), AtomicBool::new(false));
        let run = || agent.run_while(Command::Verify, LONG, &|| wanted.load(Ordering::Relaxed));
        thread::scope(|scope| {
            // No hello yet.
            let greeting = scope.spawn(run);
            wanted.store(false, Ordering::Relaxed);
            assert_eq!(greeting.join().expect("no panic"), Err(AgentError::Unwanted));
            says(&port, &Frame::hello());
            wanted.store(true, Ordering::Relaxed);
            let silent = scope.spawn(run);
            hears(&port);
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    if port.has_room() {
                        port.give(&[3; 4096]);
                    }
                }
            });
            wanted.store(false, Ordering::Relaxed);
            assert_eq!(silent.join().expect("no panic"), Err(AgentError::Unwanted));
            over.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn an_agent_that_ends_is_told_from_one_that_is_slow() {
        let (agent, port) = agent();
        port.open();
        says(&port, &Frame::hello());
        thread::scope(|scope| {
            let run = scope.spawn(|| agent.run(Command::Verify, LONG));
            hears(&port);
            port.close();
            assert_eq!(run.join().expect("no panic"), Err(AgentError::Lost));
            // One that was started again has its own hello, also in the middle of a command.
            port.open();
            says(&port, &Frame::hello());
            let run = scope.spawn(|| agent.run(Command::Verify, LONG));
            hears(&port);
            port.close();
            port.open();
            says(&port, &Frame::hello());
            assert_eq!(run.join().expect("no panic"), Err(AgentError::Lost));
            let run = scope.spawn(|| agent.run(Command::Verify, LONG));
            let heard = hears(&port);
            says(&port, &Frame::report(heard.ticket, &report(1)));
            assert_eq!(run.join().expect("no panic"), Ok(report(1)));
        });
        assert_eq!(agent.status().counts.garbage_frames, 0);
    }

    #[test]
    fn a_flood_costs_the_timeout_and_an_agent_that_does_not_read_is_named() {
        let (agent, port) = agent();
        port.open();
        let (began, stop) = (AtomicBool::new(false), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    if port.has_room() {
                        port.give(&[3; 4096]);
                        began.store(true, Ordering::Relaxed);
                    }
                }
            });
            while !began.load(Ordering::Relaxed) {
                thread::yield_now();
            }
            assert_eq!(agent.run(Command::Stats, Duration::from_millis(20)), Err(AgentError::NotUp));
            stop.store(true, Ordering::Relaxed);
        });
        assert!(agent.status().counts.garbage_frames > 0);
        port.open();
        says(&port, &Frame::hello());
        let short = Duration::from_millis(1);
        for _ in 0..BUFFER_BYTES / FRAME_BYTES {
            let error = agent.run(Command::Stats, short).expect_err("nobody answers");
            assert!(error == AgentError::Timeout(short) || error == AgentError::NotUp, "{error}");
        }
        // Callers that came too late to see the hello sent nothing.
        let mut ends = agent.run(Command::Stats, short);
        while ends != Err(AgentError::NotReading) {
            assert_eq!(ends, Err(AgentError::Timeout(short)));
            ends = agent.run(Command::Stats, short);
        }
    }

    #[test]
    fn who_waits_for_a_guest_that_boots_gets_its_agent_or_a_line() {
        let (agent, port) = agent();
        let short = Duration::from_millis(5);
        assert_eq!(agent.wait_until_up(short), Err(AgentError::NeverUp(short)));
        assert!(AgentError::NeverUp(short).to_string().contains("within 5ms: have the guest start llfree-agent"));
        thread::scope(|scope| {
            let waits = scope.spawn(|| agent.wait_until_up(LONG));
            port.open();
            assert_eq!(waits.join().expect("no panic"), Ok(()));
            assert_eq!(agent.wait_until_up(short), Ok(()));
            port.close();
            let waits = scope.spawn(|| agent.wait_until_up(LONG));
            agent.stop();
            assert_eq!(waits.join().expect("no panic"), Err(AgentError::Gone));
        });
    }

    #[test]
    fn the_end_of_the_vm_wakes_who_waits() {
        let (agent, port) = agent();
        port.open();
        says(&port, &Frame::hello());
        thread::scope(|scope| {
            let run = scope.spawn(|| agent.run(Command::Verify, LONG));
            hears(&port);
            agent.stop();
            assert_eq!(run.join().expect("no panic"), Err(AgentError::Gone));
        });
        assert_eq!(agent.run(Command::Verify, LONG), Err(AgentError::Gone));
        port.close();
        assert_eq!(agent.run(Command::Verify, LONG), Err(AgentError::Gone));
    }
}
