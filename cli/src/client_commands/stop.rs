//! `stop`: one VM, several, or all; and the end of a process that does not end itself.

use super::error::CommandError;
use super::find;
use super::output::Output;
use crate::advice;
use crate::args::{Global, StopArgs};
use crate::exit;
use crate::failure::{Fails, Failure};
use llfree_base::printable;
use llfree_control::client::{Client, ClientError};
use llfree_control::protocol::{ErrorKind, Reply, Request};
use llfree_control::socket;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::Serialize;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

/// Time that a VM has to disappear, if nobody is in a hurry.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same before it is killed.
const BEFORE_FORCE: Duration = Duration::from_secs(3);
/// Time that a killed process has to disappear: its memory goes back to the kernel first.
const AFTER_KILL: Duration = Duration::from_secs(30);

/// The output of `stop --json` for one VM.
#[derive(Serialize)]
struct Stopped {
    stopped: bool,
    /// Its guest powered itself off.
    #[serde(skip_serializing_if = "is_false")]
    powered_off: bool,
    #[serde(skip_serializing_if = "is_false")]
    killed: bool,
}

impl Stopped {
    const CLEANLY: Self = Self { stopped: true, powered_off: false, killed: false };
}

/// How VMs are stopped.
#[derive(Clone, Copy)]
struct Manner {
    /// How long their guests may take to power themselves off.
    wait: Option<Duration>,
    /// Whether those that hang are killed.
    force: bool,
}

/// A row of it for several.
#[derive(Serialize)]
struct Row {
    name: String,
    #[serde(flatten)]
    stopped: Stopped,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Failure>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_false(value: &bool) -> bool {
    !value
}

pub(super) fn stop(global: &Global, args: &StopArgs, output: &mut Output) -> Result<u8, CommandError> {
    let manner = Manner { wait: args.wait, force: args.force };
    if args.all {
        let vms = socket::live_vms()?;
        return stop_several(vms.into_iter().map(|vm| (vm.name, Target::Socket(vm.path))).collect(), manner, output);
    }
    match &args.vms[..] {
        [] => stop_one(global, manner, output),
        [name] => stop_one(&Global { name: Some(name.clone()), ..global.clone() }, manner, output),
        names => {
            let target =
                |name: &String| (name.clone(), Target::Named(Global { name: Some(name.clone()), ..global.clone() }));
            stop_several(names.iter().map(target).collect(), manner, output)
        }
    }
}

/// A VM to stop.
enum Target {
    Named(Global),
    Socket(std::path::PathBuf),
}

fn stop_one(global: &Global, manner: Manner, output: &mut Output) -> Result<u8, CommandError> {
    let stopped = end(find::connect_running(global)?, manner)?;
    output.print(&stopped, || format!("{}\n", words(&stopped)))?;
    Ok(exit::OK)
}

/// Stops them all at once, and says of each how that went.
fn stop_several(vms: Vec<(String, Target)>, manner: Manner, output: &mut Output) -> Result<u8, CommandError> {
    let stop = |target: &Target| match target {
        Target::Named(global) => find::connect_running(global).and_then(|client| end(client, manner)),
        Target::Socket(path) => {
            Client::connect(path).map_err(CommandError::from).and_then(|client| end(client, manner))
        }
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = vms.iter().map(|(_, target)| scope.spawn(|| stop(target))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or(Err(CommandError::Killed(None)))).collect()
    });
    let mut code = exit::OK;
    let mut text = String::new();
    let mut rows = Vec::new();
    for ((name, _), result) in vms.into_iter().zip(results) {
        let (said, stopped, error) = match result {
            Ok(stopped) => (words(&stopped).to_owned(), stopped, None),
            // It went by itself meanwhile.
            Err(error) if error.is_absence() => ("stopped".to_owned(), Stopped::CLEANLY, None),
            Err(error) => {
                code = code.max(error.exit_code());
                (advice::line(&error), Stopped { stopped: false, ..Stopped::CLEANLY }, Some(error.failure()))
            }
        };
        text += &format!("{}  {}\n", printable(&name), printable(&said));
        rows.push(Row { name, stopped, error });
    }
    if rows.is_empty() {
        text = "no VM is running\n".to_owned();
    }
    output.print(&rows, || text)?;
    Ok(code)
}

fn words(stopped: &Stopped) -> &'static str {
    match stopped {
        Stopped { killed: true, .. } => "killed",
        Stopped { powered_off: true, .. } => "powered off",
        _ => "stopped",
    }
}

/// Ends the VM behind this connection.
fn end(mut client: Client, manner: Manner) -> Result<Stopped, CommandError> {
    let path = client.path().to_owned();
    let patience = if manner.force { BEFORE_FORCE } else { PATIENCE };
    if let Some(wait) = manner.wait
        && powers_itself_off(&mut client, patience, wait)?
    {
        return Ok(Stopped { powered_off: true, ..Stopped::CLEANLY });
    }
    match ask_to_stop(&mut client, patience) {
        Ok(()) => Ok(Stopped::CLEANLY),
        Err(CommandError::StillThere { .. }) if manner.force => {
            drop(client);
            kill(&path)?;
            Ok(Stopped { killed: true, ..Stopped::CLEANLY })
        }
        Err(error) => Err(error),
    }
}

/// Presses the guest's power button, and waits until the VM is gone. False if the guest has none, or does not heed it.
fn powers_itself_off(client: &mut Client, patience: Duration, wait: Duration) -> Result<bool, CommandError> {
    match client.call_within(&Request::PowerButton, patience) {
        Ok(Reply::Pressed) => Ok(client.wait_for_end(wait)?),
        // It has none, is paused, is of an older release, or on its way out.
        Err(ClientError::Refused { .. } | ClientError::Ended(_)) => Ok(false),
        // It hangs, which the stop finds out; a late answer would be taken for one to that.
        Err(ClientError::Timeout { path, .. }) => {
            *client = Client::connect(&path)?;
            Ok(false)
        }
        Ok(_) => Err(ClientError::Unexpected(client.path().to_owned()).into()),
        Err(error) => Err(error.into()),
    }
}

/// Asks, and waits until the VM is gone.
fn ask_to_stop(client: &mut Client, patience: Duration) -> Result<(), CommandError> {
    let start = Instant::now();
    let path = client.path().to_owned();
    let still_there = || CommandError::StillThere { pid: socket::owner(&path), waited: patience };
    match client.call_within(&Request::Stop, patience) {
        Ok(Reply::Stopping) => {}
        Ok(_) => return Err(ClientError::Unexpected(path).into()),
        // It was on its way out before it was asked.
        Err(ClientError::Ended(_) | ClientError::Refused { kind: ErrorKind::Stopping, .. }) => {}
        Err(ClientError::Timeout { .. }) => return Err(still_there()),
        Err(error) => return Err(error.into()),
    }
    match client.wait_for_end(patience.saturating_sub(start.elapsed()))? {
        true => Ok(()),
        false => Err(still_there()),
    }
}

/// Kills the process that holds the socket's lock, and removes what it leaves.
fn kill(path: &Path) -> Result<(), CommandError> {
    let owner = socket::owner(path);
    let failed = |source: io::Error| CommandError::NotKilled { pid: owner, source };
    let Some(pid) = owner.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) else {
        // It ended meanwhile.
        socket::sweep(path);
        return Ok(());
    };
    match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        // The number may have passed to another process before it was opened, but then not the lock.
        Ok(process) if socket::owner(path) == owner => {
            rustix::process::pidfd_send_signal(&process, Signal::KILL).map_err(|error| failed(error.into()))?;
            let mut fds = [PollFd::new(&process, PollFlags::IN)];
            let patience = Timespec { tv_sec: AFTER_KILL.as_secs() as i64, tv_nsec: 0 };
            if rustix::event::poll(&mut fds, Some(&patience)).map_err(|error| failed(error.into()))? == 0 {
                return Err(CommandError::StillThere { pid: owner, waited: AFTER_KILL });
            }
        }
        Ok(_) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => return Err(failed(error.into())),
    }
    socket::sweep(path);
    Ok(())
}
