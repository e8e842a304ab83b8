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
        let is_ours = self.uid == crate::identity::effective_user() || self.uid == 0;
        is_ours && (self.uid != nobody() || all_users_have_numbers())
    }
}

/// The number that the kernel gives for each user who has none in this namespace: 65534, unless that was changed.
fn nobody() -> u32 {
    let told = std::fs::read_to_string("/proc/sys/kernel/overflowuid");
    told.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(65534)
}

/// Whether this is a namespace in which that cannot be.
fn all_users_have_numbers() -> bool {
    std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| maps_all(&map))
}

/// One line that maps all numbers, the highest of which is none.
fn maps_all(map: &str) -> bool {
    map.split_whitespace().eq(["0", "0", "4294967295"])
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

    /// All users look the same there, this process's own among them.
    #[test]
    fn nobody_is_trusted_where_users_have_no_numbers() {
        const INSIDE: &str = "PEER_OF_NOBODY";
        if std::env::var_os(INSIDE).is_some() {
            let (ours, _theirs) = UnixStream::pair().expect("a pair");
            let peer = Peer::of(&ours).expect("connected");
            assert!(peer.uid == crate::identity::effective_user() && !peer.is_trusted(), "{peer:?}");
            return;
        }
        let test = "peer::tests::nobody_is_trusted_where_users_have_no_numbers";
        let program = std::env::current_exe().expect("this test");
        let namespace = |program: &std::ffi::OsStr| {
            let mut command = std::process::Command::new("unshare");
            command.arg("-U").arg(program).args(["--exact", test]).env(INSIDE, "").output().ok()
        };
        if !namespace("true".as_ref()).is_some_and(|output| output.status.success()) {
            return test_support::skipped("no namespace can be made here");
        }
        let output = namespace(program.as_os_str()).expect("it was there");
        assert!(output.status.success(), "{output:?}");
    }

    #[test]
    fn one_map_has_all_users() {
        assert!(maps_all("         0          0 4294967295\n"));
        for other in ["", "0 1000 1\n", "0 100000 65536\n", "0 0 4294967294\n", "0 0 4294967295\n5 5 1\n"] {
            assert!(!maps_all(other), "{other}");
        }
    }
}
