//! `wait`: until a VM answers, until its guest takes commands, or until it ends.

use super::error::CommandError;
use super::find;
use super::output::Output;
use crate::args::{Global, WaitFor};
use crate::exit;
use llfree_base::printable;
use llfree_control::client::{Client, ClientError};
use llfree_control::protocol::{ErrorKind, GuestRequest, Reply, Request};
use llfree_control::report::Event;
use rustix::event::{PollFd, PollFlags, Timespec};
use serde::Serialize;
use std::io::Read;
use std::time::{Duration, Instant};

const UP: Duration = Duration::from_secs(30);
const AGENT: Duration = Duration::from_secs(120);
/// Between two questions to a guest that has no agent yet.
const LOOK: Duration = Duration::from_millis(50);
/// The end may take as long as it likes: a hundred days.
const END: Duration = Duration::from_secs(100 * 24 * 60 * 60);

/// What `wait --json` prints.
#[derive(Serialize)]
struct Came {
    /// What came.
    event: &'static str,
    waited_ms: u64,
    /// Of an end: why, and the exit code of the VM's process; absent if it was killed.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vm_exit_code: Option<u8>,
}

pub(super) fn wait(
    global: &Global,
    what: WaitFor,
    timeout: Option<Duration>,
    output: &mut Output,
) -> Result<u8, CommandError> {
    let start = Instant::now();
    let (event, patience) = match what {
        WaitFor::Up => ("up", timeout.unwrap_or(UP)),
        WaitFor::Agent => ("agent", timeout.unwrap_or(AGENT)),
        WaitFor::End => ("end", timeout.unwrap_or(END)),
    };
    let left = || patience.saturating_sub(start.elapsed());
    let too_late = |last| match last {
        Some(last) if !is_not_yet(&last) => last,
        last => CommandError::TooLate { what: promise(what), waited: patience, last: last.map(Box::new) },
    };
    let end = match what {
        WaitFor::Up => until_up(global, &left).map(|()| None).map_err(|error| too_late(Some(error)))?,
        WaitFor::Agent => until_agent(global, &left).map(|()| None).map_err(|error| too_late(Some(error)))?,
        WaitFor::End => match until_end(find::connect_running(global)?, &left)? {
            Some(end) => Some(end),
            None => return Err(too_late(None)),
        },
    };
    let (reason, vm_exit_code) = end.unwrap_or_default();
    let waited_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let text = match (&reason, vm_exit_code) {
        (Some(reason), Some(code)) => format!("ended: {}; exit code {code}\n", printable(reason)),
        _ if what == WaitFor::End => "ended without a word: it was killed\n".to_owned(),
        _ => format!("{event}\n"),
    };
    output.print(&Came { event, waited_ms, reason, vm_exit_code }, || text)?;
    Ok(exit::OK)
}

/// What did not happen, if it is too late.
const fn promise(what: WaitFor) -> &'static str {
    match what {
        WaitFor::Up => "the VM's start",
        WaitFor::Agent => "the start of the guest's agent",
        WaitFor::End => "the VM's end",
    }
}

fn until_up(global: &Global, left: &dyn Fn() -> Duration) -> Result<(), CommandError> {
    let mut client = find::connect_within(global, left())?;
    match client.call_within(&Request::Ping, left())? {
        Reply::Pong { .. } => Ok(()),
        _ => Err(ClientError::Unexpected(client.path().to_owned()).into()),
    }
}

fn until_agent(global: &Global, left: &dyn Fn() -> Duration) -> Result<(), CommandError> {
    let mut client = find::connect_within(global, left())?;
    loop {
        match client.call_within(&Request::Guest(GuestRequest::Stats), left()) {
            Ok(_) => return Ok(()),
            Err(error) if is_not_yet_said(&error) && !left().is_zero() => std::thread::sleep(LOOK.min(left())),
            Err(error) => return Err(error.into()),
        }
    }
}

/// An error that only means that it is too early.
fn is_not_yet(error: &CommandError) -> bool {
    error.is_absence() || matches!(error, CommandError::Client(error) if is_not_yet_said(error))
}

fn is_not_yet_said(error: &ClientError) -> bool {
    matches!(error, ClientError::Timeout { .. } | ClientError::Refused { kind: ErrorKind::Guest | ErrorKind::Busy, .. })
}

/// Why a VM ended, and with which exit code; nothing if it did not say.
type End = (Option<String>, Option<u8>);

/// Follows the events up to the last one; `None` if that takes too long.
fn until_end(client: Client, left: &dyn Fn() -> Duration) -> Result<Option<End>, CommandError> {
    let path = client.path().to_owned();
    let (mut bytes, mut stream) = match client.stream(&Request::Events) {
        Ok(stream) => stream,
        // It is ending already.
        Err(ClientError::Ended(_)) => return Ok(Some((None, None))),
        Err(ClientError::Refused { kind: ErrorKind::Crashed | ErrorKind::Stopping, message, .. }) => {
            return Ok(Some((Some(message), None)));
        }
        Err(error) => return Err(error.into()),
    };
    let broken = |source| CommandError::Client(ClientError::Io { path: path.clone(), source });
    let mut end = (None, None);
    loop {
        while let Some(at) = bytes.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = bytes.drain(..=at).collect();
            if let Ok(Event::End { reason, exit_code }) = serde_json::from_slice(&line) {
                end = (Some(reason), Some(exit_code));
            }
        }
        let time = left();
        let mut fds = [PollFd::new(&stream, PollFlags::IN)];
        let wait =
            Timespec { tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX), tv_nsec: time.subsec_nanos().into() };
        match rustix::event::poll(&mut fds, Some(&wait)) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(broken(error.into())),
        }
        let mut chunk = [0; 4096];
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(Some(end)),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(Some(end)),
            Ok(count) => bytes.extend_from_slice(&chunk[..count]),
            Err(error) => return Err(broken(error)),
        }
    }
}
