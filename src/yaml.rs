// SPDX-License-Identifier: Apache-2.0
//! YAML as a tree that knows where everything stands, so that every mistake in a file can be
//! shown at once, at its place.
//!
//! Plain data: no anchors, aliases or tags, one document, strings as written. A scalar gets its
//! type from whoever asks for it, so `off` is a word wherever a word is wanted.

use std::io::{self, ErrorKind};
use std::path::Path;

use granit_parser::{Event, Parser, ScalarStyle, Span};

pub use mistakes::{Mistake, Mistakes};
pub use section::Section;
pub(crate) use section::{nearest, parsed};

mod mistakes;
mod section;

/// A node and where it begins.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Node {
    /// What it is.
    pub kind: Kind,
    /// Where it begins.
    pub place: Place,
}

/// What a node is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Items in order.
    List(Vec<Node>),
    /// Keys in order, each with its own place.
    Map(Vec<(String, Place, Node)>),
    /// Nothing was written, or `null`, or `~`.
    Null,
    /// A scalar, as written, without its quotes.
    Scalar(String),
}

/// Line and column, both from 1.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Place {
    /// From 1, in characters.
    pub column: usize,
    /// From 1.
    pub line: usize,
}

/// The text of a file.
///
/// # Errors
///
/// Why it cannot be read, as a mistake at its beginning.
pub fn read(path: &Path) -> Result<String, Mistakes> {
    std::fs::read_to_string(path).map_err(|error| {
        let mut mistakes = Mistakes::none(&path.display().to_string(), "");
        mistakes.add(Place { column: 1, line: 1 }, "", unreadable(&error));
        mistakes
    })
}

fn unreadable(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::NotFound => {
            format!("{error}; `weir config show` prints a config to start from")
        }
        ErrorKind::InvalidData => "not a text file: UTF-8 is wanted".to_owned(),
        ErrorKind::IsADirectory => format!("{error}; a file is wanted"),
        ErrorKind::PermissionDenied => format!("{error}; who runs weir must be able to read it"),
        _ => error.to_string(),
    }
}

/// Reads one document; a syntax error is the only mistake this finds.
///
/// # Errors
///
/// The first thing that is no YAML, or is YAML that weir does not take.
pub fn parse(text: &str) -> Result<Node, Mistake> {
    let mut builder = Builder { open: Vec::new(), nodes: 0, root: None };
    for next in Parser::new_from_str(text) {
        let (event, span) = next.map_err(|error| {
            let place = place(error.marker().line(), error.marker().col());
            Mistake::new(place, "", format!("not YAML: {}", error.info()))
        })?;
        builder.take(event, span)?;
    }
    Ok(builder.root.unwrap_or(Node { kind: Kind::Null, place: Place { column: 1, line: 1 } }))
}

struct Builder {
    nodes: usize,
    open: Vec<Open>,
    root: Option<Node>,
}

/// A collection that is being read.
enum Open {
    List(Place, Vec<Node>),
    Map(Place, Vec<(String, Place, Node)>, Option<(String, Place)>),
}

impl Builder {
    fn take(&mut self, event: Event<'_>, span: Span) -> Result<(), Mistake> {
        let place = place(span.start.line(), span.start.col());
        self.nodes += 1;
        if self.nodes > NODES_MAX || self.open.len() > DEPTH_MAX {
            return Err(Mistake::new(place, "", "too much for a config file".to_owned()));
        }
        match event {
            Event::Alias(_) | Event::UnresolvedAlias(_) => {
                Err(Mistake::new(place, "", "aliases are not taken here".to_owned()))
            }
            Event::DocumentStart(..) if self.root.is_some() => {
                Err(Mistake::new(place, "", "only one document is taken here".to_owned()))
            }
            Event::SequenceStart(..) => {
                self.open.push(Open::List(place, Vec::new()));
                Ok(())
            }
            Event::MappingStart(..) => {
                self.open.push(Open::Map(place, Vec::new(), None));
                Ok(())
            }
            Event::SequenceEnd | Event::MappingEnd => self.close(),
            Event::Scalar(text, style, ..) => self.add(Node { kind: scalar(&text, style), place }),
            _ => Ok(()),
        }
    }

    fn close(&mut self) -> Result<(), Mistake> {
        match self.open.pop() {
            Some(Open::List(place, items)) => self.add(Node { kind: Kind::List(items), place }),
            Some(Open::Map(place, entries, _)) => {
                self.add(Node { kind: Kind::Map(entries), place })
            }
            None => Ok(()),
        }
    }

    fn add(&mut self, node: Node) -> Result<(), Mistake> {
        match self.open.last_mut() {
            None => self.root = Some(node),
            Some(Open::List(_, items)) => items.push(node),
            Some(Open::Map(_, entries, key @ None)) => match node.kind {
                Kind::Scalar(text) if entries.iter().any(|(other, ..)| *other == text) => {
                    return Err(Mistake::new(node.place, &text, "is there twice".to_owned()));
                }
                Kind::Scalar(text) => *key = Some((text, node.place)),
                _ => {
                    return Err(Mistake::new(node.place, "", "a key must be a word".to_owned()));
                }
            },
            Some(Open::Map(_, entries, key)) => {
                let (name, place) = key.take().unwrap_or_default();
                entries.push((name, place, node));
            }
        }
        Ok(())
    }
}

/// YAML 1.2's core schema knows these four ways to write nothing; quotes make it a word.
fn scalar(text: &str, style: ScalarStyle) -> Kind {
    let is_plain = matches!(style, ScalarStyle::Plain);
    if is_plain && matches!(text, "" | "~" | "null" | "Null" | "NULL") {
        Kind::Null
    } else {
        Kind::Scalar(text.to_owned())
    }
}

const fn place(line: usize, column_from_0: usize) -> Place {
    Place { column: column_from_0 + 1, line }
}

/// Events of one file: 10,000 services of 20 endpoints have 270,000. Without aliases each takes a byte of
/// the text, so nothing grows beyond what was written.
const NODES_MAX: usize = 1 << 20;
/// Nesting; a config needs five.
const DEPTH_MAX: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_thousand_services_fit_and_a_million_nodes_do_not() {
        let services = (0..10_000).fold(String::from("services:\n"), |text, one| {
            let endpoints = "\"10.0.0.1:7000\", ".repeat(20);
            text + &format!("  - {{ name: com.example.S{one}, endpoints: [{endpoints}] }}\n")
        });
        assert!(parse(&services).is_ok());
        let mistake = parse(&"- a\n".repeat(NODES_MAX)).unwrap_err();
        assert!(mistake.text.contains("too much"), "{mistake:?}");
    }
}
