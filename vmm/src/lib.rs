//! The machine: a virtual machine whose memory can be taken back in microseconds.
//!
//! KVM, boot, vCPUs, devices, the kinds of guests, and how each kind's memory is made smaller and
//! larger. Memory itself is [`llfree_monitor`]'s, the control socket [`llfree_control`]'s; nothing
//! here knows a command line. From the ground up:
//!
//! | module | what it holds |
//! |---|---|
//! | [`roles`] | the threads of a VM, and which system calls each may make |
//! | [`parking`] | how a thread is told to run, to pause or to stop |
//! | [`exit`] | how a guest ends |
//! | [`devices`] | virtio devices and those of a PC |
//! | [`boot`] | KVM's checks, the platform region, the guest's image, crash reports; Linux |
//! | [`elastic`] | how a VM's memory is made smaller and larger |
//! | [`config`], [`error`] | what to launch, and why it failed |
//! | [`agent`], [`doorbell`] | commands for the guest, and its calls |
//! | [`guest`] | the kinds of guests |
//! | [`vcpu`] | a vCPU's thread and its exits |
//! | [`cgroup`] | the VM's own memory cgroup |
//! | [`vm`] | one machine made of these |
//! | [`guest_view`] | what a guest says about its own memory |
//! | [`service`] | requests of the control socket, carried out |

pub mod agent;
pub mod boot;
pub mod cgroup;
pub mod config;
pub mod devices;
pub mod doorbell;
pub mod elastic;
pub mod error;
pub mod exit;
pub mod guest;
pub mod guest_view;
pub mod parking;
pub mod roles;
pub mod service;
pub mod vcpu;
pub mod vm;
