//! [`Output`]: where reports go, and the report that most commands begin with.

use super::error::CommandError;
use llfree_control::client::{Client, ClientError};
use llfree_control::protocol::{Reply, Request};
use llfree_control::report::StatusReport;
use serde::Serialize;
use std::io::Write;
use std::time::Duration;

/// Where output goes, and how.
pub struct Output<'a> {
    /// The writer.
    pub to: &'a mut dyn Write,
    /// JSON instead of text.
    pub json: bool,
    /// A person watches: a repeated status may redraw in place.
    pub terminal: bool,
}

impl Output<'_> {
    /// Prints the report, or its text.
    pub(super) fn print(
        &mut self,
        report: &(impl Serialize + ?Sized),
        text: impl FnOnce() -> String,
    ) -> Result<(), CommandError> {
        let result = if self.json {
            // Reports are plain data with string keys, which always serialize.
            let line = serde_json::to_string(report).expect("plain data serializes");
            writeln!(self.to, "{line}")
        } else {
            self.to.write_all(text().as_bytes())
        };
        result.and_then(|()| self.to.flush()).map_err(CommandError::Output)
    }
}

/// Asks for a status.
pub(super) fn ask_status(client: &mut Client, within: Duration) -> Result<StatusReport, ClientError> {
    match client.call_within(&Request::Status, within)? {
        Reply::Status(report) => Ok(*report),
        _ => Err(ClientError::Unexpected(client.path().to_owned())),
    }
}
