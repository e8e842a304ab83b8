//! [`Residency`]: what the host knows about one huge frame, as a byte of its table R. Plain values.

/// The backing of a huge frame: the host's own knowledge.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Residency {
    /// Nothing: the guest must ask before it uses the frame.
    Evicted = 0,
    /// Host memory.
    Installed = 1,
    /// Nothing, and the guest may not have it: the limit excludes this frame.
    Held = 2,
}

/// Somebody claimed the frame.
pub(crate) const BUSY: u8 = 0x80;

impl Residency {
    pub(crate) const fn from_bits(bits: u8) -> Self {
        match bits & !BUSY {
            1 => Self::Installed,
            2 => Self::Held,
            _ => Self::Evicted,
        }
    }
}
