//! The control plane: how a running VM is asked, and how it answers.
//!
//! One request a line, one reply a line, both JSON. [`protocol`] and [`report`] are what server
//! and client share; [`socket`] says where sockets live and which process owns a name; [`server`] answers on
//! the event loop, one connection a client, and [`jobs`] are what takes longer; [`watch`] hangs them there; [`client`]
//! asks; a [`feed`] is sent to clients as it grows. What a peer sends is bounded before it is read and checked before
//! it is believed.

#[cfg(feature = "check-replies")]
mod checked;
pub mod client;
mod connection;
pub mod feed;
pub mod jobs;
pub mod protocol;
pub mod report;
#[cfg(feature = "schema")]
pub mod schema;
pub mod server;
pub mod socket;
pub mod watch;
