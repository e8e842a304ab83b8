//! The user interface: the command line, and everything that the binary `llfree-vmm` does with it.
//!
//! This is the only crate that knows flags by name, prints to people, and gives up the process's
//! rights. The library exists for the binary, for `llfree-bench` and for tests.
//!
//! | module | what it holds |
//! |---|---|
//! | [`args`] | flags and subcommands |
//! | [`exit`] | what an exit code means |
//! | [`failure`] | an error as a program reads it |
//! | [`advice`] | which flag to turn when something fails |
//! | [`run`] | a launch: from flags to a VM that serves its socket |
//! | [`service_manager`] | the socket that systemd passes, and what it is told |
//! | [`background`] | a launch that goes on after its caller |
//! | [`log_ring`] | the newest lines of the log, in memory |
//! | [`client_commands`] | the subcommands that ask a running VM |
//! | [`areas`] | a keeper of other processes' areas |
//! | [`completions`] | what a shell completes |
//! | [`exporter`] | the metrics of all VMs from one place |
//! | [`demo`] | the whole story in one terminal |
//! | [`workload`] | what a guest is told to do, as text |
//! | [`render`], [`chart`] | reports and curves as text |
//! | [`log_writer`] | the one way to stderr, which holds nobody up |
//! | [`terminal`] | the terminal in front of a guest's serial port |
//! | [`top`] | all VMs on a live screen |
//! | [`roles`] | the threads of the process, by what they may ask of the kernel |

pub mod advice;
pub mod areas;
pub mod args;
pub mod background;
pub mod chart;
pub mod client_commands;
pub mod completions;
pub mod demo;
pub mod exit;
pub mod exporter;
pub mod failure;
mod file_kind;
pub mod log_ring;
pub mod log_writer;
pub mod render;
pub mod roles;
pub mod run;
pub mod service_manager;
pub mod terminal;
pub mod top;
pub mod workload;
