//! Why a VM does not come up ([`LaunchError`]), and why a running one does not do as asked
//! ([`VmError`], [`LimitError`]). Each says what failed, with the value and the limit; which option
//! to change is for the user interface to say.

use crate::agent::AgentError;
use crate::boot::{BootError, ImageError, KernelError, LinuxError};
use crate::cgroup::CgroupError;
use crate::devices::blk::DiskError;
use crate::devices::net::{NetConfigError, NetError};
use crate::elastic::{DeviceError, MoveError, ResizeError};
use crate::exit::ExitReason;
use llfree_base::units::Bytes;
use llfree_monitor::MonitorError;
use llfree_monitor::auto::SwitchError;
use llfree_monitor::install_config::InstallConfigError;
use llfree_monitor::memory::MemoryError;
use shared_layout::{HUGE_SIZE, Order};
use std::time::Duration;

/// Why a VM was not launched. All that was built until then is released.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The machine or the platform region.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The guest's image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A guest of ours.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A Linux guest.
    #[error(transparent)]
    Linux(#[from] LinuxError),
    /// One of its disks.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Its network cards.
    #[error(transparent)]
    NetConfig(#[from] NetConfigError),
    /// One of them.
    #[error(transparent)]
    Net(#[from] NetError),
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The way to move its memory.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// No image was given, and none is built in.
    #[error("no guest image was named, and this build has none of its own")]
    NoImage,
    /// Not even the built-in guest's image fits.
    #[error("guest memory of {memory} is too small for the built-in guest, which needs at least {least}")]
    TooSmall {
        /// The requested value.
        memory: Bytes,
        /// Where the image ends.
        least: Bytes,
    },
    /// More vCPUs than there can be.
    #[error("{asked} vCPUs were requested, but this machine's KVM runs 1 to {limit}")]
    Cpus {
        /// The requested value.
        asked: u32,
        /// KVM's maximum.
        limit: u32,
    },
    /// A core that does not exist, or that this process may not use.
    #[error("core {core} is not among those that this process may use, {allowed:?}")]
    Pin {
        /// The requested value.
        core: u32,
        /// The cores that may be used.
        allowed: Vec<u32>,
    },
    /// How frames get their memory.
    #[error(transparent)]
    Install(#[from] InstallConfigError),
    /// KVM refused guest memory.
    #[error("KVM could not map {memory} at guest address {gpa:#x} as one slot of guest memory")]
    Memslot {
        /// Where.
        gpa: u64,
        /// The size of the slot.
        memory: Bytes,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// KVM refused a step.
    #[error("KVM could not {step}")]
    Kvm {
        /// The step that failed.
        step: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// The host refused a thread or an event.
    #[error("the host could not {step}")]
    Host {
        /// The step that failed.
        step: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

/// Why a VM does not pause; it runs on as before.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// A vCPU is in an operation that the host does not finish.
    #[error("vCPU {vcpu} did not pause within {within:?}; the VM runs on")]
    Vcpu {
        /// Which.
        vcpu: u32,
        /// The time that all of them had.
        within: Duration,
    },
    /// A device is in one.
    #[error("a request to the device {device} did not finish within {within:?}; the VM runs on")]
    Device {
        /// Which.
        device: &'static str,
        /// The time that all of them had.
        within: Duration,
    },
}

/// Why a running VM did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The monitor had to stop a pass.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// The guest's agent did not answer.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// Its cgroup did not make room for it.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A limit that this VM cannot have.
    #[error(transparent)]
    Size(#[from] LimitError),
    /// An order that no block has.
    #[error("order {0} is out of range; use 0 to {max}", max = Order::MAX.get())]
    Order(u8),
    /// Automatic reclaim stays as it was.
    #[error(transparent)]
    AutoReclaim(#[from] SwitchError),
    /// A resize that this VM cannot do.
    #[error(transparent)]
    Resize(#[from] ResizeError),
    /// The guest ended.
    #[error(transparent)]
    Ended(#[from] ExitReason),
    /// The VM did not pause.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// Nothing to press.
    #[error("this kind of guest has no power button")]
    NoPowerButton,
    /// KVM refused.
    #[error("KVM could not raise the power button's interrupt")]
    Kvm(#[source] kvm_ioctls::Error),
    /// The guest cannot carry out commands while it is paused.
    #[error("the VM is paused; resume it first")]
    Paused,
}

impl From<MoveError> for VmError {
    fn from(error: MoveError) -> Self {
        match error {
            MoveError::Monitor(error) => error.into(),
            MoveError::Refused(error) => error.into(),
        }
    }
}

/// Why a VM cannot have a limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LimitError {
    /// Not a whole number of huge frames.
    #[error(
        "{bytes} bytes is not a multiple of 2 MiB; {below} or {above} would be",
        below = Bytes(bytes - bytes % HUGE_SIZE),
        above = Bytes((bytes - bytes % HUGE_SIZE).saturating_add(HUGE_SIZE))
    )]
    NotAMultiple {
        /// The requested value.
        bytes: u64,
    },
    /// More than the VM's memory.
    #[error("{target} is more than the VM's memory, {memory}")]
    AboveMemory {
        /// The requested value.
        target: Bytes,
        /// The VM's memory.
        memory: Bytes,
    },
    /// A shrink to above the limit.
    #[error("cannot shrink to {target}: the limit is already {limit}")]
    ShrinkAboveLimit {
        /// The requested value.
        target: Bytes,
        /// The current limit.
        limit: Bytes,
    },
    /// A grow to below the limit.
    #[error("cannot grow to {target}: the limit is already {limit}")]
    GrowBelowLimit {
        /// The requested value.
        target: Bytes,
        /// The current limit.
        limit: Bytes,
    },
    /// A shrink by the whole limit.
    #[error("cannot shrink by {by}: that is all of the limit, and the smallest limit is 2 MiB")]
    ShrinkByAll {
        /// The requested value.
        by: Bytes,
    },
    /// A shrink by more than the limit.
    #[error("cannot shrink by {by}: the limit is only {limit}")]
    ShrinkByMore {
        /// The requested value.
        by: Bytes,
        /// The current limit.
        limit: Bytes,
    },
}
