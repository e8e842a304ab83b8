//! Why a text is no kind of elastic memory, a VM has no device for it, or a resize was refused. Each says
//! what was asked for, what there is, and what to write instead.

use super::offers::Need;
use llfree_base::units::Bytes;
use llfree_monitor::MonitorError;
use llfree_monitor::memory::HOLE_START;
use std::io;

/// Why a text is no [`Elastic`](super::Elastic).
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ElasticError {
    /// No such kind.
    #[error("unknown kind '{0}'; use llfree, balloon, balloon-huge, virtio-mem or none")]
    Kind(String),
    /// No such option for this kind.
    #[error("'{option}' is no option of {kind}; it has {has}")]
    Option {
        /// What was written.
        option: String,
        /// The kind before it.
        kind: &'static str,
        /// What there is.
        has: &'static str,
    },
    /// An option that was there before.
    #[error("'{0}' is set twice")]
    Twice(String),
    /// Neither on nor off.
    #[error("'{0}' is neither on nor off")]
    Switch(String),
    /// No time.
    #[error("stats: {0}; it is a time of 10ms or more, or off")]
    Stats(String),
    /// No size.
    #[error("boot: {0}")]
    Boot(String),
}

/// Why a VM has no such device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Pages cannot be discarded one by one.
    #[error("a balloon of 4 KiB pages frees nothing of hugetlb memory; use balloon-huge, or another --backing")]
    SmallPagesOfHugetlb,
    /// Nothing is left for virtio-mem.
    #[error("virtio-mem leaves the first {boot} alone, and the VM has {memory}; use more --mem, or boot= with less")]
    BootTooLarge {
        /// The boot part.
        boot: Bytes,
        /// All of RAM.
        memory: Bytes,
    },
    /// The guest's image would be unplugged.
    #[error("the guest's image ends at {end}, behind virtio-mem's boot part of {boot}; use boot= with more")]
    BootTooSmall {
        /// Where the image ends.
        end: Bytes,
        /// The boot part.
        boot: Bytes,
    },
    /// The hole below 4 GiB lies in the device's region.
    #[error(
        "virtio-mem's region behind the boot part of {boot} would have the hole below 4 GiB in it; \
         use boot= with at most {most}, and a hole right behind it",
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
        /// The most there is.
        most: Bytes,
    },
    /// Linux would not get through its start.
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
        /// What would do.
        least: Bytes,
    },
    /// Linux could add none of it.
    #[error(
        "virtio-mem's region of {region} is less than one block of {least}, the unit in which Linux adds memory; \
         use more --mem, or boot= with less"
    )]
    RegionTooSmall {
        /// What lies behind the boot part.
        region: Bytes,
        /// A block.
        least: Bytes,
    },
    /// More pages than a balloon can count.
    #[error("a balloon counts pages in 32 bits, and {0} has more; use less --mem")]
    TooManyPages(Bytes),
    /// The host has no events or threads to give.
    #[error("the host could not make a device's events")]
    Host(#[source] io::Error),
}

/// Why a resize was refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ResizeError {
    /// `--elastic none`.
    #[error("this VM was started with --elastic none, so its memory stays as it is; launch it with another kind")]
    NotElastic,
    /// A reclaim needs the shared table.
    #[error("there is no reclaim with --elastic {0}: the host cannot see which memory is free; shrink the VM instead")]
    NoReclaim(&'static str),
    /// What looks at the shared table has none to look at.
    #[error("{what} needs the table that the guest shares with the host, and --elastic {kind} has none")]
    NoTable {
        /// What was asked for.
        what: &'static str,
        /// The kind of VM.
        kind: &'static str,
    },
    /// Automatic reclaim asked for and switched off at once.
    #[error(
        "--auto-reclaim on has a balloon's guest report its free pages, and --elastic balloon,reporting=off forbids \
         that; leave one of them out"
    )]
    ReportingContradicted,
    /// Settings of a scan that nobody makes.
    #[error(
        "--auto-reclaim with --elastic balloon is the guest's own reporting of free pages, which has no settings; \
         use --auto-reclaim on"
    )]
    ReportingHasNoSettings,
    /// A device's features are settled when the guest starts.
    #[error(
        "automatic reclaim of a balloon is the guest's own reporting of free pages, and is switched at launch: \
         --auto-reclaim on, or --elastic balloon,reporting=on|off"
    )]
    ReportingAtLaunch,
    /// Below what virtio-mem can unplug.
    #[error("cannot shrink to {target}: the boot part of {boot} stays the guest's (--elastic virtio-mem,boot=SIZE)")]
    BelowBoot {
        /// What was asked for.
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
    /// This VM cannot do that.
    #[error(transparent)]
    Refused(#[from] ResizeError),
}
