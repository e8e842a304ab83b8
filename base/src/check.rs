//! What a validation of a live VM compares: the monitor finds it, the wire carries it.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The things compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// Entries that no transition leads to.
    InvalidEntry,
    /// Entries and R, about the frame's owner.
    HeldEntry,
    /// Entries and R, about whether there is memory.
    EvictedEntry,
    /// Claims that nobody settles.
    ForgottenClaim,
    /// Backed frames that R calls evicted or held.
    UnaskedMemory,
    /// Unbacked frames that R calls installed.
    MissingMemory,
    /// The limit that was published, and what R holds.
    Limit,
    /// The header's control words, and the host's copies.
    Header,
}

impl Check {
    /// Every check.
    pub const ALL: [Self; 8] = [
        Self::InvalidEntry,
        Self::HeldEntry,
        Self::EvictedEntry,
        Self::ForgottenClaim,
        Self::UnaskedMemory,
        Self::MissingMemory,
        Self::Limit,
        Self::Header,
    ];

    /// The name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::InvalidEntry => "invalid_entry",
            Self::HeldEntry => "held_entry",
            Self::EvictedEntry => "evicted_entry",
            Self::ForgottenClaim => "forgotten_claim",
            Self::UnaskedMemory => "unasked_memory",
            Self::MissingMemory => "missing_memory",
            Self::Limit => "limit",
            Self::Header => "header",
        }
    }

    /// The meaning of a finding, for people.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::InvalidEntry => "entries that no step of host or guest can produce",
            Self::HeldEntry => "entries that contradict the host about the frame's owner",
            Self::EvictedEntry => "entries that contradict the host about the memory backing the frame",
            Self::ForgottenClaim => "frames that were claimed and never released",
            Self::UnaskedMemory => "frames with memory that the guest did not ask for",
            Self::MissingMemory => "frames that should have memory, but have none according to the kernel",
            Self::Limit => "huge frames by which the published limit differs from the host's books",
            Self::Header => "header words that differ from what the host wrote",
        }
    }

    /// Whether a guest can cause this on its own; otherwise it is a fault of the host.
    #[must_use]
    pub const fn is_claim(self) -> bool {
        !matches!(self, Self::ForgottenClaim | Self::MissingMemory | Self::Limit)
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_has_one_name_on_the_wire_and_for_people() {
        for check in Check::ALL {
            assert_eq!(serde_json::to_string(&check).expect("a plain enum"), format!("\"{check}\""));
        }
    }
}
