//! [`ExitReason`]: how a guest ends, whether a call, a device, the monitor or KVM noticed it.

use guest_abi::header::ABI_VERSION;
use llfree_monitor::Violation;

/// Why a guest ended.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ExitReason {
    /// The guest made the exit call.
    #[error("the guest exited with code {0}")]
    Exited(u32),
    /// It panicked; the text is the guest's own.
    #[error("the guest panicked: {0}")]
    Panicked(String),
    /// The guest reached the exception entry that the VMM placed, or claims to have.
    #[error("the guest crashed: {what}")]
    Exception {
        /// What happened and where, on one line.
        what: String,
        /// Registers, as indented lines; empty without an exception.
        details: String,
    },
    /// It was built for another ABI.
    #[error("ABI mismatch: the guest speaks version {guest}, this host {ABI_VERSION}; rebuild the guest")]
    AbiMismatch {
        /// What the guest said.
        guest: u32,
    },
    /// It touched memory that it does not have, and the policy is to end it.
    #[error("the guest touched memory that it does not have: {0}")]
    Violation(Violation),
    /// Its touches of such memory can no longer be seen, and it is not to run without that.
    #[error("the host can no longer see what memory the guest touches: userfaultfd: {0}")]
    Unwatched(String),
    /// A Linux guest powered off.
    #[error("the guest powered itself off")]
    PoweredOff,
    /// A Linux guest reset its machine to start over.
    #[error("the guest rebooted, and this VM starts only once: launch it again")]
    Rebooted,
    /// A Linux guest's kernel gave up.
    #[error("the guest's kernel panicked: {0}")]
    KernelPanic(&'static str),
    /// KVM gave up on a vCPU.
    #[error("vCPU {vcpu} cannot continue: {what}")]
    Vcpu {
        /// Which.
        vcpu: u32,
        /// KVM's exit, in words.
        what: String,
    },
}

impl ExitReason {
    /// Whether `later`, which came to light before all vCPUs had stopped, is the reason in its place: the guest asked
    /// for that end or the host decided it, and this is only what happened to a vCPU meanwhile.
    #[must_use]
    pub fn yields_to(&self, later: &Self) -> bool {
        let befell = matches!(self, Self::Vcpu { .. } | Self::Exception { .. });
        befell
            && match later {
                Self::Exited(_) | Self::Panicked(_) | Self::PoweredOff | Self::Rebooted | Self::KernelPanic(_) => true,
                Self::AbiMismatch { .. } | Self::Violation(_) | Self::Unwatched(_) => true,
                Self::Exception { .. } | Self::Vcpu { .. } => false,
            }
    }
}
