//! How much memory this process can still have before the kernel kills something: what the machine
//! has available, and what each of the cgroups around the process leaves.
//!
//! Reads `/proc` and the cgroup file systems, version 1 and 2, writes nothing. What a file does not
//! say limits nothing: a number that is missing must not keep anybody from starting.

use crate::kernel_stats::meminfo_bytes;
use std::path::{Path, PathBuf};
use std::{fmt, fs, io};

/// The narrowest of all limits.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Room {
    /// Bytes that can be had without swapping, now.
    pub available: u64,
    /// What leaves no more than that.
    pub available_in: Place,
    /// Bytes that there are in all, used or not.
    pub total: u64,
    /// What has no more than that.
    pub total_in: Place,
}

/// What limits memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// The machine.
    Host,
    /// A cgroup, by its directory.
    Cgroup(PathBuf),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("the host"),
            Self::Cgroup(path) => write!(f, "the cgroup {}", path.display()),
        }
    }
}

impl Room {
    /// The room of this process, now.
    ///
    /// # Errors
    /// `/proc` is not mounted.
    pub fn now() -> io::Result<Self> {
        let mut room = Self {
            available: meminfo_bytes("MemAvailable")?,
            available_in: Place::Host,
            total: meminfo_bytes("MemTotal")?,
            total_in: Place::Host,
        };
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        for hierarchy in hierarchies(&mounts, &groups) {
            room.narrow(&hierarchy);
        }
        Ok(room)
    }

    /// Takes into account the cgroup that a process is in and all above it.
    fn narrow(&mut self, Hierarchy { mount, group, files }: &Hierarchy) {
        let group = group.trim_start_matches('/');
        // A container may see its own group at the mount point, under a path that is not there.
        let own = Some(mount.join(group)).filter(|own| own.is_dir()).unwrap_or_else(|| mount.clone());
        for dir in own.ancestors().take_while(|dir| dir.starts_with(mount)) {
            let Some(limit) = number(&dir.join(files.limit)) else { continue };
            let used = number(&dir.join(files.used)).unwrap_or(0);
            // Files that were read and may be dropped count as used.
            let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
            let droppable = stat.lines().find_map(|line| line.strip_prefix(files.droppable)?.trim().parse().ok());
            let left = limit.saturating_sub(used.saturating_sub(droppable.unwrap_or(0)));
            if left < self.available {
                (self.available, self.available_in) = (left, Place::Cgroup(dir.to_owned()));
            }
            if limit < self.total {
                (self.total, self.total_in) = (limit, Place::Cgroup(dir.to_owned()));
            }
        }
    }
}

/// A mounted tree of cgroups that limits memory, and where in it a process is.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Hierarchy {
    mount: PathBuf,
    group: String,
    files: &'static Files,
}

/// How a version of cgroups calls its files.
#[derive(PartialEq, Eq, Debug)]
struct Files {
    limit: &'static str,
    used: &'static str,
    droppable: &'static str,
}

const V1: Files =
    Files { limit: "memory.limit_in_bytes", used: "memory.usage_in_bytes", droppable: "total_inactive_file " };
const V2: Files = Files { limit: "memory.max", used: "memory.current", droppable: "inactive_file " };

/// The hierarchies of version 1 and 2 in the words of `/proc/self/mountinfo` and `/proc/self/cgroup`.
fn hierarchies(mounts: &str, groups: &str) -> Vec<Hierarchy> {
    let group = |is_it: &dyn Fn(&str, &str) -> bool| {
        groups.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (number, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            is_it(number, controllers).then(|| path.to_owned())
        })
    };
    let known = |line: &str| {
        // Mount id, parent, device, root, mount point, options, tags ... - type, source, options.
        let (mount, kind) = line.split_once(" - ")?;
        let mount = PathBuf::from(mount.split(' ').nth(4)?);
        let mut kind = kind.split(' ');
        let (kind, options) = (kind.next()?, kind.nth(1)?);
        let has_memory = |list: &str| list.split(',').any(|name| name == "memory");
        let (group, files) = match kind {
            "cgroup2" => (group(&|number, controllers| number == "0" && controllers.is_empty())?, &V2),
            "cgroup" if has_memory(options) => (group(&|_, controllers| has_memory(controllers))?, &V1),
            _ => return None,
        };
        Some(Hierarchy { mount, group, files })
    };
    mounts.lines().filter_map(known).collect()
}

/// The number in a file; `None` for `max`, and where there is no such file.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wide() -> Room {
        Room { available: 1 << 40, available_in: Place::Host, total: 1 << 41, total_in: Place::Host }
    }

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let mount = tempfile::tempdir().expect("a scratch directory");
        for (path, text) in files {
            let path = mount.path().join(path);
            fs::create_dir_all(path.parent().expect("inside the mount")).expect("scratch");
            fs::write(path, text).expect("scratch");
        }
        mount
    }

    #[test]
    fn the_narrowest_of_all_cgroups_above_counts() {
        let mount = tree(&[
            ("a/memory.max", "1000\n"),
            ("a/memory.current", "900\n"),
            ("a/memory.stat", "anon 7\ninactive_file 300\nslab 9\n"),
            ("a/b/memory.max", "500\n"),
            ("a/b/memory.current", "50\n"),
            ("a/b/c/memory.max", "max\n"),
        ]);
        let mut room = wide();
        room.narrow(&Hierarchy { mount: mount.path().to_owned(), group: "/a/b/c".to_owned(), files: &V2 });
        let place = |path: &str| Place::Cgroup(mount.path().join(path));
        assert_eq!((room.available, room.available_in), (400, place("a")), "files that may go are no use");
        assert_eq!((room.total, room.total_in), (500, place("a/b")));
    }

    #[test]
    fn what_no_file_says_limits_nothing() {
        let mount = tree(&[("memory.limit_in_bytes", "9223372036854771712\n"), ("x/memory.limit_in_bytes", "what\n")]);
        let mut room = wide();
        room.narrow(&Hierarchy { mount: mount.path().to_owned(), group: "/x".to_owned(), files: &V1 });
        room.narrow(&Hierarchy { mount: mount.path().to_owned(), group: "/gone".to_owned(), files: &V1 });
        assert_eq!(room, wide());
    }

    #[test]
    fn both_versions_are_found_among_the_mounts() {
        let mounts = "31 24 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
             30 24 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
             32 24 0:28 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw\n";
        let groups = "4:cpu:/no\n3:memory,x:/in/it\n0::/two\n";
        let found = hierarchies(mounts, groups);
        let expected = [("/sys/fs/cgroup/memory", "/in/it", &V1), ("/sys/fs/cgroup/unified", "/two", &V2)];
        let expected = expected.map(|(mount, group, files)| Hierarchy {
            mount: PathBuf::from(mount),
            group: group.to_owned(),
            files,
        });
        assert_eq!(found, expected);
        assert_eq!(hierarchies("x\n - \n", "0::"), []);
    }

    #[test]
    fn this_process_has_room() {
        let room = Room::now().expect("/proc is mounted");
        assert!(room.available > 0 && room.available <= room.total, "{room:?}");
    }
}
