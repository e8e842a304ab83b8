//! The protocol, the server and the streams, over real sockets.
//!
//! One binary for all of them, which is linked once.

mod control_protocol;
mod control_server;
mod control_streams;
mod schema;
