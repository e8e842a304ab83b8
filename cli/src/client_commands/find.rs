//! The VM that a command means, which may be about to come up.

use super::error::CommandError;
use crate::args::Global;
use llfree_control::client::Client;
use llfree_control::socket;
use std::time::{Duration, Instant};

/// How long a command waits for a VM that is not there yet: a script starts one and asks it at once.
const COMING_UP: Duration = Duration::from_millis(500);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(10);

/// Connects to the VM, once it is there.
pub(super) fn connect(global: &Global) -> Result<Client, CommandError> {
    connect_within(global, COMING_UP)
}

/// The same, with another patience.
pub(super) fn connect_within(global: &Global, patience: Duration) -> Result<Client, CommandError> {
    until(patience, || Ok(Client::connect(&socket::find_or_start(global.name.as_deref(), global.socket.as_deref())?)?))
}

/// Connects to a VM that runs, or is about to: one that a service manager would start for this client is left alone.
pub(super) fn connect_running(global: &Global) -> Result<Client, CommandError> {
    until(COMING_UP, || Ok(Client::connect(&socket::find(global.name.as_deref(), global.socket.as_deref())?)?))
}

fn until(patience: Duration, connect: impl Fn() -> Result<Client, CommandError>) -> Result<Client, CommandError> {
    let start = Instant::now();
    loop {
        match connect() {
            Err(error) if error.is_absence() && start.elapsed() < patience => std::thread::sleep(LOOK),
            result => return result,
        }
    }
}
