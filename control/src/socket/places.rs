//! The directories that sockets live in: where a new VM puts its own, and where all of them are looked for.
//!
//! Terminals, services and `sudo` differ in their environment, and a VM must be found from each of them. So
//! there are several places, the same for every process of a user, and all of them are looked at. Only
//! [`ONLY`] narrows that to one.

use super::error::{SocketError, io_error};
use llfree_base::identity::effective_user;
use rustix::fs::Access;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// The variable that names the one directory to use, instead of all others.
pub const ONLY: &str = "LLFREE_VMM_DIR";

/// The directory of root, or of the user that VMs of a service manager run as.
const OF_SYSTEM: &str = "/run/llfree-vmm";

/// The user that has all rights.
const ROOT: u32 = 0;

/// The directories that sockets may live in, best first.
#[must_use]
pub fn all() -> Vec<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let mut places = of_user(effective_user(), absolute(ONLY), absolute("XDG_RUNTIME_DIR"));
    // Of the user that services run as; only root can have made it.
    let of_services = PathBuf::from(OF_SYSTEM);
    if absolute(ONLY).is_none() && !places.contains(&of_services) && check(&of_services).is_ok() {
        places.insert(places.len() - 1, of_services);
    }
    places
}

fn of_user(uid: u32, only: Option<PathBuf>, of_session: Option<PathBuf>) -> Vec<PathBuf> {
    if let Some(only) = only {
        return vec![only];
    }
    // Of a login, whether or not this process knows that there is one.
    let of_login = PathBuf::from(format!("/run/user/{uid}"));
    let mut places: Vec<PathBuf> = of_session.into_iter().chain([of_login]).map(|dir| dir.join("llfree-vmm")).collect();
    if uid == ROOT {
        places.push(PathBuf::from(OF_SYSTEM));
    }
    places.push(PathBuf::from(format!("/tmp/llfree-vmm-{uid}")));
    places.dedup();
    places
}

/// Where a socket of another kind goes that belongs to this user's VMs: the first of these places that can be used.
///
/// # Errors
/// Why the first of them cannot.
pub fn for_new() -> Result<PathBuf, SocketError> {
    first_usable(&all())
}

/// The first of these directories that can have a new VM's socket, made if need be.
///
/// # Errors
/// When none can be made or written to, or the best one is ours and open to others.
pub(super) fn first_usable(places: &[PathBuf]) -> Result<PathBuf, SocketError> {
    let mut last = None;
    for path in places {
        let made = std::fs::DirBuilder::new().mode(0o700).create(path);
        if let Err(error) = made
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            last = Some(io_error("create", path)(error));
            continue;
        }
        match check(path) {
            Ok(()) if rustix::fs::access(path, Access::WRITE_OK).is_ok() => return Ok(path.clone()),
            // A file system that is read-only by now.
            Ok(()) => {}
            // Somebody else's, as that of the real root is in a user namespace: there is another place.
            Err(error @ SocketError::Directory { is_ours: false, .. }) => {
                warn_once(path, &error);
                last = Some(error);
            }
            // A mistake that its owner can mend, and should.
            Err(error) => return Err(error),
        }
    }
    Err(last.unwrap_or_else(|| SocketError::NoDirectory(places.to_vec())))
}

/// Others must not be able to put their socket, or a link, where we look for ours.
pub(super) fn check(path: &Path) -> Result<(), SocketError> {
    let uid = effective_user();
    let meta = std::fs::symlink_metadata(path).map_err(io_error("look at", path))?;
    let is_ours = meta.uid() == uid;
    let found = if !meta.is_dir() {
        "it is not a directory".to_owned()
    } else if !is_ours {
        format!("it belongs to user {}", meta.uid())
    } else if meta.mode() & 0o077 != 0 {
        format!("its mode is {:04o}", meta.mode() & 0o7777)
    } else {
        return Ok(());
    };
    Err(SocketError::Directory { path: path.to_owned(), uid, found, is_ours })
}

/// Says once that a place is left out: it may be looked at again and again.
pub(super) fn warn_once(path: &Path, error: &SocketError) {
    static SAID: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
    let mut said = llfree_base::lock(&SAID);
    if !said.iter().any(|place| place == path) {
        log::warn!("skipping a directory of sockets: {}", llfree_base::error_line(error));
        said.push(path.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_looks_where_another_session_of_his_puts_its_vms() {
        let session = |dir: &str| of_user(7, None, Some(PathBuf::from(dir)));
        let without = of_user(7, None, None);
        assert_eq!(without, ["/run/user/7/llfree-vmm", "/tmp/llfree-vmm-7"].map(PathBuf::from));
        assert_eq!(session("/run/user/7"), without, "the usual one, by sudo or cron as well");
        assert_eq!(session("/elsewhere")[1..], without, "another one hides nothing");
        assert!(of_user(ROOT, None, None).contains(&PathBuf::from("/run/llfree-vmm")));
        assert_eq!(of_user(7, Some("/x".into()), Some("/y".into())), [PathBuf::from("/x")]);
    }

    #[test]
    fn a_place_that_cannot_be_used_makes_way_for_the_next() {
        let scratch = tempfile::tempdir().expect("scratch");
        let [absent, good] = ["no/such", "good"].map(|name| scratch.path().join(name));
        let places = [absent.clone(), good.clone(), scratch.path().join("never")];
        assert_eq!(first_usable(&places).expect("the second one can be made"), good);
        assert!(!scratch.path().join("never").exists());
        // Root can be told from nobody by what it owns: the root directory is its own, or somebody else's.
        let root_is_us = effective_user() == ROOT;
        let result = first_usable(&[PathBuf::from("/"), good]);
        assert_eq!(result.is_ok(), !root_is_us, "{result:?}: ours but open is refused, another's is passed by");
        // Root can also make somebody else's.
        let foreign = scratch.path().join("foreign");
        std::fs::DirBuilder::new().mode(0o700).create(&foreign).expect("a directory");
        if std::os::unix::fs::chown(&foreign, Some(65534), None).is_ok() {
            let next = scratch.path().join("next");
            assert_eq!(first_usable(&[foreign, next.clone()]).expect("the second one can be made"), next);
        }
        let error = first_usable(&[absent]).expect_err("nothing left");
        assert!(error.to_string().starts_with("cannot create"), "{error}");
    }
}
