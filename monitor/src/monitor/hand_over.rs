//! The hand-over: how a tenant with an allocator of its own stops having memory by touching it.

/// What such a tenant has said of its memory so far. It only ever says more.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum HandOver {
    /// Nothing: it boots, or shares nothing at all, and has memory by touching it.
    Booting,
    /// What is free is shared, but the host had no memory for all that was in use: that comes by touch still.
    ByTouch,
    /// It touches nothing that was not installed.
    Complete,
}

impl HandOver {
    pub(super) fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::Booting,
            1 => Self::ByTouch,
            _ => Self::Complete,
        }
    }
}
