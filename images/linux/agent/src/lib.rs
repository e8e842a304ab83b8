//! The agent of a Linux guest: what the host asks through the port `org.llfree.agent` it does with
//! memory of its own, and reports.
//!
//! It speaks the commands and reports of [`agent_abi`], which the bare-metal guest takes from its doorbell,
//! and obeys them with the same code, [`llfree_agent_core`], so `llfree-vmm guest alloc 1G` means the same to both. An
//! ordinary process: it needs root only for what it says about physical addresses, for dropping caches and for
//! [`header`]. Running out of memory is an answer, not an end: it leaves a reserve to the system.
//!
//! | file | what |
//! |---|---|
//! | [`agent`] | one command after another, and the report of each |
//! | [`process`] | the process as the system that commands work with |
//! | [`heap`] | mappings, blocks in them, stamps in these |
//! | [`room`] | how much may be allocated without hurting the system |
//! | [`system`] | what the kernel says about memory, and what it is told |
//! | [`port`] | the way to the host |
//! | [`header`] | a look at the header and the doorbell that the host shares |

pub mod agent;
pub mod header;
pub mod heap;
pub mod port;
pub mod process;
pub mod room;
pub mod system;
