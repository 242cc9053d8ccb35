// SPDX-License-Identifier: Apache-2.0
//! Reading a map key by key: what was asked for is what is allowed.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;

use super::{Kind, Mistakes, Node, Place};

/// A map that is being read. Keys that nobody asks for are mistakes, found by `finish`.
#[derive(Debug)]
pub struct Section {
    asked: Vec<&'static str>,
    entries: Vec<(String, Place, Node)>,
    path: String,
    place: Place,
}

impl Section {
    /// The map that a document is, by `take`, which asks for its keys. `file` is how messages call
    /// the document.
    ///
    /// # Errors
    ///
    /// Every mistake in the text, keys that nobody asked for among them.
    pub fn document<T>(
        file: &str,
        text: &str,
        take: impl FnOnce(&mut Section, &mut Mistakes) -> T,
    ) -> Result<T, Mistakes> {
        let mut mistakes = Mistakes::none(file, text);
        let root = match super::parse(text) {
            Ok(root) => root,
            Err(mistake) => {
                mistakes.push(mistake);
                return Err(mistakes);
            }
        };
        let mut section = Section::open(Some(root), "", &mut mistakes);
        let value = take(&mut section, &mut mistakes);
        section.finish(&mut mistakes);
        mistakes.or(value)
    }

    /// The map at `path`; an absent or empty one has no keys.
    pub fn open(node: Option<Node>, path: &str, mistakes: &mut Mistakes) -> Section {
        let place = node.as_ref().map_or(Place { column: 1, line: 1 }, |node| node.place);
        let entries = match node.map(|node| node.kind) {
            Some(Kind::Map(entries)) => entries,
            None | Some(Kind::Null) => Vec::new(),
            Some(_) => {
                mistakes.add(place, path, "must be a map (`key: value`)");
                Vec::new()
            }
        };
        Section { asked: Vec::new(), entries, path: path.to_owned(), place }
    }

    /// Where the map begins.
    #[must_use]
    pub const fn place(&self) -> Place {
        self.place
    }

    /// The dotted path of `key`.
    #[must_use]
    pub fn path(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Whether `key` is there and was not taken yet.
    #[must_use]
    pub fn has(&self, key: &str) -> bool {
        self.entries.iter().any(|(name, ..)| name == key)
    }

    /// The node under `key`, taken out.
    pub fn take(&mut self, key: &'static str) -> Option<Node> {
        self.asked.push(key);
        let index = self.entries.iter().position(|(name, ..)| name == key)?;
        let (_, place, node) = self.entries.remove(index);
        // A value that is not there stands where its key does.
        Some(if node.kind == Kind::Null { Node { place, ..node } } else { node })
    }

    /// A map under `key`.
    pub fn section(&mut self, key: &'static str, mistakes: &mut Mistakes) -> Section {
        let node = self.take(key);
        Section::open(node, &self.path(key), mistakes)
    }

    /// The items of a list under `key`; a single item may stand without a list.
    pub fn list(&mut self, key: &'static str) -> Option<Vec<Node>> {
        Some(match self.take(key)? {
            Node { kind: Kind::List(items), .. } => items,
            Node { kind: Kind::Null, .. } => Vec::new(),
            node => vec![node],
        })
    }

    /// A whole number under `key`.
    pub fn number<T: FromStr + Display + PartialOrd + Copy>(
        &mut self,
        key: &'static str,
        range: RangeInclusive<T>,
        mistakes: &mut Mistakes,
    ) -> Option<T> {
        let path = self.path(key);
        let node = self.take(key)?;
        let number = node.text().and_then(|text| text.replace('_', "").parse().ok());
        if let Some(number) = number.filter(|number| range.contains(number)) {
            return Some(number);
        }
        let (least, most) = (range.start(), range.end());
        mistakes.add(
            node.place,
            &path,
            format!("{}must be a number from {least} to {most}", node.said()),
        );
        None
    }

    /// One of some words under `key`.
    pub fn word<T: Copy>(
        &mut self,
        key: &'static str,
        words: &[(&str, T)],
        mistakes: &mut Mistakes,
    ) -> Option<T> {
        let path = self.path(key);
        let node = self.take(key)?;
        let found = words.iter().find(|(word, _)| Some(*word) == node.text());
        if let Some((_, value)) = found {
            return Some(*value);
        }
        let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let hint = node.text().and_then(|text| nearest(text, &known)).unwrap_or_default();
        mistakes.add(node.place, &path, format!("{}must be {}{hint}", node.said(), either(&known)));
        None
    }

    /// Anything under `key` that parses from a string; `what` says what it must be.
    pub fn parsed<T: FromStr>(
        &mut self,
        key: &'static str,
        what: &str,
        mistakes: &mut Mistakes,
    ) -> Option<T> {
        let path = self.path(key);
        let node = self.take(key)?;
        parsed(&node, &path, what, mistakes)
    }

    /// Every key left over is a mistake.
    pub fn finish(self, mistakes: &mut Mistakes) {
        for (name, place, _) in &self.entries {
            let mut known = self.asked.clone();
            known.sort_unstable();
            let hint =
                nearest(name, &known).unwrap_or_else(|| format!("; known: {}", known.join(", ")));
            mistakes.add(*place, &self.path(name), format!("unknown key{hint}"));
        }
    }
}

impl Node {
    /// The scalar as written; `None` for anything else.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        match &self.kind {
            Kind::Scalar(text) => Some(text),
            _ => None,
        }
    }

    /// The offending value, to begin a message with.
    pub(crate) fn said(&self) -> String {
        match &self.kind {
            Kind::List(_) => "a list: ".to_owned(),
            Kind::Map(_) => "a map: ".to_owned(),
            Kind::Null => "is empty: ".to_owned(),
            Kind::Scalar(text) => {
                let short: String = text.chars().take(60).collect();
                format!("`{}`: ", short.escape_debug())
            }
        }
    }
}

/// A node that parses from a string; `what` says what it must be.
pub(crate) fn parsed<T: FromStr>(
    node: &Node,
    path: &str,
    what: &str,
    mistakes: &mut Mistakes,
) -> Option<T> {
    let value = node.text().and_then(|text| text.parse().ok());
    if value.is_none() {
        mistakes.add(node.place, path, format!("{}must be {what}", node.said()));
    }
    value
}

/// "; did you mean `x`?" for the nearest of `known`, if one is near.
pub(crate) fn nearest(word: &str, known: &[&str]) -> Option<String> {
    known
        .iter()
        .map(|candidate| (strsim::damerau_levenshtein(word, candidate), candidate))
        .min()
        .filter(|(distance, candidate)| *distance <= candidate.len().max(word.len()) / 3 + 1)
        .map(|(_, candidate)| format!("; did you mean `{candidate}`?"))
}

fn either(words: &[&str]) -> String {
    match words {
        [one] => (*one).to_owned(),
        [first @ .., last] => format!("{} or {last}", first.join(", ")),
        [] => String::new(),
    }
}
