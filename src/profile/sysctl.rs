// SPDX-License-Identifier: Apache-2.0
//! What a profile wants of a sysctl: this value, or at least so much.

use std::fmt;
use std::str::FromStr;

/// What one sysctl should be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Wanted {
    /// This number or more; written `">=4096"`. A host that has more keeps it.
    AtLeast(u64),
    /// Exactly this; several fields with one space between.
    Exactly(String),
}

impl Wanted {
    /// Whether a sysctl that reads `now` is as wanted.
    #[must_use]
    pub fn is_met(&self, now: &str) -> bool {
        match self {
            Wanted::AtLeast(least) => now.parse::<u64>().is_ok_and(|now| now >= *least),
            Wanted::Exactly(value) => value == now,
        }
    }

    /// What to write where it is not met.
    #[must_use]
    pub fn value(&self) -> String {
        match self {
            Wanted::AtLeast(least) => least.to_string(),
            Wanted::Exactly(value) => value.clone(),
        }
    }
}

impl FromStr for Wanted {
    type Err = ();

    fn from_str(text: &str) -> Result<Wanted, ()> {
        match text.strip_prefix(">=") {
            Some(least) => least.trim().parse().map(Wanted::AtLeast).map_err(|_| ()),
            None if text.trim().is_empty() => Err(()),
            None => Ok(Wanted::Exactly(fields(text))),
        }
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Wanted::AtLeast(least) => write!(f, ">={least}"),
            Wanted::Exactly(value) => f.write_str(value),
        }
    }
}

/// The kernel separates fields by tabs, people by spaces.
pub(crate) fn fields(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_that_has_more_is_left_alone() {
        let wanted: Wanted = ">= 4096".parse().unwrap();
        assert_eq!((wanted.is_met("4096"), wanted.is_met("9999")), (true, true));
        assert_eq!((wanted.is_met("4095"), wanted.is_met("on")), (false, false));
        assert_eq!((wanted.value(), wanted.to_string()), ("4096".into(), ">=4096".into()));
        let ports: Wanted = "1024  65000".parse().unwrap();
        assert!(ports.is_met("1024 65000") && !ports.is_met("1024 65001"));
        assert!(">=many".parse::<Wanted>().is_err() && " ".parse::<Wanted>().is_err());
    }
}
