//! How a VM's memory is made smaller and larger, one file per way: by the shared `table`, by a
//! device (`balloon`, `mem`), by what the guest turns out to have (`either`), or not at all (`fixed`).
//!
//! [`Elastic`] is what users choose. A choice is a [`Way`]: it says what it *needs* of a guest, and
//! builds the [`Elasticity`] of a running VM. A kind of guest says what it [`Offers`], and
//! [`check_offers`] is the one place that compares the two. No code looks at the kind of guest to find
//! out how its memory moves.
//!
//! To add a way: a file with its configuration as a [`Way`], a variant of [`Elastic`] and its line in
//! `KINDS`, a word of the status report (`ElasticKind`), and its name in the help of `--elastic`.

mod balloon;
mod choice;
mod device;
mod either;
mod error;
mod fixed;
mod mem;
mod offers;
mod table;
mod way;

#[cfg(test)]
mod either_tests;
#[cfg(test)]
mod tests;

pub use choice::{Elastic, check_offers};
pub use error::{DeviceError, ElasticError, MoveError, ResizeError};
pub use mem::MemConfig;
pub use offers::{Need, Offers};
pub use way::{Elasticity, Parts, Shape, Way};
