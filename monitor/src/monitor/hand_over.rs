//! The hand-over: how a tenant with an allocator of its own stops having memory by touching it, or never does.

/// What such a tenant has said of its memory so far. It only ever says more, and whoever comes first, its word or the
/// driver of a device, decides for good.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum HandOver {
    /// Nothing: it boots, or shares nothing at all, and has memory by touching it.
    Booting,
    /// What is free is shared, but the host had no memory for all that was in use: that comes by touch still.
    ByTouch,
    /// It touches nothing that was not installed.
    Complete,
    /// Nothing, and it has a driver for a device that moves memory instead: [`leave_to_device`](super::Monitor::leave_to_device).
    ToDevice,
}

impl HandOver {
    pub(super) fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::Booting,
            1 => Self::ByTouch,
            2 => Self::Complete,
            _ => Self::ToDevice,
        }
    }
}
