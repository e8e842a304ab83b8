//! vCPUs: a thread each, which enters the guest and turns each of KVM's exits into a step or an end.
//!
//! | file | what lives there |
//! |---|---|
//! | `handle` | what the VM holds of a vCPU: its orders, its thread, its counters; kicks |
//! | `run` | the thread's loop: run, pause, stop |
//! | `exits` | what each exit comes to |
//!
//! The thread owns its `VcpuFd`; nobody else touches it. It obeys the orders of
//! [`Parking`](crate::parking::Parking), which it reads between two entries into the guest.

mod exits;
mod handle;
mod run;

pub use handle::{VcpuHandle, prepare_kick, settle, stop};
pub use run::run;

use crate::boot::{Image, Kernel, Platform};
use crate::devices::Devices;
use crate::devices::pc::Pc;
use crate::doorbell::Doorbell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64};

/// What a vCPU did since it started.
#[derive(Default, Debug)]
pub struct VcpuCounters {
    /// Exits for the doorbell page or for memory that is not there.
    pub mmio: AtomicU64,
    /// Exits for an I/O port.
    pub pio: AtomicU64,
    /// All other exits.
    pub other: AtomicU64,
    /// Rings of the doorbell, by MMIO or port.
    pub calls: AtomicU64,
    /// In the guest, as opposed to asleep in a `Wait`.
    pub busy: AtomicBool,
    /// The kernel's number of its thread; 0 before it runs.
    pub thread: AtomicI32,
}

/// What a vCPU runs.
#[derive(Clone)]
pub enum Guest {
    /// An image of ours, which names addresses in crash reports.
    Own(Arc<Image>),
    /// Linux, on a PC.
    Linux(Arc<Pc>),
}

impl Guest {
    fn kernel(&self) -> Option<&Kernel> {
        match self {
            Self::Own(image) => match &**image {
                Image::Own(kernel) => Some(kernel),
                Image::Linux(_) => None,
            },
            Self::Linux(_) => None,
        }
    }
}

/// What a vCPU thread shares with the rest of the VM.
pub struct VcpuContext {
    /// What it runs. First, as it may share the VM, which goes before its memory does.
    pub guest: Guest,
    /// The platform region.
    pub platform: Arc<Platform>,
    /// Serves its calls.
    pub doorbell: Arc<Doorbell>,
    /// Behind the doorbell's page.
    pub devices: Arc<Devices>,
    /// Its orders and counters.
    pub vcpu: Arc<VcpuHandle>,
}
