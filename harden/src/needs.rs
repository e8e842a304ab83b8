//! [`Needs`]: what of the file system a process needs after its start.

use std::path::Path;

/// The parts of the file system that are needed after the start.
#[derive(Clone, Copy, Default, Debug)]
pub struct Needs<'a> {
    /// The directory that a socket must be removed from.
    pub socket_dir: Option<&'a Path>,
    /// The VM's own cgroup.
    pub cgroup: Option<&'a Path>,
}
