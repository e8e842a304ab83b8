//! Choices: what people type, the control socket carries and the monitor obeys, in one type each.
//!
//! Values and their names only. What they mean happens in the crates above.

mod auto_reclaim;

pub use auto_reclaim::{Settings, SettingsError, Switch};

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use thiserror::Error;

/// The kind of memory that backs guest RAM.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Backing {
    /// Private anonymous memory with transparent huge pages: the default and the fastest.
    #[default]
    Anon,
    /// A memory file, for RAM that other processes map too. Usually made of 4 KiB pages.
    Memfd,
    /// A file of 2 MiB pages from the machine's hugetlb pool, all of them reserved at start.
    Hugetlb,
}

impl Backing {
    /// Every kind of backing.
    pub const ALL: [Self; 3] = [Self::Anon, Self::Memfd, Self::Hugetlb];

    /// The name on the command line and in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Anon => "anon",
            Self::Memfd => "memfd",
            Self::Hugetlb => "hugetlb",
        }
    }
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Backing {
    type Err = UnknownBacking;

    fn from_str(name: &str) -> Result<Self, UnknownBacking> {
        Self::ALL.into_iter().find(|backing| backing.name() == name).ok_or_else(|| UnknownBacking(name.to_owned()))
    }
}

/// A name that is not a [`Backing`].
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("unknown memory backing `{0}`: use anon, memfd or hugetlb")]
pub struct UnknownBacking(String);

/// The fate of a guest that touches memory it does not have.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum OnViolation {
    /// It ends, with a report.
    Stop,
    /// It gets evicted frames, which its limit includes, and is counted; at a held one it ends.
    #[default]
    Install,
    /// It gets evicted frames, is lent a page of zeroes for a moment at held ones, and is counted.
    Log,
}

impl OnViolation {
    /// Every policy.
    pub const ALL: [Self; 3] = [Self::Stop, Self::Install, Self::Log];

    /// The name on the command line and in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Install => "install",
            Self::Log => "log",
        }
    }
}

impl fmt::Display for OnViolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for OnViolation {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        Self::ALL.into_iter().find(|policy| policy.name() == name).ok_or_else(|| UnknownPolicy(name.to_owned()))
    }
}

/// A name that is not an [`OnViolation`].
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("unknown violation policy `{0}`: use stop, install or log")]
pub struct UnknownPolicy(String);
