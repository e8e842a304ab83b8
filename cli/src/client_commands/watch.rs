//! `status` and `list`, once or again and again.

use super::error::CommandError;
use super::output::{Output, ask_status};
use crate::exit;
use crate::render;
use llfree_control::client::{Client, ClientError};
use llfree_control::protocol::ErrorKind;
use llfree_control::report::StatusReport;
use llfree_control::socket::{self, LiveVm, SocketError};
use serde::Serialize;
use std::path::Path;
use std::time::{Duration, Instant};

/// Time that a VM has to send its status.
const STATUS: Duration = Duration::from_secs(5);
/// The same in a list: one that hangs is listed as such, and holds up nobody for long.
const LISTED: Duration = Duration::from_secs(2);
/// Time that the kernel may take to close the files of a killed process: its memory goes first.
const LAST_FILES: Duration = Duration::from_secs(2);
/// VMs that are asked at once for a list.
const AT_ONCE: usize = 64;

/// The steps of a watch, by the clock: slow answers do not stretch the interval, and missed steps are skipped.
struct Clock {
    next: Instant,
    interval: Duration,
}

impl Clock {
    fn new(interval: Duration) -> Self {
        Self { next: Instant::now(), interval }
    }

    fn wait(&mut self) {
        self.next = (self.next + self.interval).max(Instant::now());
        std::thread::sleep(self.next.saturating_duration_since(Instant::now()));
    }
}

/// Prints one step of a watch: in place on a terminal, below the last one elsewhere.
fn show(
    output: &mut Output,
    report: &(impl Serialize + ?Sized),
    text: impl FnOnce() -> String,
) -> Result<(), CommandError> {
    let in_place = output.terminal && !output.json;
    output.print(report, || match in_place {
        true => render::in_place(&text(), render::terminal_size()),
        false => format!("{}\n", text()),
    })
}

pub(super) fn status(mut client: Client, watch: Option<Duration>, output: &mut Output) -> Result<u8, CommandError> {
    let mut report = ask_status(&mut client, STATUS)?;
    let Some(interval) = watch else {
        output.print(&report, || render::status(&report))?;
        return Ok(exit::OK);
    };
    let mut clock = Clock::new(interval);
    let (mut last, mut at) = (None, Instant::now());
    loop {
        show(output, &report, || {
            let mut text = render::status(&report);
            text += &last.as_ref().map(|(last, time)| render::rates(last, &report, *time)).unwrap_or_default();
            text
        })?;
        clock.wait();
        let now = match ask_status(&mut client, STATUS) {
            Ok(now) => now,
            Err(error) => return end_of_watch(report.pid, error),
        };
        last = Some((std::mem::replace(&mut report, now), at.elapsed()));
        at = Instant::now();
    }
}

/// A VM that stops has shown its watcher everything. One that was killed has not, and leaves its socket.
fn end_of_watch(pid: u32, error: ClientError) -> Result<u8, CommandError> {
    match error {
        ClientError::Refused { kind: ErrorKind::Stopping, .. } => Ok(exit::OK),
        ClientError::Ended(path) if is_left_behind(&path) => Err(CommandError::Killed(Some(pid))),
        ClientError::Ended(_) => Ok(exit::OK),
        error => Err(error.into()),
    }
}

/// Whether a socket lies there that is nobody's any more. The kernel closes what a killed process had open one by one,
/// the lock maybe last.
fn is_left_behind(path: &Path) -> bool {
    let start = Instant::now();
    while path.symlink_metadata().is_ok() {
        if socket::owner(path).is_none() {
            return path.symlink_metadata().is_ok();
        }
        if start.elapsed() > LAST_FILES {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

/// A row of `list --json`.
#[derive(Serialize)]
struct Listed<'a> {
    name: &'a str,
    socket: &'a Path,
    /// Absent if the VM did not answer.
    status: Option<&'a StatusReport>,
    error: Option<&'a str>,
}

pub(super) fn list(watch: Option<Duration>, output: &mut Output) -> Result<u8, CommandError> {
    let mut clock = watch.map(Clock::new);
    loop {
        let looks = look()?;
        let listed: Vec<Listed> = looks
            .iter()
            .map(|(vm, status)| Listed {
                name: &vm.name,
                socket: &vm.path,
                status: status.as_ref().ok(),
                error: status.as_ref().err().map(String::as_str),
            })
            .collect();
        let text = || {
            let rows: Vec<_> = looks.iter().map(|(vm, status)| (vm.name.clone(), status.clone())).collect();
            render::list(&rows, &socket::places::all())
        };
        let Some(clock) = &mut clock else {
            output.print(&listed, text)?;
            return Ok(exit::OK);
        };
        show(output, &listed, text)?;
        clock.wait();
    }
}

/// VMs at one moment, each with its status, or with why there is none.
pub type Look = Vec<(LiveVm, Result<StatusReport, String>)>;

/// All VMs of this user that run now, each with its status, or with why there is none.
///
/// # Errors
/// When a directory of sockets cannot be read.
pub fn look() -> Result<Look, SocketError> {
    let vms = socket::live_vms()?;
    let statuses = ask_all(&vms);
    Ok(vms.into_iter().zip(statuses).collect())
}

/// The statuses of all these VMs, each asked on a thread of its own: one that hangs costs the others nothing.
fn ask_all(vms: &[LiveVm]) -> Vec<Result<StatusReport, String>> {
    let ask = |vm: &LiveVm| {
        let status = Client::connect(&vm.path).and_then(|mut client| ask_status(&mut client, LISTED));
        status.map_err(|error| {
            let owner = socket::owner(&vm.path).map_or_else(String::new, |pid| format!(" (pid {pid})"));
            format!("{}{owner}", llfree_base::error_line(&error))
        })
    };
    let mut statuses = Vec::with_capacity(vms.len());
    for some in vms.chunks(AT_ONCE) {
        std::thread::scope(|scope| {
            let threads: Vec<_> = some.iter().map(|vm| scope.spawn(|| ask(vm))).collect();
            let failed = || Err("it could not be asked".to_owned());
            statuses.extend(threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| failed())));
        });
    }
    statuses
}
