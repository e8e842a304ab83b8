//! The kinds of guests: our bare-metal `shim`, and `linux`.
//!
//! A guest is planned before there is a machine: a [`Plan`] checks the configuration, says where RAM
//! lies, and then does its part of each step of a launch. What runs afterwards is a [`Guest`]. Each
//! kind states its [`Facts`] once: what it offers to the ways of moving memory, and its defaults.
//!
//! To add a kind: a file with its plan, its guest and its facts, and an arm in `kinds`.

mod kinds;
mod linux;
mod plan;
mod shim;

pub use kinds::{facts, plan};
pub use linux::FACTS as LINUX;
pub use plan::{Attached, Facts, Guest, Hardware, Plan};
pub use shim::FACTS as SHIM;
