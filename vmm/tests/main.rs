//! Whole machines, driven by calls: how memory moves, what the monitor sees, what a pause keeps.
//!
//! One binary for all of them: it is linked once, and while a test waits for its guest another one works. The tests of
//! [machine.rs](machine.rs), which the test bed runs in ring 3, and those that make the host of their whole process
//! fail ([faults.rs](faults.rs)) have their own.

mod elastic;
mod hostile_driver;
mod monitor;
mod pause;
mod reclaim;
mod status;
mod validate;
