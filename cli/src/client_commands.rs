//! The subcommands that talk to a running VM: connect, ask, print, choose the exit code.
//!
//! Output goes to the writer that is handed in, text or JSON; errors go up to `main`, which prints
//! them as one line. A reader of our output that goes away (`| head`) ends a command quietly.

mod error;
mod find;
mod metrics;
mod output;
mod progress;
mod stop;
mod streams;
mod wait;
mod watch;

pub use error::CommandError;
pub use output::Output;
pub use watch::{Look, look};

use crate::advice;
use crate::args::{ClientCommand, Global, GrowArgs, GuestCommand, Patience, ResizeArgs, ShrinkArgs};
use crate::exit;
use crate::render;
use find::connect;
use llfree_control::client::ClientError;
use llfree_control::protocol::{GuestRequest, Reply, Request, ResizeGoal, ShrinkGoal};
use llfree_control::report::{GuestOutcome, GuestReport};
use std::io::{self};
use std::time::Duration;

/// Runs a command against a running VM and says with which code to exit.
///
/// # Errors
/// Whatever keeps it from asking a VM or printing the answer.
pub fn run(global: &Global, command: &ClientCommand, output: &mut Output) -> Result<u8, CommandError> {
    match run_command(global, command, output) {
        Err(CommandError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(exit::OK),
        other => other,
    }
}

fn run_command(global: &Global, command: &ClientCommand, output: &mut Output) -> Result<u8, CommandError> {
    match command {
        ClientCommand::List { watch } => watch::list(*watch, output),
        ClientCommand::Status { watch, .. } => connect(global).and_then(|client| watch::status(client, *watch, output)),
        ClientCommand::Metrics { format, .. } => metrics::metrics(global, *format, output),
        ClientCommand::Stop(args) => stop::stop(global, args, output),
        ClientCommand::Wait { what, timeout, .. } => wait::wait(global, *what, *timeout, output),
        ClientCommand::Console { .. } => streams::console(global),
        ClientCommand::Logs { follow, lines, .. } => streams::logs(global, *lines, *follow, output),
        ClientCommand::Events { .. } => streams::events(global, output),
        ClientCommand::Shrink(args) => ask(global, "shrink", &shrink_request(args), output),
        ClientCommand::Grow(args) => ask(global, "grow", &grow_request(args), output),
        ClientCommand::Resize(ResizeArgs { to, patience, .. }) => {
            ask(global, "resize", &resize_request(ResizeGoal::ToBytes(to.0), patience), output)
        }
        ClientCommand::Reclaim { by, force, .. } => {
            let bytes = by.map(|by| by.0);
            let request = if *force { Request::ReclaimByForce { bytes } } else { Request::Reclaim { bytes } };
            ask(global, "reclaim", &request, output)
        }
        ClientCommand::AutoReclaim { settings, .. } => {
            ask(global, "auto-reclaim", &Request::AutoReclaim { settings: *settings }, output)
        }
        ClientCommand::Validate { .. } => ask(global, "validate", &Request::Validate, output),
        ClientCommand::Pause { .. } => ask(global, "pause", &Request::Pause, output),
        ClientCommand::Resume { .. } => ask(global, "resume", &Request::Resume, output),
        ClientCommand::Guest { command, .. } => {
            let request = guest_request(command);
            ask(global, request.verb(), &Request::Guest(request), output)
        }
    }
}

/// In the words that an older VM knows, if they can say it.
fn shrink_request(args: &ShrinkArgs) -> Request {
    // The parser demands one of the two.
    let goal = match (args.to, args.by) {
        (Some(to), _) => ShrinkGoal::ToBytes(to.0),
        (None, by) => ShrinkGoal::ByBytes(by.unwrap_or_default().0),
    };
    match args.patience.once {
        _ if args.force => Request::ShrinkByForce { goal, wait_ms: millis(args.patience.wait) },
        true => resize_request(goal.into(), &args.patience),
        false => Request::Shrink { goal, wait_ms: millis(args.patience.wait) },
    }
}

fn grow_request(args: &GrowArgs) -> Request {
    match (args.to, args.by) {
        (Some(to), _) => Request::Grow { to_bytes: to.0 },
        (None, by) => resize_request(ResizeGoal::UpByBytes(by.unwrap_or_default().0), &Patience::default()),
    }
}

fn resize_request(goal: ResizeGoal, patience: &Patience) -> Request {
    Request::Resize { goal, wait_ms: millis(patience.wait), once: patience.once }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn guest_request(command: &GuestCommand) -> GuestRequest {
    match command {
        GuestCommand::Alloc { bytes, order, .. } => GuestRequest::Alloc { bytes: *bytes, order: *order },
        GuestCommand::Verify { .. } => GuestRequest::Verify,
        GuestCommand::Free { amount, random, .. } => GuestRequest::Free { bytes: amount.bytes(), random: *random },
        GuestCommand::Churn { millis, .. } => GuestRequest::Churn { millis: *millis },
        GuestCommand::Idle { .. } => GuestRequest::Idle,
        GuestCommand::Stats { .. } => GuestRequest::Stats,
        GuestCommand::Burst { bytes, touch, keep, single, .. } => {
            GuestRequest::Burst { bytes: *bytes, touch: *touch, keep: *keep, single: *single }
        }
        GuestCommand::Stream { millis, bytes, beside, .. } => {
            GuestRequest::Stream { millis: *millis, bytes: *bytes, beside_bytes: beside.0 }
        }
        GuestCommand::Ftq { millis, quantum, beside, .. } => {
            // The parser bounds it.
            let quantum_us = u64::try_from(quantum.as_micros()).unwrap_or(u64::MAX);
            GuestRequest::Ftq { millis: *millis, quantum_us, beside_bytes: beside.0 }
        }
    }
}

/// One request, one report.
fn ask(global: &Global, verb: &str, request: &Request, output: &mut Output) -> Result<u8, CommandError> {
    let mut client = connect(global)?;
    let path = client.path().to_owned();
    match (request, progress::call(&mut client, request)?) {
        (
            Request::Shrink { .. } | Request::ShrinkByForce { .. } | Request::Grow { .. } | Request::Resize { .. },
            Reply::Resize(report),
        ) => {
            output.print(&report, || render::resize(verb, &report, advice::shortfall(request)))?;
            Ok(if report.complete { exit::OK } else { exit::PARTIAL })
        }
        (Request::Reclaim { .. } | Request::ReclaimByForce { .. }, Reply::Reclaim(report)) => {
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
        _ => Err(ClientError::Unexpected(path).into()),
    }
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
