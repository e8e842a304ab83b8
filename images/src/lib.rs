//! What guests boot from. [`SHIM_ELF`] is the bare-metal guest of the `guest-shim` crate, built by
//! this crate's build script. Bytes only: who loads them checks them. The directory also holds
//! `testbed`, which runs a program on a stock KVM that QEMU emulates.

/// Aligned like an ELF header, so that parsers can look at the tables in place.
#[repr(C, align(16))]
struct Aligned<T: ?Sized>(T);

static SHIM: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/guest-shim.elf")));

/// The bare-metal guest: a statically linked ELF executable for x86-64 at 2 MiB, with an ABI note
/// and its symbols, entered in 64-bit ring 3.
pub const SHIM_ELF: &[u8] = &SHIM.0;

#[cfg(test)]
mod tests;
