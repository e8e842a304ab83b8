//! [`Needs`]: what of the file system a process needs after its start.

use std::path::Path;

/// The parts of the file system that are needed after the start.
#[derive(Clone, Copy, Default, Debug)]
pub struct Needs<'a> {
    /// The directory that a socket must be removed from.
    pub socket_dir: Option<&'a Path>,
    /// The VM's own cgroup.
    pub cgroup: Option<&'a Path>,
    /// The directory that the file with the process id must be removed from.
    pub pid_dir: Option<&'a Path>,
    /// The directory that the log is opened in again, after somebody moved it away.
    pub log_dir: Option<&'a Path>,
    /// The directory that the file of metrics is exchanged in, again and again.
    pub metrics_dir: Option<&'a Path>,
    /// The directory that the socket of metrics must be removed from.
    pub metrics_socket_dir: Option<&'a Path>,
}

impl<'a> Needs<'a> {
    /// The directories in which files are made or removed later.
    pub(crate) fn changed_dirs(&self) -> impl Iterator<Item = &'a Path> {
        [self.socket_dir, self.pid_dir, self.log_dir].into_iter().flatten().map(named)
    }
}

/// A directory by a name that has one: the parent of a mere file name is the empty path.
pub(crate) fn named(dir: &Path) -> &Path {
    if dir.as_os_str().is_empty() { Path::new(".") } else { dir }
}
