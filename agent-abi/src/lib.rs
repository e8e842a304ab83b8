//! What a host asks of a test agent in its guest, and what it hears back: commands and reports as bytes.
//!
//! The table that host and guest share needs none of this: a guest that only allocates links `shared-layout` and
//! `llfree`. Everything here is `no_std`, decodes totally and touches no memory.
//!
//! | file | what it fixes |
//! |---|---|
//! | `command` | [`Command`] and [`Report`], as words of a vCPU's mailbox |
//! | [`channel`] | the same as frames on a byte stream, for agents that are programs in a guest |
#![no_std]

#[cfg(test)]
extern crate std;

pub mod channel;
mod command;

pub use command::{Command, Outcome, Report, Samples, Touch};
