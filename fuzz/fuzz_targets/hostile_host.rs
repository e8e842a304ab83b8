//! The host over any words in shared memory. The body is shared with llfree's own tests.
#![no_main]

#[path = "../../llfree/tests/common/hostile.rs"]
mod hostile;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hostile::run_bytes(bytes));
