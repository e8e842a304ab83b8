//! [`StatusReport`]: everything known about a running VM, part by part.
//!
//! Marked fields are metrics: a [walk](llfree_base::metrics::walk) over a status visits all of its
//! numbers, except for the process id, the indices of vCPUs and what is counted by duration, under their paths in the
//! JSON. The counters of parts are declared in [`llfree_base::counters`].

use super::words::{ChosenBy, ElasticKind, Enforcement, GuestSays, HandOver, VcpuState, VmState, Word};
use llfree_base::choices::{Backing, OnViolation};
use llfree_base::counters::{
    AgentCounts, BalloonCounts, CallCounts, DiskCounts, DoorbellCounts, DriverCounts, ExitCounts, FrameCounts,
    MemCounts, MonitorCounts, SupplyCounts,
};
use llfree_base::histogram::DurationCounts;
use llfree_base::metered;
use serde::{Deserialize, Serialize};

metered! {
    /// All numbers about a VM. "Of the kernel" means: by the host kernel's accounting.
    #[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
    #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
    pub struct StatusReport {
        /// The VM's name.
        pub name: String,
        /// Its process.
        pub pid: u32,
        /// The release that it runs. An older VM does not say.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        pub version: String,
        /// Milliseconds since it started.
        pub uptime_ms: u64 => gauge,
        /// Whether its guest runs.
        #[serde(default)]
        pub state: Word<VmState>,
        /// For how long it has been paused, in milliseconds, if it is.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub paused_ms: Option<u64> => gauge,
        /// The kind of memory that backs it.
        pub backing: Word<Backing>,
        /// Guest memory at start, in bytes; no limit can be above.
        pub memory_bytes: u64 => gauge,
        /// Memory that the guest may hold now, in bytes.
        pub limit_bytes: u64 => gauge,
        /// Memory that the last resize, a shrink, is still short of, in bytes: the guest is asked for it until the next
        /// resize.
        pub wanted_bytes: u64 => gauge,
        /// The limit that a resize asked for and that is not reached yet, in bytes: it is pursued until it is, or until
        /// another resize replaces it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub target_bytes: Option<u64> => gauge,
        /// For how long that limit has been pursued, in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub target_age_ms: Option<u64> => gauge,
        /// Resident guest memory of the kernel, in bytes, with what the guest touched without asking
        /// and what is taken back while this report is made.
        pub resident_bytes: u64 => gauge,
        /// The part of the resident memory in huge pages, in bytes.
        pub huge_page_bytes: u64 => gauge,
        /// All host memory that the VM costs, in bytes: resident guest memory, the install pool, the VMM, and
        /// page tables. An older VM does not say, which is 0.
        #[serde(default)]
        pub cost_bytes: u64 => gauge,
        /// The page tables for the VM, the kernel's and the hypervisor's, in bytes; the hypervisor's are counted in a
        /// cgroup of the VM's own, else at least what KVM's statistics imply. No limit counts them but that of such a cgroup.
        #[serde(default)]
        pub page_table_bytes: u64 => gauge,
        /// Memory that a shrink took, in bytes; with a device, what its driver gave away.
        pub held_bytes: u64 => gauge,
        /// Memory free in the guest but not backed, in bytes.
        pub evicted_bytes: u64 => gauge,
        /// Memory that is backed by the VMM's own books, in bytes; 0 where it keeps none, as with
        /// a device.
        pub installed_bytes: u64 => gauge,
        /// The source of the guest's figures below.
        #[serde(default)]
        pub guest_says: Word<GuestSays>,
        /// Memory that the guest has allocated, by its own account, in bytes.
        pub guest_used_bytes: Option<u64> => gauge,
        /// Memory that the guest has free, by its own account, in bytes.
        pub guest_free_bytes: Option<u64> => gauge,
        /// Memory that a shrink could take right now, in bytes.
        pub reclaimable_now_bytes: Option<u64> => gauge,
        /// The VMM's resident memory without the guest's and the install pool's, in bytes; of its code, which
        /// all VMMs share, its share.
        pub vmm_overhead_bytes: u64 => gauge,
        /// What the monitor did for the guest, and what the guest did behind its back.
        #[serde(flatten)]
        pub monitor: MonitorCounts => inline,
        /// The mechanism that sees violations.
        pub enforcement: Word<Enforcement>,
        /// The fate of the guest then, with userfaultfd.
        pub on_violation: Word<OnViolation>,
        /// Memory kept ready for installs.
        pub install_pool: InstallPoolStatus => part,
        /// Entries of the shared table that made no sense when the host read them.
        pub corrupt_entries: u64 => gauge,
        /// Calls that were refused.
        #[serde(flatten)]
        pub doorbell: DoorbellCounts => inline,
        /// How long install calls took on the host, whatever became of them.
        #[serde(default)]
        pub install_durations: DurationCounts,
        /// How long resizes took, without the time that a shrink waited for its guest.
        #[serde(default)]
        pub resize_durations: DurationCounts,
        /// The commands that the guest's agent has got, and those that wait for it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub guest_commands: Option<GuestCommandsReport> => part,
        /// Reclaim without being asked.
        pub auto_reclaim: AutoReclaimReport => part,
        /// The VM's own cgroup, if it has one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub cgroup: Option<CgroupStatus> => part,
        /// One a vCPU.
        pub vcpus: Vec<VcpuStatus> => part,
        /// The way that memory is made smaller and larger.
        #[serde(default)]
        pub elastic: ElasticStatus => part,
        /// One a disk.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        pub disks: Vec<DiskStatus> => part,
        /// One a network card.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        pub nets: Vec<NetReport> => part,
        /// The agent in a Linux guest; other guests have none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub agent: Option<LinuxAgentStatus> => part,
        /// One a virtio device.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        pub devices: Vec<DeviceStatus> => part,
    }
}

metered! {
    /// Commands for the guest's agent: one at a time.
    #[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
    #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
    pub struct GuestCommandsReport {
        /// The one at work.
        pub at_work: Option<String>,
        /// For how long, in milliseconds.
        pub age_ms: Option<u64> => gauge,
        /// How many wait behind it.
        pub queued: u64 => gauge,
    }
}

metered! {
    /// A virtio device, as its transport sees it.
    #[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
    #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
    pub struct DeviceStatus {
        /// What it is.
        pub name: String => label,
        /// Whether a driver is at work with it.
        pub driven: bool,
        /// Errors of its driver.
        #[serde(flatten)]
        pub counts: DriverCounts => inline,
    }
}

metered! {
    /// A network card, and what went through it since the VM started.
    #[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
    #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
    pub struct NetReport {
        /// The host's interface.
        pub tap: String => label,
        /// The guest's address.
        pub mac: String => label,
        /// Frames and bytes, both ways.
        pub traffic: NetStatus => part,
    }
}

metered! {
    /// Numbers of a network, for a status.
    #[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
    #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
    pub struct NetStatus {
        /// From the tap to the guest.
        pub to_guest: FrameCounts => part,
        /// From the guest to the tap.
        pub from_guest: FrameCounts => part,
    }
}

metered! {
    /// Messages from an agent, and whether it is there.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
    #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
    pub struct LinuxAgentStatus {
        /// Whether a program in the guest has the port open.
        pub open: bool,
        /// Messages that it sent unasked.
        #[serde(flatten)]
        pub counts: AgentCounts => inline,
        /// Bytes that could not be taken for frames: too many at once, or from no connection.
        pub ignored_bytes: u64 => counter,
    }
}

metered! {
    /// A disk, and what the guest did with it since the VM started.
    #[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
    #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
    pub struct DiskStatus {
        /// The file, as it was given.
        pub path: String => label,
        /// Its size, in bytes.
        pub size_bytes: u64 => gauge,
        /// Whether the guest must not write.
        pub read_only: bool,
        /// The guest's use of it.
        #[serde(flatten)]
        pub counts: DiskCounts => inline,
    }
}

metered! {
    /// The way that the VM's memory is made smaller and larger, and its own figures.
    #[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
    #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
    pub struct ElasticStatus {
        /// In which way.
        pub kind: Word<ElasticKind>,
        /// What decided on that.
        #[serde(default)]
        pub chosen_by: Word<ChosenBy>,
        /// Whether the guest has a driver at work; for `llfree`, whether it shares its table by now.
        pub driven: bool,
        /// Violations of the specification by the guest's driver.
        pub device_errors: u64 => counter,
        /// The balloon, if it is one.
        pub balloon: Option<BalloonStatus> => part,
        /// virtio-mem, if it is that.
        pub mem: Option<MemStatus> => part,
        /// What the guest says beside its table, if it has an allocator of its own.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub table: Option<TableStatus> => part,
    }
}

metered! {
    /// What a guest with an allocator of its own says beside the table, by its own account.
    #[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
    #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
    pub struct TableStatus {
        /// How far it is in handing its memory over.
        #[serde(default)]
        pub hand_over: Word<HandOver>,
        /// Memory that it asks its host to leave free, in bytes.
        pub floor_bytes: u64 => gauge,
        /// Free memory in frames that are not entirely free, in bytes, at most a second old.
        pub fragmented_bytes: u64 => gauge,
        /// Memory that the host holds, and that it has noticed and no longer counts as its own, in bytes.
        pub set_aside_bytes: u64 => gauge,
    }
}

metered! {
    /// A virtio-balloon.
    #[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
    #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
    pub struct BalloonStatus {
        /// Its target size, in bytes.
        pub target_bytes: u64 => gauge,
        /// Its size by the device's own books, in bytes.
        pub inflated_bytes: u64 => gauge,
        /// Its size according to the driver, in bytes.
        pub claimed_bytes: u64 => gauge,
        /// The guest's use of it.
        #[serde(flatten)]
        pub counts: BalloonCounts => inline,
        /// Whether the driver may take pages back when the guest is out of memory.
        #[serde(default)]
        pub deflates_on_oom: bool,
        /// The guest's statistics, if it sent some; by its own account.
        pub guest: Option<GuestStatsReport> => part,
    }
}

metered! {
    /// A guest's report on its memory through the balloon; figures that it leaves out are absent.
    #[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
    #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
    pub struct GuestStatsReport {
        /// Milliseconds since it said so.
        pub age_ms: u64 => gauge,
        /// Whether that is too long ago to be true now: it no longer answers.
        #[serde(default)]
        pub stale: bool,
        /// Memory that nobody uses, in bytes.
        pub free_bytes: Option<u64> => gauge,
        /// Memory that could be used without swapping, in bytes.
        pub available_bytes: Option<u64> => gauge,
        /// All of its memory, in bytes.
        pub total_bytes: Option<u64> => gauge,
        /// Disk caches, in bytes.
        pub cache_bytes: Option<u64> => gauge,
        /// Page faults that needed the disk.
        pub major_faults: Option<u64> => counter,
        /// Page faults that did not need the disk.
        pub minor_faults: Option<u64> => counter,
    }
}

metered! {
    /// A virtio-mem device.
    #[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
    #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
    pub struct MemStatus {
        /// The part of RAM that is always the guest's, in bytes.
        pub boot_bytes: u64 => gauge,
        /// The part of the rest that is to be plugged, in bytes.
        pub requested_bytes: u64 => gauge,
        /// The part that is plugged, in bytes.
        pub plugged_bytes: u64 => gauge,
        /// Requests of its driver.
        #[serde(flatten)]
        pub counts: MemCounts => inline,
    }
}

metered! {
    /// Memory kept ready for installs.
    #[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
    #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
    pub struct InstallPoolStatus {
        /// Its size at most, in bytes; 0 without a pool.
        pub size_bytes: u64 => gauge,
        /// The size that it is kept at, in bytes: 0 while the guest hardly installs anything.
        #[serde(default)]
        pub goal_bytes: u64 => gauge,
        /// Its size now, in bytes: host memory besides the guest's.
        pub resident_bytes: u64 => gauge,
        /// The sources of memory for installs.
        #[serde(flatten)]
        pub counts: SupplyCounts => inline,
    }
}

metered! {
    /// The memory cgroup of a VM.
    #[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
    #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
    pub struct CgroupStatus {
        /// Its directory.
        pub path: String => label,
        /// The memory it allows the whole process, in bytes.
        pub memory_max_bytes: u64 => gauge,
        /// The memory in use in it, in bytes.
        pub memory_current_bytes: u64 => gauge,
    }
}

metered! {
    /// The state of automatic reclaim.
    #[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
    #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
    pub struct AutoReclaimReport {
        /// Whether it runs.
        pub on: bool,
        /// Its settings as the command line takes them, if it runs.
        pub settings: Option<String>,
        /// Memory that it took back since the VM started, in bytes.
        pub evicted_bytes: u64 => counter,
        /// Scans since the VM started.
        pub scans: u64 => counter,
        /// Milliseconds since the last scan.
        pub last_scan_ms_ago: Option<u64> => gauge,
        /// Free memory that the host still pays for, at the last scan, in bytes.
        pub free_bytes: u64 => gauge,
        /// The part of that free memory which stays with the guest, in bytes.
        pub headroom_bytes: u64 => gauge,
        /// The part of the headroom that recent installs called for, in bytes.
        pub back_off_bytes: u64 => gauge,
    }
}

metered! {
    /// One vCPU.
    #[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
    #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
    pub struct VcpuStatus {
        /// Its number, from 0.
        pub index: u32,
        /// Why it left the guest, and how often.
        pub exits: ExitCounts => part,
        /// What it called for.
        #[serde(flatten)]
        pub counts: CallCounts => inline,
        /// Its current state.
        pub state: Word<VcpuState>,
    }
}
