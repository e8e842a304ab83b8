//! Lines held to the schema of their type: in builds for tests whatever a VM or a keeper says is looked at where it is
//! made, whoever asked for it.

use jsonschema::Validator;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;

/// What tells whether a line is one of these, as they are sent.
pub(crate) fn validator<T: JsonSchema>() -> Validator {
    let schema = SchemaSettings::draft2020_12().for_serialize().into_generator().into_root_schema_for::<T>();
    jsonschema::validator_for(schema.as_value()).expect("a schema of ours")
}

/// Panics if the schema does not allow the line.
pub(crate) fn check(validator: &Validator, line: &[u8]) {
    let Ok(value) = serde_json::from_slice(line) else { return };
    if let Err(error) = validator.validate(&value) {
        let line = String::from_utf8_lossy(line);
        panic!("a line that the schema does not allow, at {}: {error}: {line}", error.instance_path());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::event::{Event, Stamped};

    #[test]
    #[should_panic(expected = "a line that the schema does not allow")]
    fn a_line_without_its_time_is_found() {
        let events = validator::<Stamped<'_>>();
        check(&events, Event::Paused.to_line().as_bytes());
        check(&events, br#"{"event":"paused"}"#);
    }
}
