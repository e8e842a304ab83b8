//! Why a text does not name a kind of elastic memory, why a VM cannot have its device, and why a resize
//! was refused. Each error says what was asked for, what is available, and what to write instead.

use super::offers::Need;
use llfree_base::units::Bytes;
use llfree_monitor::MonitorError;
use llfree_monitor::memory::HOLE_START;
use std::io;

/// Why a text is not an [`Elastic`](super::Elastic).
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ElasticError {
    /// No such kind.
    #[error("unknown kind '{0}'; use llfree, balloon, balloon-huge, virtio-mem or none")]
    Kind(String),
    /// No such option for this kind.
    #[error("'{option}' is not an option of {kind}, which has {has}")]
    Option {
        /// The text as written.
        option: String,
        /// The kind that it was given for.
        kind: &'static str,
        /// The options that the kind has.
        has: &'static str,
    },
    /// An option that was set before.
    #[error("'{0}' is set twice")]
    Twice(String),
    /// Neither on nor off.
    #[error("'{0}' is neither on nor off")]
    Switch(String),
    /// Not a state to start in.
    #[error(
        "start: '{0}' is neither evicted (the default: memory comes as the guest needs it) nor installed (all of it at once)"
    )]
    Start(String),
    /// Not a time.
    #[error("stats: {0}; give a time of 10ms or more, or off")]
    Stats(String),
    /// Not a size.
    #[error("boot: {0}")]
    Boot(String),
}

/// Why a VM cannot have such a device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// hugetlb pages cannot be discarded 4 KiB at a time.
    #[error("a balloon of 4 KiB pages cannot free hugetlb memory")]
    SmallPagesOfHugetlb,
    /// Nothing is left for virtio-mem.
    #[error("virtio-mem leaves the first {boot} alone (boot=), and the VM has only {memory}")]
    BootTooLarge {
        /// The boot part.
        boot: Bytes,
        /// All of RAM.
        memory: Bytes,
    },
    /// The guest's image would be unplugged.
    #[error("the guest's image ends at {end}, past virtio-mem's boot part of {boot}; use a larger boot=")]
    BootTooSmall {
        /// Where the image ends.
        end: Bytes,
        /// The boot part.
        boot: Bytes,
    },
    /// The hole below 4 GiB lies in the device's region.
    #[error(
        "virtio-mem's region after the boot part of {boot} would contain the hole below 4 GiB; \
         use boot= with at most {most}, and a hole right after it",
        most = Bytes(HOLE_START)
    )]
    RegionInParts {
        /// The boot part.
        boot: Bytes,
    },
    /// The guest lacks what this way of moving memory needs.
    #[error("{kind} needs {need}, which {guest} does not have; use {instead}")]
    Unmet {
        /// The way.
        kind: &'static str,
        /// What it needs.
        need: Need,
        /// The kind of guest.
        guest: &'static str,
        /// What that guest supports.
        instead: String,
    },
    /// The boot part does not fit below the hole.
    #[error("virtio-mem's boot part of {boot} would reach into the hole below 4 GiB; use boot= with at most {most}")]
    BootAboveHole {
        /// The boot part.
        boot: Bytes,
        /// The most that fits.
        most: Bytes,
    },
    /// Linux would not get through its boot.
    #[error(
        "virtio-mem's boot part of {boot} is too small for Linux, which keeps in it what it knows about the pages \
         of the other {region}; use boot={mib}M or more",
        mib = least.0 >> 20
    )]
    BootTooSmallForLinux {
        /// The boot part.
        boot: Bytes,
        /// The rest.
        region: Bytes,
        /// The least that would do.
        least: Bytes,
    },
    /// Linux could add none of it.
    #[error("virtio-mem's region of {region} is less than one block of {least}, the unit in which Linux adds memory")]
    RegionTooSmall {
        /// The memory after the boot part.
        region: Bytes,
        /// The size of a block.
        least: Bytes,
    },
    /// More pages than a balloon can count.
    #[error("a balloon counts pages in 32 bits, and {0} has more")]
    TooManyPages(Bytes),
    /// The host has no events or threads to give.
    #[error("the host could not create a device's events")]
    Host(#[source] io::Error),
}

/// Why a resize was refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ResizeError {
    /// The kind `none`.
    #[error("this VM was launched without elastic memory, so its memory stays as it is")]
    NotElastic,
    /// A reclaim needs the shared table.
    #[error(
        "memory of kind {0} cannot be reclaimed, as the host cannot see which of it is free; shrink the VM instead"
    )]
    NoReclaim(&'static str),
    /// An operation on the shared table of a VM that has none.
    #[error("{what} is impossible with memory of kind {kind}, as the guest shares no table with the host")]
    NoTable {
        /// The requested value.
        what: &'static str,
        /// The kind of VM.
        kind: &'static str,
    },
    /// Automatic reclaim requested and disabled at the same time.
    #[error("automatic reclaim of a balloon is the guest's own reporting of free pages, which reporting=off forbids")]
    ReportingContradicted,
    /// Settings for a scan that does not happen.
    #[error("automatic reclaim of a balloon is the guest's own reporting of free pages, which has no settings")]
    ReportingHasNoSettings,
    /// A device's features are settled when the guest starts.
    #[error("automatic reclaim of a balloon is the guest's own reporting of free pages, which is switched at launch")]
    ReportingAtLaunch,
    /// Below what virtio-mem can unplug.
    #[error("cannot shrink to {target}: the boot part of {boot} always stays with the guest")]
    BelowBoot {
        /// The requested value.
        target: Bytes,
        /// The boot part.
        boot: Bytes,
    },
}

/// Why memory did not move.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// The monitor had to stop a pass.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// This VM cannot do what was asked.
    #[error(transparent)]
    Refused(#[from] ResizeError),
}
