//! [`Failure`]: an error as a program reads it, under `--json`.
//!
//! The same facts as the line for people: what kind of thing went wrong, why in a word if the VM said so, the
//! line itself, and the exit code. It goes to stdout, where the report would have been; the line for people is
//! on stderr as always.

use llfree_control::socket::SocketError;
use serde::Serialize;

/// An error for programs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Failure {
    /// What went wrong: a kind of the control protocol, or one of this side: `usage`, `no_vm`, `several_vms`,
    /// `in_use`, `socket`, `connection`, `protocol`, `timeout`, `ended`, `killed`, `launch`, `guest`, `host`, `output`.
    pub kind: String,
    /// Why a VM refused, as the control protocol names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The line for people, with its advice.
    pub message: String,
    /// The exit code of this process.
    pub exit_code: u8,
}

/// The line of JSON.
#[derive(Serialize)]
struct Line<'a> {
    error: &'a Failure,
}

impl Failure {
    /// It as a line, the newline included.
    #[must_use]
    pub fn to_line(&self) -> String {
        // Plain data with string keys, which always serializes.
        serde_json::to_string(&Line { error: self }).expect("plain data serializes") + "\n"
    }
}

/// An error that programs can read.
pub trait Fails {
    /// What they read.
    fn failure(&self) -> Failure;
}

/// The kind of an error about sockets.
pub(crate) fn of_socket(error: &SocketError) -> String {
    match error {
        SocketError::NoneRunning(_) | SocketError::UnknownName { .. } | SocketError::NoSuchVm(_) => "no_vm",
        SocketError::SeveralRunning(_) => "several_vms",
        SocketError::InUse { .. } => "in_use",
        SocketError::Name(_) | SocketError::PathTooLong { .. } => "usage",
        SocketError::Directory { .. }
        | SocketError::NoDirectory(_)
        | SocketError::NotASocket(_)
        | SocketError::NotALock(_)
        | SocketError::Passed(_)
        | SocketError::Io { .. } => "socket",
    }
    .to_owned()
}

/// A word of the protocol, as it is on the wire.
pub(crate) fn word(word: &impl Serialize) -> String {
    match serde_json::to_value(word) {
        Ok(serde_json::Value::String(word)) => word,
        _ => "other".to_owned(),
    }
}
