//! All VMs of this user, asked at once: one that hangs costs the others nothing.

use crate::vms::Observed;
use llfree_control::client::{Client, ClientError};
use llfree_control::protocol::{Reply, Request};
use llfree_control::report::StatusReport;
use llfree_control::socket::{self, LiveVm, SocketError};
use std::path::Path;
use std::time::Duration;

/// Time that a VM has to take the question, and again to answer.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// VMs that are asked at the same time.
const AT_ONCE: usize = 64;

/// Asks one VM.
///
/// # Errors
/// It is not there, or does not say in time.
pub fn ask(path: &Path) -> Result<StatusReport, ClientError> {
    match Client::connect_within(path, PATIENCE)?.call_within(&Request::Status, PATIENCE)? {
        Reply::Status(report) => Ok(*report),
        _ => Err(ClientError::Unexpected(path.to_owned())),
    }
}

/// Asks all VMs that listen now. One that ends meanwhile is left out; one that hangs did not answer.
///
/// # Errors
/// A directory of sockets cannot be read.
pub fn observe() -> Result<Vec<Observed>, SocketError> {
    // A look at whether they listen would be one more connection each.
    Ok(ask_all(&socket::vms_to_ask()?))
}

fn ask_all(vms: &[LiveVm]) -> Vec<Observed> {
    let mut observed = Vec::with_capacity(vms.len());
    for some in vms.chunks(AT_ONCE) {
        std::thread::scope(|scope| {
            let threads: Vec<_> = some.iter().map(|vm| (vm, scope.spawn(|| ask_one(vm)))).collect();
            // A thread that panicked is a VM that did not answer.
            observed.extend(threads.into_iter().filter_map(|(vm, thread)| {
                thread.join().unwrap_or_else(|_| Some(Observed { name: vm.name.clone(), status: None }))
            }));
        });
    }
    observed
}

/// `None` for a VM that is gone.
fn ask_one(vm: &LiveVm) -> Option<Observed> {
    let status = match ask(&vm.path) {
        Ok(status) => Some(status),
        Err(ClientError::Ended(_)) => return None,
        Err(ClientError::Socket(SocketError::NoSuchVm(_))) => return None,
        Err(error) => {
            log::debug!("{}: {}", vm.name, llfree_base::error_line(&error));
            None
        }
    };
    Some(Observed { name: vm.name.clone(), status })
}
