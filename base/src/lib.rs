//! What every host crate needs, and nothing that only one of them does.
//!
//! No guest, no KVM, no socket and no command line: values, text and the few helpers that a crate
//! would otherwise write again. Everything above may use it; it sees only the ABI's frame sizes.
//!
//! | module | what it holds |
//! |---|---|
//! | [`units`] | sizes and times as people type them |
//! | [`choices`] | what people choose, the wire carries and the monitor obeys |
//! | [`metrics`], [`counters`] | counters, gauges, and how a report declares its numbers; every counter of a VM |
//! | [`histogram`] | how long something takes, by powers of two |
//! | [`check`] | what a validation compares, as monitor and wire name it |
//! | [`text`] | error lines, and text that is fit for a terminal |
//! | [`rate_limit`] | which of many like events to log |
//! | [`sync`] | a mutex that a panic does not poison |
//! | [`panics`] | a panic ends the process |
//! | [`thread`] | the one place that starts threads: name, role, fault point |
//! | [`kernel_stats`] | what the host kernel says about this process and its huge pages |
//! | [`identity`] | the numbers of this user, process and thread |
//! | [`peer`] | who is at the other end of a socket |
//! | [`memory_room`] | how much memory this process can still have |
//! | [`forecast`] | how long a command will take, said before it begins |
//! | [`descriptors`] | how many descriptors it may have, and has |
//! | [`faults`] | places where tests make the host fail |

pub mod check;
pub mod choices;
pub mod counters;
pub mod descriptors;
pub mod faults;
pub mod forecast;
pub mod histogram;
pub mod identity;
pub mod kernel_stats;
pub mod memory_room;
pub mod metrics;
pub mod panics;
pub mod peer;
pub mod rate_limit;
pub mod sync;
pub mod text;
pub mod thread;
pub mod units;

pub use rate_limit::RateLimit;
pub use sync::lock;
pub use text::{error_line, printable};
