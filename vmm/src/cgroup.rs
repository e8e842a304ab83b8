//! `--cgroup`: the VM in a memory cgroup of its own, whose `memory.max` follows the limit.
//!
//! Touches only the cgroup file system. The files are opened once, at the start, before any rights are
//! dropped; afterwards only those open files are used, and only the keeper's thread can write to
//! one. Invariant: `memory.max` is never below what the
//! guest may hold plus the VMM's allowance; it rises before a grow and falls after a shrink, and falls
//! only once what is in use fits, because the kernel kills what does not.

mod keeper;

use crate::roles;
use keeper::{Keeper, Unopened};
use llfree_base::faults;
use llfree_base::kernel_stats::parse_cgroup2_mount;
use llfree_base::lock;
use llfree_base::thread::Spawner;
use llfree_base::units::Bytes;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Names are this and the pid, so that a cgroup whose process is gone can be recognized and removed.
const PREFIX: &str = "llfree-vmm-";

/// What the VMM itself may use: code, heap, buffers of clients.
const FIXED_ALLOWANCE: u64 = 64 << 20;
/// Plus one byte per this many bytes of guest memory: the page tables of the process and of KVM, at
/// worst an 8-byte entry per 4 KiB page in each, which is 1/256, and as much again for the kernel's
/// own bookkeeping.
const BYTES_PER_ALLOWANCE: u64 = 128;

/// How often, and at what interval, removing a busy cgroup is retried.
const BUSY_TRIES: u32 = 100;
const BUSY_PAUSE: Duration = Duration::from_millis(5);

/// Why there is no cgroup, or why it does not follow the limit.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No cgroup v2 at all.
    #[error("a cgroup for the VM needs cgroup v2, which is not mounted here")]
    NoV2(#[source] io::Error),
    /// A path that is not a cgroup.
    #[error("{path} is not a cgroup v2 directory")]
    NotACgroup {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No memory controller there.
    #[error(
        "the cgroup {path} has no memory controller: cgroup v1 has it, or the cgroup above does not pass it on \
         (`echo +memory > cgroup.subtree_control`)"
    )]
    NoMemoryController {
        /// Which cgroup.
        path: PathBuf,
    },
    /// A step that the kernel refused.
    #[error("cannot {step} {path}")]
    Refused {
        /// What.
        step: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The cgroup's numbers for a status.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Usage {
    /// The cgroup's directory.
    pub path: PathBuf,
    /// `memory.max` in bytes.
    pub max: u64,
    /// `memory.current` in bytes.
    pub current: u64,
}

/// The cgroup that this process is in until it leaves.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    /// What writes to its files.
    keeper: Keeper,
    current: File,
    /// `memory.stat`, where there is one.
    stat: Option<File>,
    /// The most guest memory there can be; the allowance depends on it.
    memory: u64,
    /// Other memory that counts, such as a pool of zeroed frames.
    besides: u64,
    written: Mutex<u64>,
    left: AtomicBool,
}

impl Cgroup {
    /// Creates a cgroup below `parent` for a VM of `memory` bytes plus the bytes that the VMM keeps
    /// `besides`, and moves this process there. By default the cgroup is created beside the one that
    /// this process is in. Cgroups there whose VM was killed are removed.
    ///
    /// # Errors
    /// [`CgroupError`]; no cgroup is left behind.
    pub fn enter(parent: Option<&Path>, memory: u64, besides: u64) -> Result<Self, CgroupError> {
        let own = own_cgroup().map_err(CgroupError::NoV2)?;
        let beside = own.parent().filter(|parent| parent.join("cgroup.controllers").exists()).unwrap_or(&own);
        Self::enter_from(&own, parent.unwrap_or(beside), memory, besides)
    }

    /// The same, for a process that is in the cgroup `home` and returns there.
    ///
    /// # Errors
    /// Likewise.
    pub fn enter_from(home: &Path, parent: &Path, memory: u64, besides: u64) -> Result<Self, CgroupError> {
        let refused = |step, path: &Path| {
            let path = path.to_owned();
            move |source| CgroupError::Refused { step, path, source }
        };
        let controllers = std::fs::read_to_string(parent.join("cgroup.controllers"))
            .map_err(|source| CgroupError::NotACgroup { path: parent.to_owned(), source })?;
        if !has_memory(&controllers) {
            return Err(CgroupError::NoMemoryController { path: parent.to_owned() });
        }
        let passed_on = parent.join("cgroup.subtree_control");
        let read = std::fs::read_to_string(&passed_on).map_err(refused("read", &passed_on))?;
        if !has_memory(&read) {
            // Fails with EBUSY if processes live in the parent itself.
            let enable = OpenOptions::new().write(true).open(&passed_on).and_then(|file| write(&file, "+memory"));
            enable.map_err(refused("enable the memory controller in", &passed_on))?;
        }
        sweep(parent);
        let path = parent.join(format!("{PREFIX}{}", std::process::id()));
        match std::fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(refused("create the cgroup", &path)(error));
            }
            _ => {}
        }
        let open = |name: &str, write: bool| {
            let file = path.join(name);
            OpenOptions::new().read(!write).write(write).open(&file).map_err(refused("open", &file))
        };
        let entered = (|| {
            let keeper = Keeper::start(roles::CGROUP, path.join("memory.max"), home.join("cgroup.procs"))
                .map_err(|Unopened { path, source }| CgroupError::Refused { step: "open", path, source })?;
            let cgroup = Self {
                path: path.clone(),
                keeper,
                current: open("memory.current", false)?,
                stat: open("memory.stat", false).ok(),
                memory,
                besides,
                written: Mutex::new(0),
                left: AtomicBool::new(false),
            };
            cgroup.raise(memory)?;
            write(&open("cgroup.procs", true)?, &std::process::id().to_string())
                .map_err(refused("move into", &path))?;
            Ok(cgroup)
        })();
        if entered.is_err() {
            // The cgroup is empty. If the move failed, the drop has tried already.
            let _ = std::fs::remove_dir(&path);
        }
        entered
    }

    /// The cgroup's directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Confines the thread that writes to the cgroup's files, now that there are bounds for threads.
    pub fn confine(&self, threads: &Spawner) {
        if let Err(error) = self.keeper.confine(threads.clone()) {
            log::error!("{error}");
        }
    }

    /// Before a grow: makes room for a limit of `limit` bytes.
    ///
    /// # Errors
    /// If the kernel does not take the new maximum; the old one stands.
    pub fn raise(&self, limit: u64) -> Result<(), CgroupError> {
        self.set(|written, wanted| (wanted > written).then_some(wanted), limit)
    }

    /// After a shrink, and repeatedly until it succeeds: gives up the room that `limit` bytes leave
    /// unused, provided that what is in use now fits into the rest.
    ///
    /// # Errors
    /// If the kernel does not take the new maximum; the old one stands.
    pub fn lower(&self, limit: u64) -> Result<(), CgroupError> {
        let fits = |wanted| self.read_current().is_ok_and(|current| current <= wanted);
        self.set(|written, wanted| (wanted < written && fits(wanted)).then_some(wanted), limit)
    }

    fn set(&self, choose: impl FnOnce(u64, u64) -> Option<u64>, limit: u64) -> Result<(), CgroupError> {
        let mut written = lock(&self.written);
        let Some(bytes) = choose(*written, maximum(limit, self.memory, self.besides)) else { return Ok(()) };
        self.keeper.set_max(bytes).map_err(|source| CgroupError::Refused {
            step: "set the memory.max of",
            path: self.path.clone(),
            source,
        })?;
        *written = bytes;
        log::debug!("memory.max of {} is {}", self.path.display(), Bytes(bytes));
        Ok(())
    }

    /// The maximum, and what is in use.
    ///
    /// # Errors
    /// The kernel does not report them.
    pub fn usage(&self) -> io::Result<Usage> {
        let max = *lock(&self.written);
        Ok(Usage { path: self.path.clone(), max, current: self.read_current()? })
    }

    /// Bytes of page tables in it, the kernel's for this process and, where it counts those (Linux 6.0), the
    /// hypervisor's for the guest; `None` where it does not say.
    #[must_use]
    pub fn page_tables(&self) -> Option<u64> {
        // Some forty lines of a name and a number.
        let mut text = [0; 4096];
        let length = self.stat.as_ref()?.read_at(&mut text, 0).ok()?;
        page_tables(str::from_utf8(&text[..length]).ok()?)
    }

    /// Moves this process back to where it came from and removes the cgroup. Further calls do nothing.
    pub fn leave(&self) {
        if self.left.swap(true, Ordering::AcqRel) {
            return;
        }
        // A cgroup with a process in it cannot be removed.
        if let Err(error) = self.keeper.go_home().and_then(|()| remove(&self.path)) {
            log::warn!(
                "the cgroup {} could not be removed: {error}; the next VM that gets a cgroup beside it will remove it",
                self.path.display()
            );
        }
    }

    fn read_current(&self) -> io::Result<u64> {
        let mut text = [0; 32];
        let length = self.current.read_at(&mut text, 0)?;
        let number = str::from_utf8(&text[..length]).ok().and_then(|text| text.trim().parse().ok());
        number.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "memory.current is not a number"))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Removes a cgroup that this process has left. On some kernels one of KVM's own threads is in it
/// until the VM is gone, and that thread takes a moment to exit.
fn remove(path: &Path) -> io::Result<()> {
    let mut tries = 0;
    loop {
        match std::fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && tries < BUSY_TRIES => tries += 1,
            other => return other,
        }
        std::thread::sleep(BUSY_PAUSE);
    }
}

fn write(file: &File, text: &str) -> io::Result<()> {
    faults::point(faults::CGROUP_WRITE)?;
    file.write_all_at(text.as_bytes(), 0)
}

/// The maximum for a limit.
fn maximum(limit: u64, memory: u64, besides: u64) -> u64 {
    limit.saturating_add(besides).saturating_add(FIXED_ALLOWANCE + memory / BYTES_PER_ALLOWANCE)
}

/// The page tables in a `memory.stat`.
fn page_tables(stat: &str) -> Option<u64> {
    let field = |name| {
        let line = stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|number| number.parse::<u64>().ok())
    };
    Some(field("pagetables")?.saturating_add(field("sec_pagetables").unwrap_or(0)))
}

fn has_memory(controllers: &str) -> bool {
    controllers.split_whitespace().any(|name| name == "memory")
}

/// The directory of the cgroup that this process is in.
fn own_cgroup() -> io::Result<PathBuf> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, "this process is not in a v2 cgroup");
    let mount = parse_cgroup2_mount(&std::fs::read_to_string("/proc/self/mountinfo")?).ok_or_else(missing)?;
    let groups = std::fs::read_to_string("/proc/self/cgroup")?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/")).ok_or_else(missing)?;
    Ok(if path.is_empty() { mount } else { mount.join(path) })
}

/// Removes the cgroups that killed VMs left behind. One that still has a process cannot be removed.
fn sweep(parent: &Path) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse::<u32>().ok());
        // A live process may be about to enter.
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            match std::fs::remove_dir(entry.path()) {
                Ok(()) => log::info!("removed {}, which a killed VM left behind", entry.path().display()),
                Err(error) => log::debug!("{} stays: {error}", entry.path().display()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory that looks like a cgroup, with one below it for this process. The kernel creates these
    /// files itself; what it does with them is tested by `cli/tests/cgroup.rs` where possible.
    fn tree() -> (tempfile::TempDir, PathBuf) {
        let parent = tempfile::tempdir().expect("a scratch directory");
        let own = parent.path().join(format!("{PREFIX}{}", std::process::id()));
        std::fs::create_dir(&own).expect("scratch");
        for (name, text) in
            [("cgroup.controllers", "cpu memory\n"), ("cgroup.subtree_control", "memory\n"), ("cgroup.procs", "")]
        {
            std::fs::write(parent.path().join(name), text).expect("scratch");
        }
        for (name, text) in [("memory.max", ""), ("memory.current", "1000\n"), ("cgroup.procs", "")] {
            std::fs::write(own.join(name), text).expect("scratch");
        }
        (parent, own)
    }

    fn enter(parent: &Path, memory: u64) -> Result<Cgroup, CgroupError> {
        Cgroup::enter_from(parent, parent, memory, 0)
    }

    fn number(path: &Path) -> u64 {
        std::fs::read_to_string(path).expect("scratch").parse().expect("a number")
    }

    #[test]
    fn the_maximum_rises_before_and_falls_only_when_what_is_in_use_fits() {
        let (parent, own) = tree();
        let cgroup = enter(parent.path(), 1 << 30).expect("it looks like a cgroup");
        let max = own.join("memory.max");
        let allowance = (64 << 20) + (1 << 30) / 128;
        assert_eq!(number(&max), (1 << 30) + allowance);
        assert_eq!(number(&own.join("cgroup.procs")), u64::from(std::process::id()));
        cgroup.raise(1 << 20).expect("nothing to do");
        assert_eq!(number(&max), (1 << 30) + allowance, "raise never lowers");
        std::fs::write(own.join("memory.current"), "999999999\n").expect("scratch");
        cgroup.lower(512 << 20).expect("not yet");
        assert_eq!(number(&max), (1 << 30) + allowance, "too much is in use");
        std::fs::write(own.join("memory.current"), "2000\n").expect("scratch");
        cgroup.lower(512 << 20).expect("now");
        let path = own.clone();
        assert_eq!(cgroup.usage().expect("numbers"), Usage { path, max: (512 << 20) + allowance, current: 2000 });
        assert_eq!(cgroup.page_tables(), None);

        // Nobody but the thread that is for it has a file that could be written to.
        let open = std::fs::read_dir("/proc/self/fd").expect("/proc is mounted").flatten();
        let ours: Vec<PathBuf> = open
            .filter_map(|fd| std::fs::read_link(fd.path()).ok())
            .filter(|file| file.starts_with(parent.path()))
            .collect();
        assert_eq!(ours, [own.join("memory.current")]);
    }

    #[test]
    fn page_tables_of_both_kinds_are_added() {
        assert_eq!(page_tables("anon 7\npagetables 4096\nsec_pagetables 8192\n"), Some(12288));
        assert_eq!(page_tables("anon 7\npagetables 4096\n"), Some(4096));
        assert_eq!(page_tables("anon 7\n"), None);
    }

    #[test]
    fn who_is_gone_is_swept_and_who_lives_stays() {
        let (parent, own) = tree();
        let stale = parent.path().join(format!("{PREFIX}4194305"));
        let foreign = parent.path().join("llfree-vmm-x");
        std::fs::create_dir(&stale).expect("scratch");
        std::fs::create_dir(&foreign).expect("scratch");
        sweep(parent.path());
        assert!(!stale.exists() && own.exists() && foreign.exists());
    }

    #[test]
    fn what_is_no_cgroup_is_refused_with_its_path() {
        let (parent, _) = tree();
        let error = enter(Path::new("/nonexistent/cgroup"), 1).expect_err("it is not there");
        assert!(error.to_string().contains("/nonexistent/cgroup is not a cgroup v2"), "{error}");
        std::fs::write(parent.path().join("cgroup.controllers"), "cpu memoryless\n").expect("scratch");
        let error = enter(parent.path(), 1).expect_err("no controller");
        assert!(matches!(error, CgroupError::NoMemoryController { .. }), "{error}");
    }

    #[test]
    fn the_sum_never_wraps() {
        assert_eq!(maximum(u64::MAX, u64::MAX, u64::MAX), u64::MAX);
    }
}
