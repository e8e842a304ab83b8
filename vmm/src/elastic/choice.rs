//! [`Elastic`]: the available ways of moving memory, by name.

use super::either::Either;
use super::error::{DeviceError, ElasticError, ResizeError};
use super::fixed::Fixed;
use super::mem::MemConfig;
use super::offers::Offers;
use super::table::Table;
use super::way::Way;
use crate::devices::balloon::BalloonConfig;
use llfree_base::choices::Switch;
use llfree_base::units::shorten;
use std::fmt;
use std::str::FromStr;

/// The chosen way to make a VM's memory smaller and larger.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Elastic {
    /// The host takes free frames out of the table that it shares with the guest.
    Table(Table),
    /// virtio-balloon.
    Balloon(BalloonConfig),
    /// virtio-mem.
    Mem(MemConfig),
    /// The table if the guest turns out to share one, else virtio-balloon. It has no name on the command line: it is what
    /// no choice comes to.
    Either(Either),
    /// Not at all.
    Fixed(Fixed),
}

impl Default for Elastic {
    fn default() -> Self {
        Self::LLFREE
    }
}

/// Checks that a guest meets what a way of moving its memory needs.
///
/// # Errors
/// [`DeviceError::Unmet`], with the ways that the guest does support.
pub fn check_offers(way: &dyn Way, offers: &Offers) -> Result<(), DeviceError> {
    if offers.meet(way.needs()) {
        return Ok(());
    }
    let can: Vec<_> =
        KINDS.iter().filter(|kind| offers.meet(kind.way().needs())).map(|kind| kind.way().name()).collect();
    let (last, others) = can.split_last().unwrap_or((&"none", &[]));
    let instead = if others.is_empty() { (*last).to_owned() } else { format!("{} or {last}", others.join(", ")) };
    Err(DeviceError::Unmet { kind: way.name(), need: way.needs(), guest: offers.guest, instead })
}

/// Every kind with its default options.
const KINDS: [Elastic; 5] =
    [Elastic::LLFREE, Elastic::balloon(false), Elastic::balloon(true), Elastic::virtio_mem(), Elastic::NONE];

impl Elastic {
    /// The shared table.
    pub const LLFREE: Self = Self::Table(Table::STRICT);
    /// Memory that never moves.
    pub const NONE: Self = Self::Fixed(Fixed);

    /// The chosen way.
    #[must_use]
    pub fn way(&self) -> &dyn Way {
        match self {
            Self::Table(way) => way,
            Self::Balloon(way) => way,
            Self::Mem(way) => way,
            Self::Either(way) => way,
            Self::Fixed(way) => way,
        }
    }

    fn way_mut(&mut self) -> &mut dyn Way {
        match self {
            Self::Table(way) => way,
            Self::Balloon(way) => way,
            Self::Mem(way) => way,
            Self::Either(way) => way,
            Self::Fixed(way) => way,
        }
    }

    /// A balloon with default options.
    #[must_use]
    pub const fn balloon(huge: bool) -> Self {
        Self::Balloon(BalloonConfig::plain(huge))
    }

    /// virtio-mem with default options.
    #[must_use]
    pub const fn virtio_mem() -> Self {
        Self::Mem(MemConfig::DEFAULT)
    }

    /// The default for Linux.
    #[must_use]
    pub const fn for_linux() -> Self {
        Self::Either(Either::FOR_LINUX)
    }

    /// The kind's name on the command line and in reports.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.way().name()
    }

    /// This kind together with automatic reclaim: with the shared table the host scans; with a balloon
    /// the guest reports free pages on its own. Returns what is left for the host to switch on.
    ///
    /// # Errors
    /// Kinds that can do neither, settings that only a scan has, and reporting that is off.
    pub fn with_auto_reclaim(mut self, switch: Switch) -> Result<(Self, Switch), ResizeError> {
        let Some(settings) = switch.0 else { return Ok((self, switch)) };
        let left = self.way_mut().prepare_auto_reclaim(settings)?;
        Ok((self, left))
    }

    fn set(&mut self, option: &str) -> Result<(), ElasticError> {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let way = self.way_mut();
        if way.set(name, value)? {
            return Ok(());
        }
        Err(ElasticError::Option { option: shorten(option), kind: way.name(), has: way.options() })
    }
}

impl FromStr for Elastic {
    type Err = ElasticError;

    fn from_str(text: &str) -> Result<Self, ElasticError> {
        let mut parts = text.split(',');
        let kind = parts.next().unwrap_or_default();
        let found = KINDS.into_iter().find(|known| known.name() == kind);
        let mut elastic = found.ok_or_else(|| ElasticError::Kind(shorten(kind)))?;
        let mut seen: Vec<&str> = Vec::new();
        for option in parts {
            elastic.set(option)?;
            // Few enough for a linear search: the line above refuses unknown options.
            let name = option.split('=').next().unwrap_or_default();
            if seen.contains(&name) {
                return Err(ElasticError::Twice(name.to_owned()));
            }
            seen.push(name);
        }
        Ok(elastic)
    }
}

impl fmt::Display for Elastic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
