//! JSON Schema of what goes over the control socket, from the types that read and write it.
//!
//! Only for tests and for whoever writes the schema anew: no VM has this. A request is described as it is read, which
//! is strictly; a reply and an event as a VM of this release sends them. Older releases lack what was added later, newer
//! ones say more.

use crate::protocol::{ReplyLine, RequestLine};
use crate::report::event::Stamped;
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema};

/// The schemas, each with the name of its file.
#[must_use]
pub fn all() -> [(&'static str, Schema); 3] {
    let read = SchemaSettings::draft2020_12();
    let sent = SchemaSettings::draft2020_12().for_serialize();
    fn of<T: JsonSchema>(settings: &SchemaSettings) -> Schema {
        settings.clone().into_generator().into_root_schema_for::<T>()
    }
    [
        ("request.json", of::<RequestLine>(&read)),
        ("reply.json", of::<ReplyLine>(&sent)),
        ("event.json", of::<Stamped<'_>>(&sent)),
    ]
}

/// A schema as text.
#[must_use]
pub fn to_text(schema: &Schema) -> String {
    // Plain data with string keys, which always serializes.
    serde_json::to_string_pretty(schema).expect("plain data serializes") + "\n"
}

/// Panics if a reply is not what the schema says.
#[cfg(feature = "check-replies")]
pub(crate) fn check_reply(line: &[u8]) {
    use std::sync::LazyLock;
    static REPLY: LazyLock<jsonschema::Validator> = LazyLock::new(crate::checked::validator::<ReplyLine>);
    crate::checked::check(&REPLY, line);
}
