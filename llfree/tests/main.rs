//! The allocator from outside: what it promises to tenants and hosts, one operation at a time, in random sequences, by the
//! million, and across kills.
//!
//! One binary for all of them, which is linked once. The folder `common` is shared with the models and the fuzz targets.

#[path = "common/bytes.rs"]
mod bytes;
mod common;
#[path = "common/hostile.rs"]
mod hostile;
#[path = "common/memory.rs"]
mod memory;
#[path = "common/ops.rs"]
mod ops;

mod allocator;
mod corpus;
mod every_entry;
mod faults;
mod full;
mod handle;
mod huge;
mod kill;
mod ledger;
mod misuse;
mod mixed;
mod model;
mod pairs;
mod persist;
mod refused;
mod run;
mod stats;
mod table;
