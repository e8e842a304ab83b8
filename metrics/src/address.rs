//! Where scrapers come to: [`Address`] as people type it, and the [`Listener`] there.

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Scrapers that may wait for the first accept.
const BACKLOG: i32 = 128;

/// Where scrapers come to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Address {
    /// A socket in the file system, which only its user can use.
    Unix(PathBuf),
    /// A port. Without an address it is one of the loopback device.
    Tcp(SocketAddr),
}

impl Address {
    /// Whether other machines may reach it.
    #[must_use]
    pub fn is_public(&self) -> bool {
        matches!(self, Self::Tcp(address) if !address.ip().is_loopback())
    }

    /// The file to be removed at the end.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Unix(path) => Some(path),
            Self::Tcp(_) => None,
        }
    }
}

/// A text that is no address.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("use unix:PATH, ADDRESS:PORT like 127.0.0.1:9837 or [::1]:9837, or a port alone for the loopback device")]
pub struct NoAddress;

impl FromStr for Address {
    type Err = NoAddress;

    fn from_str(text: &str) -> Result<Self, NoAddress> {
        let loopback = |port| Self::Tcp(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() || path.contains('\0') { Err(NoAddress) } else { Ok(Self::Unix(path.into())) };
        }
        let port = text.strip_prefix("localhost:").or_else(|| text.strip_prefix(':')).unwrap_or(text);
        // `parse` would take a sign.
        if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) {
            return port.parse().map(loopback).map_err(|_| NoAddress);
        }
        text.parse().map(Self::Tcp).map_err(|_| NoAddress)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

/// Nobody can listen there.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody does already.
    #[error("{0} is in use")]
    InUse(Address),
    /// There is something else.
    #[error("{0} exists and is not a socket")]
    NotASocket(PathBuf),
    /// The kernel does not let us.
    #[error("cannot listen on {address}")]
    Io {
        /// The address.
        address: Address,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A socket that scrapers connect to. Its file goes with it.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    address: Address,
    /// The device and inode of its file.
    file: Option<(u64, u64)>,
}

impl Listener {
    /// Listens there.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn bind(address: &Address) -> Result<Self, ListenError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => ListenError::InUse(address.clone()),
            _ => ListenError::Io { address: address.clone(), source },
        };
        match address {
            Address::Unix(path) => {
                remove_dead(address, path)?;
                let fd = bind_unix(path).map_err(|error| failed(error.into()))?;
                let file = identity(path).ok();
                Ok(Self { fd, address: address.clone(), file })
            }
            Address::Tcp(tcp) => {
                let listener = TcpListener::bind(tcp).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                // A port of 0 is any.
                let real = listener.local_addr().map_err(failed)?;
                Ok(Self { fd: listener.into(), address: Address::Tcp(real), file: None })
            }
        }
    }

    /// Where it is.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = self.address.path()
            && self.file.is_some()
            && identity(path).ok() == self.file
        {
            // Nobody is hurt by one that stays: the next one takes its place.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let meta = std::fs::symlink_metadata(path)?;
    Ok((meta.dev(), meta.ino()))
}

/// Removes a socket that nobody listens on any more.
fn remove_dead(address: &Address, path: &Path) -> Result<(), ListenError> {
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => Err(ListenError::NotASocket(path.to_owned())),
        Ok(_) if matches!(try_connect(path), Err(rustix::io::Errno::CONNREFUSED)) => {
            std::fs::remove_file(path).map_err(|source| ListenError::Io { address: address.clone(), source })
        }
        Ok(_) => Err(ListenError::InUse(address.clone())),
        // Nothing is there, or the bind says what is wrong.
        Err(_) => Ok(()),
    }
}

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

fn try_connect(path: &Path) -> rustix::io::Result<()> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)
}

fn bind_unix(path: &Path) -> rustix::io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)?;
    // Linux gives the file the mode of the unbound socket: at no time can others connect.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_alone_is_one_of_the_loopback_device() {
        for text in ["9837", ":9837", "127.0.0.1:9837", "localhost:9837"] {
            let address: Address = text.parse().expect(text);
            assert_eq!((address.to_string().as_str(), address.is_public()), ("127.0.0.1:9837", false), "{text}");
        }
        let v6: Address = "[::1]:1".parse().expect("an address");
        assert_eq!((v6.to_string().as_str(), v6.is_public()), ("[::1]:1", false));
        assert!("0.0.0.0:1".parse::<Address>().expect("an address").is_public());
        let unix: Address = "unix:/run/x".parse().expect("a path");
        assert_eq!((unix.path(), unix.is_public()), (Some(Path::new("/run/x")), false));
        for text in ["", ":", "unix:", "70000", "+1", "-1", "example.org:1", "127.0.0.1", "1.2.3.4:x", "tcp:1"] {
            text.parse::<Address>().expect_err(text);
        }
    }

    #[test]
    fn an_address_in_use_is_refused_and_a_dead_socket_replaced() {
        let scratch = tempfile::tempdir().expect("scratch");
        let tcp = Listener::bind(&"127.0.0.1:0".parse().expect("an address")).expect("a port");
        assert!(matches!(Listener::bind(tcp.address()), Err(ListenError::InUse(_))));
        let path = scratch.path().join("m.sock");
        let address = Address::Unix(path.clone());
        let first = Listener::bind(&address).expect("free");
        assert_eq!(std::fs::metadata(&path).expect("there").mode() & 0o777, 0o600);
        let error = Listener::bind(&address).expect_err("in use");
        assert_eq!(error.to_string(), format!("unix:{} is in use", path.display()));
        drop(first);
        assert!(!path.exists(), "its file went with it");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("free"));
        assert!(path.exists(), "as a killed process leaves it");
        drop(Listener::bind(&address).expect("nobody listens there"));
        std::fs::write(&path, "mine").expect("scratch");
        assert!(matches!(Listener::bind(&address), Err(ListenError::NotASocket(_))));
        assert_eq!(std::fs::read(&path).expect("there"), b"mine");
        let nowhere = Address::Unix(scratch.path().join("no/such/dir"));
        assert!(matches!(Listener::bind(&nowhere), Err(ListenError::Io { .. })));
        let long = Address::Unix(scratch.path().join("x".repeat(200)));
        assert!(matches!(Listener::bind(&long), Err(ListenError::Io { .. })));
    }
}
