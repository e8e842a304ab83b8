//! The subcommands that talk to a running VM: connect, ask, print, choose the exit code.
//!
//! Output goes to the writer that is handed in, text or JSON; errors go up to `main`, which prints
//! them as one line. A reader of our output that goes away (`| head`) ends a command quietly.

use crate::advice::{self, Advice, Advised};
use crate::args::{ClientCommand, Global, GuestCommand};
use crate::exit;
use crate::render;
use llfree_control::client::{Client, ClientError};
use llfree_control::protocol::{ErrorKind, GuestRequest, Reply, Request, ShrinkGoal};
use llfree_control::report::{GuestOutcome, GuestReport, StatusReport};
use llfree_control::socket::{self, LiveVm, SocketError};
use serde::Serialize;
use std::io::{self, Write};
use std::time::{Duration, Instant};

/// Time that a stopped VM has to disappear.
const STOP: Duration = Duration::from_secs(30);
/// Time that a VM which refused a request has to send its status.
const REFUSAL: Duration = Duration::from_secs(1);

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// No VM, or none that answers.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// No directory of sockets.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The VM understood and said no; its words, and what tells why.
    #[error("{message}")]
    Refused {
        /// For people.
        message: String,
        /// The request.
        request: Box<Request>,
        /// Its status, if it sent one.
        status: Option<Box<StatusReport>>,
    },
    /// It said that it would stop, and did not.
    #[error("the VM is still running {STOP:?} after it agreed to stop; find its process with 'pgrep -a llfree-vmm'")]
    StillThere,
    /// Our output has nowhere to go.
    #[error("cannot write the output")]
    Output(#[source] io::Error),
}

impl CommandError {
    /// The exit code that goes with it.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Client(ClientError::Refused { kind: ErrorKind::Crashed, .. }) => exit::CRASHED,
            _ => exit::ERROR,
        }
    }
}

impl Advised for CommandError {
    fn advice(&self) -> Option<Advice> {
        match self {
            Self::Client(ClientError::Socket(error)) | Self::Socket(error) => advice::socket(error),
            Self::Refused { request, status, .. } => advice::refusal(request, status.as_deref()?),
            Self::Client(_) | Self::StillThere | Self::Output(_) => None,
        }
    }
}

/// Where output goes, and how.
pub struct Output<'a> {
    /// The writer.
    pub to: &'a mut dyn Write,
    /// JSON instead of text.
    pub json: bool,
    /// A person watches: a repeated status may redraw in place.
    pub terminal: bool,
}

impl Output<'_> {
    /// Prints the report, or its text.
    fn print(&mut self, report: &impl Serialize, text: impl FnOnce() -> String) -> Result<(), CommandError> {
        let result = if self.json {
            // Reports are plain data with string keys, which always serialize.
            let line = serde_json::to_string(report).expect("plain data serializes");
            writeln!(self.to, "{line}")
        } else {
            self.to.write_all(text().as_bytes())
        };
        result.and_then(|()| self.to.flush()).map_err(CommandError::Output)
    }
}

/// Runs a command against a running VM and says with which code to exit.
///
/// # Errors
/// Whatever keeps it from asking a VM or printing the answer.
pub fn run(global: &Global, command: &ClientCommand, output: &mut Output) -> Result<u8, CommandError> {
    let result = match command {
        ClientCommand::List => list(output),
        ClientCommand::Status { watch } => connect(global).and_then(|client| status(client, *watch, output)),
        ClientCommand::Stop => connect(global).and_then(|client| stop(client, output)),
        ClientCommand::Shrink(args) => {
            // The parser demands one of the two.
            let goal = match (args.to, args.by) {
                (Some(to), _) => ShrinkGoal::ToBytes(to.0),
                (None, by) => ShrinkGoal::ByBytes(by.unwrap_or_default().0),
            };
            let wait_ms = u64::try_from(args.wait.as_millis()).unwrap_or(u64::MAX);
            ask(global, "shrink", &Request::Shrink { goal, wait_ms }, output)
        }
        ClientCommand::Grow { to } => ask(global, "grow", &Request::Grow { to_bytes: to.0 }, output),
        ClientCommand::Reclaim { by } => ask(global, "reclaim", &Request::Reclaim { bytes: by.map(|by| by.0) }, output),
        ClientCommand::AutoReclaim { settings } => {
            ask(global, "auto-reclaim", &Request::AutoReclaim { settings: *settings }, output)
        }
        ClientCommand::Validate => ask(global, "validate", &Request::Validate, output),
        ClientCommand::Pause => ask(global, "pause", &Request::Pause, output),
        ClientCommand::Resume => ask(global, "resume", &Request::Resume, output),
        ClientCommand::Guest(command) => {
            let request = guest_request(command);
            ask(global, request.verb(), &Request::Guest(request), output)
        }
    };
    match result {
        Err(CommandError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(exit::OK),
        other => other,
    }
}

fn guest_request(command: &GuestCommand) -> GuestRequest {
    match *command {
        GuestCommand::Alloc { bytes, order } => GuestRequest::Alloc { bytes, order },
        GuestCommand::Verify => GuestRequest::Verify,
        GuestCommand::Free { amount, random } => GuestRequest::Free { bytes: amount.bytes(), random },
        GuestCommand::Churn { millis } => GuestRequest::Churn { millis },
        GuestCommand::Idle => GuestRequest::Idle,
        GuestCommand::Stats => GuestRequest::Stats,
        GuestCommand::Burst { bytes, touch, keep, single } => GuestRequest::Burst { bytes, touch, keep, single },
        GuestCommand::Stream { millis, bytes, beside } => {
            GuestRequest::Stream { millis, bytes, beside_bytes: beside.0 }
        }
        GuestCommand::Ftq { millis, quantum, beside } => {
            // The parser bounds it.
            let quantum_us = u64::try_from(quantum.as_micros()).unwrap_or(u64::MAX);
            GuestRequest::Ftq { millis, quantum_us, beside_bytes: beside.0 }
        }
    }
}

fn connect(global: &Global) -> Result<Client, CommandError> {
    let path = socket::find(global.name.as_deref(), global.socket.as_deref())?;
    Ok(Client::connect(&path)?)
}

/// One request, one report.
fn ask(global: &Global, verb: &str, request: &Request, output: &mut Output) -> Result<u8, CommandError> {
    let mut client = connect(global)?;
    match (request, client.call(request).map_err(|error| refused(&mut client, request, error))?) {
        (Request::Shrink { .. } | Request::Grow { .. }, Reply::Resize(report)) => {
            output.print(&report, || render::resize(verb, &report, advice::shortfall(request)))?;
            Ok(if report.complete { exit::OK } else { exit::PARTIAL })
        }
        (Request::Reclaim { .. }, Reply::Reclaim(report)) => {
            output.print(&report, || render::reclaim(&report))?;
            Ok(exit::OK)
        }
        (Request::AutoReclaim { .. }, Reply::AutoReclaim(report)) => {
            output.print(&report, || render::auto_reclaim(&report))?;
            Ok(exit::OK)
        }
        (Request::Validate, Reply::Validate(report)) => {
            output.print(&report, || render::validate(&report))?;
            Ok(if report.clean { exit::OK } else { exit::PARTIAL })
        }
        (Request::Pause | Request::Resume, Reply::Life(report)) => {
            output.print(&report, || render::life(&report))?;
            Ok(exit::OK)
        }
        (Request::Guest(_), Reply::Guest(report)) => {
            output.print(&report, || render::guest(verb, &report))?;
            Ok(guest_exit_code(&report))
        }
        _ => Err(ClientError::Unexpected(client.path().to_owned()).into()),
    }
}

/// A refusal with the status that explains it: the VM itself knows no flags to advise.
fn refused(client: &mut Client, request: &Request, error: ClientError) -> CommandError {
    let ClientError::Refused { kind: ErrorKind::Refused, message } = error else { return error.into() };
    // For a better message only: it may take a moment, and it may fail.
    let status = match client.call_within(&Request::Status, REFUSAL) {
        Ok(Reply::Status(status)) => Some(status),
        _ => None,
    };
    CommandError::Refused { message, request: Box::new(request.clone()), status }
}

/// The exit code that a guest's report calls for.
#[must_use]
pub fn guest_exit_code(report: &GuestReport) -> u8 {
    match report.outcome.known() {
        // A measurement without samples is none.
        Some(GuestOutcome::Ok) if report.samples.as_ref().is_some_and(|samples| samples.count == 0) => exit::PARTIAL,
        Some(GuestOutcome::Ok) if report.mismatches == 0 => exit::OK,
        Some(GuestOutcome::Unknown) => exit::ERROR,
        _ => exit::PARTIAL,
    }
}

fn ask_status(client: &mut Client) -> Result<StatusReport, ClientError> {
    match client.call(&Request::Status)? {
        Reply::Status(report) => Ok(*report),
        _ => Err(ClientError::Unexpected(client.path().to_owned())),
    }
}

fn status(mut client: Client, watch: Option<Duration>, output: &mut Output) -> Result<u8, CommandError> {
    let mut report = ask_status(&mut client)?;
    let Some(interval) = watch else {
        output.print(&report, || render::status(&report))?;
        return Ok(exit::OK);
    };
    let mut next = Instant::now();
    loop {
        let redraw = output.terminal && !output.json;
        output.print(&report, || {
            // Home, the block with each line cleared to its end, then clear what is below: no flicker.
            let text = render::status(&report);
            if redraw { format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n")) } else { format!("{text}\n") }
        })?;
        // By the clock, so that slow answers do not stretch the interval; missed ones are skipped.
        next = (next + interval).max(Instant::now());
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        report = match ask_status(&mut client) {
            Ok(report) => report,
            // A VM that stops has shown its watcher everything.
            Err(ClientError::Ended(_) | ClientError::Refused { kind: ErrorKind::Stopping, .. }) => return Ok(exit::OK),
            Err(error) => return Err(error.into()),
        };
    }
}

/// The output of `stop --json`.
#[derive(Serialize)]
struct Stopped {
    stopped: bool,
}

fn stop(mut client: Client, output: &mut Output) -> Result<u8, CommandError> {
    match client.call(&Request::Stop)? {
        Reply::Stopping => {}
        _ => return Err(ClientError::Unexpected(client.path().to_owned()).into()),
    }
    if !client.wait_for_end(STOP)? {
        return Err(CommandError::StillThere);
    }
    output.print(&Stopped { stopped: true }, || "stopped\n".to_owned())?;
    Ok(exit::OK)
}

/// A row of `list --json`.
#[derive(Serialize)]
struct Listed<'a> {
    name: &'a str,
    socket: &'a std::path::Path,
    /// Absent if the VM did not answer.
    status: Option<&'a StatusReport>,
    error: Option<&'a str>,
}

fn list(output: &mut Output) -> Result<u8, CommandError> {
    let vms = socket::live_vms()?;
    let rows: Vec<(String, Result<StatusReport, String>)> = vms.iter().map(list_one).collect();
    let listed: Vec<Listed> = vms
        .iter()
        .zip(&rows)
        .map(|(vm, (_, status))| Listed {
            name: &vm.name,
            socket: &vm.path,
            status: status.as_ref().ok(),
            error: status.as_ref().err().map(String::as_str),
        })
        .collect();
    output.print(&listed, || render::list(&rows))?;
    Ok(exit::OK)
}

fn list_one(vm: &LiveVm) -> (String, Result<StatusReport, String>) {
    let status = Client::connect(&vm.path).and_then(|mut client| ask_status(&mut client));
    (vm.name.clone(), status.map_err(|error| llfree_base::error_line(&error)))
}
