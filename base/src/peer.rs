//! [`Peer`]: who is at the other end of a Unix socket, by the kernel's account.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// The process that connected, or that listens, as it was then.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Its number; `None` where it has none here, as a process of another pid namespace that is not below ours.
    pub pid: Option<u32>,
    /// Its user.
    pub uid: u32,
}

impl Peer {
    /// Who is at the other end.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn of(socket: impl AsFd) -> io::Result<Self> {
        let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut bytes = size_of::<libc::ucred>() as libc::socklen_t;
        let fd = socket.as_fd().as_raw_fd();
        // Not by rustix, for which a pid is never zero.
        // SAFETY: the kernel writes one structure of this type, and its size; both outlive the call.
        let failed = unsafe {
            libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut peer).cast(), &raw mut bytes)
        };
        if failed != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { pid: u32::try_from(peer.pid).ok().filter(|pid| *pid > 0), uid: peer.uid })
    }

    /// Whether it is a process of this user or of root: these could write to this process's memory anyway.
    #[must_use]
    pub fn is_trusted(&self) -> bool {
        self.uid == crate::identity::effective_user() || self.uid == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn both_ends_of_a_pair_are_this_process() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let peer = Peer::of(&ours).expect("connected");
        assert_eq!(Peer::of(&theirs).expect("connected"), peer);
        assert_eq!(peer.pid, Some(std::process::id()));
        assert!(peer.is_trusted());
        assert!(Peer::of(std::fs::File::open("/dev/null").expect("it is there")).is_err());
    }
}
