//! How frames get their memory, as people choose it: the install pool, userfaultfd, and what
//! a violation comes to. Values and their checks only; what they mean happens in [`crate::memory`]
//! and [`crate::monitor`].

use crate::memory::{Backing, Fill, PoolConfig, UseUserfaultfd};
use llfree_base::choices::OnViolation;
use llfree_base::units::{Bytes, MemorySizeError, SizeError, check_memory};
use shared_layout::HUGE_SIZE;
use std::fmt;
use std::str::FromStr;

/// How frames get their memory, and what becomes of a guest that does not ask for it. `None` is the
/// default, which gives way to what the host can do; what somebody chose must be possible.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct InstallConfig {
    /// Memory that is kept ready: 64 MiB, or an eighth of guest memory if that is less.
    pub pool: Option<InstallPool>,
    /// What a touch of memory that the guest does not have comes to.
    pub on_violation: Option<OnViolation>,
    /// What sees such a touch, and moves memory in.
    pub userfaultfd: UseUserfaultfd,
}

/// Memory that is kept ready for installs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InstallPool {
    /// How much: a multiple of 2 MiB, 0 for none.
    pub size: Bytes,
    /// Refilled with at most so much a second; 0 is no limit.
    pub rate: Bytes,
    /// How much of it is kept full: all of one that somebody chose.
    pub fill: Fill,
}

/// Choices that cannot be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InstallConfigError {
    /// Memory that nobody could use would be kept ready.
    #[error("an install pool of {size} is larger than the guest's memory, {memory}")]
    PoolTooLarge {
        /// What was asked for.
        size: Bytes,
        /// The guest's memory.
        memory: Bytes,
    },
    /// Something that needs userfaultfd, without it.
    #[error("{wanted} is impossible here: {obstacle}")]
    NeedsUserfaultfd {
        /// What was asked for.
        wanted: Wanted,
        /// Why there is no userfaultfd.
        obstacle: Obstacle,
    },
}

/// A choice that only a userfaultfd makes possible.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// Memory that is kept ready.
    InstallPool,
    /// What a violation comes to.
    OnViolation,
    /// The userfaultfd itself.
    Userfaultfd,
}

/// Why guest memory cannot be under a userfaultfd, whatever the host permits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Obstacle {
    /// The guest shares no table, so nobody knows which frames it has.
    NoTable,
    /// Somebody switched it off.
    SwitchedOff,
    /// Pages of files cannot be moved.
    Backing(Backing),
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InstallPool => "an install pool",
            Self::OnViolation => "a violation policy",
            Self::Userfaultfd => "userfaultfd",
        })
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoTable => f.write_str("the guest shares no table with the host"),
            Self::SwitchedOff => f.write_str("userfaultfd is switched off"),
            Self::Backing(backing) => write!(f, "pages of {backing} memory cannot be moved"),
        }
    }
}

impl InstallConfig {
    /// What to do for a guest with `memory` of this kind, which shares its allocator's table or has
    /// a device instead.
    ///
    /// # Errors
    /// [`InstallConfigError`].
    pub fn resolve(
        &self,
        memory: Bytes,
        backing: Backing,
        shares_table: bool,
    ) -> Result<(PoolConfig, OnViolation, UseUserfaultfd), InstallConfigError> {
        let obstacle = match (self.userfaultfd, backing) {
            _ if !shares_table => Some(Obstacle::NoTable),
            (UseUserfaultfd::Off, _) => Some(Obstacle::SwitchedOff),
            (_, Backing::Memfd | Backing::Hugetlb) => Some(Obstacle::Backing(backing)),
            _ => None,
        };
        let wanted = match self {
            Self { pool: Some(pool), .. } if pool.size.0 > 0 => Some(Wanted::InstallPool),
            Self { on_violation: Some(_), .. } => Some(Wanted::OnViolation),
            Self { userfaultfd: UseUserfaultfd::On, .. } if !shares_table => Some(Wanted::Userfaultfd),
            _ => None,
        };
        if let (Some(wanted), Some(obstacle)) = (wanted, obstacle) {
            return Err(InstallConfigError::NeedsUserfaultfd { wanted, obstacle });
        }
        if !shares_table {
            let none = PoolConfig::default();
            return Ok((none, OnViolation::default(), UseUserfaultfd::Off));
        }
        let pool = self.pool.unwrap_or(InstallPool::default_for(memory));
        if pool.size > memory {
            return Err(InstallConfigError::PoolTooLarge { size: pool.size, memory });
        }
        // No guest has 2^32 huge frames.
        let huge_frames = u32::try_from(pool.size.0 / HUGE_SIZE).unwrap_or(u32::MAX);
        let pool = PoolConfig { huge_frames, rate: pool.rate.0, fill: pool.fill };
        Ok((pool, self.on_violation.unwrap_or_default(), self.userfaultfd))
    }
}

impl InstallPool {
    /// No pool.
    pub const NONE: Self = Self { size: Bytes(0), rate: Bytes(0), fill: Fill::Always };

    /// Enough for a burst of 32 huge frames, once the guest installs some, and not much beside it.
    #[must_use]
    pub fn default_for(memory: Bytes) -> Self {
        let size = Bytes((64 * Bytes::MIB).min(memory.0 / 8 / HUGE_SIZE * HUGE_SIZE));
        Self { size, fill: Fill::OnDemand, ..Self::NONE }
    }

    /// The same, or smaller.
    #[must_use]
    pub fn at_most(self, size: Bytes) -> Self {
        Self { size: self.size.min(size), ..self }
    }
}

/// Why a text describes no pool.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InstallPoolError {
    /// Its size.
    #[error(transparent)]
    Size(#[from] MemorySizeError),
    /// Its rate.
    #[error("the rate: {0}")]
    Rate(SizeError),
    /// A rate that is no rate, or at which no memory would ever be ready.
    #[error("'{0}' is no refill rate; write at least 2M/s, like rate=4G/s")]
    NoRate(String),
    /// A second rate after the first.
    #[error("the rate is set twice")]
    Twice,
    /// Text after the size that is no rate.
    #[error("unknown setting '{0}'; write a size and perhaps a rate, like 64M,rate=4G/s, or 0 for no pool")]
    UnknownSetting(String),
}

impl FromStr for InstallPool {
    type Err = InstallPoolError;

    fn from_str(text: &str) -> Result<Self, InstallPoolError> {
        let mut parts = text.split(',').map(str::trim);
        // A split has a first part.
        let size: Bytes = parts.next().unwrap_or_default().parse().map_err(MemorySizeError::from)?;
        let mut pool = Self { size: if size.0 == 0 { size } else { check_memory(size)? }, ..Self::NONE };
        for part in parts {
            let Some(rate) = part.strip_prefix("rate=") else {
                return Err(InstallPoolError::UnknownSetting(llfree_base::units::shorten(part)));
            };
            if pool.rate.0 != 0 {
                return Err(InstallPoolError::Twice);
            }
            let no_rate = || InstallPoolError::NoRate(llfree_base::units::shorten(rate));
            pool.rate = rate.strip_suffix("/s").ok_or_else(no_rate)?.parse().map_err(InstallPoolError::Rate)?;
            if pool.rate.0 < HUGE_SIZE {
                return Err(no_rate());
            }
        }
        Ok(pool)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_are_read_as_people_write_them() {
        let pool = |mib: u64, rate| InstallPool { size: Bytes(mib << 20), rate: Bytes(rate), fill: Fill::Always };
        for (text, expected) in [
            ("64M", pool(64, 0)),
            ("0", InstallPool::NONE),
            ("64M,rate=4G/s", pool(64, 4 << 30)),
            (" 2MiB , rate=2M/s ", pool(2, 2 << 20)),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn refusals_teach() {
        for (text, words) in [
            ("", "an empty size"),
            ("-1M", "negative"),
            ("3M", "not a multiple of 2 MiB; the nearest sizes are 2M and 4M"),
            ("64M,rate=4G", "'4G' is no refill rate"),
            ("64M,rate=0/s", "at least 2M/s"),
            ("64M,rate=1M/s", "at least 2M/s"),
            ("64M,rate=2M/s,rate=4M/s", "set twice"),
            ("64M,rate=x/s", "the rate: 'x' is not a size"),
            ("64M,speed=1", "unknown setting 'speed=1'"),
            ("99999999999T", "too large"),
        ] {
            let error = text.parse::<InstallPool>().expect_err(text).to_string();
            assert!(error.contains(words) && error.lines().count() == 1, "{text}: {error}");
        }
    }

    #[test]
    fn what_somebody_chose_must_be_possible() {
        let memory = Bytes(32 << 20);
        let chosen = InstallConfig {
            pool: Some(InstallPool { size: Bytes(64 << 20), ..InstallPool::NONE }),
            on_violation: Some(OnViolation::Stop),
            userfaultfd: UseUserfaultfd::Auto,
        };
        let refused = |config: InstallConfig, backing| config.resolve(memory, backing, true).expect_err("no");
        let text = refused(chosen, Backing::Anon).to_string();
        assert!(text.contains("64 MiB is larger than the guest's memory, 32 MiB"), "{text}");
        let needs = |wanted, obstacle| InstallConfigError::NeedsUserfaultfd { wanted, obstacle };
        assert_eq!(refused(chosen, Backing::Memfd), needs(Wanted::InstallPool, Obstacle::Backing(Backing::Memfd)));
        let without = InstallConfig { pool: None, userfaultfd: UseUserfaultfd::Off, ..chosen };
        assert_eq!(refused(without, Backing::Anon), needs(Wanted::OnViolation, Obstacle::SwitchedOff));
        let defaults = InstallConfig::default();
        for backing in Backing::ALL {
            let (pool, policy, _) = defaults.resolve(memory, backing, true).expect("defaults give way");
            assert_eq!((pool.huge_frames, policy), (2, OnViolation::Install), "an eighth");
        }
    }
}
