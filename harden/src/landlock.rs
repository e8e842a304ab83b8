//! Landlock: of all files, a thread may open only those that say what is resident; of all
//! directories, remove its socket from one and its cgroup from another. No TCP either.
//!
//! Files that are open already (KVM, memory files, the socket, the terminal) stay usable: that is
//! why threads enter after the start. Best effort: an older kernel enforces what it knows.

use crate::needs::{Needs, named};
use ::landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError,
};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// Newest version of Landlock whose rights we know.
const KNOWN: ABI = ABI::V5;

/// Files that may be read: the kernel's account of this process, of pressure and of huge pages, and the
/// list of CPUs that some C libraries look at before they make an arena.
const READ: [&str; 5] =
    ["/proc/self", "/proc/pressure", "/proc/meminfo", "/sys/kernel/mm", "/sys/devices/system/cpu/online"];

/// A rule set that threads restrict themselves with.
pub(super) struct Files {
    /// `None` where the kernel enforces nothing. Used as it is by every thread, at any time: none has to
    /// find a descriptor for a copy.
    rules: Option<OwnedFd>,
    /// Rules go with the kernel's inodes. Those of `/proc/self` may be made anew once nobody holds
    /// them, and would then have no rule.
    _pins: Vec<PathFd>,
}

/// Makes the rule set; `None`, with a debug line, where the kernel has no Landlock.
pub(super) fn prepare(needs: &Needs<'_>) -> Option<Files> {
    match rules(needs) {
        Ok(files) => Some(files),
        Err(error) => {
            log::debug!("Landlock is unavailable: {}", llfree_base::error_line(&error));
            None
        }
    }
}

fn rules(needs: &Needs<'_>) -> Result<Files, RulesetError> {
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .create()?;
    let mut pins = Vec::new();
    let mut allow = |path: &Path, access: BitFlags<AccessFs>| {
        // What is not there needs no rule.
        let Ok(fd) = PathFd::new(path) else { return Ok(()) };
        (&mut rules).add_rule(PathBeneath::new(&fd, access))?;
        pins.push(fd);
        Ok::<_, RulesetError>(())
    };
    for path in READ {
        allow(Path::new(path), AccessFs::ReadFile.into())?;
    }
    for dir in [needs.socket_dir, needs.pid_dir, needs.metrics_socket_dir].into_iter().flatten() {
        allow(named(dir), AccessFs::RemoveFile.into())?;
    }
    if let Some(dir) = needs.log_dir {
        allow(named(dir), AccessFs::WriteFile | AccessFs::MakeReg)?;
    }
    if let Some(dir) = needs.metrics_dir {
        allow(named(dir), AccessFs::WriteFile | AccessFs::MakeReg | AccessFs::RemoveFile)?;
    }
    // Its files are open; what is left is to remove it.
    if let Some(parent) = needs.cgroup.and_then(Path::parent) {
        allow(parent, AccessFs::RemoveDir.into())?;
    }
    let rules: Option<OwnedFd> = rules.into();
    if rules.is_none() {
        log::debug!("this kernel enforces no Landlock rules: only file modes restrict access");
    }
    Ok(Files { rules, _pins: pins })
}

impl Files {
    /// Restricts the calling thread for good.
    pub(super) fn restrict_this_thread(&self) -> io::Result<()> {
        let Some(rules) = &self.rules else { return Ok(()) };
        rustix::thread::set_no_new_privs(true)?;
        // SAFETY: the call takes a descriptor and flags, and touches no memory.
        match unsafe { libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_reads_its_own_account_and_no_other_file() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let path = scratch.path().join("secret");
        std::fs::write(&path, "x").expect("scratch");
        let other = tempfile::tempdir().expect("a scratch directory");
        let needs = Needs { socket_dir: Some(other.path()), ..Needs::default() };
        std::fs::write(other.path().join("socket"), "").expect("scratch");
        let Some(files) = prepare(&needs) else { return test_support::skipped("no Landlock") };
        let (inner, socket) = (path.clone(), other.path().join("socket"));
        let enforced = std::thread::spawn(move || {
            if files.rules.is_none() {
                return false;
            }
            files.restrict_this_thread().expect("it restricts");
            assert!(std::fs::read(&inner).is_err() && std::fs::remove_file(&inner).is_err());
            assert!(std::fs::read("/proc/1/status").is_err() && std::fs::read("/etc/passwd").is_err());
            assert!(std::fs::read("/proc/self/smaps_rollup").is_ok());
            assert!(std::fs::write("/proc/self/comm", "x").is_err());
            assert!(std::fs::File::open(&socket).is_err());
            std::fs::remove_file(&socket).expect("the socket may go");
            assert!(std::net::TcpListener::bind("127.0.0.1:0").is_err() || cfg!(not(target_os = "linux")));
            true
        });
        if !enforced.join().expect("no panic") {
            return test_support::skipped("this kernel enforces no Landlock rules");
        }
        assert!(path.exists(), "other threads are as free as before");
        std::fs::read(&path).expect("other threads are as free as before");
    }
}
