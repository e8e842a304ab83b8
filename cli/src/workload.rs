//! `--workload`: guest commands that run at boot, as one argument.
//!
//! `"alloc 8G, verify; free all, stop"` becomes a list of steps. The words are those of the
//! `guest` subcommands, separated by commas or semicolons. Text in, values out.

use llfree_base::units::{Bytes, DurationError, SizeError, parse_duration, shorten};
use llfree_control::protocol::{BurstTouch, GuestRequest};
use shared_layout::Order;
use std::str::FromStr;

/// The default order of allocated blocks: 2 MiB.
pub const DEFAULT_ORDER: u8 = Order::HUGE.get();

/// The default size of STREAM's arrays: more than caches hold.
pub const STREAM_BYTES: u64 = 192 << 20;
/// FTQ's default quantum: a millisecond.
pub const QUANTUM_US: u64 = 1000;

/// One step of a workload.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// Work for the guest's agent.
    Guest(GuestRequest),
    /// End the VM; only as the last step.
    Stop,
}

/// Steps that run one after the other, once the guest has booted.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Workload(pub Vec<Step>);

/// The reason that a text is not a workload.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WorkloadError {
    /// No step at all.
    #[error("no commands given; write some, like \"alloc 8G, verify, free all\"")]
    Empty,
    /// A word that is not a command.
    #[error(
        "unknown command '{0}'; the commands are alloc, verify, free, churn, burst, stream, ftq, idle, stats and stop"
    )]
    UnknownCommand(String),
    /// A command without its argument.
    #[error("'{command}' needs {what}")]
    Missing {
        /// The command.
        command: &'static str,
        /// What it needs.
        what: &'static str,
    },
    /// A word too many.
    #[error("'{word}' makes no sense after '{command}'")]
    Extra {
        /// The command.
        command: &'static str,
        /// The word.
        word: String,
    },
    /// An argument that is not a size.
    #[error("in '{command}': {reason}")]
    Size {
        /// The command.
        command: &'static str,
        /// What is wrong.
        reason: SizeError,
    },
    /// No bytes.
    #[error("'{0}' of 0 bytes does nothing")]
    NoBytes(&'static str),
    /// An argument that is not a time.
    #[error("in '{command}': {reason}")]
    Time {
        /// The command.
        command: &'static str,
        /// What is wrong.
        reason: DurationError,
    },
    /// No time.
    #[error("'{0}' for 0 seconds does nothing")]
    NoTime(&'static str),
    /// Not 0 to 10.
    #[error("'{0}' is not an order; orders are 0 (4 KiB blocks) to 10 (4 MiB blocks)")]
    Order(String),
    /// A step that can never run.
    #[error("'stop' must be the last command")]
    AfterStop,
}

impl FromStr for Workload {
    type Err = WorkloadError;

    fn from_str(text: &str) -> Result<Self, WorkloadError> {
        let mut steps = Vec::new();
        for part in text.split([',', ';']).map(str::trim).filter(|part| !part.is_empty()) {
            if steps.last() == Some(&Step::Stop) {
                return Err(WorkloadError::AfterStop);
            }
            steps.push(parse_step(part)?);
        }
        if steps.is_empty() { Err(WorkloadError::Empty) } else { Ok(Self(steps)) }
    }
}

fn parse_step(text: &str) -> Result<Step, WorkloadError> {
    let mut words = text.split_whitespace();
    let verb = words.next().unwrap_or_default();
    let (command, step) = match verb {
        "alloc" => ("alloc", Step::Guest(parse_alloc(&mut words)?)),
        "verify" => ("verify", Step::Guest(GuestRequest::Verify)),
        "free" => ("free", Step::Guest(parse_free(&mut words)?)),
        "churn" => {
            let word = words.next().ok_or(WorkloadError::Missing { command: "churn", what: "a time, like 10s" })?;
            ("churn", Step::Guest(GuestRequest::Churn { millis: parse_millis(word)? }))
        }
        "burst" => {
            let word = words.next().ok_or(WorkloadError::Missing { command: "burst", what: "a size, like 1G" })?;
            let bytes = parse_some("burst", word)?;
            (
                "burst",
                Step::Guest(GuestRequest::Burst { bytes, touch: BurstTouch::default(), keep: false, single: false }),
            )
        }
        "stream" => {
            let word = words.next().ok_or(WorkloadError::Missing { command: "stream", what: "a time, like 10s" })?;
            let millis = parse_time("stream", word)?;
            ("stream", Step::Guest(GuestRequest::Stream { millis, bytes: STREAM_BYTES, beside_bytes: 0 }))
        }
        "ftq" => {
            let word = words.next().ok_or(WorkloadError::Missing { command: "ftq", what: "a time, like 10s" })?;
            let millis = parse_time("ftq", word)?;
            ("ftq", Step::Guest(GuestRequest::Ftq { millis, quantum_us: QUANTUM_US, beside_bytes: 0 }))
        }
        "idle" => ("idle", Step::Guest(GuestRequest::Idle)),
        "stats" => ("stats", Step::Guest(GuestRequest::Stats)),
        "stop" => ("stop", Step::Stop),
        other => return Err(WorkloadError::UnknownCommand(shorten(other))),
    };
    match words.next() {
        Some(word) => Err(WorkloadError::Extra { command, word: shorten(word) }),
        None => Ok(step),
    }
}

fn parse_alloc<'a>(words: &mut impl Iterator<Item = &'a str>) -> Result<GuestRequest, WorkloadError> {
    let mut bytes = None;
    let mut order = DEFAULT_ORDER;
    while let Some(word) = words.next() {
        if word == "--order" {
            order = parse_order(words.next().unwrap_or_default())?;
        } else if let Some(value) = word.strip_prefix("--order=") {
            order = parse_order(value)?;
        } else if bytes.is_none() {
            bytes = Some(parse_some("alloc", word)?);
        } else {
            return Err(WorkloadError::Extra { command: "alloc", word: shorten(word) });
        }
    }
    let bytes = bytes.ok_or(WorkloadError::Missing { command: "alloc", what: "a size, like 8G" })?;
    Ok(GuestRequest::Alloc { bytes, order })
}

fn parse_free<'a>(words: &mut impl Iterator<Item = &'a str>) -> Result<GuestRequest, WorkloadError> {
    let mut amount = None;
    let mut random = false;
    for word in words {
        if word == "--random" {
            random = true;
        } else if amount.is_none() {
            amount = Some(word.parse::<FreeAmount>()?);
        } else {
            return Err(WorkloadError::Extra { command: "free", word: shorten(word) });
        }
    }
    let amount = amount.ok_or(WorkloadError::Missing { command: "free", what: "a size, like 8G, or 'all'" })?;
    Ok(GuestRequest::Free { bytes: amount.bytes(), random })
}

/// A size but 0 for a command, in bytes.
///
/// # Errors
/// If the text is not a size, or is 0.
pub fn parse_some(command: &'static str, text: &str) -> Result<u64, WorkloadError> {
    match text.parse::<Bytes>() {
        Ok(Bytes(0)) => Err(WorkloadError::NoBytes(command)),
        Ok(Bytes(bytes)) => Ok(bytes),
        Err(reason) => Err(WorkloadError::Size { command, reason }),
    }
}

/// An amount to allocate: any size but 0. In bytes.
///
/// # Errors
/// If the text is not a size, or is 0.
pub fn parse_amount(text: &str) -> Result<u64, WorkloadError> {
    parse_some("alloc", text)
}

/// A block's order, 0 to 10.
///
/// # Errors
/// [`WorkloadError::Order`].
pub fn parse_order(text: &str) -> Result<u8, WorkloadError> {
    let order = text.parse().ok().and_then(Order::new);
    order.map(Order::get).ok_or_else(|| WorkloadError::Order(shorten(text)))
}

/// The time to churn, in milliseconds.
///
/// # Errors
/// If the text is not a time, or is 0.
pub fn parse_millis(text: &str) -> Result<u64, WorkloadError> {
    parse_time("churn", text)
}

/// The duration of a command, in milliseconds.
///
/// # Errors
/// If the text is not a time, or is 0.
pub fn parse_time(command: &'static str, text: &str) -> Result<u64, WorkloadError> {
    match parse_duration(text).map_err(|reason| WorkloadError::Time { command, reason })?.as_millis() as u64 {
        0 => Err(WorkloadError::NoTime(command)),
        millis => Ok(millis),
    }
}

/// How much to free.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FreeAmount {
    /// Everything.
    All,
    /// This many bytes.
    Bytes(u64),
}

impl FreeAmount {
    /// As the protocol says it: `None` is everything.
    #[must_use]
    pub fn bytes(self) -> Option<u64> {
        match self {
            Self::All => None,
            Self::Bytes(bytes) => Some(bytes),
        }
    }
}

impl FromStr for FreeAmount {
    type Err = WorkloadError;

    fn from_str(text: &str) -> Result<Self, WorkloadError> {
        if text.eq_ignore_ascii_case("all") { Ok(Self::All) } else { parse_some("free", text).map(Self::Bytes) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_workload_is_a_list_of_guest_commands() {
        let workload: Workload =
            "alloc 8G, verify; alloc 1M --order 0, free 2G --random, free all; churn 10s, idle, stats; \
             burst 1G, stream 2s, ftq 30ms, stop"
                .parse()
                .expect("as in the help");
        let steps = [
            GuestRequest::Alloc { bytes: 8 << 30, order: 9 },
            GuestRequest::Verify,
            GuestRequest::Alloc { bytes: 1 << 20, order: 0 },
            GuestRequest::Free { bytes: Some(2 << 30), random: true },
            GuestRequest::Free { bytes: None, random: false },
            GuestRequest::Churn { millis: 10_000 },
            GuestRequest::Idle,
            GuestRequest::Stats,
            GuestRequest::Burst { bytes: 1 << 30, touch: BurstTouch::Pages, keep: false, single: false },
            GuestRequest::Stream { millis: 2000, bytes: STREAM_BYTES, beside_bytes: 0 },
            GuestRequest::Ftq { millis: 30, quantum_us: 1000, beside_bytes: 0 },
        ];
        let expected: Vec<Step> = steps.into_iter().map(Step::Guest).chain([Step::Stop]).collect();
        assert_eq!(workload.0, expected);
    }

    #[test]
    fn refusals_teach() {
        for (text, message) in [
            (" , ;", "no commands given; write some, like \"alloc 8G, verify, free all\""),
            (
                "allok 8G",
                "unknown command 'allok'; the commands are alloc, verify, free, churn, burst, stream, ftq, idle, stats and stop",
            ),
            ("alloc", "'alloc' needs a size, like 8G"),
            ("free --random", "'free' needs a size, like 8G, or 'all'"),
            ("verify now", "'now' makes no sense after 'verify'"),
            (
                "alloc 8X",
                "in 'alloc': unknown unit 'X' in '8X'; the units are K, M, G and T (powers of 1024), or none for bytes",
            ),
            ("alloc 0", "'alloc' of 0 bytes does nothing"),
            ("alloc 1G --order 11", "'11' is not an order; orders are 0 (4 KiB blocks) to 10 (4 MiB blocks)"),
            ("churn 0s", "'churn' for 0 seconds does nothing"),
            ("ftq 0s", "'ftq' for 0 seconds does nothing"),
            ("burst 0", "'burst' of 0 bytes does nothing"),
            ("stream", "'stream' needs a time, like 10s"),
            ("stop, verify", "'stop' must be the last command"),
        ] {
            assert_eq!(text.parse::<Workload>().expect_err(text).to_string(), message);
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "((alloc|free|churn|burst|stream|ftq|verify|stop|--order|--random|all|[0-9]{0,30}[GMs]?|.)[ ,;]?){0,12}") {
            let _ = text.parse::<Workload>();
        }
    }
}
