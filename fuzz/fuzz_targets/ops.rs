//! Sequences of operations against the model. The body is shared with llfree's own tests.
#![no_main]

#[path = "../../llfree/tests/common/bytes.rs"]
mod bytes;
#[path = "../../llfree/tests/common/mod.rs"]
mod common;
#[path = "../../llfree/tests/common/ops.rs"]
mod ops;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| bytes::run(bytes));
