//! The host side: KVM, guest memory, the monitor, devices and the control socket.

pub mod kernel_stats;
pub mod memory;
pub mod boot;
pub mod chart;
pub mod cli;
pub mod client_commands;
pub mod control;
pub mod render;
pub mod units;
pub mod workload;

/// An error and all its causes on one line, joined by `: `.
#[must_use]
pub fn error_line(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        next = cause.source();
    }
    // A cause from elsewhere may bring line breaks of its own.
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}
