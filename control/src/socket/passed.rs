//! Sockets that somebody else made and listens on: a service manager that starts a VM for its first client.

use super::error::SocketError;
use rustix::net::{AddressFamily, SocketType, sockopt};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// In the kernel's list of sockets: it accepts connections.
const ACCEPTS: u32 = 1 << 16;

/// The path at which a socket listens.
///
/// # Errors
/// It is no stream socket of this machine, does not listen, or has no path.
pub(super) fn path_of(socket: &OwnedFd) -> Result<PathBuf, SocketError> {
    let is = |what: rustix::io::Result<bool>| what.unwrap_or(false);
    if !is(sockopt::socket_domain(socket).map(|domain| domain == AddressFamily::UNIX)) {
        return Err(SocketError::Passed("it is no Unix socket"));
    }
    if !is(sockopt::socket_type(socket).map(|kind| kind == SocketType::STREAM)) {
        return Err(SocketError::Passed("it is no stream socket"));
    }
    if !is(sockopt::socket_acceptconn(socket)) {
        return Err(SocketError::Passed("nothing listens on it"));
    }
    let address = rustix::net::getsockname(socket).ok().and_then(|any| rustix::net::SocketAddrUnix::try_from(any).ok());
    let path = address.as_ref().and_then(|address| address.path()).map(|path| path.into_owned());
    let path = path.and_then(|path| path.into_string().ok()).map(PathBuf::from);
    path.filter(|path| path.is_absolute()).ok_or(SocketError::Passed("it has no absolute path"))
}

/// Whether the kernel knows of a socket that listens there, without a connection to it. One of another network
/// namespace is not seen.
pub(super) fn is_listening(path: &Path) -> bool {
    let sockets = std::fs::read("/proc/net/unix").unwrap_or_default();
    String::from_utf8_lossy(&sockets).lines().skip(1).any(|line| {
        // Number, references, protocol, flags, type, state, inode: none has a slash. Then the path.
        let flags = line.split_whitespace().nth(3).and_then(|flags| u32::from_str_radix(flags, 16).ok());
        let at = line.find('/').map(|at| Path::new(&line[at..]));
        flags.is_some_and(|flags| flags & ACCEPTS != 0) && at == Some(path)
    })
}
