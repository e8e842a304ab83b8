//! What a VM reports, as it travels in a [`Reply`](crate::protocol::Reply) and as `--json` prints it.
//!
//! Plain data, every field with its unit. "Of the kernel" means: by the host kernel's accounting;
//! "by its own words" means that a guest said so, who may say anything.

use serde::{Deserialize, Serialize};

/// How a shrink or a grow went.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeReport {
    /// The limit that was asked for, in bytes.
    pub target_bytes: u64,
    /// The limit that was reached, in bytes.
    pub actual_bytes: u64,
    /// What a shrink could take right now, in bytes; by a Linux guest's own words, if it says so.
    pub reclaimable_now_bytes: Option<u64>,
    /// Whether the target was reached.
    pub complete: bool,
    /// Why not.
    pub shortfall: Option<Shortfall>,
    /// Huge frames that changed hands.
    pub huge_frames: u64,
    /// Resident memory that went back to the host, in bytes.
    pub freed_bytes: u64,
    /// Spent at it, in microseconds, without the time that a shrink waited for its guest.
    pub duration_us: u64,
    /// That time, in microseconds.
    pub waited_us: u64,
    /// What the guest said of its memory last, where nothing better is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestStatsReport>,
}

/// Why a shrink stopped short of its target.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shortfall {
    /// Memory that the guest has allocated, in bytes, if it says so.
    pub in_use_bytes: Option<u64>,
    /// Free memory in huge frames that are not wholly free, in bytes, if the guest says so.
    pub fragmented_bytes: Option<u64>,
    /// The same as a sentence.
    pub wording: String,
}

/// How a soft reclaim went.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReclaimReport {
    /// Huge frames that lost their memory.
    pub huge_frames: u64,
    /// Resident memory that went back to the host, in bytes.
    pub freed_bytes: u64,
    /// From the request to the result, in microseconds.
    pub duration_us: u64,
}

/// Whether a VM's guest runs.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Its vCPUs and devices do their work.
    #[default]
    Running,
    /// They stand still until a resume.
    Paused,
}

/// How a pause or a resume went.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LifeReport {
    /// What the VM is now.
    pub state: VmState,
    /// Whether it was something else before.
    pub changed: bool,
    /// From the request to the result, in microseconds.
    pub duration_us: u64,
    /// How long it was paused before this, in milliseconds; absent if it ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_ms: Option<u64>,
}

/// What a check of a live VM found.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValidateReport {
    /// Whether nothing was found.
    pub clean: bool,
    /// Huge frames of the VM.
    pub huge_frames: u64,
    /// Huge frames that the host holds.
    pub held: u64,
    /// Huge frames without memory that the guest may ask for.
    pub evicted: u64,
    /// Huge frames with memory.
    pub installed: u64,
    /// One a kind of contradiction.
    pub findings: Vec<FindingReport>,
    /// From the request to the result, in microseconds.
    pub duration_us: u64,
}

/// One kind of contradiction.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FindingReport {
    /// What was compared, as a word.
    pub check: String,
    /// How many frames, or words, are concerned.
    pub count: u64,
    /// The numbers of the first few huge frames.
    pub first_frames: Vec<u32>,
    /// A guest can bring this about by writing or touching what it should not; otherwise it is a
    /// fault of the host.
    pub guest_can_cause: bool,
    /// What it means.
    pub wording: String,
}

/// All numbers about a VM. "Of the kernel" means: by the host kernel's accounting.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StatusReport {
    /// The VM's name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// Milliseconds since it started.
    pub uptime_ms: u64,
    /// Whether its guest runs.
    #[serde(default)]
    pub state: VmState,
    /// For how long it has been paused, in milliseconds, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_ms: Option<u64>,
    /// What its memory is made of: `anon`, `memfd` or `hugetlb`.
    pub backing: String,
    /// Guest memory at start, in bytes; no limit can be above.
    pub memory_bytes: u64,
    /// Memory that the guest may hold now, in bytes.
    pub limit_bytes: u64,
    /// What the last resize, a shrink, still lacks, in bytes: the guest is asked for it until the next
    /// resize, but nobody takes what it frees meanwhile.
    pub wanted_bytes: u64,
    /// Resident guest memory of the kernel, in bytes, with what the guest touched without asking
    /// and what is taken back while this report is made.
    pub resident_bytes: u64,
    /// The part of it in huge pages, in bytes.
    pub huge_page_bytes: u64,
    /// Memory that a shrink took, in bytes; with a device, what its driver gave away.
    pub held_bytes: u64,
    /// Free for the guest, but nothing behind it, in bytes.
    pub evicted_bytes: u64,
    /// Memory with something behind it by the VMM's own books, in bytes; 0 where it keeps none, as with
    /// a device.
    pub installed_bytes: u64,
    /// Where the guest says what follows: in the shared `table`, by `statistics`, or `nowhere`.
    #[serde(default)]
    pub guest_says: GuestSays,
    /// What the guest has allocated, by its own words, in bytes.
    pub guest_used_bytes: Option<u64>,
    /// What the guest has free, by its own words, in bytes.
    pub guest_free_bytes: Option<u64>,
    /// What a shrink could take right now, in bytes.
    pub reclaimable_now_bytes: Option<u64>,
    /// The VMM's resident memory without the guest's and the install pool's, in bytes.
    pub vmm_overhead_bytes: u64,
    /// Frames that got memory on the guest's request.
    pub installs: u64,
    /// Such requests that failed.
    pub install_failures: u64,
    /// Touches of frames that the guest did not have.
    pub violations: u64,
    /// The part of them that hit held frames.
    pub held_violations: u64,
    /// What sees them: `userfaultfd`, in the act, or `audit`, afterwards.
    pub enforcement: String,
    /// What becomes of the guest then, with userfaultfd: `stop`, `install` or `log`.
    pub on_violation: String,
    /// Memory kept ready for installs.
    pub install_pool: InstallPoolStatus,
    /// Entries of the shared table that made no sense when the host read them.
    pub corrupt_entries: u64,
    /// Doorbell calls that were refused.
    pub bad_calls: u64,
    /// Reclaim without being asked.
    pub auto_reclaim: AutoReclaimReport,
    /// The VM's own cgroup, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<CgroupStatus>,
    /// One a vCPU.
    pub vcpus: Vec<VcpuStatus>,
    /// How memory is made smaller and larger.
    #[serde(default)]
    pub elastic: ElasticStatus,
    /// One a disk.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskStatus>,
    /// One a network card.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<NetReport>,
    /// The agent in a Linux guest; other guests have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<LinuxAgentStatus>,
    /// One a virtio device.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceStatus>,
}

/// A virtio device, as its transport sees it.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceStatus {
    /// What it is.
    pub name: String,
    /// Whether a driver is at work with it.
    pub driven: bool,
    /// What its driver did that no driver may do.
    pub errors: u64,
}

/// A network card, and what went through it since the VM started.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetReport {
    /// The host's interface.
    pub tap: String,
    /// The guest's address.
    pub mac: String,
    /// Frames and bytes, both ways.
    pub traffic: NetStatus,
}

/// Numbers of one direction.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrameCounts {
    /// Frames that went through.
    pub frames: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Frames that did not fit: larger than the guest's buffer, or more than the tap takes at a time.
    pub dropped: u64,
    /// Reads and writes of the tap that failed.
    pub errors: u64,
}

/// Numbers of a network, for a status.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetStatus {
    /// From the tap to the guest.
    pub to_guest: FrameCounts,
    /// From the guest to the tap.
    pub from_guest: FrameCounts,
}

/// What an agent sent, and whether it is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinuxAgentStatus {
    /// Whether a program in the guest has the port open.
    pub open: bool,
    /// Reports that came when nobody waited for them any more.
    pub late_reports: u64,
    /// Frames that were no hello and no report on anything that was asked.
    pub garbage_frames: u64,
    /// Bytes that could not be taken for frames: too many at once, or from no connection.
    pub ignored_bytes: u64,
}

/// A disk, and what the guest did with it since the VM started.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskStatus {
    /// The file, as it was given.
    pub path: String,
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// Whether the guest must not write.
    pub read_only: bool,
    /// Reads that succeeded.
    pub reads: u64,
    /// Bytes that they read.
    pub read_bytes: u64,
    /// Writes that succeeded.
    pub writes: u64,
    /// Bytes that they wrote.
    pub written_bytes: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// What was discarded or filled with zeroes, in bytes.
    pub cleared_bytes: u64,
    /// Requests that the host could not carry out.
    pub io_errors: u64,
    /// Requests that made no sense.
    pub refused_requests: u64,
}

/// Where a guest says what it does with its memory.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestSays {
    /// In the table that it shares with the host: true at any moment, if it is honest.
    #[default]
    Table,
    /// By the balloon's statistics: true when they were sent, if it is honest.
    Statistics,
    /// It says nothing, or said so too long ago.
    Nowhere,
}

/// How the VM's memory is made smaller and larger, and what that way knows.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ElasticStatus {
    /// `llfree`, `balloon`, `balloon-huge`, `virtio-mem` or `none`.
    pub kind: String,
    /// Whether the guest has a driver at work; true for `llfree`, which has no device.
    pub driven: bool,
    /// What the guest's driver did that no driver may do.
    pub device_errors: u64,
    /// The balloon, if it is one.
    pub balloon: Option<BalloonStatus>,
    /// virtio-mem, if it is that.
    pub mem: Option<MemStatus>,
}

/// A virtio-balloon.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatus {
    /// How large it shall be, in bytes.
    pub target_bytes: u64,
    /// How large it is by the device's own books, in bytes.
    pub inflated_bytes: u64,
    /// How large the driver says it is, in bytes.
    pub claimed_bytes: u64,
    /// Requests to inflate.
    pub inflate_requests: u64,
    /// Requests to deflate.
    pub deflate_requests: u64,
    /// Runs of pages that were discarded, a system call each.
    pub discards: u64,
    /// What was discarded, in bytes, whether there was memory behind it or not.
    pub discarded_bytes: u64,
    /// Discards that the kernel refused.
    pub failed_discards: u64,
    /// What the guest reported as free, in bytes.
    pub reported_bytes: u64,
    /// Page numbers out of range, or not at the start of a block.
    pub bad_pages: u64,
    /// Pages given twice, or taken back without having been given.
    pub repeated_pages: u64,
    /// Whether the driver may take pages back when the guest is out of memory.
    #[serde(default)]
    pub deflates_on_oom: bool,
    /// The guest's statistics, if it sent some; by its own words.
    pub guest: Option<GuestStatsReport>,
}

/// What a guest says about its memory through the balloon; absent what it does not say.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestStatsReport {
    /// Milliseconds since it said so.
    pub age_ms: u64,
    /// Whether that is too long ago to be true now: it no longer answers.
    #[serde(default)]
    pub stale: bool,
    /// Memory that nobody uses, in bytes.
    pub free_bytes: Option<u64>,
    /// What could be used without swapping, in bytes.
    pub available_bytes: Option<u64>,
    /// All of its memory, in bytes.
    pub total_bytes: Option<u64>,
    /// Disk caches, in bytes.
    pub cache_bytes: Option<u64>,
    /// Page faults that needed the disk.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
}

/// A virtio-mem device.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemStatus {
    /// The part of RAM that is always the guest's, in bytes.
    pub boot_bytes: u64,
    /// How much of the rest shall be plugged, in bytes.
    pub requested_bytes: u64,
    /// How much of it is, in bytes.
    pub plugged_bytes: u64,
    /// Requests to plug that were granted.
    pub plug_requests: u64,
    /// All other requests that were granted.
    pub other_requests: u64,
    /// Requests that were refused.
    pub refused_requests: u64,
    /// Runs of blocks that were discarded, a system call each.
    pub discards: u64,
    /// Discards that the kernel refused.
    pub failed_discards: u64,
}

/// Memory kept ready for installs.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstallPoolStatus {
    /// What it holds when it is full, in bytes; 0 without a pool.
    pub size_bytes: u64,
    /// What it holds now, in bytes: host memory beside the guest's.
    pub resident_bytes: u64,
    /// Frames that were installed from it.
    pub hits: u64,
    /// Frames whose memory was zeroed while the guest waited.
    pub misses: u64,
    /// Times that it gave all it held back because the host was short of memory.
    pub given_back: u64,
}

/// The memory cgroup of a VM.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct CgroupStatus {
    /// Its directory.
    pub path: String,
    /// What it allows the whole process, in bytes.
    pub memory_max_bytes: u64,
    /// What is in use of that, in bytes.
    pub memory_current_bytes: u64,
}

/// What automatic reclaim is at.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AutoReclaimReport {
    /// Whether it runs.
    pub on: bool,
    /// Its settings as the command line takes them, if it runs.
    pub settings: Option<String>,
    /// What it took back since the VM started, in bytes.
    pub evicted_bytes: u64,
    /// Scans since the VM started.
    pub scans: u64,
    /// Milliseconds since the last of them.
    pub last_scan_ms_ago: Option<u64>,
    /// Free memory that the host still pays for, at the last scan, in bytes.
    pub free_bytes: u64,
    /// How much of that stays with the guest, in bytes.
    pub headroom_bytes: u64,
    /// The part of the headroom that recent installs called for, in bytes.
    pub back_off_bytes: u64,
}

/// One vCPU.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuStatus {
    /// Its number, from 0.
    pub index: u32,
    /// Why it left the guest, and how often.
    pub exits: ExitCounts,
    /// Doorbell calls it made.
    pub calls: u64,
    /// What it does now: `running`, `waiting` for a command, or `paused` with its VM.
    pub state: String,
}

/// How often a vCPU left the guest.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExitCounts {
    /// For a memory-mapped device.
    pub mmio: u64,
    /// For an I/O port.
    pub pio: u64,
    /// For anything else.
    pub other: u64,
}

/// How the guest's work went, added up over its vCPUs. All of it is the guest's own claim.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestReport {
    /// Did it do what was asked?
    pub outcome: GuestOutcome,
    /// Bytes allocated, freed or verified by this command.
    pub bytes: u64,
    /// Blocks allocated, freed or verified by this command.
    pub blocks: u64,
    /// Bytes that its blocks hold now.
    pub held_bytes: u64,
    /// Blocks it owns now.
    pub held_blocks: u64,
    /// Pages with a wrong stamp.
    pub mismatches: u64,
    /// The first of them.
    pub first_bad: Option<BadPage>,
    /// Allocations since boot.
    pub allocs: u64,
    /// Frees since boot.
    pub frees: u64,
    /// Install calls since boot.
    pub install_calls: u64,
    /// Huge frames that those asked for before they were needed.
    pub ahead_frames: u64,
    /// Free memory in the whole table, in bytes.
    pub free_bytes: u64,
    /// The part of it in wholly free huge frames, in bytes.
    pub free_huge_bytes: u64,
    /// From the request to the last vCPU's report, in microseconds.
    pub duration_us: u64,
    /// What a measuring request measured: only those have it, so peers that do not know them never see
    /// it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<SampleReport>,
}

/// Samples of a measuring request: of several vCPUs the worst percentiles, mean and median averaged.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleReport {
    /// What they count: `ns`, `MB/s`, or `units` of work in a quantum.
    pub unit: String,
    /// How many there are; 0 where the guest has no clock.
    pub count: u64,
    /// Their mean.
    pub mean: u64,
    /// The smallest.
    pub min: u64,
    /// The 1st percentile.
    pub p1: u64,
    /// The median.
    pub p50: u64,
    /// The 99th percentile.
    pub p99: u64,
    /// The 99.9th percentile.
    pub p999: u64,
    /// The largest.
    pub max: u64,
    /// Beside the samples, in nanoseconds of all vCPUs: a burst's touching, what the others allocated.
    pub beside_ns: u64,
}

/// A page that held something else than its stamp.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BadPage {
    /// Guest-physical address.
    pub address: u64,
    /// What it should have held.
    pub expected: u64,
    /// What it held.
    pub found: u64,
}

/// How a guest command ended; the worst of the vCPUs' outcomes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestOutcome {
    /// As asked.
    Ok,
    /// The guest held less than it was to free, and freed all of it.
    FellShort,
    /// The guest ran out of memory on the way.
    OutOfMemory,
    /// The host refused to put memory behind a frame.
    InstallFailed,
    /// A page held something else than its stamp.
    Corrupt,
    /// The guest does not know the command, or answered nonsense.
    Unknown,
}
