//! [`CommandError`]: why a command against a running VM failed.

use crate::advice::{self, Advice, Advised};
use crate::exit;
use crate::failure::{Fails, Failure};
use llfree_control::client::ClientError;
use llfree_control::protocol::ErrorKind;
use llfree_control::socket::SocketError;
use std::io;
use std::time::Duration;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// No VM, or none that answers.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// No directory of sockets.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// It said that it would stop, and did not, or it does not say anything.
    #[error("the VM{} is still running {waited:?} after it was told to stop", of_pid(.pid))]
    StillThere {
        /// Its process, if its lock says so.
        pid: Option<u32>,
        /// The time it had.
        waited: Duration,
    },
    /// Its process could not be killed.
    #[error("the VM{} could not be killed", of_pid(.pid))]
    NotKilled {
        /// Its process, if its lock says so.
        pid: Option<u32>,
        /// Why not.
        source: io::Error,
    },
    /// It was there a moment ago, and went without a word.
    #[error("the VM{} was killed, or crashed: it is gone and has left its socket behind", of_pid(.0))]
    Killed(Option<u32>),
    /// Not in time.
    #[error("{what} did not happen within {waited:?}")]
    TooLate {
        /// What was waited for.
        what: &'static str,
        /// The time waited.
        waited: Duration,
        /// What stood in the way at last.
        #[source]
        last: Option<Box<CommandError>>,
    },
    /// No terminal, where one is needed.
    #[error("cannot set up the terminal")]
    Terminal(#[source] io::Error),
    /// Our output has nowhere to go.
    #[error("cannot write the output")]
    Output(#[source] io::Error),
}

fn of_pid(pid: &Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (pid {pid})"))
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

    /// Whether no VM is there yet, or none any more.
    pub(super) fn is_absence(&self) -> bool {
        match self {
            Self::Client(ClientError::Socket(error)) | Self::Socket(error) => error.is_absence(),
            _ => false,
        }
    }
}

impl Advised for CommandError {
    fn advice(&self) -> Option<Advice> {
        match self {
            Self::Client(ClientError::Socket(error)) | Self::Socket(error) => advice::socket(error),
            Self::Client(ClientError::Refused { reason: Some(reason), .. }) => advice::refusal(reason.known()?),
            Self::StillThere { .. } => Some("'llfree-vmm stop --force' kills it".into()),
            Self::Client(_) | Self::NotKilled { .. } | Self::Killed(_) | Self::TooLate { .. } => None,
            Self::Terminal(_) | Self::Output(_) => None,
        }
    }
}

impl Fails for CommandError {
    fn failure(&self) -> Failure {
        let (kind, reason) = match self {
            Self::Client(error) => client_failure(error),
            Self::Socket(error) => (crate::failure::of_socket(error), None),
            Self::StillThere { .. } | Self::TooLate { .. } => ("timeout".to_owned(), None),
            Self::NotKilled { .. } => ("host".to_owned(), None),
            Self::Killed(_) => ("killed".to_owned(), None),
            Self::Terminal(_) | Self::Output(_) => ("output".to_owned(), None),
        };
        Failure { kind, reason, message: advice::line(self), exit_code: self.exit_code() }
    }
}

/// The kind of an error of a client, and the reason that the VM gave.
fn client_failure(error: &ClientError) -> (String, Option<String>) {
    let kind = match error {
        ClientError::Refused { kind, reason, .. } => {
            return (crate::failure::word(kind), reason.as_ref().map(ToString::to_string));
        }
        ClientError::Socket(error) => return (crate::failure::of_socket(error), None),
        ClientError::Timeout { .. } => "timeout",
        ClientError::Ended(_) => "ended",
        ClientError::Io { .. } => "connection",
        ClientError::TooLong(_) | ClientError::Decode { .. } | ClientError::Unexpected(_) => "protocol",
    };
    (kind.to_owned(), None)
}
