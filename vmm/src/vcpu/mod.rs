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

pub use handle::{VcpuCounters, VcpuHandle, prepare_kick, settle, stop};
pub use run::run;

use crate::boot::Platform;
use crate::devices::Devices;
use crate::doorbell::Doorbell;
use crate::guest::Guest;
use std::sync::Arc;

/// What a vCPU thread shares with the rest of the VM.
pub struct VcpuContext {
    /// What it runs. First, as it may share the VM, which goes before its memory does.
    pub guest: Arc<dyn Guest>,
    /// The platform region.
    pub platform: Arc<Platform>,
    /// Serves its calls.
    pub doorbell: Arc<Doorbell>,
    /// Behind the doorbell's page.
    pub devices: Arc<Devices>,
    /// Its orders and counters.
    pub vcpu: Arc<VcpuHandle>,
}
