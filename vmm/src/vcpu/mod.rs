//! vCPUs: one thread each, which enters the guest and handles KVM's exits until the guest or the VM ends.
//!
//! | file | what lives there |
//! |---|---|
//! | `handle` | a vCPU as the VM sees it: its orders, its thread, its counters; kicks |
//! | `run` | the thread's loop: run, pause, stop |
//! | `exits` | what each exit leads to |
//!
//! The thread owns its `VcpuFd`; nobody else touches it. It obeys the orders of
//! [`Parking`](crate::parking::Parking), which it reads between two entries into the guest.

mod exits;
mod handle;
mod run;

pub use handle::{VcpuCounters, VcpuHandle, order_stop, prepare_kick, settle, stop};
pub use run::run;

use crate::boot::Platform;
use crate::devices::Devices;
use crate::doorbell::Doorbell;
use crate::guest::Guest;
use std::sync::Arc;

/// What a vCPU thread shares with the rest of the VM.
pub struct VcpuContext {
    /// The guest. First, as it may share KVM's VM, which must go before its memory does.
    pub guest: Arc<dyn Guest>,
    /// The platform region.
    pub platform: Arc<Platform>,
    /// Serves its calls.
    pub doorbell: Arc<Doorbell>,
    /// The devices, whose pages follow the doorbell's.
    pub devices: Arc<Devices>,
    /// Its orders and counters.
    pub vcpu: Arc<VcpuHandle>,
}
