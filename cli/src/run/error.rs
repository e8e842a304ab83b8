//! [`RunError`]: why a launch failed, or did not end well, and what that prints and exits with.

use crate::advice::{self, Advice, Advised};
use crate::exit;
use crate::failure::{self, Fails, Failure};
use crate::service_manager::PassedError;
use llfree_base::units::Bytes;
use llfree_control::server::LimitsError;
use llfree_control::socket::SocketError;
use llfree_harden::SeccompError;
use llfree_metrics::address::ListenError;
use llfree_metrics::file::FileError;
use llfree_monitor::auto::SwitchError;
use std::io;
use std::path::PathBuf;
use vmm::cgroup::CgroupError;
use vmm::elastic::ResizeError;
use vmm::exit::ExitReason;
use vmm::vm::{LaunchError, VmError};

/// Why a launch failed, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No control socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// What was passed as control socket.
    #[error(transparent)]
    Passed(#[from] PassedError),
    /// Two control sockets.
    #[error("the service manager passed {passed} as control socket, and {flag} says {asked}")]
    TwoSockets {
        /// The socket passed.
        passed: PathBuf,
        /// The flag that says something else.
        flag: &'static str,
        /// What it says.
        asked: String,
    },
    /// A control socket for another process.
    #[error("the service manager passed a control socket to this process, and --detach goes on in another one")]
    PassedToCaller,
    /// Nobody could ask it anything.
    #[error("the host could not serve the control socket")]
    Clients(#[from] LimitsError),
    /// No VM.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// No cgroup of its own.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Flags that contradict each other.
    #[error(transparent)]
    Flags(#[from] ResizeError),
    /// No filters for the threads.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// The limit to start with.
    #[error("the VM cannot start with that limit")]
    Limit(#[source] VmError),
    /// A file for the serial line.
    #[error("cannot open {path} for the serial line")]
    SerialFile {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A serial line of a guest that has none.
    #[error("this kind of guest has no serial line; leave --serial out, or name a Linux with --kernel")]
    NoSerial,
    /// Nowhere to serve metrics.
    #[error("no metrics")]
    MetricsListen(#[from] ListenError),
    /// No file for metrics.
    #[error(transparent)]
    MetricsFile(#[from] FileError),
    /// A directory that a VM in its sandbox cannot write to.
    #[error("{dir} belongs to user {owner}, and a VM of root's gives up the right to write there")]
    MetricsDir {
        /// The directory.
        dir: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// The guest ended on its own, and not well.
    #[error(transparent)]
    Guest(#[from] ExitReason),
    /// The demo's story does not fit.
    #[error(transparent)]
    DemoSize(#[from] DemoSizeError),
    /// A command of a workload or of the demo failed.
    #[error("'{verb}' failed")]
    Workload {
        /// The command.
        verb: &'static str,
        /// Why.
        source: VmError,
    },
    /// The host refused something the loop needs.
    #[error("the host could not {step}")]
    Host {
        /// The step that it refused.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Automatic reclaim could not be switched on.
    #[error(transparent)]
    AutoReclaim(#[from] SwitchError),
    /// The event loop broke.
    #[error("the event loop failed: {0}")]
    Loop(String),
    /// Nowhere to print to.
    #[error("cannot write the output")]
    Output(#[source] io::Error),
}

impl RunError {
    /// The exit code that belongs to it.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Guest(end) | Self::Workload { source: VmError::Ended(end), .. } => match end {
                // Not the guest's fault.
                ExitReason::Unwatched(_) => exit::ERROR,
                ExitReason::Rebooted => exit::REBOOTED,
                ExitReason::KernelPanic(_) => exit::PANICKED,
                _ => exit::CRASHED,
            },
            _ => exit::ERROR,
        }
    }

    /// The text to print: one line, and below it the registers of a guest that crashed.
    #[must_use]
    pub fn report(&self) -> String {
        let line = advice::line(self);
        match self {
            Self::Guest(ExitReason::Exception { details, .. })
            | Self::Workload { source: VmError::Ended(ExitReason::Exception { details, .. }), .. }
                if !details.is_empty() =>
            {
                format!("{line}\n{details}")
            }
            _ => line,
        }
    }
}

impl Fails for RunError {
    fn failure(&self) -> Failure {
        let kind = match self {
            Self::Socket(error) => failure::of_socket(error),
            Self::Passed(_) | Self::PassedToCaller | Self::TwoSockets { .. } => "socket".to_owned(),
            Self::Guest(_) | Self::Workload { source: VmError::Ended(_), .. } => "guest".to_owned(),
            Self::Flags(_) | Self::DemoSize(_) | Self::NoSerial | Self::Limit(_) => "usage".to_owned(),
            Self::Host { .. } | Self::Clients(_) | Self::Loop(_) | Self::SerialFile { .. } => "host".to_owned(),
            Self::MetricsListen(ListenError::InUse(_)) => "in_use".to_owned(),
            Self::MetricsListen(_) | Self::MetricsFile(_) | Self::MetricsDir { .. } => "host".to_owned(),
            Self::Output(_) => "output".to_owned(),
            Self::Launch(_) | Self::Cgroup(_) | Self::Seccomp(_) | Self::AutoReclaim(_) | Self::Workload { .. } => {
                "launch".to_owned()
            }
        };
        Failure { kind, reason: None, message: self.report(), exit_code: self.exit_code() }
    }
}

impl Advised for RunError {
    fn advice(&self) -> Option<Advice> {
        match self {
            Self::Socket(error) => advice::socket(error),
            Self::Clients(error) => advice::clients(error),
            Self::Launch(error) => advice::launch(error),
            Self::Cgroup(error) => advice::cgroup(error),
            Self::Flags(error) => Some(advice::resize(error)),
            Self::Guest(end) => advice::exit(end),
            Self::Workload { source, .. } | Self::Limit(source) => advice::vm(source),
            Self::TwoSockets { flag, .. } => Some(format!("leave {flag} out").into()),
            Self::PassedToCaller => Some("leave --detach out".into()),
            Self::SerialFile { .. } | Self::NoSerial | Self::Passed(_) => None,
            Self::MetricsListen(ListenError::InUse(_)) => Some("choose another one with --metrics-listen".into()),
            Self::MetricsDir { .. } => {
                Some("choose a directory of root's, or have 'llfree-vmm exporter --file' write there".into())
            }
            Self::MetricsListen(_) | Self::MetricsFile(_) => None,
            Self::Seccomp(_) | Self::AutoReclaim(_) | Self::Host { .. } => None,
            Self::DemoSize(_) | Self::Loop(_) | Self::Output(_) => None,
        }
    }
}

/// A size that the demo's story does not fit in.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DemoSizeError {
    /// Too little memory.
    #[error("--mem {memory} is too small for the demo; use at least {least}")]
    Memory {
        /// The size given.
        memory: Bytes,
        /// The smallest size that works.
        least: Bytes,
    },
    /// The guest would touch next to nothing.
    #[error("--touch {touch} is too small for the demo; use at least {least}")]
    TouchTooLittle {
        /// The size given.
        touch: Bytes,
        /// The smallest size that works.
        least: Bytes,
    },
    /// The guest would touch more than can be had.
    #[error("the demo's guest touches {touch} with these sizes, and {place} has only {available} available")]
    Room {
        /// What it would touch.
        touch: Bytes,
        /// What can be had.
        available: Bytes,
        /// Who has no more.
        place: String,
    },
    /// The guest would touch all there is.
    #[error("--touch {touch} leaves the guest no memory of its own; use at most {most} with --mem {memory}")]
    TouchTooMuch {
        /// The size given.
        touch: Bytes,
        /// The most there can be.
        most: Bytes,
        /// The guest's memory.
        memory: Bytes,
    },
}

/// The step that failed on the host, in a form that `map_err` takes.
pub(super) fn host(step: &'static str) -> impl FnOnce(io::Error) -> RunError {
    move |source| RunError::Host { step, source }
}
