//! Versions of both ends, to compare.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A version, `MAJOR.MINOR.PATCH`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Version {
    major: u32,
    minor: u32,
    patch: u32,
}

impl Version {
    /// This version.
    ///
    /// # Panics
    /// Never: cargo has checked the text.
    pub fn own() -> Self {
        env!("CARGO_PKG_VERSION").parse().expect("cargo's own version is well formed")
    }

    /// A version of these numbers.
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl From<Version> for String {
    fn from(version: Version) -> Self {
        version.to_string()
    }
}

/// A text that is no version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no version")]
pub struct NoVersion(String);

impl FromStr for Version {
    type Err = NoVersion;

    fn from_str(text: &str) -> Result<Self, NoVersion> {
        let number = |part: Option<&str>| {
            part.and_then(|part| part.parse().ok()).ok_or_else(|| NoVersion(text.chars().take(40).collect()))
        };
        let release = text.split(['-', '+']).next().unwrap_or_default();
        let mut parts = release.split('.');
        let version = Self { major: number(parts.next())?, minor: number(parts.next())?, patch: number(parts.next())? };
        if parts.next().is_some() { number(None) } else { Ok(0) }.map(|_: u32| version)
    }
}

impl TryFrom<String> for Version {
    type Error = NoVersion;

    fn try_from(text: String) -> Result<Self, NoVersion> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number_not_by_text() {
        assert!("0.10.0".parse::<Version>().unwrap() > "0.9.9".parse().unwrap());
        assert_eq!("1.2.3-rc1".parse::<Version>().unwrap(), Version::new(1, 2, 3));
        assert_eq!(Version::new(0, 1, 0).to_string(), "0.1.0");
    }

    #[test]
    fn what_is_no_version_is_refused() {
        for text in ["", "1", "1.2", "1.2.3.4", "a.b.c", "1..3", "99999999999.0.0"] {
            assert!(text.parse::<Version>().is_err(), "{text}");
        }
    }
}
