//! Why a figure was not measured: one type for all of them, one line each.

use llfree_base::units::Bytes;
use shared_layout::HUGE_SIZE;

/// Why there is no figure.
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
    #[error("{0}")]
    Size(String),
    #[error("the guest did not do its part: {0}")]
    Guest(String),
    #[error("KVM could not {step}")]
    Kvm { step: &'static str, source: kvm_ioctls::Error },
    #[error("cannot write {path}")]
    File { path: String, source: csv::Error },
    #[error("cannot pin a thread to a core")]
    Cores(#[source] std::io::Error),
    #[error("--threads {threads} needs a core for each, and this process may use {cores}")]
    Threads { threads: u32, cores: usize },
    #[error("--mem has {huge_frames} huge frames, too few for these orders on {threads} threads; use at least {}", Bytes(least * HUGE_SIZE))]
    TooSmall { huge_frames: u32, threads: u32, least: u64 },
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
    #[error("cannot draw: {0}")]
    Plot(String),
    #[error("cannot write the output")]
    Output(#[from] std::io::Error),
}

/// An allocator found no block although memory was free, or did not take one back.
#[derive(Debug, thiserror::Error)]
#[error("an allocation or a free of order {order} failed in {bench} although memory was left")]
pub(crate) struct Exhausted {
    pub(crate) bench: &'static str,
    pub(crate) order: u8,
}
