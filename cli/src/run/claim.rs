//! What a launch has of whoever started it: a name, a control socket that was passed, and somebody who wants to hear how
//! the VM does.

use super::error::RunError;
use crate::args::Global;
use crate::service_manager::ServiceManager;
use llfree_control::socket;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Whoever wants to be told how the VM does. One that cannot be reached is no reason not to launch it.
pub(super) fn service_manager() -> Option<Arc<ServiceManager>> {
    match ServiceManager::of_environment() {
        Ok(manager) => manager.map(Arc::new),
        Err(error) => {
            log::warn!("{}; nobody hears that the VM is ready", llfree_base::error_line(&error));
            None
        }
    }
}

/// The VM's name and its control socket.
pub(super) fn claim_name(global: &Global, passed: Option<OwnedFd>) -> Result<socket::Claim, RunError> {
    Ok(match (passed, &global.socket, &global.name) {
        (Some(listener), asked, name) => {
            let claim = socket::Claim::of_listener(listener)?;
            let passed = claim.path().to_owned();
            if let Some(asked) = asked.as_ref().filter(|asked| **asked != passed) {
                return Err(RunError::TwoSockets { passed, flag: "--socket", asked: asked.display().to_string() });
            }
            // Clients find the VM by its socket.
            if let Some(asked) = name.clone().filter(|name| name != claim.name()) {
                return Err(RunError::TwoSockets { passed, flag: "--name", asked });
            }
            claim
        }
        (None, Some(path), _) => socket::Claim::at_path(path)?,
        (None, None, name) => socket::Claim::in_place(name.as_deref())?,
    })
}
