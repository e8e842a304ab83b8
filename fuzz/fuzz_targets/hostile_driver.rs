//! Virtio devices under a driver of arbitrary bytes. The body is shared with the VMM's own tests.
#![no_main]

#[path = "../../vmm/tests/common/hostile_driver.rs"]
mod hostile_driver;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hostile_driver::run_bytes(bytes));
