//! Why a figure was not measured: one type for all of them, one line each.

use llfree_base::units::Bytes;
use shared_layout::HUGE_SIZE;

/// The reason that a figure was not measured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    #[error(transparent)]
    Launch(#[from] vmm::vm::LaunchError),
    #[error(transparent)]
    Vm(#[from] vmm::vm::VmError),
    #[error(transparent)]
    Memory(#[from] llfree_monitor::memory::MemoryError),
    #[error(transparent)]
    Host(#[from] vmm::boot::BootError),
    #[error(transparent)]
    Size(#[from] SizeError),
    #[error("cannot create a region for the frames")]
    Create(#[from] llfree::CreateError),
    #[error("cannot open an instance")]
    Open(#[from] llfree::OpenError),
    #[error("cannot close an instance")]
    Close(#[from] llfree::CloseError),
    #[error("the guest did not do its part: {0}")]
    Guest(String),
    #[error("KVM could not {step}")]
    Kvm { step: &'static str, source: kvm_ioctls::Error },
    #[error("cannot write {path}")]
    File { path: String, source: std::io::Error },
    #[error("cannot write the rows as CSV")]
    Csv(#[from] csv::Error),
    #[error("--json and --csv - both need the standard output; give --csv a file")]
    OneStdout,
    #[error("this figure needs up to {needed} at once, and {place} has {available} available; use a smaller --mem")]
    Room { needed: Bytes, available: Bytes, place: String },
    #[error("interrupted: the rows are of the rounds until then, and files are as they were")]
    Interrupted,
    #[error("cannot pin a thread to a core")]
    Cores(#[source] std::io::Error),
    #[error("--threads {threads} needs a core for each, and this process may use {cores}")]
    Threads { threads: u32, cores: usize },
    #[error("--mem has {huge_frames} huge frames, too few for these orders on {threads} threads; use at least {}", Bytes(least * HUGE_SIZE))]
    TooSmall { huge_frames: u32, threads: u32, least: u64 },
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
    #[error("an allocation of order {order} was granted in {bench} although no such block was free")]
    Granted { bench: &'static str, order: u8 },
    #[error("cannot draw: {0}")]
    Plot(String),
    #[error("cannot write the output")]
    Output(#[from] std::io::Error),
}

/// Sizes with which there is nothing to measure.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum SizeError {
    #[error("--mem {mem} is too small to be 99.9 % full; use at least {least}")]
    TooSmallToFill { mem: Bytes, least: Bytes },
    #[error("--mem {mem} leaves nothing to resize; use {least} or more")]
    NothingToResize { mem: Bytes, least: Bytes },
    #[error("--mem {0} has more huge frames than can be counted")]
    TooManyFrames(Bytes),
    #[error("--to {to} is out of range; use at least {least} and less than --mem {mem}")]
    Target { to: Bytes, least: Bytes, mem: Bytes },
    #[error("--burst {burst} is out of range; use 2M up to half of --mem ({half})")]
    Burst { burst: Bytes, half: Bytes },
    #[error("--reclaim {reclaim} is more than half of --mem, {half}")]
    Reclaim { reclaim: Bytes, half: Bytes },
}

/// An allocator found no block although memory was free, or did not take one back.
#[derive(Debug, thiserror::Error)]
#[error("an allocation or free of order {order} failed in {bench} although memory was left")]
pub(crate) struct Exhausted {
    pub(crate) bench: &'static str,
    pub(crate) order: u8,
}
