// SPDX-License-Identifier: Apache-2.0
//! Sizes of messages: one, or several by weight, always in the same order.

use std::fmt;
use std::str::FromStr;

/// `64`, or `64*90,5000*9,256k*1`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Sizes {
    list: Vec<(usize, u32)>,
    /// What comes when, spread evenly.
    order: Vec<usize>,
    text: String,
}

impl Sizes {
    /// The size of message `number`.
    pub(crate) fn at(&self, number: u64) -> usize {
        let place = usize::try_from(number % self.order.len() as u64).unwrap_or(0);
        self.order[place]
    }

    pub(crate) fn largest(&self) -> usize {
        self.list.iter().map(|(size, _)| *size).max().unwrap_or(1)
    }
}

impl FromStr for Sizes {
    type Err = String;

    fn from_str(text: &str) -> Result<Sizes, String> {
        let list = text.split(',').map(item).collect::<Result<Vec<_>, _>>()?;
        let total: u32 = list.iter().map(|(_, weight)| weight).sum();
        if total > WEIGHT_MAX {
            return Err(format!("weights must sum to at most {WEIGHT_MAX}"));
        }
        // Whoever is furthest behind its share comes next.
        let mut given = vec![0_u32; list.len()];
        let mut order = Vec::new();
        for step in 1..=total {
            let behind = |index: &usize| {
                let (_, weight) = list[*index];
                i64::from(weight) * i64::from(step) - i64::from(given[*index]) * i64::from(total)
            };
            let next = (0..list.len()).max_by_key(behind).unwrap_or(0);
            given[next] += 1;
            order.push(list[next].0);
        }
        Ok(Sizes { list, order, text: text.to_owned() })
    }
}

impl fmt::Display for Sizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn item(text: &str) -> Result<(usize, u32), String> {
    let (size, weight) = text.split_once('*').unwrap_or((text, "1"));
    let digits = size.trim_end_matches(['k', 'K', 'm', 'M']);
    let unit = match &size[digits.len()..] {
        "" => 1,
        "k" | "K" => 1 << 10,
        "m" | "M" => 1 << 20,
        _ => 0,
    };
    let size = digits.parse::<usize>().ok().and_then(|size| size.checked_mul(unit));
    let weight = weight.parse::<u32>().ok().filter(|weight| *weight > 0);
    match (size.filter(|size| (1..=SIZE_MAX).contains(size)), weight) {
        (Some(size), Some(weight)) => Ok((size, weight)),
        _ => Err(format!("`{text}` must be bytes from 1 to 16m, as 64, 5000*9 (weight 9) or 256k")),
    }
}

const SIZE_MAX: usize = 16 << 20;
const WEIGHT_MAX: u32 = 10_000;

#[cfg(test)]
mod tests {
    use super::Sizes;

    #[test]
    fn several_sizes_come_by_weight_and_spread() {
        let sizes: Sizes = "64*3,1k*1".parse().unwrap_or_else(|error| panic!("{error}"));
        let order: Vec<usize> = (0..8).map(|number| sizes.at(number)).collect();
        assert_eq!(order.iter().filter(|size| **size == 1024).count(), 2);
        assert_eq!(order[..4], order[4..]);
        assert_eq!(sizes.largest(), 1024);
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "0", "64*0", "1g", "17m", "64*20000", "a"] {
            assert!(text.parse::<Sizes>().is_err(), "{text}");
        }
    }
}
