//! `--auto-reclaim`: on, off, or settings as people write them. Text in, values out.

use crate::units::{Bytes, DurationError, SizeError, exact, parse_duration, shorten};
use serde::{Deserialize, Serialize};
use shared_layout::HUGE_SIZE;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// The shortest interval: a scan of 64 TiB fits in.
const SHORTEST: Duration = Duration::from_millis(100);
/// The longest.
const LONGEST: Duration = Duration::from_secs(60 * 60);

/// The settings of automatic reclaim.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Settings {
    /// Between two scans, 100 ms to an hour.
    pub interval: Duration,
    /// Scans in a row that must find a frame free, at least 1.
    pub min_age: u8,
    /// Free memory that always stays with the guest.
    pub keep_bytes: u64,
    /// At most this much a second, at least 2 MiB.
    pub rate_bytes: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { interval: Duration::from_secs(5), min_age: 2, keep_bytes: 64 << 20, rate_bytes: 4 << 30 }
    }
}

impl Settings {
    /// The headroom that always stays, in huge frames.
    #[must_use]
    pub fn keep_frames(&self) -> u32 {
        u32::try_from(self.keep_bytes.div_ceil(HUGE_SIZE)).unwrap_or(u32::MAX)
    }

    /// Frames that the rate allows between two scans, in huge frames: at least 1.
    #[must_use]
    pub fn frames_a_scan(&self) -> u32 {
        let bytes = u128::from(self.rate_bytes) * self.interval.as_millis() / 1000;
        u32::try_from(bytes / u128::from(HUGE_SIZE)).unwrap_or(u32::MAX).max(1)
    }
}

/// Automatic reclaim, or none.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Switch(pub Option<Settings>);

/// The reason that a text is not a [`Switch`].
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SettingsError {
    /// No `key=value` and neither `on` nor `off`.
    #[error("'{0}' is not a setting; write on, off, or settings like interval=5s,min-age=2,keep=64M,rate=4G/s")]
    NotASetting(String),
    /// A key that there is not.
    #[error("unknown setting '{0}'; the settings are interval, min-age, keep and rate")]
    Unknown(String),
    /// A key that was there before.
    #[error("'{0}' is set twice")]
    Twice(&'static str),
    /// No time.
    #[error("in 'interval': {0}")]
    Interval(DurationError),
    /// Too short or too long.
    #[error("'interval={0}' is out of range; use 100ms to 1h")]
    IntervalRange(String),
    /// No number of scans.
    #[error("'min-age={0}' is not a number of scans; use 1 to 255")]
    MinAge(String),
    /// No size.
    #[error("in '{0}': {1}")]
    Size(&'static str, SizeError),
    /// Nothing would ever move.
    #[error("'rate={0}' is too slow; use at least 2M/s")]
    Rate(String),
}

impl FromStr for Switch {
    type Err = SettingsError;

    fn from_str(text: &str) -> Result<Self, SettingsError> {
        match text.trim() {
            "off" => return Ok(Self(None)),
            "on" => return Ok(Self(Some(Settings::default()))),
            _ => {}
        }
        let mut settings = Settings::default();
        let mut seen = [false; 4];
        for part in text.split(',').map(str::trim) {
            let (key, value) = part.split_once('=').ok_or_else(|| SettingsError::NotASetting(shorten(part)))?;
            let (key, value) = (key.trim(), value.trim());
            let (index, name) = match key {
                "interval" => (0, "interval"),
                "min-age" => (1, "min-age"),
                "keep" => (2, "keep"),
                "rate" => (3, "rate"),
                other => return Err(SettingsError::Unknown(shorten(other))),
            };
            if std::mem::replace(&mut seen[index], true) {
                return Err(SettingsError::Twice(name));
            }
            match name {
                "interval" => settings.interval = interval(value)?,
                "min-age" => settings.min_age = min_age(value)?,
                "keep" => settings.keep_bytes = size("keep", value)?,
                _ => settings.rate_bytes = rate(value)?,
            }
        }
        Ok(Self(Some(settings)))
    }
}

fn interval(text: &str) -> Result<Duration, SettingsError> {
    let interval = parse_duration(text).map_err(SettingsError::Interval)?;
    // What is shown is what was taken.
    let interval = Duration::from_millis(interval.as_millis() as u64);
    if (SHORTEST..=LONGEST).contains(&interval) {
        Ok(interval)
    } else {
        Err(SettingsError::IntervalRange(shorten(text)))
    }
}

fn min_age(text: &str) -> Result<u8, SettingsError> {
    text.parse().ok().filter(|age| *age > 0).ok_or_else(|| SettingsError::MinAge(shorten(text)))
}

fn size(key: &'static str, text: &str) -> Result<u64, SettingsError> {
    text.parse::<Bytes>().map(|Bytes(bytes)| bytes).map_err(|reason| SettingsError::Size(key, reason))
}

fn rate(text: &str) -> Result<u64, SettingsError> {
    let bytes = size("rate", text.strip_suffix("/s").unwrap_or(text))?;
    if bytes < HUGE_SIZE { Err(SettingsError::Rate(shorten(text))) } else { Ok(bytes) }
}

impl fmt::Display for Settings {
    /// As the command line takes it back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { interval, min_age, keep_bytes, rate_bytes } = self;
        let (keep, rate) = (exact(*keep_bytes), exact(*rate_bytes));
        match interval.as_millis() {
            millis if millis % 1000 == 0 => write!(f, "interval={}s", millis / 1000)?,
            millis => write!(f, "interval={millis}ms")?,
        }
        write!(f, ",min-age={min_age},keep={keep},rate={rate}/s")
    }
}

impl From<Settings> for String {
    fn from(settings: Settings) -> Self {
        settings.to_string()
    }
}

impl From<Switch> for String {
    fn from(switch: Switch) -> Self {
        switch.0.map_or_else(|| "off".to_owned(), Self::from)
    }
}

impl TryFrom<String> for Switch {
    type Error = SettingsError;

    fn try_from(text: String) -> Result<Self, SettingsError> {
        text.parse()
    }
}

impl TryFrom<String> for Settings {
    type Error = SettingsError;

    fn try_from(text: String) -> Result<Self, SettingsError> {
        text.parse::<Switch>()?.0.ok_or(SettingsError::NotASetting(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn settings_are_read_as_people_write_them() {
        assert_eq!("off".parse(), Ok(Switch(None)));
        assert_eq!("on".parse(), Ok(Switch(Some(Settings::default()))));
        assert_eq!("interval=5s,min-age=2,keep=64M,rate=4G/s".parse(), Ok(Switch(Some(Settings::default()))));
        let few = Settings { interval: Duration::from_millis(200), keep_bytes: 0, ..Settings::default() };
        assert_eq!(" keep=0 , interval=200ms".parse(), Ok(Switch(Some(few))));
        assert_eq!(few.to_string().parse(), Ok(Switch(Some(few))));
        assert_eq!((few.keep_frames(), few.frames_a_scan()), (0, 409));
    }

    #[test]
    fn refusals_teach() {
        for (text, message) in [
            ("", "'' is not a setting; write on, off, or settings like interval=5s,min-age=2,keep=64M,rate=4G/s"),
            ("yes", "'yes' is not a setting; write on, off, or settings like interval=5s,min-age=2,keep=64M,rate=4G/s"),
            (
                "on,keep=0",
                "'on' is not a setting; write on, off, or settings like interval=5s,min-age=2,keep=64M,rate=4G/s",
            ),
            ("speed=1", "unknown setting 'speed'; the settings are interval, min-age, keep and rate"),
            ("keep=1M,keep=2M", "'keep' is set twice"),
            ("interval=1ms", "'interval=1ms' is out of range; use 100ms to 1h"),
            ("interval=2h", "'interval=2h' is out of range; use 100ms to 1h"),
            ("interval=5", "in 'interval': '5' has no known unit; the units are us, ms, s, m (minutes) and h"),
            ("min-age=0", "'min-age=0' is not a number of scans; use 1 to 255"),
            ("min-age=256", "'min-age=256' is not a number of scans; use 1 to 255"),
            ("keep=-1", "in 'keep': '-1' is negative; a size starts at 0"),
            ("rate=0/s", "'rate=0/s' is too slow; use at least 2M/s"),
            (
                "rate=4X/s",
                "in 'rate': unknown unit 'X' in '4X'; the units are K, M, G and T (powers of 1024), or none for bytes",
            ),
        ] {
            assert_eq!(text.parse::<Switch>().expect_err(text).to_string(), message);
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "((interval|min-age|keep|rate|on|off|x)?=?[0-9]{0,30}(ms|s|h|G|M|/s)?,?){0,6}") {
            if let Ok(switch) = text.parse::<Switch>() {
                prop_assert_eq!(String::from(switch).parse::<Switch>(), Ok(switch));
            }
        }
    }
}
