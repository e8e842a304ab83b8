//! The service manager that started this process: the socket that it passes, and what it is told.
//!
//! The protocols are systemd's, sd_listen_fds(3) and sd_notify(3): variables, descriptors from 3 on, and a datagram
//! socket for words such as `READY=1`. A few lines of ours instead of a crate: what there is also changes this process'
//! variables, or connects anew for each word, which the sandbox forbids. Here the socket is connected once, before there
//! is a sandbox; a word is then one `send`, which waits for nobody.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Where the words go, and how often the service manager wants to hear that all is well.
#[derive(Debug)]
pub struct ServiceManager {
    socket: UnixDatagram,
    watchdog: Option<Duration>,
}

/// Why there is no way to tell the service manager anything.
#[derive(Debug, thiserror::Error)]
pub enum NotifyError {
    /// An address of another kind.
    #[error("NOTIFY_SOCKET is '{}', which is neither a path nor an abstract address", .0.display())]
    Address(OsString),
    /// Nobody is there.
    #[error("cannot reach the service manager at {}", .address.display())]
    Connect {
        /// The address.
        address: OsString,
        /// Why not.
        source: io::Error,
    },
}

/// Why a socket that was passed cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PassedError {
    /// No number.
    #[error("LISTEN_FDS is '{}', which is not the number of sockets that were passed", .0.display())]
    NoNumber(OsString),
    /// More than there is a use for.
    #[error("{0} sockets were passed (LISTEN_FDS), and a VM has one control socket")]
    Several(u64),
    /// Nothing there.
    #[error("a socket was passed (LISTEN_FDS), but descriptor 3 is not open")]
    Closed,
}

/// The first descriptor that is passed.
const FIRST: i32 = 3;

impl ServiceManager {
    /// The one that started this process and wants to be told how it does; `None` if there is none.
    ///
    /// # Errors
    /// It cannot be reached.
    pub fn of_environment() -> Result<Option<Self>, NotifyError> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let Some(address) = variable("NOTIFY_SOCKET") else { return Ok(None) };
        let watchdog = watchdog(&variable, std::process::id());
        Self::connect(address, watchdog).map(Some)
    }

    fn connect(address: OsString, watchdog: Option<Duration>) -> Result<Self, NotifyError> {
        let to = match address.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
            [b'/', ..] => SocketAddr::from_pathname(&address),
            _ => return Err(NotifyError::Address(address)),
        };
        let connect = |to: SocketAddr| {
            let socket = UnixDatagram::unbound()?;
            socket.connect_addr(&to)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        match to.and_then(connect) {
            Ok(socket) => Ok(Self { socket, watchdog }),
            Err(source) => Err(NotifyError::Connect { address, source }),
        }
    }

    /// Says something: lines such as `READY=1`. False if it is not taken now, as its queue is full.
    #[must_use]
    pub fn say(&self, words: &str) -> bool {
        match self.socket.send(words.as_bytes()) {
            Ok(_) => true,
            Err(error) => {
                log::debug!("the service manager does not hear '{}': {error}", words.escape_debug());
                false
            }
        }
    }

    /// Says that the VM stops, and why. The end itself can be seen, so this may be lost.
    pub fn says_end(&self, why: &str) {
        let _ = self.say(&format!("STOPPING=1\nSTATUS={}", llfree_base::printable(why)));
    }

    /// It restarts the VM if it has not heard `WATCHDOG=1` for this long.
    #[must_use]
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }
}

/// A watchdog that is meant for this process.
fn watchdog(variable: &dyn Fn(&str) -> Option<OsString>, pid: u32) -> Option<Duration> {
    let number = |name: &str| variable(name)?.to_str()?.parse::<u64>().ok();
    let is_ours = variable("WATCHDOG_PID").is_none() || number("WATCHDOG_PID") == Some(pid.into());
    number("WATCHDOG_USEC").filter(|time| is_ours && *time > 0).map(Duration::from_micros)
}

/// The listening socket that the service manager passed, if it did. Only the first call gives it.
///
/// # Errors
/// What was passed is not one socket.
pub fn passed_socket() -> Result<Option<OwnedFd>, PassedError> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let variable = |name: &str| std::env::var_os(name);
    let is_passed = is_socket_passed(variable("LISTEN_PID").as_deref(), variable("LISTEN_FDS"), std::process::id())?;
    if !is_passed || TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(None);
    }
    // SAFETY: it asks about a number.
    if unsafe { libc::fcntl(FIRST, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(PassedError::Closed);
    }
    // SAFETY: whoever started this process says that the descriptor is for it, and it is taken once.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(FIRST) }))
}

/// Whether a socket was passed to this very process, which a fork leaves behind.
#[must_use]
pub fn has_passed_a_socket() -> bool {
    let variable = |name: &str| std::env::var_os(name);
    is_socket_passed(variable("LISTEN_PID").as_deref(), variable("LISTEN_FDS"), std::process::id()) == Ok(true)
}

fn is_socket_passed(of: Option<&OsStr>, count: Option<OsString>, pid: u32) -> Result<bool, PassedError> {
    let is_ours = of.and_then(OsStr::to_str).and_then(|of| of.parse().ok()) == Some(pid);
    let Some(count) = count.filter(|_| is_ours) else { return Ok(false) };
    match count.to_str().and_then(|count| count.parse::<u64>().ok()) {
        Some(0) => Ok(false),
        Some(1) => Ok(true),
        Some(several) => Err(PassedError::Several(several)),
        None => Err(PassedError::NoNumber(count)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watchdog_of_another_process_or_without_a_time_is_none() {
        let of = |time: &'static str, pid: Option<&'static str>| {
            let variable = move |name: &str| match name {
                "WATCHDOG_USEC" => Some(time.into()),
                "WATCHDOG_PID" => pid.map(Into::into),
                _ => None,
            };
            watchdog(&variable, 7)
        };
        assert_eq!(of("2000000", None), Some(Duration::from_secs(2)));
        assert_eq!(of("2000000", Some("7")), Some(Duration::from_secs(2)));
        for (time, pid) in [("2000000", Some("8")), ("2000000", Some("x")), ("0", None), ("", None), ("-1", None)] {
            assert_eq!(of(time, pid), None, "{time} {pid:?}");
        }
    }

    #[test]
    fn a_socket_is_passed_to_one_process_and_is_one() {
        let of = |pid: &str, count: &str| is_socket_passed(Some(OsStr::new(pid)), Some(count.into()), 7);
        assert_eq!(of("7", "1"), Ok(true));
        for (pid, count) in [("8", "1"), ("8", "x"), ("", "1"), ("7", "0")] {
            assert_eq!(of(pid, count), Ok(false), "{pid} {count}");
        }
        assert_eq!(is_socket_passed(None, Some("1".into()), 7), Ok(false));
        assert_eq!(is_socket_passed(Some(OsStr::new("7")), None, 7), Ok(false));
        assert_eq!(of("7", "2"), Err(PassedError::Several(2)));
        assert_eq!(of("7", "many"), Err(PassedError::NoNumber("many".into())));
    }

    #[test]
    fn an_address_is_a_path_or_abstract() {
        for address in ["vsock:2:9999", "relative"] {
            let error = ServiceManager::connect(address.into(), None).expect_err(address);
            assert!(matches!(error, NotifyError::Address(_)), "{error}");
        }
        let name = format!("llfree-vmm-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("short");
        let manager = UnixDatagram::bind_addr(&address).expect("free");
        let told = ServiceManager::connect(format!("@{name}").into(), None).expect("it is there");
        assert!(told.say("READY=1"));
        let mut words = [0; 64];
        let length = manager.recv(&mut words).expect("it came");
        assert_eq!(&words[..length], b"READY=1");
        drop(manager);
        assert!(!told.say("READY=1"), "nobody is there, which is no reason to end");
    }
}
