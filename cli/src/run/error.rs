//! [`RunError`]: why a launch failed, or did not end well, and what that prints and exits with.

use crate::exit;
use llfree_control::socket::SocketError;
use llfree_harden::SeccompError;
use llfree_monitor::auto::SwitchError;
use std::io;
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
    /// The guest ended by itself, and not well.
    #[error(transparent)]
    Guest(#[from] ExitReason),
    /// A size that the demo's story does not fit in.
    #[error("{0}")]
    DemoSize(String),
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
        /// What.
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
                ExitReason::Rebooted => exit::REBOOTED,
                ExitReason::KernelPanic(_) => exit::PANICKED,
                _ => exit::CRASHED,
            },
            _ => exit::ERROR,
        }
    }

    /// What to print: one line, and below it the registers of a guest that crashed.
    #[must_use]
    pub fn report(&self) -> String {
        let line = llfree_base::error_line(self);
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

/// What failed on the host, in a form that `map_err` takes.
pub(super) fn host(step: &'static str) -> impl FnOnce(io::Error) -> RunError {
    move |source| RunError::Host { step, source }
}
