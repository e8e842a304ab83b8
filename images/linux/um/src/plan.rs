//! What is asked for, and why it cannot be done.

use std::error::Error;
use std::path::PathBuf;

/// Why something cannot be done.
pub(crate) type Fault = Box<dyn Error>;

/// What the command line says.
pub(crate) struct Plan {
    /// The kernel's program.
    pub(crate) kernel: PathBuf,
    /// What it boots from.
    pub(crate) initrd: PathBuf,
    /// Its memory.
    pub(crate) mem_mib: u64,
    /// Rounds of shrink, grow and reclaim under each load.
    pub(crate) rounds: u32,
    /// A C project to build there.
    pub(crate) project: Option<PathBuf>,
}
