//! Sizes and times as people write them.
//!
//! [`Bytes`] and the parsers here turn `16G`, `1.5GiB` or `500ms` into numbers and back. Text goes
//! in, values come out; nothing else is touched. Every error names the text it refused and says
//! what would have been taken.

use serde::{Deserialize, Serialize};
use shared_layout::HUGE_SIZE;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A number of bytes. All its units are binary: `1K` is 1024 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// 1024 bytes.
    pub const KIB: u64 = 1 << 10;
    /// 1024 KiB.
    pub const MIB: u64 = 1 << 20;
    /// 1024 MiB.
    pub const GIB: u64 = 1 << 30;
    /// 1024 GiB.
    pub const TIB: u64 = 1 << 40;
}

/// The units that [`Bytes`] knows, largest first.
const UNITS: [(&str, u64); 4] = [("TiB", Bytes::TIB), ("GiB", Bytes::GIB), ("MiB", Bytes::MIB), ("KiB", Bytes::KIB)];

/// More digits than any number of bytes needs; a longer text is refused before it is added up.
const MAX_DIGITS: usize = 30;

/// The reason that a text is not a size.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SizeError {
    /// Nothing there.
    #[error("an empty size; write a number and a unit, like 512M or 16G")]
    Empty,
    /// A minus sign.
    #[error("'{0}' is negative; a size starts at 0")]
    Negative(String),
    /// No digits in front, or letters among them.
    #[error("'{0}' is not a size; write a number and a unit, like 512M, 1.5G or 4096")]
    NotANumber(String),
    /// Letters after the number that are not a unit.
    #[error("unknown unit '{unit}' in '{text}'; the units are K, M, G and T (powers of 1024), or none for bytes")]
    UnknownUnit {
        /// The text.
        text: String,
        /// The part that is not a unit.
        unit: String,
    },
    /// A point, but no unit.
    #[error("'{0}' is a fraction of a byte; add a unit (K, M, G, T) or leave the fraction out")]
    FractionOfByte(String),
    /// Beyond 64 bits.
    #[error("'{0}' is too large; the largest size is 16 EiB less one byte")]
    Overflow(String),
}

impl FromStr for Bytes {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let trimmed = text.trim();
        if trimmed.is_empty() {
            return Err(SizeError::Empty);
        }
        let quoted = || shorten(trimmed);
        if let Some(rest) = trimmed.strip_prefix('-')
            && rest.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        {
            return Err(SizeError::Negative(quoted()));
        }
        let (number, unit) = split_number(trimmed);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let has_point = number.contains('.');
        if whole.is_empty() || (has_point && fraction.is_empty()) || fraction.contains('.') {
            return Err(SizeError::NotANumber(quoted()));
        }
        let Some(factor) = unit_factor(unit) else {
            return Err(SizeError::UnknownUnit { text: quoted(), unit: shorten(unit) });
        };
        if has_point && factor == 1 {
            return Err(SizeError::FractionOfByte(quoted()));
        }
        // A fraction is cut to whole bytes; digits that cannot move a byte are not read.
        let fraction = &fraction[..fraction.len().min(18)];
        let overflow = || SizeError::Overflow(quoted());
        let whole = digits(whole).ok_or_else(overflow)?.checked_mul(u128::from(factor)).ok_or_else(overflow)?;
        let scale = 10u128.pow(fraction.len() as u32);
        let part = digits(fraction).ok_or_else(overflow)? * u128::from(factor) / scale;
        whole.checked_add(part).and_then(|sum| u64::try_from(sum).ok()).map(Self).ok_or_else(overflow)
    }
}

/// The longest prefix of digits and points, and the rest.
fn split_number(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

/// The value of a string of ASCII digits, 0 for none; `None` if it is absurdly long.
fn digits(text: &str) -> Option<u128> {
    let text = text.trim_start_matches('0');
    if text.len() > MAX_DIGITS {
        return None;
    }
    Some(text.bytes().fold(0, |sum, digit| sum * 10 + u128::from(digit - b'0')))
}

fn unit_factor(unit: &str) -> Option<u64> {
    let unit = unit.to_ascii_lowercase();
    let letter = match unit.as_str() {
        "" | "b" => return Some(1),
        other => other.strip_suffix("ib").or_else(|| other.strip_suffix(['b', 'i'])).unwrap_or(other),
    };
    match letter {
        "k" => Some(Bytes::KIB),
        "m" => Some(Bytes::MIB),
        "g" => Some(Bytes::GIB),
        "t" => Some(Bytes::TIB),
        _ => None,
    }
}

/// A refused text as it goes into an error: not longer than a line can bear, nothing unprintable.
pub fn shorten(text: &str) -> String {
    const MOST: usize = 40;
    let mut short: String = text.chars().take(MOST).flat_map(char::escape_debug).collect();
    if text.chars().nth(MOST).is_some() {
        short.push_str("...");
    }
    short
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What would round to 1024 of a unit is one of the next.
        let reaches = |factor: u64| self.0 >= factor - if factor > Bytes::KIB { factor / 2048 } else { 0 };
        let text = match UNITS.iter().find(|(_, factor)| reaches(*factor)) {
            None => format!("{} B", self.0),
            Some((unit, factor)) if self.0.is_multiple_of(*factor) => format!("{} {unit}", self.0 / factor),
            Some((unit, factor)) => {
                // Three digits are enough to read; fewer before the point leave more after it.
                let value = self.0 as f64 / *factor as f64;
                let places = if value >= 100.0 {
                    0
                } else if value >= 10.0 {
                    1
                } else {
                    2
                };
                let number = format!("{value:.places$}");
                let number = if places > 0 { number.trim_end_matches('0').trim_end_matches('.') } else { &number };
                format!("{number} {unit}")
            }
        };
        f.pad(&text)
    }
}

/// Why a size cannot be an amount of guest memory.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MemorySizeError {
    /// No size at all.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// Nothing.
    #[error("the size is 0; memory comes in steps of 2 MiB, so the smallest is 2M")]
    Zero,
    /// Between two steps.
    #[error("{bytes} bytes are not a multiple of 2 MiB; {}", neighbours(*.below, *.above))]
    NotAMultiple {
        /// The size given.
        bytes: u64,
        /// The next size below that would do, at least 2 MiB.
        below: u64,
        /// The next size above that would do.
        above: u64,
    },
}

fn neighbours(below: u64, above: u64) -> String {
    if below == above {
        format!("the nearest size is {}", exact(below))
    } else {
        format!("the nearest sizes are {} and {}", exact(below), exact(above))
    }
}

/// A size as the command line takes it back, without rounding.
pub fn exact(bytes: u64) -> String {
    match [("T", Bytes::TIB), ("G", Bytes::GIB), ("M", Bytes::MIB), ("K", Bytes::KIB)]
        .into_iter()
        .find(|(_, factor)| bytes != 0 && bytes.is_multiple_of(*factor))
    {
        Some((unit, factor)) => format!("{}{unit}", bytes / factor),
        None => bytes.to_string(),
    }
}

/// Checks that `bytes` is an amount that guest memory can have or change by.
///
/// # Errors
/// If the size is zero or not a multiple of 2 MiB.
pub fn check_memory(bytes: Bytes) -> Result<Bytes, MemorySizeError> {
    let Bytes(bytes) = bytes;
    if bytes == 0 {
        return Err(MemorySizeError::Zero);
    }
    if !bytes.is_multiple_of(HUGE_SIZE) {
        let below = (bytes - bytes % HUGE_SIZE).max(HUGE_SIZE);
        let above = bytes.checked_next_multiple_of(HUGE_SIZE).unwrap_or(below);
        return Err(MemorySizeError::NotAMultiple { bytes, below, above });
    }
    Ok(Bytes(bytes))
}

/// A size that guest memory can have or change by: not 0, a multiple of 2 MiB.
///
/// # Errors
/// See [`MemorySizeError`].
pub fn parse_memory(text: &str) -> Result<Bytes, MemorySizeError> {
    check_memory(text.parse()?)
}

/// The reason that a text is not a time span.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DurationError {
    /// Nothing there.
    #[error("an empty time; write a number and a unit, like 10s or 500ms")]
    Empty,
    /// A minus sign.
    #[error("'{0}' is negative; a time starts at 0")]
    Negative(String),
    /// No digits in front.
    #[error("'{0}' is not a time; write a number and a unit, like 10s or 500ms")]
    NotANumber(String),
    /// A number only, or letters after it that are not a unit.
    #[error("'{0}' has no known unit; the units are us, ms, s, m (minutes) and h")]
    UnknownUnit(String),
    /// Beyond what any command waits.
    #[error("'{0}' is too long; the longest time is 24h")]
    TooLong(String),
}

/// The longest time that any command takes.
pub const MAX_DURATION: Duration = Duration::from_secs(24 * 60 * 60);

/// A time span: a number, perhaps with a fraction, and `us`, `ms`, `s`, `m` or `h`.
///
/// # Errors
/// See [`DurationError`].
pub fn parse_duration(text: &str) -> Result<Duration, DurationError> {
    let trimmed = text.trim();
    if trimmed.is_empty() {
        return Err(DurationError::Empty);
    }
    let quoted = || shorten(trimmed);
    if trimmed.starts_with('-') {
        return Err(DurationError::Negative(quoted()));
    }
    let (number, unit) = split_number(trimmed);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.contains('.') || number.ends_with('.') {
        return Err(DurationError::NotANumber(quoted()));
    }
    let micros: u128 = match unit.to_ascii_lowercase().as_str() {
        "us" | "µs" => 1,
        "ms" => 1_000,
        "s" | "sec" => 1_000_000,
        "m" | "min" => 60_000_000,
        "h" => 3_600_000_000,
        // Nothing needs no unit.
        "" if digits(whole) == Some(0) && fraction.is_empty() => 0,
        _ => return Err(DurationError::UnknownUnit(quoted())),
    };
    let fraction = &fraction[..fraction.len().min(9)];
    let too_long = || DurationError::TooLong(quoted());
    let whole = digits(whole).and_then(|n| n.checked_mul(micros)).ok_or_else(too_long)?;
    let part = digits(fraction).ok_or_else(too_long)? * micros / 10u128.pow(fraction.len() as u32);
    let sum = u64::try_from(whole.saturating_add(part)).map_err(|_| too_long())?;
    let duration = Duration::from_micros(sum);
    if duration > MAX_DURATION { Err(too_long()) } else { Ok(duration) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("16G", 16 << 30),
            ("512M", 512 << 20),
            ("2MiB", 2 << 20),
            ("2mib", 2 << 20),
            ("1.5G", 3 << 29),
            ("4096", 4096),
            ("4096B", 4096),
            ("4 KB", 4096),
            ("1Ti", 1 << 40),
            (" 0 ", 0),
            ("0.5k", 512),
            ("007M", 7 << 20),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn refusals_teach() {
        for (text, message) in [
            ("", "an empty size; write a number and a unit, like 512M or 16G"),
            ("-1G", "'-1G' is negative; a size starts at 0"),
            ("NaN", "'NaN' is not a size; write a number and a unit, like 512M, 1.5G or 4096"),
            ("1.2.3G", "'1.2.3G' is not a size; write a number and a unit, like 512M, 1.5G or 4096"),
            ("12X", "unknown unit 'X' in '12X'; the units are K, M, G and T (powers of 1024), or none for bytes"),
            ("1.5", "'1.5' is a fraction of a byte; add a unit (K, M, G, T) or leave the fraction out"),
            ("99999999999T", "'99999999999T' is too large; the largest size is 16 EiB less one byte"),
        ] {
            assert_eq!(text.parse::<Bytes>().expect_err(text).to_string(), message);
        }
        for text in ["G", ".5G", "5.", "1e9", "inf", "0x10", "٣G"] {
            text.parse::<Bytes>().expect_err(text);
        }
    }

    #[test]
    fn sizes_are_shown_in_a_readable_unit() {
        for (bytes, text) in [
            (0, "0 B"),
            (4095, "4 KiB"),
            (4096, "4 KiB"),
            (16 << 30, "16 GiB"),
            (3 << 29, "1.5 GiB"),
            (512 << 20, "512 MiB"),
            ((1 << 30) + (64 << 20), "1.06 GiB"),
            ((1 << 40) - (1 << 29), "1 TiB"),
            ((1 << 40) - (1 << 29) - 1, "1023 GiB"),
            ((1 << 30) - 1, "1 GiB"),
            (1023, "1023 B"),
            (123 * 1024 * 1024 + 512, "123 MiB"),
            (u64::MAX, "16777216 TiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
        assert_eq!(format!("[{:>8}]", Bytes(4096)), "[   4 KiB]");
    }

    #[test]
    fn memory_comes_in_steps_of_2_mib_and_the_refusal_names_both_neighbours() {
        assert_eq!(parse_memory("16G"), Ok(Bytes(16 << 30)));
        assert_eq!(parse_memory("0"), Err(MemorySizeError::Zero));
        for (text, message) in [
            ("3M", "3145728 bytes are not a multiple of 2 MiB; the nearest sizes are 2M and 4M"),
            ("1023.5M", "1073217536 bytes are not a multiple of 2 MiB; the nearest sizes are 1022M and 1G"),
            ("1", "1 bytes are not a multiple of 2 MiB; the nearest size is 2M"),
        ] {
            assert_eq!(parse_memory(text).expect_err(text).to_string(), message);
        }
        parse_memory("18446744073709551615").expect_err("no multiple, and none above it");
    }

    #[test]
    fn times_are_read_and_bounded() {
        for (text, millis) in
            [("10s", 10_000), ("500ms", 500), ("2m", 120_000), ("1.5s", 1500), ("0", 0), ("24h", 86_400_000)]
        {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        assert_eq!(parse_duration("50us"), Ok(Duration::from_micros(50)));
        for text in ["", "10", "-1s", "s", "25h", "1d", "99999999999999999999999999999999999999s", "1.s"] {
            parse_duration(text).expect_err(text);
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,60}") {
            let _ = text.parse::<Bytes>();
            let _ = parse_memory(&text);
            let _ = parse_duration(&text);
        }

        #[test]
        fn numbers_with_units_never_panic(text in "-?[0-9]{0,45}(\\.[0-9]{0,45})? ?[kKmMgGtTx]?i?[bB]?") {
            let _ = text.parse::<Bytes>();
            let _ = parse_duration(&text);
        }

        #[test]
        fn whole_units_survive(n in 1u64..1 << 20, unit in prop::sample::select(vec!["K", "M", "G", "T"])) {
            let bytes: Bytes = format!("{n}{unit}").parse().expect("in range");
            prop_assert_eq!(exact(bytes.0).parse(), Ok(bytes));
        }
    }
}
