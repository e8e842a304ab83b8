//! [`Event`]: what happens to a VM, as lines of JSON for whoever follows it.
//!
//! A line is `{"event":...,"unix_ms":...}` with the event's own fields beside them. New events and fields may
//! be added: readers skip what they do not know.

use serde::{Deserialize, Serialize};
use std::time::{SystemTime, UNIX_EPOCH};

/// Something that happened to a VM.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The VM answers.
    Up {
        /// Its name.
        name: String,
        /// Its socket.
        socket: String,
        /// Its process.
        pid: u32,
        /// Guest memory at start, in bytes.
        memory_bytes: u64,
        /// vCPUs.
        cpus: u32,
        /// The kind of memory that backs it.
        backing: String,
    },
    /// The limit moved, or a resize fell short.
    Resized {
        /// The limit that was asked for, in bytes.
        target_bytes: u64,
        /// The limit now, in bytes.
        limit_bytes: u64,
        /// Whether that is the target.
        complete: bool,
        /// Whether this was reached after the reply to the resize, or what is missing is pursued on.
        pursued: bool,
    },
    /// The guest stands still.
    Paused,
    /// The guest runs again.
    Resumed,
    /// The guest touched memory without asking.
    Violation {
        /// How often since the last such event.
        count: u64,
        /// How often since the start.
        total: u64,
        /// How often beyond its limit since the start.
        beyond_limit: u64,
    },
    /// A driver in the guest violated its device's specification.
    DeviceError {
        /// The device.
        device: String,
        /// How often since the last such event.
        count: u64,
        /// How often since the start.
        total: u64,
    },
    /// The VM ends, and so does this stream.
    End {
        /// Why.
        reason: String,
        /// The exit code of its process.
        exit_code: u8,
    },
    /// This reader was too slow, and events are missing here.
    Lost {
        /// How many.
        count: u64,
    },
    /// Something that only a newer VM knows.
    #[serde(other)]
    Other,
}

/// An event with its time.
#[derive(Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(title = "Event"))]
pub(crate) struct Stamped<'a> {
    #[serde(flatten)]
    event: &'a Event,
    unix_ms: u64,
}

impl Event {
    /// The line that says that this happened now, its newline included.
    #[must_use]
    pub fn to_line(&self) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let stamped = Stamped { event: self, unix_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX) };
        // Plain data with string keys, which always serializes.
        let line = serde_json::to_string(&stamped).expect("plain data serializes") + "\n";
        #[cfg(feature = "check-replies")]
        {
            use std::sync::LazyLock;
            static EVENT: LazyLock<jsonschema::Validator> = LazyLock::new(crate::checked::validator::<Stamped<'_>>);
            crate::checked::check(&EVENT, line.as_bytes());
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_a_flat_line_with_its_time_and_a_newer_one_is_read() {
        let event = Event::DeviceError { device: "blk0".to_owned(), count: 1, total: 7 };
        let line = event.to_line();
        assert!(
            line.starts_with(r#"{"event":"device_error","device":"blk0","count":1,"total":7,"unix_ms":"#),
            "{line}"
        );
        assert!(line.ends_with("}\n"));
        assert_eq!(serde_json::from_str::<Event>(&line).expect("its own line"), event);
        assert!(Event::Paused.to_line().starts_with(r#"{"event":"paused","unix_ms":"#));
        let newer = r#"{"event":"migrated","to":"host2","unix_ms":1}"#;
        assert_eq!(serde_json::from_str::<Event>(newer).expect("lenient"), Event::Other);
    }
}
