//! `llfree-bench` as its users start it.
//!
//! One binary for all of it, which is linked once.

mod progress;
mod results;
