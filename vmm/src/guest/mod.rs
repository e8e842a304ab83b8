//! Who the guest is: our bare-metal [`shim`], or [`linux`].
//!
//! A guest is planned before there is a machine: a [`Plan`] checks the configuration, says where RAM
//! lies, and then takes its part in each step of a launch. What runs afterwards is a [`Guest`]. Each
//! kind states its [`Facts`] once: what it offers to the ways of moving memory, and what it gets when
//! nobody chooses.
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
