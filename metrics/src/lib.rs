//! The metrics of VMs: from a status to the text that a monitoring system reads.
//!
//! A status declares its numbers once, and here they get the names, units and types that Prometheus expects. Nothing is
//! counted here and nothing is kept: who scrapes gets what the VM says at that moment. A label never holds what a
//! guest says, and their number does not grow with what it does.
//!
//! | module | what it holds |
//! |---|---|
//! | [`text`] | families of samples, as text in two formats |
//! | [`names`] | what a number of a status is called as a metric |
//! | [`vms`] | the families of some VMs |
//! | [`fleet`] | all VMs of this user, asked at once |
//! | [`address`] | where scrapers come to |
//! | [`http`] | what they ask, and the head of an answer |
//! | [`mod@file`] | metrics in a file, exchanged in one step |
//! | [`publisher`] | the loop that answers scrapers and writes the file |

pub mod address;
pub mod file;
pub mod fleet;
pub mod http;
pub mod names;
pub mod publisher;
pub mod text;
pub mod vms;
