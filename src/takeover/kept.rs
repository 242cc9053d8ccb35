// SPDX-License-Identifier: Apache-2.0
//! What the desk keeps over a restart, as JSON: what applications asked for, and what each registry
//! is believed to have said.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Provider, Snapshot};

/// Everything that applications have asked for and not taken back.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub(super) struct Journal {
    pub(super) applications: Vec<String>,
    pub(super) publications: Vec<Asked>,
    pub(super) sessions: Vec<Session>,
    pub(super) subscriptions: Vec<String>,
}

/// A publication, as it was asked for.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Asked {
    pub(super) parameters: String,
    pub(super) port: u16,
    pub(super) service: String,
}

/// An application's session at its registry, which the façade carries.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Session {
    pub(super) id: i64,
    pub(super) leaves: Vec<Leaf>,
    pub(super) services: Vec<String>,
    pub(super) timeout_ms: u64,
}

/// A provider that it has entered: as the application calls it, and as the registry does.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Leaf {
    pub(super) path: String,
    pub(super) place: String,
    pub(super) port: u16,
    pub(super) real: String,
}

#[derive(Deserialize, Serialize)]
struct Entry {
    providers: Vec<String>,
    revision: u64,
}

impl Journal {
    /// Whose file it is.
    pub(super) const IDENTITY: &str = "journal";

    pub(super) fn page(&self) -> Value {
        json!({ "identity": Journal::IDENTITY, "journal": self })
    }

    pub(super) fn read(mut page: Value) -> Journal {
        serde_json::from_value(page["journal"].take()).unwrap_or_default()
    }
}

/// What the registry `identity` is believed to have said.
pub(super) fn snapshots_page<'a>(
    identity: &str,
    snapshots: impl Iterator<Item = &'a Snapshot>,
) -> Value {
    let entry = |snapshot: &Snapshot| Entry {
        providers: snapshot.providers.iter().map(Provider::text).collect(),
        revision: snapshot.revision,
    };
    let services: BTreeMap<&str, Entry> =
        snapshots.map(|snapshot| (snapshot.service.as_str(), entry(snapshot))).collect();
    json!({ "identity": identity, "services": services })
}

/// By service.
pub(super) fn snapshots(mut page: Value) -> BTreeMap<String, Snapshot> {
    let services: BTreeMap<String, Entry> =
        serde_json::from_value(page["services"].take()).unwrap_or_default();
    let snapshot = |(service, entry): (String, Entry)| {
        let providers = entry.providers.iter().filter_map(|text| Provider::parse(text)).collect();
        (service.clone(), Snapshot { providers, revision: entry.revision, service })
    };
    services.into_iter().map(snapshot).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_read_as_they_were_written() {
        let asked = Asked { parameters: "v=1".to_owned(), port: 20_880, service: "a:1".to_owned() };
        let leaf =
            Leaf { path: "/o".to_owned(), place: "h:1".to_owned(), port: 1, real: "/r".to_owned() };
        let session = Session {
            id: i64::MIN,
            leaves: vec![leaf],
            services: vec!["c:1".to_owned()],
            timeout_ms: 4000,
        };
        let journal = Journal {
            applications: vec!["app".to_owned()],
            publications: vec![asked],
            sessions: vec![session],
            subscriptions: vec!["b:1".to_owned()],
        };
        assert_eq!(Journal::read(journal.page()), journal);
        assert_eq!(Journal::read(json!({ "journal": 1 })), Journal::default());
        let provider = Provider::parse("10.0.0.1:5?weight=7&zone=z").unwrap();
        let snapshot =
            Snapshot { providers: vec![provider], revision: 9, service: "a:1".to_owned() };
        let read = snapshots(snapshots_page("me", [&snapshot].into_iter()));
        assert_eq!(read["a:1"], snapshot);
    }
}
