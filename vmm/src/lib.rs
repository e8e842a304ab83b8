//! The host side: a VMM that takes guest memory back in microseconds.
//!
//! From the ground up:
//!
//! | module | what it holds |
//! |---|---|
//! | [`units`] | sizes and times as people type them |
//! | [`kernel_stats`] | what the host kernel says about this process and its huge pages |
//! | [`memory`] | guest RAM: mapped, populated, discarded, and its residency by the kernel's accounting |
//! | [`guest_log`] | what a guest can make us write: filtered and bounded |
//! | [`boot`] | KVM's checks, the platform region, the guest's image, crash reports |
//! | [`monitor`] | the owner of the guest's memory: shrink, grow, install, audit |
//! | [`install_config`] | how frames get their memory, as the command line says it |
//! | [`devices`], [`elastic`] | virtio devices, and how a VM's memory is made smaller and larger with them |
//! | [`agent`], [`doorbell`], [`vcpu`] | commands for the guest, its calls, its exits |
//! | [`vm`] | one machine made of these |
//! | [`guest_view`] | what a guest says about its own memory |
//! | [`control`], [`service`] | the control socket, and requests carried out |
//! | [`console`] | the terminal in front of a guest's serial port |
//! | [`cli`], [`workload`], [`client_commands`], [`render`], [`chart`] | what people see |
//! | [`faults`] | places where tests make the host fail |
//! | [`cgroup`] | the VM's own memory cgroup |
//! | [`harden`] | what the process gives up before it serves a guest |
//! | [`launch`], [`demo`] | what the binary runs |

pub mod agent;
pub mod boot;
pub mod cgroup;
pub mod chart;
pub mod cli;
pub mod client_commands;
pub mod console;
pub mod control;
pub mod demo;
pub mod devices;
pub mod doorbell;
pub mod elastic;
pub mod faults;
pub mod guest_log;
pub mod guest_view;
pub mod harden;
pub mod install_config;
pub mod kernel_stats;
pub mod launch;
pub mod memory;
pub mod monitor;
pub mod render;
pub mod service;
pub mod units;
pub mod vcpu;
pub mod vm;
pub mod workload;

#[cfg(test)]
#[path = "../tests/common/skipped.rs"]
mod skipped;

/// An error and all its causes on one line, joined by `: `, fit for a terminal.
#[must_use]
pub fn error_line(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        next = cause.source();
    }
    // A cause from elsewhere may bring line breaks of its own, and worse.
    guest_log::printable(&line).split_whitespace().collect::<Vec<_>>().join(" ")
}
