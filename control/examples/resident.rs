//! Prints the resident memory of every VM on this machine, or of those named.
//!
//! `cargo run -p llfree-control --example resident -- [NAME ...]`

use llfree_base::units::Bytes;
use llfree_control::client::Client;
use llfree_control::protocol::{Reply, Request};
use llfree_control::socket::live_vms;
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    for vm in live_vms()?.into_iter().filter(|vm| wanted.is_empty() || wanted.contains(&vm.name)) {
        match Client::connect(&vm.path)?.call(&Request::Status)? {
            Reply::Status(status) => {
                let (resident, limit) = (Bytes(status.resident_bytes), Bytes(status.limit_bytes));
                println!("{}: {resident} resident, at most {limit}", vm.name);
            }
            Reply::Error { message, .. } => eprintln!("{}: {message}", vm.name),
            other => eprintln!("{}: an answer to another question: {other:?}", vm.name),
        }
    }
    Ok(())
}
