//! [`DriverError`]: what no driver may do.

/// A driver's violation of the standard.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// A step of the initialisation out of order.
    #[error("device status {from:#x} cannot become {to:#x}")]
    Status {
        /// The status before.
        from: u32,
        /// The value written.
        to: u32,
    },
    /// A register in the wrong state, or a value that it cannot take.
    #[error("register {register:#x} cannot take {value:#x} now")]
    Register {
        /// Its offset.
        register: u64,
        /// The value written.
        value: u32,
    },
    /// A ring that is misaligned or not in RAM.
    #[error("queue {queue} has a ring that is misaligned or not all in RAM")]
    Ring {
        /// The queue's index.
        queue: usize,
    },
    /// The ring of available requests makes no sense.
    #[error("queue {queue} offers more requests than it has descriptors, or a descriptor that it does not have")]
    Available {
        /// Which.
        queue: usize,
    },
    /// A chain without an end, or too long.
    #[error("the descriptor chain that starts at {head} loops, leads nowhere or is too long")]
    Chain {
        /// Its first descriptor.
        head: u16,
    },
    /// A buffer that is not in RAM.
    #[error("a buffer of {bytes} bytes at {address:#x} is not all in RAM")]
    Buffer {
        /// Guest-physical address.
        address: u64,
        /// Its length.
        bytes: u32,
    },
    /// A device that is no longer there.
    #[error("the guest shares its free memory, so it has no balloon")]
    Withdrawn,
    /// A request of the wrong length.
    #[error("{bytes} bytes are {allowed}")]
    Length {
        /// The length found.
        bytes: u64,
        /// What is wrong with that.
        allowed: &'static str,
    },
}
