//! One tenant's memory as its host sees it.
//!
//! A *tenant* allocates from a frame table that it shares with its host: a virtual machine, or an
//! ordinary process. This crate owns the tenant's memory: it maps it, knows what of it is resident,
//! takes free frames back, returns them, and backs with memory those that the tenant wants to use.
//! It needs no KVM, no device and no control socket, and believes nothing that a tenant writes.
//!
//! | module | what it holds |
//! |---|---|
//! | [`memory`] | the tenant's RAM: mapped, discarded, populated; where its memory comes from |
//! | [`region`] | the words that tenant and host share |
//! | [`monitor`] | the owner of all that: reclaim, return, install, resize, audit, validate |
//! | [`auto`] | reclaim without being asked |
//! | [`install_config`] | how frames get their memory |
//! | [`roles`] | the threads that this crate starts |

pub mod auto;
mod fair_lock;
pub mod install_config;
pub mod memory;
pub mod monitor;
pub mod region;
pub mod roles;

pub use memory::Backing;
pub use monitor::{
    Check, Direction, Ending, Finding, HandOver, InstallError, Monitor, MonitorError, OnViolation, Pass, Picture,
    Resize, TenantStart, Terms, Validation, Violation, Violations,
};
pub use region::{Region, Table};
