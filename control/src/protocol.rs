//! The words of the control socket, shared by server and client.
//!
//! A line is one JSON object, `{"version":1,"request":...}` or `{"version":1,"reply":...}`, no
//! longer than [`MAX_LINE`] or [`MAX_REPLY`]. Sizes are bytes, times carry their unit in the name.
//! Nothing here does I/O; decoding is total.
//!
//! What a version promises:
//! - **Requests are strict.** A field that the VM does not know is refused, so that a misspelt one is
//!   never silently ignored. A new request needs no new
//!   version: an old VM names it in its refusal. A new field of an old request needs one.
//! - **Replies may grow.** A client skips fields that it does not know and keeps a
//!   [`Word`] that it does not know as it is. So a new counter needs no new
//!   version. A field that is added to a reply has `#[serde(default)]`, as older VMs do not send it.
//! - **`ping` and `stop` never change**, nor do their replies `pong` and `stopping`, nor `error`. They are
//!   served and understood whatever the version, in both directions: a newer client can stop an older
//!   VM, and an older client a newer one.
//!
//! Raise [`PROTOCOL_VERSION`] when an old peer would misread a line: a field changes its meaning or
//! disappears, or a request gains one.

use crate::report::{
    AutoReclaimReport, GuestReport, LifeReport, Reason, ReclaimReport, ResizeReport, StatusReport, ValidateReport, Word,
};
use llfree_base::choices::Switch;
use llfree_base::units::{Bytes, MAX_DURATION, MemorySizeError, check_memory};
use serde::{Deserialize, Serialize};
use shared_layout::Order;
use std::time::Duration;

/// The version that both sides must speak, except for a ping and a stop.
pub const PROTOCOL_VERSION: u32 = 1;
/// The most bytes in a request line, its newline included.
pub const MAX_LINE: usize = 64 << 10;
/// The most bytes in a reply line, its newline included: a status of 1024 vCPUs fits.
pub const MAX_REPLY: usize = 1 << 20;

/// FTQ's quanta in microseconds: below, reading the clock would be most of the work.
pub const QUANTUM_US: std::ops::RangeInclusive<u64> = 10..=1_000_000;

/// The contents of a line. The version is checked before the rest is read, and so not kept.
#[derive(Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(title = "Request"))]
#[serde(deny_unknown_fields)]
pub(crate) struct RequestLine {
    #[serde(rename = "version")]
    _version: u32,
    request: Request,
}

/// Likewise for a reply, which may say more.
#[derive(Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(title = "Reply"))]
pub(crate) struct ReplyLine {
    #[serde(rename = "version")]
    _version: u32,
    reply: Reply,
}

/// Reads only the version: it decides whether the rest can be understood.
#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

/// A request from a client to a VM.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Are you there, and who are you?
    Ping,
    /// All numbers about the VM's memory and vCPUs.
    Status,
    /// Lower the limit: free memory goes back to the host and stays away from the guest. The same as a
    /// [`Resize`](Self::Resize) that may only go down.
    Shrink {
        /// The goal.
        goal: ShrinkGoal,
        /// Time to wait for a guest that must first give up memory, in milliseconds.
        wait_ms: u64,
    },
    /// Raise the limit. Memory comes back as the guest uses it. The same as a [`Resize`](Self::Resize) that may
    /// only go up.
    Grow {
        /// The new limit in bytes.
        to_bytes: u64,
    },
    /// Move the limit, down or up. A limit that is not reached in time is pursued until it is, or until another
    /// resize replaces it.
    Resize {
        /// The goal.
        goal: ResizeGoal,
        /// Time to wait for a guest that must first give up memory, in milliseconds.
        wait_ms: u64,
        /// Give up what is missing when the reply is sent, instead of pursuing it.
        once: bool,
    },
    /// Take back the memory of free frames; the limit stays, the guest may use them again.
    Reclaim {
        /// At most this many bytes; everything free if absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bytes: Option<u64>,
    },
    /// Lower the limit even if that takes what the guest asks to be left. What is missing is not pursued.
    ShrinkByForce {
        /// The goal.
        goal: ShrinkGoal,
        /// Time to wait for a guest that must first give up memory, in milliseconds.
        wait_ms: u64,
    },
    /// Take back the memory of free frames, also of those that the guest asks to be left.
    ReclaimByForce {
        /// At most this many bytes; everything free if absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bytes: Option<u64>,
    },
    /// Reclaim without being asked: on, off or how.
    AutoReclaim {
        /// As on the command line: `on`, `off`, or settings.
        #[cfg_attr(feature = "schema", schemars(with = "String"))]
        settings: Switch,
    },
    /// Check that no frame is lost or owned twice.
    Validate,
    /// Work for the test guest's agent.
    Guest(GuestRequest),
    /// Halt all vCPUs and devices where they are.
    Pause,
    /// Let them go on.
    Resume,
    /// Press the power button of a guest that has one. What it does then is up to it; one that is set up to powers itself
    /// off.
    PowerButton,
    /// The VM's log, as it stands in memory.
    Logs {
        /// The last lines only; all that are kept if absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lines: Option<u64>,
        /// Go on with what comes.
        follow: bool,
    },
    /// What happens to the VM, from its start on: a JSON object a line.
    Events,
    /// The serial line of its guest, both ways.
    Console,
    /// End the VM cleanly.
    Stop,
}

/// The goal of a resize.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ResizeGoal {
    /// To this limit in bytes, from wherever it is.
    ToBytes(u64),
    /// Down to this limit in bytes; refused if the limit is below.
    DownToBytes(u64),
    /// Down by this many bytes.
    DownByBytes(u64),
    /// Up to this limit in bytes; refused if the limit is above.
    UpToBytes(u64),
    /// Up by this many bytes.
    UpByBytes(u64),
}

impl From<ShrinkGoal> for ResizeGoal {
    fn from(goal: ShrinkGoal) -> Self {
        match goal {
            ShrinkGoal::ToBytes(bytes) => Self::DownToBytes(bytes),
            ShrinkGoal::ByBytes(bytes) => Self::DownByBytes(bytes),
        }
    }
}

/// The goal of a shrink.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ShrinkGoal {
    /// To this limit in bytes.
    ToBytes(u64),
    /// By this many bytes less than the limit is now.
    ByBytes(u64),
}

/// Work for the test guest's agent; the VM shares it out among the vCPUs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum GuestRequest {
    /// Allocate, touch and stamp memory.
    Alloc {
        /// The amount, in bytes.
        bytes: u64,
        /// In blocks of `4 KiB << order`, 0 to 10.
        order: u8,
    },
    /// Check every stamp of what is allocated.
    Verify,
    /// Free memory.
    Free {
        /// The amount, in bytes; everything if absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        bytes: Option<u64>,
        /// Blocks at random, not the newest first.
        random: bool,
    },
    /// Allocate, verify and free blocks of mixed sizes and lifetimes.
    Churn {
        /// For how long, in milliseconds.
        millis: u64,
    },
    /// Give cached frames back, so that the host can take them.
    Idle,
    /// Only report.
    Stats,
    /// Allocate huge frames one after another, and time each.
    Burst {
        /// The amount, in bytes.
        bytes: u64,
        /// The words to touch.
        touch: BurstTouch,
        /// Keep it all, instead of freeing it.
        keep: bool,
        /// Ask the host for each frame alone, and for none ahead.
        single: bool,
    },
    /// Measure memory bandwidth over time: STREAM's triad.
    Stream {
        /// For how long, in milliseconds.
        millis: u64,
        /// The total size of its arrays, in bytes.
        bytes: u64,
        /// Bytes to allocate, touch and free between samples.
        beside_bytes: u64,
    },
    /// Measure computing time over time: work done in each of many fixed time quanta.
    Ftq {
        /// For how long, in milliseconds.
        millis: u64,
        /// A quantum, in microseconds.
        quantum_us: u64,
        /// Bytes to allocate, touch and free between quanta.
        beside_bytes: u64,
    },
}

/// The part of its allocations that a burst touches.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum BurstTouch {
    /// Nothing.
    Nothing,
    /// One word of each 2 MiB frame.
    Frames,
    /// One word of each 4 KiB page.
    #[default]
    Pages,
}

impl BurstTouch {
    /// Every choice.
    pub const ALL: [Self; 3] = [Self::Nothing, Self::Frames, Self::Pages];

    /// Its name on the wire, which people type too.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Frames => "frames",
            Self::Pages => "pages",
        }
    }
}

impl GuestRequest {
    /// The time that it takes on its own, in milliseconds.
    #[must_use]
    pub const fn millis(&self) -> u64 {
        match *self {
            Self::Churn { millis } | Self::Stream { millis, .. } | Self::Ftq { millis, .. } => millis,
            _ => 0,
        }
    }

    /// The word for it on the command line.
    #[must_use]
    pub const fn verb(&self) -> &'static str {
        match self {
            Self::Alloc { .. } => "alloc",
            Self::Verify => "verify",
            Self::Free { .. } => "free",
            Self::Churn { .. } => "churn",
            Self::Idle => "idle",
            Self::Stats => "stats",
            Self::Burst { .. } => "burst",
            Self::Stream { .. } => "stream",
            Self::Ftq { .. } => "ftq",
        }
    }
}

/// A VM's answer.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To a ping.
    Pong {
        /// The VM's name.
        name: String,
        /// Its process.
        pid: u32,
    },
    /// To a status request.
    Status(Box<StatusReport>),
    /// To a shrink or a grow.
    Resize(ResizeReport),
    /// To a soft reclaim.
    Reclaim(ReclaimReport),
    /// To a switch of automatic reclaim.
    AutoReclaim(AutoReclaimReport),
    /// To a check.
    Validate(ValidateReport),
    /// To a guest request.
    Guest(GuestReport),
    /// To a pause or a resume.
    Life(LifeReport),
    /// To a power button: it is pressed.
    Pressed,
    /// To a request for a log, events or a console: what follows on this connection are the bytes of that,
    /// and no more replies. The end of the stream is the end of the connection.
    Stream,
    /// To a stop: the VM ends now.
    Stopping,
    /// The request was not carried out.
    Error {
        /// For programs.
        kind: ErrorKind,
        /// Likewise, finer; older VMs do not send it, and not every error has one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<Word<Reason>>,
        /// For people: one line.
        message: String,
    },
}

/// Why a request was not carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// No JSON, an unknown request or field, a number out of range.
    BadRequest,
    /// Another protocol version.
    Version,
    /// A line above [`MAX_LINE`].
    TooLong,
    /// Too many clients or requests at once; try again.
    Busy,
    /// Understood, but this VM cannot do that: a limit above its memory, say.
    Refused,
    /// The guest did not answer, or has no agent.
    Guest,
    /// The guest crashed.
    Crashed,
    /// The VM is on its way out.
    Stopping,
    /// A fault of the VMM or its host.
    Internal,
    /// A reason that only a newer VM knows.
    #[serde(other)]
    Other,
}

/// The reason that a line is not a request, or not a reply.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// No JSON, or another shape than expected; the text says where.
    #[error("not understood: {0}")]
    Malformed(String),
    /// The peer speaks another version.
    #[error("protocol version {found}, but this side speaks version {PROTOCOL_VERSION}; use the same release on both")]
    Version {
        /// The peer's version.
        found: u32,
    },
    /// A size that memory cannot have.
    #[error("in '{field}'")]
    Size {
        /// The field with that size.
        field: &'static str,
        /// The mistake in it.
        source: MemorySizeError,
    },
    /// A number out of its range.
    #[error("'{field}' is {value}; it must be {range}")]
    Range {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The values allowed.
        range: &'static str,
    },
}

impl DecodeError {
    /// The error reply that tells a client so.
    #[must_use]
    pub fn to_reply(&self) -> Reply {
        let kind = if matches!(self, Self::Version { .. }) { ErrorKind::Version } else { ErrorKind::BadRequest };
        Reply::error(kind, llfree_base::error_line(self))
    }
}

impl Request {
    /// The line that asks this, its newline included.
    #[must_use]
    pub fn to_line(&self) -> String {
        to_line("request", self)
    }

    /// Reads a line, with or without its newline.
    ///
    /// # Errors
    /// Anything but a request of this version with all its numbers in range, or a ping or a stop of any
    /// version.
    pub fn from_line(line: &[u8]) -> Result<Self, DecodeError> {
        let request = of_any_version(line, |line: RequestLine| line.request, Self::never_changes)?;
        request.check()?;
        Ok(request)
    }

    /// Whether it is the same in every version.
    #[must_use]
    pub const fn never_changes(&self) -> bool {
        matches!(self, Self::Ping | Self::Stop)
    }

    /// Whether it is answered at once, whatever else the VM is at: nobody can keep anybody from asking.
    #[must_use]
    pub const fn is_prompt(&self) -> bool {
        matches!(self, Self::Ping | Self::Status | Self::Stop)
    }

    /// The checks that do not depend on the VM asked.
    fn check(&self) -> Result<(), DecodeError> {
        let size = |field, bytes: u64| {
            check_memory(Bytes(bytes)).map(drop).map_err(|source| DecodeError::Size { field, source })
        };
        let range = |field, value, ok: bool, range| {
            if ok { Ok(()) } else { Err(DecodeError::Range { field, value, range }) }
        };
        let longest = MAX_DURATION.as_millis() as u64;
        match *self {
            Self::Shrink { goal, wait_ms } | Self::ShrinkByForce { goal, wait_ms } => {
                range("wait_ms", wait_ms, wait_ms <= longest, "at most 86400000")?;
                match goal {
                    ShrinkGoal::ToBytes(bytes) => size("to_bytes", bytes),
                    ShrinkGoal::ByBytes(bytes) => size("by_bytes", bytes),
                }
            }
            Self::Grow { to_bytes } => size("to_bytes", to_bytes),
            Self::Resize { goal, wait_ms, .. } => {
                range("wait_ms", wait_ms, wait_ms <= longest, "at most 86400000")?;
                match goal {
                    ResizeGoal::ToBytes(bytes) => size("to_bytes", bytes),
                    ResizeGoal::DownToBytes(bytes) => size("down_to_bytes", bytes),
                    ResizeGoal::DownByBytes(bytes) => size("down_by_bytes", bytes),
                    ResizeGoal::UpToBytes(bytes) => size("up_to_bytes", bytes),
                    ResizeGoal::UpByBytes(bytes) => size("up_by_bytes", bytes),
                }
            }
            Self::Reclaim { bytes: Some(bytes) } | Self::ReclaimByForce { bytes: Some(bytes) } => size("bytes", bytes),
            Self::Guest(GuestRequest::Alloc { bytes, order }) => {
                range("bytes", bytes, bytes > 0, "above 0")?;
                range("order", order.into(), Order::new(order).is_some(), "0 to 10")
            }
            Self::Guest(GuestRequest::Free { bytes: Some(bytes), .. }) => range("bytes", bytes, bytes > 0, "above 0"),
            Self::Guest(GuestRequest::Burst { bytes, .. }) => range("bytes", bytes, bytes > 0, "above 0"),
            Self::Guest(GuestRequest::Churn { millis }) => {
                range("millis", millis, millis > 0 && millis <= longest, "1 to 86400000")
            }
            Self::Guest(GuestRequest::Stream { millis, bytes, .. }) => {
                range("millis", millis, millis > 0 && millis <= longest, "1 to 86400000")?;
                range("bytes", bytes, bytes > 0, "above 0")
            }
            Self::Guest(GuestRequest::Ftq { millis, quantum_us, .. }) => {
                range("millis", millis, millis > 0 && millis <= longest, "1 to 86400000")?;
                range("quantum_us", quantum_us, QUANTUM_US.contains(&quantum_us), "10 to 1000000")
            }
            Self::Ping
            | Self::Status
            | Self::AutoReclaim { .. }
            | Self::Validate
            | Self::Reclaim { bytes: None }
            | Self::ReclaimByForce { bytes: None }
            | Self::Guest(_)
            | Self::Pause
            | Self::Resume
            | Self::PowerButton
            | Self::Logs { .. }
            | Self::Events
            | Self::Console
            | Self::Stop => Ok(()),
        }
    }

    /// Time that a client should wait for the reply. Work that touches memory may take minutes on
    /// a host that must first find it; what only asks is answered at once.
    #[must_use]
    pub fn patience(&self) -> Duration {
        let work = Duration::from_secs(10 * 60);
        match self {
            Self::Ping | Self::Status | Self::AutoReclaim { .. } | Self::Logs { .. } | Self::Events | Self::Console => {
                Duration::from_secs(5)
            }
            Self::Pause | Self::Resume | Self::PowerButton | Self::Stop => Duration::from_secs(30),
            Self::Shrink { wait_ms, .. } | Self::Resize { wait_ms, .. } | Self::ShrinkByForce { wait_ms, .. } => {
                work + Duration::from_millis(*wait_ms)
            }
            Self::Guest(request) => work + Duration::from_millis(request.millis()),
            // A device's driver takes its time to grow.
            Self::Grow { .. } | Self::Reclaim { .. } | Self::ReclaimByForce { .. } | Self::Validate => work,
        }
    }
}

impl Reply {
    /// An error reply.
    pub fn error(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self::Error { kind, reason: None, message: message.into() }
    }

    /// An error reply with a reason for programs.
    pub fn refusal(kind: ErrorKind, reason: Option<Reason>, message: impl Into<String>) -> Self {
        Self::Error { kind, reason: reason.map(Word::from), message: message.into() }
    }

    /// The line that says this, its newline included. One that would be longer than
    /// [`MAX_REPLY`] is replaced by an error.
    #[must_use]
    pub fn to_line(&self) -> String {
        let line = to_line("reply", self);
        if line.len() > MAX_REPLY {
            let message = format!("the reply has {} bytes; a reply line has at most {MAX_REPLY}", line.len());
            return Self::error(ErrorKind::Internal, message).to_line();
        }
        line
    }

    /// Reads a line, with or without its newline.
    ///
    /// # Errors
    /// Anything but a reply of this version, or one of any version that [never changes](Self::never_changes).
    pub fn from_line(line: &[u8]) -> Result<Self, DecodeError> {
        of_any_version(line, |line: ReplyLine| line.reply, Self::never_changes)
    }

    /// Whether it is the same in every version: a pong, a stopping, an error.
    #[must_use]
    pub const fn never_changes(&self) -> bool {
        matches!(self, Self::Pong { .. } | Self::Stopping | Self::Error { .. })
    }
}

fn to_line<T: Serialize>(key: &str, value: &T) -> String {
    // Serializing fails for maps without string keys and for types that say so: here are neither.
    let value = serde_json::to_string(value).expect("plain data serializes");
    format!("{{\"version\":{PROTOCOL_VERSION},\"{key}\":{value}}}\n")
}

/// Reads a line of this version, or one of another if what it says never changes.
fn of_any_version<'a, L: Deserialize<'a>, T>(
    line: &'a [u8],
    said: impl FnOnce(L) -> T,
    never_changes: impl FnOnce(&T) -> bool,
) -> Result<T, DecodeError> {
    let VersionOnly { version } = from_json(line)?;
    match from_json(line).map(said) {
        result if version == PROTOCOL_VERSION => result,
        Ok(said) if never_changes(&said) => Ok(said),
        _ => Err(DecodeError::Version { found: version }),
    }
}

fn from_json<'a, T: Deserialize<'a>>(line: &'a [u8]) -> Result<T, DecodeError> {
    serde_json::from_slice(line).map_err(|error| {
        // The reason may quote a long word of the peer's, control characters and all.
        let reason: String = error.to_string().chars().flat_map(char::escape_debug).take(300).collect();
        DecodeError::Malformed(reason.replace("\\'", "'").replace("\\\"", "\""))
    })
}
