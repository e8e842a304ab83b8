//! What the ways of moving memory need of a guest ([`Need`]), and what guests offer ([`Offers`]).

use std::fmt;

/// A requirement that a way of moving memory has of a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Need {
    /// Nothing.
    Nothing,
    /// A frame table that the guest allocates from and shares with its host.
    Table,
    /// A virtio-balloon driver.
    Balloon,
    /// A virtio-balloon driver that supports 2 MiB blocks.
    HugeBalloon,
    /// A virtio-mem driver.
    Mem,
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "nothing",
            Self::Table => "an allocator that the guest shares with the host",
            Self::Balloon => "a virtio-balloon driver",
            Self::HugeBalloon => "a balloon driver that supports 2 MiB blocks",
            Self::Mem => "a virtio-mem driver",
        })
    }
}

/// What a kind of guest offers.
#[derive(Clone, Copy, Debug)]
pub struct Offers {
    /// The kind of guest, as error lines name it.
    pub guest: &'static str,
    /// The needs that it meets.
    pub meets: &'static [Need],
}

impl Offers {
    /// Whether the guest meets a need.
    #[must_use]
    pub fn meet(&self, need: Need) -> bool {
        need == Need::Nothing || self.meets.contains(&need)
    }
}
