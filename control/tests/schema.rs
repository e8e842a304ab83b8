//! The schemas that are committed are those of the types, and lines that other programs rely on are valid.

use llfree_control::schema;
use std::path::{Path, PathBuf};

/// Writes the schemas anew instead of comparing them.
const WRITE: &str = "LLFREE_WRITE_SCHEMA";

fn place(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/schema").join(name)
}

#[test]
fn the_committed_schemas_are_those_of_the_types() {
    for (name, schema) in schema::all() {
        let text = schema::to_text(&schema);
        if std::env::var_os(WRITE).is_some() {
            std::fs::create_dir_all(place("")).and_then(|()| std::fs::write(place(name), &text)).expect("writable");
        }
        let committed = std::fs::read_to_string(place(name)).unwrap_or_default();
        assert!(
            committed == text,
            "docs/schema/{name} is stale: {WRITE}=1 cargo test -p llfree-control schema writes it anew. Does the change \
             keep what protocol.md promises?"
        );
    }
}

/// What a validator says, which is there if it was asked for: some 40 crates come with it.
#[cfg(feature = "check-replies")]
mod validity {
    use super::{super::control_protocol, place};
    use llfree_control::protocol::{ErrorKind, Reply, Request};
    use llfree_control::report::{Event, Reason, StatusReport, VcpuStatus};
    use serde_json::Value;

    fn validator(name: &str) -> jsonschema::Validator {
        let text = std::fs::read_to_string(place(name)).expect("committed");
        let schema: Value = serde_json::from_str(&text).expect("JSON");
        jsonschema::meta::validate(&schema).expect("a schema");
        jsonschema::validator_for(&schema).expect("a schema")
    }

    #[track_caller]
    fn is_valid(validator: &jsonschema::Validator, line: &str) {
        let value: Value = serde_json::from_str(line).expect("JSON");
        if let Err(error) = validator.validate(&value) {
            panic!("{error} at {} in {line}", error.instance_path());
        }
    }

    #[test]
    fn golden_lines_are_valid() {
        let request = validator("request.json");
        for (_, line) in control_protocol::requests() {
            is_valid(&request, line);
        }
        let reply = validator("reply.json");
        for vcpus in [0, 2] {
            let status = StatusReport { vcpus: vec![VcpuStatus::default(); vcpus], ..StatusReport::default() };
            is_valid(&reply, &Reply::Status(Box::new(status)).to_line());
        }
        is_valid(&reply, &Reply::Stopping.to_line());
        is_valid(&reply, &Reply::refusal(ErrorKind::Refused, Some(Reason::Paused), "no").to_line());
        let event = validator("event.json");
        is_valid(&event, &Event::Paused.to_line());
        is_valid(&event, &Event::Lost { count: 7 }.to_line());
    }

    #[test]
    fn what_the_vm_refuses_to_read_is_invalid_and_what_a_newer_one_says_is_not() {
        let request = validator("request.json");
        for line in [
            r#"{"version":1,"request":"dance"}"#,
            r#"{"version":1,"request":"status","extra":1}"#,
            r#"{"version":1,"request":{"grow":{"to_bytes":-1}}}"#,
            r#"{"version":1,"request":{"grow":{"to_bytes":1,"more":2}}}"#,
            r#"{"request":"status"}"#,
            r#"[]"#,
        ] {
            Request::from_line(line.as_bytes()).expect_err(line);
            assert!(!request.is_valid(&serde_json::from_str(line).expect("JSON")), "{line}");
        }
        let reply = validator("reply.json");
        let newer =
            r#"{"version":1,"reply":{"life":{"state":"migrating","changed":true,"duration_us":1,"more":2}},"new":3}"#;
        assert!(matches!(Reply::from_line(newer.as_bytes()), Ok(Reply::Life(_))));
        is_valid(&reply, newer);
        for line in [
            r#"{"version":1,"reply":{"life":{"state":"paused"}}}"#,
            r#"{"version":1,"reply":{"pong":{"name":"a","pid":"b"}}}"#,
            r#"{"reply":"stopping"}"#,
        ] {
            assert!(!reply.is_valid(&serde_json::from_str(line).expect("JSON")), "{line}");
        }
    }
}
