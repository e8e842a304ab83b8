//! A keeper takes memory back from the areas of other processes.
//!
//! A process registers an area over a socket and goes on. From then on its free memory goes back without it, and its
//! area answers to the commands that a VM answers to: `status`, `shrink`, `grow`, `reclaim`, `auto-reclaim`, `validate`.
//! Nothing that a process sends, writes or leaves undone harms the keeper or another process; a process that ends is
//! forgotten, and a keeper that ends leaves every process as it is, to take its memory back by itself.
//!
//! | module | what it holds |
//! |---|---|
//! | [`keeper`] | the socket, who may register, quotas |
//! | `tenant` | one registered area: its loop, its end |
//! | `handshake` | what a process sends, and what of it is believed |
//! | `work` | the thread that takes memory back and answers |
//! | `requests` | what can be asked of an area, and the answers |
//! | `own_table` | a table of descriptors for each area, so that none keeps another's open |
//! | `quota`, `exit` | how many and how much; that the keeper ends |

mod exit;
mod handshake;
pub mod keeper;
mod own_table;
mod quota;
mod requests;
mod tenant;
mod work;

pub use keeper::{Keeper, KeeperError, Options};
pub use quota::Quota;
