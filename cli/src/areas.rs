//! `llfree-vmm areas`: a keeper in this process, until a signal ends it.
//!
//! It has no virtual machine and needs no KVM. What is asked of an area goes to the area's control socket, where the
//! other commands find it as they find a VM's.

use crate::args::AreasArgs;
use crate::client_commands::Output;
use crate::exit;
use crate::failure::{Fails, Failure, of_socket};
use llfree_base::error_line;
use llfree_control::socket::{SocketError, places};
use llfree_keeper::{Keeper, KeeperError, Options, Quota};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io;

/// The name of the registration socket in the directory of control sockets.
const SOCKET: &str = "areas";

/// Why there is no keeper.
#[derive(Debug, thiserror::Error)]
pub enum AreasError {
    /// No directory for control sockets.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// No keeper.
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    /// Signals cannot be heard.
    #[error("cannot watch for signals")]
    Signals(#[source] io::Error),
    /// Our output has nowhere to go.
    #[error("cannot write the output")]
    Output(#[source] io::Error),
}

impl Fails for AreasError {
    fn failure(&self) -> Failure {
        let kind = match self {
            Self::Socket(error) => of_socket(error),
            Self::Keeper(KeeperError::InUse(_)) => "in_use".to_owned(),
            Self::Keeper(_) => "socket".to_owned(),
            Self::Signals(_) => "host".to_owned(),
            Self::Output(_) => "output".to_owned(),
        };
        Failure { kind, reason: None, message: error_line(self), exit_code: exit::ERROR }
    }
}

/// Takes memory back from processes that register, until it is told to end.
///
/// # Errors
/// [`AreasError`].
pub fn run(args: &AreasArgs, output: &mut Output<'_>) -> Result<u8, AreasError> {
    // Before there is a file that an early signal could leave behind.
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(AreasError::Signals)?;
    let control = places::for_new()?;
    let socket = args.register.clone().unwrap_or_else(|| control.join(SOCKET));
    let quota = Quota { areas: args.max_areas, bytes: args.max_memory.0, ..Quota::default() };
    let keeper = Keeper::start(Options { socket: socket.clone(), control, quota })?;
    let text = match output.json {
        // Lossy: JSON has no way to say a path that is not UTF-8.
        true => format!("{}\n", serde_json::json!({ "register": socket.display().to_string() })),
        false => format!("processes register their areas at {}\n", socket.display()),
    };
    output.to.write_all(text.as_bytes()).and_then(|()| output.to.flush()).map_err(AreasError::Output)?;
    let signal = signals.forever().next();
    drop(keeper);
    Ok(if signal == Some(SIGINT) { exit::INTERRUPTED } else { exit::OK })
}
