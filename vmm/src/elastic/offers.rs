//! What ways of moving memory need of a guest, and what guests offer.

use std::fmt;

/// What a way of moving memory needs of a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Need {
    /// Nothing.
    Nothing,
    /// A frame table that the guest allocates from and shares with its host.
    Table,
    /// A driver of virtio-balloon.
    Balloon,
    /// One that knows blocks of 2 MiB.
    HugeBalloon,
    /// A driver of virtio-mem.
    Mem,
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "nothing",
            Self::Table => "an allocator that the guest shares with the host",
            Self::Balloon => "a driver of virtio-balloon",
            Self::HugeBalloon => "a balloon driver that knows blocks of 2 MiB",
            Self::Mem => "a driver of virtio-mem",
        })
    }
}

/// What a kind of guest has to offer.
#[derive(Clone, Copy, Debug)]
pub struct Offers {
    /// The kind of guest, in error lines.
    pub guest: &'static str,
    /// All that it meets.
    pub meets: &'static [Need],
}

impl Offers {
    /// Whether the guest meets a need.
    #[must_use]
    pub fn meet(&self, need: Need) -> bool {
        need == Need::Nothing || self.meets.contains(&need)
    }
}
