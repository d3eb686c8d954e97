//! Sizes and durations as people write them in configuration: `256MiB`, `250ms`. Parsed the same way everywhere.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A number of bytes, written as `512`, `64KiB`, `1.5GiB` or `10MB`.
///
/// Powers of two are `KiB MiB GiB TiB`; powers of ten are `kB MB GB TB`. A bare number is bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(u64);

/// A length of time, written as `250ms`, `30s`, `1m30s`. The unit is required: a bare number could be anything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HumanDuration(Duration);

/// Why a text is not a size or a duration, with an example that is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Not a size.
    #[error("{0:?} is not a size: write a number and a unit, as in \"64KiB\", \"256MiB\" or \"2GiB\"")]
    Size(String),
    /// Not a duration.
    #[error("{0:?} is not a duration: write a number and a unit, as in \"250ms\", \"30s\" or \"5m\"")]
    Duration(String),
    /// More than fits.
    #[error("{0:?} is more than can be counted here: write a smaller value")]
    TooLarge(String),
}

const SIZE_UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("B", 1),
];

const DURATION_UNITS: [(&str, u64); 7] = [
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

impl ByteSize {
    /// So many bytes.
    pub const fn bytes(n: u64) -> Self {
        Self(n)
    }

    /// So many KiB.
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }

    /// So many MiB.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// So many GiB.
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }

    /// The number of bytes.
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// The number of bytes as a `usize`; on a 32-bit machine at most `usize::MAX`.
    pub fn as_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl HumanDuration {
    /// So many microseconds.
    pub const fn micros(n: u64) -> Self {
        Self(Duration::from_micros(n))
    }

    /// So many milliseconds.
    pub const fn millis(n: u64) -> Self {
        Self(Duration::from_millis(n))
    }

    /// So many seconds.
    pub const fn secs(n: u64) -> Self {
        Self(Duration::from_secs(n))
    }

    /// As the standard library's type.
    pub const fn get(self) -> Duration {
        self.0
    }
}

impl From<HumanDuration> for Duration {
    fn from(value: HumanDuration) -> Self {
        value.0
    }
}

impl From<Duration> for HumanDuration {
    fn from(value: Duration) -> Self {
        Self(value)
    }
}

/// Cuts one leading `number unit` off `text`; the unit is the run of letters after the number.
fn leading_quantity(text: &str) -> Option<(&str, &str, &str)> {
    let digits = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '_'))
        .unwrap_or(text.len());
    let (number, rest) = text.split_at(digits);
    let rest = rest.trim_start();
    let letters = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
    let (unit, rest) = rest.split_at(letters);
    (!number.is_empty()).then_some((number, unit, rest.trim_start()))
}

/// `number * scale`, exact for whole numbers; fractions are rounded to the nearest whole unit of 1.
fn scaled(number: &str, scale: u64) -> Option<Result<u64, ()>> {
    let number = number.replace('_', "");
    if let Ok(whole) = number.parse::<u64>() {
        return Some(whole.checked_mul(scale).ok_or(()));
    }
    let product = number.parse::<f64>().ok()? * scale as f64;
    Some(if product < u64::MAX as f64 {
        Ok(product.round() as u64)
    } else {
        Err(())
    })
}

impl FromStr for ByteSize {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let not_a_size = || UnitError::Size(text.to_owned());
        let (number, unit, rest) = leading_quantity(text.trim()).ok_or_else(not_a_size)?;
        if !rest.is_empty() {
            return Err(not_a_size());
        }
        let scale = match unit {
            "" => 1,
            unit => {
                SIZE_UNITS
                    .iter()
                    .find(|(name, _)| name.eq_ignore_ascii_case(unit))
                    .ok_or_else(not_a_size)?
                    .1
            }
        };
        match scaled(number, scale).ok_or_else(not_a_size)? {
            Ok(bytes) => Ok(Self(bytes)),
            Err(()) => Err(UnitError::TooLarge(text.to_owned())),
        }
    }
}

impl FromStr for HumanDuration {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let not_a_duration = || UnitError::Duration(text.to_owned());
        let too_large = || UnitError::TooLarge(text.to_owned());
        let mut rest = text.trim();
        let mut nanos = 0u64;
        if rest.is_empty() {
            return Err(not_a_duration());
        }
        while !rest.is_empty() {
            let (number, unit, after) = leading_quantity(rest).ok_or_else(not_a_duration)?;
            let scale = DURATION_UNITS
                .iter()
                .find(|(name, _)| *name == unit)
                .ok_or_else(not_a_duration)?
                .1;
            let part = scaled(number, scale)
                .ok_or_else(not_a_duration)?
                .map_err(|()| too_large())?;
            nanos = nanos.checked_add(part).ok_or_else(too_large)?;
            rest = after;
        }
        Ok(Self(Duration::from_nanos(nanos)))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Binary units first; the exact number is always shown, so that reading it back gives the same value.
        match SIZE_UNITS
            .iter()
            .take(4)
            .find(|(_, scale)| self.0 > 0 && self.0.is_multiple_of(*scale))
        {
            Some((unit, scale)) => write!(f, "{}{unit}", self.0 / scale),
            None => write!(f, "{}B", self.0),
        }
    }
}

impl fmt::Display for HumanDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.as_nanos();
        match DURATION_UNITS
            .iter()
            .find(|(_, scale)| nanos > 0 && nanos.is_multiple_of(u128::from(*scale)))
        {
            Some((unit, scale)) => write!(f, "{}{unit}", nanos / u128::from(*scale)),
            None => write!(f, "0s"),
        }
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for HumanDuration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"256MiB\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_i64<E: de::Error>(self, n: i64) -> Result<ByteSize, E> {
                u64::try_from(n)
                    .map(ByteSize)
                    .map_err(|_| E::custom(UnitError::Size(n.to_string())))
            }

            fn visit_u64<E: de::Error>(self, n: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(n))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl<'de> Deserialize<'de> for HumanDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = HumanDuration;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration such as \"250ms\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<HumanDuration, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_i64<E: de::Error>(self, n: i64) -> Result<HumanDuration, E> {
                Err(E::custom(UnitError::Duration(n.to_string())))
            }

            fn visit_f64<E: de::Error>(self, n: f64) -> Result<HumanDuration, E> {
                Err(E::custom(UnitError::Duration(n.to_string())))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_and_print() {
        let table = [
            ("0", 0, "0B"),
            ("512", 512, "512B"),
            ("64KiB", 65_536, "64KiB"),
            (" 256 MiB ", 256 << 20, "256MiB"),
            ("256mib", 256 << 20, "256MiB"),
            ("1.5GiB", 1536 << 20, "1536MiB"),
            ("10MB", 10_000_000, "10000000B"),
            ("1_024B", 1024, "1KiB"),
            ("2TiB", 2 << 40, "2TiB"),
        ];
        for (text, bytes, printed) in table {
            let size: ByteSize = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(size.as_u64(), bytes, "{text}");
            assert_eq!(size.to_string(), printed);
            assert_eq!(size.to_string().parse(), Ok(size), "{text} must survive printing");
        }
    }

    #[test]
    fn durations_read_and_print() {
        let table = [
            ("0s", 0, "0s"),
            ("250ms", 250_000_000, "250ms"),
            ("1.5s", 1_500_000_000, "1500ms"),
            ("1m30s", 90_000_000_000, "90s"),
            ("2h", 7_200_000_000_000, "2h"),
            ("15us", 15_000, "15us"),
        ];
        for (text, nanos, printed) in table {
            let duration: HumanDuration = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(duration.get().as_nanos(), nanos, "{text}");
            assert_eq!(duration.to_string(), printed);
            assert_eq!(
                duration.to_string().parse(),
                Ok(duration),
                "{text} must survive printing"
            );
        }
    }

    #[test]
    fn what_is_not_a_unit_is_refused_with_an_example() {
        for text in ["", "lots", "12XB", "MiB", "1 2", "-5MiB", "1..2MiB"] {
            let error = text.parse::<ByteSize>().expect_err(text);
            assert!(error.to_string().contains("as in \"64KiB\""), "{text}: {error}");
        }
        for text in ["", "30", "5 parsecs", "s", "1m30", "-1s"] {
            let error = text.parse::<HumanDuration>().expect_err(text);
            assert!(error.to_string().contains("as in \"250ms\""), "{text}: {error}");
        }
        for text in ["99999999999TiB", "999999999999999999999"] {
            assert_eq!(text.parse::<ByteSize>(), Err(UnitError::TooLarge(text.to_owned())));
        }
        assert_eq!(
            "99999999999999d".parse::<HumanDuration>(),
            Err(UnitError::TooLarge("99999999999999d".to_owned()))
        );
    }
}
