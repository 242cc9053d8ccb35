// SPDX-License-Identifier: Apache-2.0
//! Every mistake in a file, each at its place, with the line it stands in.

use std::fmt;

use super::Place;

/// One mistake.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Mistake {
    /// Dotted path of the key, empty for the file as a whole.
    pub path: String,
    /// Where it stands.
    pub place: Place,
    /// What is wrong and what is allowed.
    pub text: String,
}

impl Mistake {
    /// At `place`, about `path`.
    #[must_use]
    pub fn new(place: Place, path: &str, text: String) -> Mistake {
        Mistake { path: path.to_owned(), place, text }
    }
}

/// All mistakes of one file, in the order of the file when shown.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Mistakes {
    file: String,
    list: Vec<Mistake>,
    source: String,
}

impl Mistakes {
    /// None yet, in `file` (as it was given), which reads `source`.
    #[must_use]
    pub fn none(file: &str, source: &str) -> Mistakes {
        Mistakes { file: file.to_owned(), list: Vec::new(), source: source.to_owned() }
    }

    /// Notes one more.
    pub fn add(&mut self, place: Place, path: &str, text: impl Into<String>) {
        self.list.push(Mistake::new(place, path, text.into()));
    }

    /// Notes one that was found elsewhere.
    pub fn push(&mut self, mistake: Mistake) {
        self.list.push(mistake);
    }

    /// Nothing is wrong.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// In the order of the file.
    #[must_use]
    pub fn sorted(&self) -> Vec<&Mistake> {
        let mut sorted: Vec<&Mistake> = self.list.iter().collect();
        sorted.sort_by_key(|mistake| (mistake.place.line, mistake.place.column));
        sorted
    }

    /// `value` if nothing is wrong, otherwise all that is.
    ///
    /// # Errors
    ///
    /// Every mistake noted.
    pub fn or<T>(self, value: T) -> Result<T, Mistakes> {
        if self.list.is_empty() { Ok(value) } else { Err(self) }
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, mistake) in self.sorted().into_iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            let Place { column, line } = mistake.place;
            let colon = if mistake.path.is_empty() { "" } else { ": " };
            let Mistake { path, text, .. } = mistake;
            write!(f, "{}:{line}:{column}: {path}{colon}{text}", self.file)?;
            let shown = self.source.lines().nth(line.saturating_sub(1)).unwrap_or("");
            let shown: String = shown.replace('\t', " ").chars().take(SHOWN_MAX).collect();
            if !shown.trim().is_empty() {
                let caret = column.min(SHOWN_MAX);
                write!(f, "\n  {line:>4} | {shown}\n       | {:>caret$}", '^')?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Mistakes {}

/// Characters of a line that are shown.
const SHOWN_MAX: usize = 120;
