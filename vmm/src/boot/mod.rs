//! Everything before a vCPU runs: what the host must offer, the memory that the VMM places beside
//! RAM, and the guest image; and the report when a vCPU dies of an exception.
//!
//! | file | what lives there |
//! |---|---|
//! | [`host`] | opens `/dev/kvm`, checks it, states its limits |
//! | [`platform`] | the one mapping beside RAM: shared region, boot data, doorbell address |
//! | `paging` | the identity map's page tables |
//! | `cpu` | descriptor tables, exception stubs, the registers a vCPU starts with |
//! | [`crash`] | what an exception left behind, read back and made readable |
//! | [`image`] | what `--kernel` names: one of ours, or Linux |
//! | [`elf`] | an image of ours: checks, load, symbols |
//! | [`linux`] | Linux kernels: image, memory map, ACPI, CPUs |
//!
//! Nothing in here runs a vCPU or owns RAM; the callers do. What is written here before the guest
//! starts is never trusted afterwards: the guest may have changed all it can reach.

pub mod crash;
pub mod elf;
pub mod host;
pub mod image;
pub mod linux;
pub mod platform;

mod cpu;
mod error;
mod paging;

#[cfg(test)]
mod tests;

pub use crash::CrashFrame;
pub use elf::{Kernel, KernelError};
pub use error::BootError;
pub use host::{KvmLimits, limits, open_kvm, runs_ring0};
pub use image::{Image, ImageError};
pub use linux::{Initrd, LinuxError, LinuxKernel, LinuxOnly};
pub use platform::Platform;
