//! [`LinuxError`]: why a Linux kernel does not come up.

use llfree_base::units::Bytes;
use std::fmt;

/// Why a kernel image does not get to its first instruction.
#[derive(Debug, thiserror::Error)]
pub enum LinuxError {
    /// The file ends early.
    #[error(
        "{name} is a Linux {format} that was cut off: it has {bytes} bytes, its header needs {needed}; copy it again"
    )]
    Cut {
        /// The image.
        name: String,
        /// `bzImage` or `ELF kernel`.
        format: &'static str,
        /// Its size.
        bytes: u64,
        /// The size it should have.
        needed: u64,
    },
    /// Older or smaller than what can be started in 64-bit mode.
    #[error("{name} is a bzImage without {lacks}; use a 64-bit x86 kernel of Linux 3.8 or newer")]
    TooOld {
        /// The image.
        name: String,
        /// The missing feature.
        lacks: &'static str,
    },
    /// A header that contradicts itself.
    #[error("{name} is not a Linux kernel that can be started: {what}")]
    Malformed {
        /// The image.
        name: String,
        /// The reason.
        what: String,
    },
    /// RAM is too small.
    #[error("{name} and its initrd need {needed} of memory below 3 GiB, but there is only {memory}")]
    TooSmall {
        /// The image.
        name: String,
        /// The memory it needs, rounded up.
        needed: Bytes,
        /// The memory available.
        memory: Bytes,
    },
    /// The boot part of virtio-mem is too small.
    #[error(
        "{name} and its initrd need {needed} of memory, and virtio-mem's boot part has {memory}; use a larger boot="
    )]
    BootTooSmall {
        /// The image.
        name: String,
        /// The memory it needs, rounded up.
        needed: Bytes,
        /// The memory available.
        memory: Bytes,
    },
    /// Too many characters.
    #[error(
        "the kernel's command line has {bytes} characters with those added for this VM, but the kernel takes at most \
         {limit}"
    )]
    CommandLineLength {
        /// Its length, with what is added.
        bytes: usize,
        /// The kernel's limit.
        limit: usize,
    },
    /// Characters that a command line cannot have.
    #[error("the kernel's command line must be printable ASCII")]
    CommandLine {
        /// The reason.
        source: linux_loader::cmdline::Error,
    },
    /// The initrd cannot be read.
    #[error("cannot read the initrd {path}")]
    Initrd {
        /// Its path.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The initrd is not a file, or is empty.
    #[error("the initrd {path} is {what}; give a file with an initial RAM file system")]
    NoInitrd {
        /// Where.
        path: String,
        /// What was found there.
        what: &'static str,
    },
    /// The initrd does not fit into any machine.
    #[error("the initrd has {bytes} bytes, but {name} takes at most {limit}")]
    InitrdTooLarge {
        /// The image.
        name: String,
        /// The initrd's size.
        bytes: u64,
        /// What fits between the kernel's end and the highest address that it accepts for one.
        limit: Bytes,
    },
    /// Something only Linux guests take, given for another guest.
    #[error("{what} is only for Linux guests, and {guest} is not one")]
    NotLinux {
        /// The option that was given.
        what: LinuxOnly,
        /// The guest that is launched instead.
        guest: String,
    },
    /// KVM without hardware virtualization.
    #[error(
        "{name} is a Linux kernel, which runs in ring 0, and this machine's KVM cannot run ring 0 natively: its CPU \
         offers neither VMX nor SVM (a KVM such as PVM interprets ring-0 code, thousands of times slower, and \
         stops at many instructions); run it on a host with VMX or SVM, or try the test bed, images/linux/testbed"
    )]
    NoRing0 {
        /// The image.
        name: String,
    },
    /// More vCPUs than the tables describe.
    #[error("{asked} vCPUs were requested, but a Linux guest has 1 to {limit}")]
    Cpus {
        /// The requested value.
        asked: u32,
        /// The highest number.
        limit: u32,
    },
    /// More devices than there are interrupt lines.
    #[error("{asked} devices were requested, but a Linux guest has at most {limit}")]
    Devices {
        /// Devices, including those that are always there.
        asked: usize,
        /// The most there can be.
        limit: usize,
    },
    /// Guest memory refused a write.
    #[error("the kernel cannot be copied into guest memory")]
    Load(#[source] linux_loader::loader::Error),
    /// Guest memory refused a write.
    #[error("boot data cannot be copied into guest memory")]
    Write(#[from] vm_memory::GuestMemoryError),
}

/// What only a Linux guest takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinuxOnly {
    /// An initial RAM file system.
    Initrd,
    /// A kernel's command line.
    CommandLine,
    /// A disk.
    Disk,
    /// A network card.
    Net,
}

impl fmt::Display for LinuxOnly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Initrd => "an initrd",
            Self::CommandLine => "a kernel command line",
            Self::Disk => "a disk",
            Self::Net => "a network card",
        })
    }
}
