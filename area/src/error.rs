//! What can be wrong with an area, an allocation or a free. Values and their words.

use llfree::run::RunError;
use llfree_monitor::MonitorError;
use llfree_monitor::auto::SwitchError;
use llfree_monitor::memory::MemoryError;
use shared_layout::HUGE_SIZE;
use shared_layout::table::MAX_HUGE_FRAMES;
use std::io;

/// Why there is no area, or why nothing was taken back from it.
#[derive(Debug, thiserror::Error)]
pub enum AreaError {
    /// A size that no area can have.
    #[error("an area of {bytes} bytes: it must have at least one and at most {max}", max = u64::from(MAX_HUGE_FRAMES) * HUGE_SIZE)]
    Size {
        /// The size asked for.
        bytes: u64,
    },
    /// Its memory was unavailable.
    #[error("cannot make the memory of an area")]
    Memory(#[from] MemoryError),
    /// Its table was unavailable.
    #[error("cannot make the table of an area")]
    Table(#[source] io::Error),
    /// Automatic reclaim was unavailable.
    #[error("cannot switch automatic reclaim")]
    Switch(#[from] SwitchError),
    /// The kernel did not take memory back, or does not say what is resident.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// Another process takes memory back from the area.
    #[error("the area is registered: another process takes memory back from it")]
    Registered,
    /// This process is a forked child of the one that made the area.
    #[error("this process is a forked child: {}", FORKED)]
    Forked,
}

const FORKED: &str = "the area's reclaimer stayed with the parent, and so did its memory unless it is private";

/// Why there is no block.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AllocError {
    /// Nothing as large is free, side by side.
    #[error("out of memory: the area has no {bytes} bytes free side by side")]
    OutOfMemory {
        /// The size asked for.
        bytes: u64,
    },
    /// No address space has that much.
    #[error("{count} elements of {size} bytes are more than the address space has")]
    Size {
        /// Elements.
        count: usize,
        /// The size of each.
        size: usize,
    },
    /// The process has no area, and none could be made.
    #[error("the process has no area for large objects, and none could be made")]
    Unavailable,
    /// More than an area can align to.
    #[error("an alignment of {0} bytes: an area aligns to 2 MiB at the most")]
    Alignment(usize),
    /// This process is a forked child, which does not have the area.
    #[error("this process is a forked child of the one that has the area")]
    Forked,
}

/// Why a block was not freed. It is gone all the same: nobody can use it any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FreeError {
    /// It belongs to another area.
    #[error("the block belongs to another area")]
    Foreign,
    /// The table does not know it as allocated: somebody wrote the table.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The same of a block of an order.
    #[error(transparent)]
    Block(#[from] llfree::FreeError),
    /// This process is a forked child, which does not have the area.
    #[error("this process is a forked child of the one that has the area")]
    Forked,
}
