//! Linux guests: an unmodified kernel, started in ring 0 as a boot loader would start it.
//!
//! | file | what lives there |
//! |---|---|
//! | [`kernel`] | bzImage or ELF with a PVH entry: checked, and copied into RAM |
//! | [`map`] | where everything lies, and what the kernel is told of it (e820) |
//! | [`acpi`] | the tables by which it finds CPUs, devices, reset and power-off |
//! | `cpu` | CPUID with a topology, and the registers of the first CPU |
//!
//! All of it is written before the guest starts; what the guest makes of it later is never read.

pub mod acpi;
pub mod kernel;
pub mod map;

mod cpu;
mod error;

#[cfg(test)]
mod tests;

pub use cpu::{cpuid, start, start_other};
pub use error::{LinuxError, LinuxOnly};
pub use kernel::{Entry, Initrd, LinuxKernel};
