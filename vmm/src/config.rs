//! [`VmConfig`]: what to launch.

use crate::boot::{Image, Initrd};
use crate::devices::blk::DiskConfig;
use crate::devices::net::NetConfig;
use crate::elastic::{Elastic, Need};
use llfree_base::thread::Spawner;
use llfree_base::units::Bytes;
use llfree_monitor::OnViolation;
use llfree_monitor::install_config::{InstallConfig, InstallConfigError};
use llfree_monitor::memory::{Backing, PoolConfig, UseUserfaultfd};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What to launch.
#[derive(Clone, Default, Debug)]
pub struct VmConfig {
    /// RAM in bytes, a non-zero multiple of 2 MiB.
    pub memory: Bytes,
    /// vCPUs.
    pub cpus: u32,
    /// What backs RAM.
    pub backing: Backing,
    /// What to run instead of the embedded guest.
    pub kernel: Option<Arc<Image>>,
    /// Host cores for the vCPUs' threads, assigned in turn; empty means any core.
    pub pin: Vec<u32>,
    /// How frames get their memory, and what holds the guest to its limit.
    pub install: InstallConfig,
    /// How the VM's memory is made smaller and larger.
    pub elastic: Elastic,
    /// Settings for Linux guests only.
    pub linux: LinuxConfig,
    /// Starts the VM's threads, each with its own rights.
    pub threads: Spawner,
}

/// What a Linux guest gets besides memory and CPUs.
#[derive(Clone, Default, Debug)]
pub struct LinuxConfig {
    /// Its initial RAM file system.
    pub initrd: Option<Arc<Initrd>>,
    /// Its command line, to which the VMM adds a few parameters.
    pub command_line: String,
    /// Where its console's output goes; nowhere by default.
    pub console: Option<Arc<OwnedFd>>,
    /// Its disks, in order.
    pub disks: Vec<DiskConfig>,
    /// Its network cards, in order.
    pub nets: Vec<NetConfig>,
}

impl VmConfig {
    /// Where frames get their memory from, what a violation leads to, and whether a userfaultfd detects it.
    ///
    /// # Errors
    /// Choices that exclude each other. What somebody chose must be possible whatever the guest turns out to have.
    pub fn supply(&self) -> Result<(PoolConfig, OnViolation, UseUserfaultfd), InstallConfigError> {
        let way = self.elastic.way();
        let is_tracked = way.needs() == Need::Table;
        if way.may_leave_table() {
            self.install.resolve(self.memory, self.backing, false)?;
        }
        self.install.resolve(self.memory, self.backing, is_tracked)
    }

    /// Frees what the guest has in its own memory by now, so that the host does not pay twice.
    pub(crate) fn forget_contents(&mut self) {
        if let Some(rest) = self.kernel.as_ref().and_then(|image| image.without_contents()) {
            self.kernel = Some(Arc::new(rest));
        }
        self.linux.initrd = None;
    }

    /// The built-in guest, with defaults for everything else.
    #[must_use]
    pub fn new(memory: Bytes, cpus: u32, backing: Backing) -> Self {
        Self { memory, cpus, backing, ..Self::default() }
    }
}
