//! What a VM reports, as it travels in a [`Reply`](crate::protocol::Reply) and as `--json` prints it.
//!
//! Plain data, every field with its unit. "Of the kernel" means: by the host kernel's accounting;
//! "by its own account" means that a guest said so, which may say anything. Reports
//! are read leniently: unknown fields are skipped, unknown words kept as a [`Word`], and fields that were
//! added after the first release have a default, as older VMs do not send them. [`status`] has the
//! status and its metrics, [`event`] what happens, [`words`] the words; the replies to other commands are here.

pub mod event;
pub mod status;
pub mod words;

pub use event::Event;
pub use status::{
    AutoReclaimReport, BalloonStatus, CgroupStatus, DeviceStatus, DiskStatus, ElasticStatus, GuestCommandsReport,
    GuestStatsReport, InstallPoolStatus, LinuxAgentStatus, MemStatus, NetReport, NetStatus, StatusReport, TableStatus,
    VcpuStatus,
};
pub use words::{
    ChosenBy, ElasticKind, Enforcement, GuestOutcome, GuestSays, HandOver, Reason, SampleUnit, VcpuState, VmState, Word,
};

use llfree_base::check::Check;
use serde::{Deserialize, Serialize};

/// The outcome of a shrink or a grow.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ResizeReport {
    /// The limit that was asked for, in bytes.
    pub target_bytes: u64,
    /// The limit that was reached, in bytes.
    pub actual_bytes: u64,
    /// Memory that a shrink could take right now, in bytes; by a Linux guest's own account, if it gives one.
    pub reclaimable_now_bytes: Option<u64>,
    /// Whether the target was reached.
    pub complete: bool,
    /// Why not.
    pub shortfall: Option<Shortfall>,
    /// Whether what is missing is pursued from here on, until the target is reached or replaced.
    #[serde(default)]
    pub pursued: bool,
    /// Huge frames that changed hands.
    pub huge_frames: u64,
    /// Resident memory that went back to the host, in bytes.
    pub freed_bytes: u64,
    /// Time spent on it, in microseconds, without the time that a shrink waited for its guest.
    pub duration_us: u64,
    /// That time, in microseconds.
    pub waited_us: u64,
    /// The guest's last statement about its memory, where nothing better is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestStatsReport>,
}

/// Why a shrink stopped short of its target.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Shortfall {
    /// Memory that the guest has allocated, in bytes, if it says so.
    pub in_use_bytes: Option<u64>,
    /// Free memory in huge frames that are not wholly free, in bytes, if the guest says so.
    pub fragmented_bytes: Option<u64>,
    /// The same as a sentence.
    pub wording: String,
}

/// The outcome of a soft reclaim.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ReclaimReport {
    /// Huge frames that lost their memory.
    pub huge_frames: u64,
    /// Resident memory that went back to the host, in bytes.
    pub freed_bytes: u64,
    /// From the request to the result, in microseconds.
    pub duration_us: u64,
}

/// The outcome of a pause or a resume.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct LifeReport {
    /// The VM's state now.
    pub state: Word<VmState>,
    /// Whether it was something else before.
    pub changed: bool,
    /// From the request to the result, in microseconds.
    pub duration_us: u64,
    /// Time that it was paused before this, in milliseconds; absent if it ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_ms: Option<u64>,
}

/// Findings of a check of a live VM.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
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
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct FindingReport {
    /// The things compared.
    pub check: Word<Check>,
    /// How many frames, or words, are concerned.
    pub count: u64,
    /// The numbers of the first few huge frames.
    pub first_frames: Vec<u32>,
    /// A guest can bring this about by writing or touching what it should not; otherwise it is a
    /// fault of the host.
    pub guest_can_cause: bool,
    /// Its meaning.
    pub wording: String,
}

/// The outcome of the guest's work, added up over its vCPUs. All of it is the guest's own claim.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct GuestReport {
    /// Did it do what was asked?
    pub outcome: Word<GuestOutcome>,
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
    /// The samples of a measuring request: only those have it, so peers that do not know them never see
    /// it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<SampleReport>,
}

/// Samples of a measuring request: of several vCPUs the worst percentiles, mean and median averaged.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SampleReport {
    /// Their unit.
    pub unit: Word<SampleUnit>,
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

/// A page that held something other than its stamp.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct BadPage {
    /// Guest-physical address.
    pub address: u64,
    /// The word expected there.
    pub expected: u64,
    /// The word found there.
    pub found: u64,
}
