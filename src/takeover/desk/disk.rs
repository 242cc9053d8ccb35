// SPDX-License-Identifier: Apache-2.0
//! What a desk puts on disk, and what it finds there when it begins.
//!
//! Invariant: what could not be written is due until it is written.

use std::collections::BTreeMap;
use std::io;

use serde_json::Value;

use super::super::Snapshot;
use super::super::kept::{self, Asked, Journal};
use super::super::shelf::Shelf;
use super::{APPLICATIONS_MAX, Desk, Publication};

/// Something for the disk.
#[derive(Debug)]
pub struct Page {
    name: String,
    of: Part,
    shelf: Shelf,
    value: Value,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Part {
    /// What applications asked for.
    Journal,
    /// What is believed of a registry, by its place in the config.
    Registry(usize),
}

/// Why a page is not on disk.
#[derive(Debug, thiserror::Error)]
#[error("keep {name} in {place} (takeover.state): {source}")]
pub struct Unwritten {
    name: String,
    place: String,
    source: io::Error,
}

impl Page {
    /// Waits for the disk.
    ///
    /// # Errors
    ///
    /// It is not there; what was there before still is.
    pub fn write(&self) -> Result<(), Unwritten> {
        self.shelf.write(&self.name, &self.value).map_err(|source| Unwritten {
            name: self.name.clone(),
            place: self.shelf.to_string(),
            source,
        })
    }
}

impl Desk {
    /// What has to go to the disk, if anything has changed since the last time.
    pub fn pages(&mut self) -> Vec<Page> {
        let Some(shelf) = self.shelf.clone() else { return Vec::new() };
        let page = |of, name, value| Page { name, of, shelf: shelf.clone(), value };
        let mut pages = Vec::new();
        if std::mem::take(&mut self.to_keep) {
            pages.push(page(Part::Journal, JOURNAL.to_owned(), self.journal().page()));
        }
        for (index, one) in self.config.registries.iter().enumerate() {
            let Some(identity) = one.identity() else { continue };
            if let Some(snapshots) = self.book.take_news(index) {
                let value = kept::snapshots_page(&identity, snapshots.into_iter());
                pages.push(page(Part::Registry(index), file_of(&one.name), value));
            }
        }
        pages
    }

    /// This page could not be written: what it is about is due again, as it is by then.
    pub fn keep_again(&mut self, page: &Page) {
        match page.of {
            Part::Journal => self.to_keep = true,
            Part::Registry(index) => self.book.keep_again(index),
        }
    }

    /// What applications asked for in an earlier life.
    pub(super) fn replay(&mut self) {
        let page = self.shelf.as_ref().and_then(|shelf| read(shelf, JOURNAL, Journal::IDENTITY));
        let journal = page.map(Journal::read).unwrap_or_default();
        self.applications.extend(journal.applications.into_iter().take(APPLICATIONS_MAX));
        for Asked { parameters, port, service } in journal.publications {
            if let Err(refusal) = self.publish(&service, Some(port), &parameters) {
                tracing::warn!(
                    service,
                    "what was published before is not published again: {refusal}"
                );
            }
        }
        for service in journal.subscriptions {
            // Refused now, refused when it is asked for again.
            let _ = self.subscribe(&service);
        }
        self.replay_sessions(journal.sessions);
        self.to_keep = false;
    }

    fn journal(&self) -> Journal {
        let asked = |(service, one): (&String, &Publication)| Asked {
            parameters: one.provider.parameters.clone(),
            port: one.port,
            service: service.clone(),
        };
        Journal {
            applications: self.applications.iter().cloned().collect(),
            publications: self.publications.iter().map(asked).collect(),
            sessions: self.kept_sessions(),
            subscriptions: self.asked.iter().cloned().collect(),
        }
    }
}

/// What a registry said in an earlier life.
pub(super) fn kept_of(
    one: &crate::config::Registry,
    shelf: Option<&Shelf>,
) -> BTreeMap<String, Snapshot> {
    let identity = one.identity();
    let page = shelf
        .zip(identity)
        .and_then(|(shelf, identity)| read(shelf, &file_of(&one.name), &identity));
    page.map(kept::snapshots).unwrap_or_default()
}

fn read(shelf: &Shelf, name: &str, identity: &str) -> Option<Value> {
    let page = shelf.read(name, identity);
    page.unwrap_or_else(|unusable| {
        tracing::warn!("{name} in takeover.state is not used: {unusable}");
        None
    })
}

/// In which a registry's snapshots are: no two names have the same file.
fn file_of(registry: &str) -> String {
    let mut file = "registry-".to_owned();
    for byte in registry.bytes() {
        match byte {
            byte if byte.is_ascii_alphanumeric() || byte == b'-' => file.push(char::from(byte)),
            byte => file.push_str(&format!("_{byte:02x}")),
        }
    }
    file + ".json"
}

const JOURNAL: &str = "journal.json";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_registry_has_a_file_of_its_own() {
        let files: Vec<String> =
            ["main", "a.b", "a_b", "a/b", "\u{e9}", "_2e"].map(file_of).to_vec();
        let expected = [
            "registry-main.json",
            "registry-a_2eb.json",
            "registry-a_5fb.json",
            "registry-a_2fb.json",
            "registry-_c3_a9.json",
            "registry-_5f2e.json",
        ];
        assert_eq!(files, expected);
    }
}
