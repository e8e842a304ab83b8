//! The host side: KVM, guest memory, the monitor, devices and the control socket.

pub mod kernel_stats;
pub mod memory;
pub mod boot;
