//! Linux guests: an unmodified kernel, started in ring 0 as a boot loader would start it.
//!
//! | file | what lives there |
//! |---|---|
//! | [`kernel`] | bzImage or ELF with a PVH entry: checked, and copied into RAM |
//! | [`map`] | where everything lies, and the memory map for the kernel (e820) |
//! | [`acpi`] | the tables from which it learns of CPUs, devices, reset and power-off |
//! | `cpu` | CPUID with a topology, and the registers of the first CPU |
//!
//! All of it is written before the guest starts and never read back.

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
