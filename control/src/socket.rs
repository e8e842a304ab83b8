//! Where control sockets live, and which process owns a name.
//!
//! A VM called NAME listens on `NAME.sock` in a directory that only its user can enter. Next to it
//! lies `NAME.lock`, locked for as long as the VM lives and holding its pid. The lock decides: who
//! has it may remove a socket that a killed VM left and bind its own, so two starters cannot both
//! believe that they own a name. A clean stop removes both files, if they are still those that it made; a
//! start removes what killed VMs left in the same directory. A lock file has a pid from its first moment, so
//! one without is somebody else's file.

mod lock;
mod passed;

use llfree_base::units::shorten;
use lock::{Identity, Lock, LockError, remove};
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

mod error;
pub mod places;

use error::io_error;
pub use error::{MAX_NAME, MAX_SOCKET_PATH, SocketError};

/// Clients that may wait for the first accept.
const BACKLOG: i32 = 256;

/// Checks a VM's name.
///
/// # Errors
/// [`SocketError::Name`].
pub fn check_name(name: &str) -> Result<(), SocketError> {
    let ok = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.len() <= MAX_NAME && name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(ok) {
        Ok(())
    } else {
        Err(SocketError::Name(shorten(name)))
    }
}

/// A name or path that is ours, and the socket that listens on it. Dropping it removes both files.
#[derive(Debug)]
pub struct Claim {
    name: String,
    path: PathBuf,
    lock_path: PathBuf,
    /// The socket's file, whatever has its name by now; `None` if it stays with who made it.
    socket: Option<Identity>,
    listener: UnixListener,
    /// Locked until it is closed, after both files are gone.
    lock: Lock,
}

impl Claim {
    /// Claims NAME in `dir`.
    ///
    /// # Errors
    /// When a live VM has it, or no socket can be made there.
    pub fn by_name(dir: &Path, name: &str) -> Result<Self, SocketError> {
        check_name(name)?;
        let claim = Self::new(name.to_owned(), dir.join(format!("{name}.sock")), dir.join(format!("{name}.lock")))?;
        sweep_dead(dir);
        Ok(claim)
    }

    /// Claims the lowest of `vm0`, `vm1` ... that is free in `dir`.
    ///
    /// # Errors
    /// As [`by_name`](Self::by_name), except that a taken name leads to the next.
    pub fn first_free(dir: &Path) -> Result<Self, SocketError> {
        Self::first_free_beside(dir, &[])
    }

    /// Claims NAME, or the lowest free one of `vm0`, `vm1` ..., in this user's directory for new sockets. A name that a
    /// VM has in another of this user's [places] is taken, too.
    ///
    /// # Errors
    /// As [`by_name`](Self::by_name), and when there is no such directory.
    pub fn in_place(name: Option<&str>) -> Result<Self, SocketError> {
        Self::in_first_of(&places::all(), name)
    }

    fn in_first_of(places: &[PathBuf], name: Option<&str>) -> Result<Self, SocketError> {
        let dir = places::first_usable(places)?;
        let others: Vec<PathBuf> = places.iter().filter(|place| **place != dir).cloned().collect();
        match name {
            Some(name) => Self::by_name_beside(&dir, &others, name),
            None => Self::first_free_beside(&dir, &others),
        }
    }

    /// Claims NAME in `dir`, unless a VM in one of `others` has it.
    fn by_name_beside(dir: &Path, others: &[PathBuf], name: &str) -> Result<Self, SocketError> {
        // First: of two that claim a name in two places at once, at most one sees nobody elsewhere.
        let claim = Self::by_name(dir, name)?;
        for other in others.iter().filter(|other| places::check(other).is_ok()) {
            let path = other.join(format!("{name}.sock"));
            if let Some(pid) = lock::holder(&other.join(format!("{name}.lock"))) {
                return Err(SocketError::InUse { path, pid });
            }
        }
        Ok(claim)
    }

    fn first_free_beside(dir: &Path, others: &[PathBuf]) -> Result<Self, SocketError> {
        let mut number = 0u32;
        loop {
            match Self::by_name_beside(dir, others, &format!("vm{number}")) {
                // It ends: every round finds one more live VM.
                Err(SocketError::InUse { .. }) => number += 1,
                other => return other,
            }
        }
    }

    /// Claims a path outside the runtime directory. The VM's name is the file's name.
    ///
    /// # Errors
    /// As [`by_name`](Self::by_name), and when something other than a socket has that path.
    pub fn at_path(path: &Path) -> Result<Self, SocketError> {
        let name = path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let mut lock = path.as_os_str().to_owned();
        lock.push(".lock");
        Self::new(name, path.to_owned(), PathBuf::from(lock))
    }

    fn new(name: String, path: PathBuf, lock_path: PathBuf) -> Result<Self, SocketError> {
        let len = path.as_os_str().len();
        if len > MAX_SOCKET_PATH {
            return Err(SocketError::PathTooLong { len, path });
        }
        let lock = take_lock(&lock_path, &path)?;
        // From here on the lock file is ours to remove, whatever fails.
        let listening = listen_on(&path).and_then(|listener| {
            let socket = std::fs::symlink_metadata(&path).map_err(io_error("look at", &path))?;
            Ok((listener, Identity::of(&socket)))
        });
        match listening {
            Ok((listener, socket)) => Ok(Self { name, path, lock_path, socket: Some(socket), listener, lock }),
            Err(error) => {
                lock.remove(&lock_path);
                Err(error)
            }
        }
    }

    /// Claims a socket that somebody made for this VM and listens on already, as a service manager does. It stays when the
    /// VM goes. The VM's name is the file's.
    ///
    /// # Errors
    /// When it is no socket that listens at a path, or a live VM has that path.
    pub fn of_listener(listener: OwnedFd) -> Result<Self, SocketError> {
        let path = passed::path_of(&listener)?;
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let by_name = path.extension().is_some_and(|extension| extension == "sock") && check_name(stem).is_ok();
        let beside = || {
            let mut lock = path.as_os_str().to_owned();
            lock.push(".lock");
            PathBuf::from(lock)
        };
        let lock_path = if by_name { path.with_extension("lock") } else { beside() };
        let lock = take_lock(&lock_path, &path)?;
        Ok(Self { name: stem.to_owned(), path, lock_path, socket: None, listener: listener.into(), lock })
    }

    /// The VM's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The path of its socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The listening socket, for the server.
    ///
    /// # Errors
    /// When no descriptors are left.
    pub fn listener(&self) -> Result<UnixListener, SocketError> {
        self.listener.try_clone().map_err(io_error("duplicate", &self.path))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // The lock goes last: until then nobody else may touch the socket's path.
        if let Some(socket) = self.socket {
            remove(&self.path, socket);
        }
        self.lock.remove(&self.lock_path);
    }
}

/// Takes the lock of a socket's path.
fn take_lock(lock_path: &Path, socket_path: &Path) -> Result<Lock, SocketError> {
    Lock::take(lock_path).map_err(|error| match error {
        LockError::Held(pid) => SocketError::InUse { path: socket_path.to_owned(), pid },
        LockError::NotALock => SocketError::NotALock(lock_path.to_owned()),
        LockError::Io(step, source) => io_error(step, lock_path)(source),
    })
}

/// Removes what killed VMs left in a directory of sockets. A live VM has its lock, and keeps its files.
fn sweep_dead(dir: &Path) {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()) {
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.and_then(|name| name.strip_suffix(".lock").or_else(|| name.strip_suffix(".sock")));
        let Some(name) = name.filter(|name| check_name(name).is_ok()) else { continue };
        let (socket, lock_path) = (dir.join(format!("{name}.sock")), dir.join(format!("{name}.lock")));
        let Ok(lock) = take_lock(&lock_path, &socket) else { continue };
        if let Ok(meta) = std::fs::symlink_metadata(&socket)
            && meta.file_type().is_socket()
            // First: a service manager that listens would start a VM for who connects.
            && !passed::is_listening(&socket)
            && !listens(&socket)
        {
            log::info!("removing {}: its VM is gone", socket.display());
            remove(&socket, Identity::of(&meta));
        }
        lock.remove(&lock_path);
    }
}

/// The process that owns a socket, according to the lock beside it, if that is held.
#[must_use]
pub fn owner(path: &Path) -> Option<u32> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".lock");
    [path.with_extension("lock"), PathBuf::from(beside)].iter().find_map(|lock| lock::holder(lock).flatten())
}

/// Removes what a VM left that was killed. Nothing happens while a live one has the socket.
pub fn sweep(path: &Path) {
    // Whoever claims it takes over what is there, and a claim removes both files when it goes.
    let named = path.extension().is_some_and(|extension| extension == "sock")
        && std::fs::symlink_metadata(path.with_extension("lock")).is_ok();
    let claim = match (named, path.parent(), path.file_stem().and_then(|name| name.to_str())) {
        (true, Some(dir), Some(name)) => Claim::by_name(dir, name),
        _ => Claim::at_path(path),
    };
    if let Err(error) = claim {
        log::debug!("{} stays: {}", path.display(), llfree_base::error_line(&error));
    }
}

/// Clears away what a dead VM left, and listens. The lock is ours.
fn listen_on(path: &Path) -> Result<UnixListener, SocketError> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io_error("look at", path)(error)),
        Ok(meta) if !meta.file_type().is_socket() => return Err(SocketError::NotASocket(path.to_owned())),
        // A program that knows nothing of our lock may listen on a path that the user chose.
        Ok(_) if passed::is_listening(path) || listens(path) => {
            return Err(SocketError::InUse { path: path.to_owned(), pid: None });
        }
        Ok(_) => {
            log::info!("taking over {}: its VM is gone", path.display());
            std::fs::remove_file(path).map_err(io_error("remove the stale socket", path))?;
        }
    }
    bind(path).map(UnixListener::from).map_err(|error| io_error("listen on", path)(error.into()))
}

fn bind(path: &Path) -> rustix::io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // Linux gives the file the mode of the unbound socket: at no time can others connect.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &address)?;
    match rustix::net::listen(&socket, BACKLOG) {
        Ok(()) => Ok(socket),
        Err(error) => {
            // The lock is ours, so the file is the one that was just made.
            let _ = std::fs::remove_file(path);
            Err(error)
        }
    }
}

/// A VM that accepts connections.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct LiveVm {
    /// Its name.
    pub name: String,
    /// Its socket.
    pub path: PathBuf,
}

/// The VMs of this user that listen now, by name. A socket that waits for its first client to start a VM is none.
///
/// # Errors
/// When a directory of sockets cannot be read.
pub fn live_vms() -> Result<Vec<LiveVm>, SocketError> {
    // Terminals differ in XDG_RUNTIME_DIR; so a VM is looked for wherever one may be.
    in_any(&places::all(), live_in)
}

/// The sockets of this user's VMs, by name, without a look at whether somebody listens: for who asks all of them anyway.
///
/// # Errors
/// When a directory of sockets cannot be read.
pub fn vms_to_ask() -> Result<Vec<LiveVm>, SocketError> {
    in_any(&places::all(), |dir| sockets_in(dir, has_owner))
}

/// The VMs that `look` finds in these directories.
fn in_any(
    dirs: &[PathBuf],
    look: impl Fn(&Path) -> Result<Vec<LiveVm>, SocketError>,
) -> Result<Vec<LiveVm>, SocketError> {
    let mut vms = Vec::new();
    for dir in dirs.iter().filter(|dir| std::fs::symlink_metadata(dir).is_ok()) {
        match places::check(dir) {
            Ok(()) => vms.extend(look(dir)?),
            // No VM of ours is in there, as none would have started; and its creator must not
            // keep us from those elsewhere.
            Err(error) => places::warn_once(dir, &error),
        }
    }
    vms.sort();
    Ok(vms)
}

/// The VMs that listen in one directory.
///
/// # Errors
/// When it cannot be read.
pub fn live_in(dir: &Path) -> Result<Vec<LiveVm>, SocketError> {
    sockets_in(dir, |path| has_owner(path) && listens(path))
}

/// Whether a process holds the lock beside a socket.
fn has_owner(path: &Path) -> bool {
    lock::holder(&path.with_extension("lock")).is_some()
}

fn sockets_in(dir: &Path, is_wanted: impl Fn(&Path) -> bool) -> Result<Vec<LiveVm>, SocketError> {
    let mut vms = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io_error("read", dir))? {
        let path = entry.map_err(io_error("read", dir))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".sock"));
        let Some(name) = name.filter(|name| check_name(name).is_ok()) else { continue };
        if is_wanted(&path) {
            vms.push(LiveVm { name: name.to_owned(), path });
        }
    }
    vms.sort();
    Ok(vms)
}

/// Whether someone accepts connections there. A full queue means yes, and must not block us.
fn listens(path: &Path) -> bool {
    matches!(connect(path), Ok(_) | Err(rustix::io::Errno::AGAIN))
}

/// A non-blocking connection, or `EAGAIN` while the listener's queue is full.
pub(super) fn connect(path: &Path) -> rustix::io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket)
}

/// The socket that a command means: `socket` if given, else the VM called `name`, else the only one.
///
/// # Errors
/// When that is none, or more than one.
pub fn find(name: Option<&str>, socket: Option<&Path>) -> Result<PathBuf, SocketError> {
    if let Some(path) = socket {
        let len = path.as_os_str().len();
        if len > MAX_SOCKET_PATH {
            return Err(SocketError::PathTooLong { len, path: path.to_owned() });
        }
        return Ok(path.to_owned());
    }
    if let Some(name) = name {
        check_name(name)?;
    }
    choose(name, live_vms()?, places::all())
}

/// The same; of a VM called `name` that does not run, the socket at which a service manager waits for somebody to start
/// it for.
///
/// # Errors
/// As [`find`].
pub fn find_or_start(name: Option<&str>, socket: Option<&Path>) -> Result<PathBuf, SocketError> {
    match find(name, socket) {
        Err(error @ SocketError::UnknownName { .. }) => name.and_then(waiting_for).ok_or(error),
        found => found,
    }
}

/// The socket of a VM that a service manager starts for its first client.
fn waiting_for(name: &str) -> Option<PathBuf> {
    let places = places::all();
    let mut paths = places.iter().filter(|dir| places::check(dir).is_ok()).map(|dir| dir.join(format!("{name}.sock")));
    paths.find(|path| passed::is_listening(path))
}

/// Likewise, among these.
fn choose(name: Option<&str>, mut vms: Vec<LiveVm>, looked: Vec<PathBuf>) -> Result<PathBuf, SocketError> {
    if let Some(name) = name {
        return match vms.iter().position(|vm| vm.name == name) {
            Some(at) => Ok(vms.swap_remove(at).path),
            None => Err(SocketError::UnknownName {
                name: name.to_owned(),
                running: vms.into_iter().map(|vm| vm.name).collect(),
                looked,
            }),
        };
    }
    match vms.len() {
        0 => Err(SocketError::NoneRunning(looked)),
        1 => Ok(vms.swap_remove(0).path),
        _ => Err(SocketError::SeveralRunning(vms.into_iter().map(|vm| vm.name).collect())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::DirBuilderExt;

    fn vm(name: &str) -> LiveVm {
        LiveVm { name: name.to_owned(), path: PathBuf::from(format!("/x/{name}.sock")) }
    }

    #[test]
    fn with_one_vm_running_no_name_is_needed() {
        assert_eq!(choose(None, vec![vm("a")], vec![]).expect("the only one"), Path::new("/x/a.sock"));
        assert_eq!(choose(Some("b"), vec![vm("a"), vm("b")], vec![]).expect("named"), Path::new("/x/b.sock"));
        for (name, vms, message) in [
            (None, vec![], "no VM is running (looked in /x, /y)"),
            (None, vec![vm("a"), vm("b")], "2 VMs are running"),
            (Some("c"), vec![vm("a"), vm("b")], "no VM is called 'c'; running VMs: a, b (looked in /x, /y)"),
            (Some("c"), vec![], "no VM is called 'c'; none is running (looked in /x, /y)"),
        ] {
            let looked = vec![PathBuf::from("/x"), PathBuf::from("/y")];
            assert_eq!(choose(name, vms, looked).expect_err(message).to_string(), message);
        }
    }

    #[test]
    fn a_directory_of_somebody_else_hides_no_vm() {
        let scratch = tempfile::tempdir().expect("scratch");
        let dir = |name: &str, mode| {
            let path = scratch.path().join(name);
            std::fs::DirBuilder::new().mode(mode).create(&path).expect("scratch");
            path
        };
        let (ours, open, link) = (dir("ours", 0o700), dir("open", 0o755), scratch.path().join("link"));
        std::os::unix::fs::symlink(&ours, &link).expect("scratch");
        let _claim = Claim::by_name(&ours, "a").expect("free");
        let _squatter = Claim::by_name(&open, "b").expect("free");
        let vms = in_any(&[open, link, scratch.path().join("absent"), ours], live_in).expect("readable");
        assert_eq!(vms.iter().map(|vm| vm.name.as_str()).collect::<Vec<_>>(), ["a"]);
    }

    #[test]
    fn a_name_that_a_vm_has_in_another_place_is_taken() {
        let scratch = tempfile::tempdir().expect("scratch");
        let [here, there] = ["here", "there"].map(|name| scratch.path().join(name));
        for dir in [&here, &there] {
            std::fs::DirBuilder::new().mode(0o700).create(dir).expect("scratch");
        }
        let others = std::slice::from_ref(&there);
        let web = Claim::by_name(&there, "web").expect("free");
        let _vm0 = Claim::by_name(&there, "vm0").expect("free");
        let error = Claim::by_name_beside(&here, others, "web").expect_err("taken over there");
        let SocketError::InUse { path, pid } = error else { panic!("{error}") };
        assert_eq!((path, pid), (there.join("web.sock"), Some(std::process::id())));
        assert!(std::fs::read_dir(&here).expect("readable").next().is_none(), "nothing is left");
        assert_eq!(Claim::first_free_beside(&here, others).expect("free").name(), "vm1");
        let places = [here.clone(), there.clone()];
        assert!(matches!(Claim::in_first_of(&places, Some("web")), Err(SocketError::InUse { .. })));
        assert_eq!(Claim::in_first_of(&places, None).expect("free").path(), here.join("vm1.sock"));
        assert_eq!(owner(web.path()), Some(std::process::id()));
        drop(web);
        Claim::by_name_beside(&here, others, "web").expect("free now");
        // What a killed VM left is nobody's.
        std::fs::write(there.join("web.lock"), "4294967\n").expect("scratch");
        Claim::by_name_beside(&here, others, "web").expect("its VM is dead");
        assert_eq!(owner(&there.join("web.sock")), None);
    }

    #[test]
    fn names_are_file_names_everywhere() {
        for name in ["vm0", "a", "web-1_b.c", "0", &"x".repeat(64)] {
            check_name(name).expect(name);
        }
        for name in ["", ".", "..", ".hidden", "-x", "a/b", "a b", "ü", "a\0b", &"x".repeat(65)] {
            check_name(name).expect_err(name);
        }
    }
}
