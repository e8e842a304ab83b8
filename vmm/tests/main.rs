//! Whole machines, driven by calls: how memory moves, what the monitor sees, what a pause keeps.
//!
//! One binary for all of them: it is linked once, and while a test waits for its guest another one works. The tests of
//! [machine.rs](machine.rs), which the test bed runs in ring 3, have their own.

mod elastic;
mod ends;
mod faults;
mod held;
mod hostile_driver;
mod monitor;
mod pause;
mod reclaim;
mod status;
mod validate;
