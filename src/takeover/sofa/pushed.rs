// SPDX-License-Identifier: Apache-2.0
//! What session servers have pushed, by service and data center.
//!
//! Pure. A push is the whole list of one data center, with a version that grows; an older one that
//! comes late changes nothing. Versions are compared within one session only: another server, or one
//! whose data were wiped, is believed anew, and whether its word is taken is decided elsewhere.

use std::collections::BTreeMap;

use super::message::ReceivedData;
use crate::takeover::{Provider, Snapshot};

/// Outlives sessions.
#[derive(Debug, Default)]
pub(super) struct Pushed {
    /// By service, then by data center.
    services: BTreeMap<String, BTreeMap<String, Segment>>,
    session: u64,
}

#[derive(Debug)]
struct Segment {
    providers: Vec<Provider>,
    /// In which it came.
    session: u64,
    version: i64,
}

impl Pushed {
    /// Another session begins.
    pub(super) fn begin_session(&mut self) {
        self.session += 1;
    }

    /// What is known of `service` now; nothing if this push is not newer than what was known.
    pub(super) fn hear(&mut self, service: &str, push: &ReceivedData) -> Option<Snapshot> {
        let segments = self.services.entry(service.to_owned()).or_default();
        let is_newer = segments
            .get(&push.segment)
            .is_none_or(|known| known.session != self.session || known.version < push.version);
        if !is_newer {
            return None;
        }
        let (session, version) = (self.session, push.version);
        let segment = Segment { providers: providers(push), session, version };
        segments.insert(push.segment.clone(), segment);
        Some(snapshot(service, segments))
    }

    /// What data centers said in earlier sessions and have not said in this one is gone, of services
    /// that this session has said something of.
    pub(super) fn settle(&mut self) -> Vec<Snapshot> {
        let mut changed = Vec::new();
        for (service, segments) in &mut self.services {
            let (before, session) = (segments.len(), self.session);
            if segments.values().any(|segment| segment.session == session) {
                segments.retain(|_, segment| segment.session == session);
            }
            if segments.len() != before {
                changed.push(snapshot(service, segments));
            }
        }
        changed
    }

    /// Nobody wants to know any more.
    pub(super) fn forget(&mut self, service: &str) {
        self.services.remove(service);
    }
}

fn providers(push: &ReceivedData) -> Vec<Provider> {
    let mut providers = Vec::new();
    for (zone, boxes) in &push.data {
        for one in &boxes.data {
            let Some(mut provider) = Provider::parse(&one.data) else { continue };
            if provider.endpoint.zone.is_empty() {
                provider.endpoint.zone = zone.as_str().into();
            }
            providers.push(provider);
        }
    }
    providers
}

fn snapshot(service: &str, segments: &BTreeMap<String, Segment>) -> Snapshot {
    let all = segments.values().flat_map(|segment| &segment.providers);
    let mut providers: Vec<Provider> = all.cloned().collect();
    providers.sort_by_key(|provider| provider.endpoint.addr);
    providers.dedup_by_key(|provider| provider.endpoint.addr);
    let newest = segments.values().map(|segment| segment.version).max();
    let revision = newest.and_then(|version| u64::try_from(version).ok()).unwrap_or(0);
    Snapshot { providers, revision, service: service.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::super::message::{DataBox, DataBoxes};
    use super::*;

    fn push(segment: &str, version: i64, ports: &[u16]) -> ReceivedData {
        let one = |port: &u16| DataBox { data: format!("10.0.0.1:{port}?v=4.0") };
        let boxes = DataBoxes { data: ports.iter().map(one).collect() };
        ReceivedData {
            segment: segment.to_owned(),
            data: BTreeMap::from([("blue".to_owned(), boxes)]),
            version,
            ..ReceivedData::default()
        }
    }

    fn ports(snapshot: &Snapshot) -> Vec<u16> {
        snapshot.providers.iter().map(|one| one.endpoint.addr.port()).collect()
    }

    fn heard(pushed: &mut Pushed, push: &ReceivedData) -> Option<Vec<u16>> {
        pushed.hear("a", push).as_ref().map(ports)
    }

    #[test]
    fn newest_push_of_each_data_center_counts() {
        let mut pushed = Pushed::default();
        assert_eq!(heard(&mut pushed, &push("east", 5, &[2, 1])), Some(vec![1, 2]));
        assert_eq!(heard(&mut pushed, &push("west", 3, &[3, 1])), Some(vec![1, 2, 3]));
        assert_eq!(heard(&mut pushed, &push("east", 5, &[9])), None, "not newer");
        assert_eq!(heard(&mut pushed, &push("east", 4, &[9])), None, "late");
        let last = pushed.hear("a", &push("east", 6, &[])).unwrap();
        assert_eq!((ports(&last), last.revision), (vec![1, 3], 6));
        assert_eq!(&*last.providers[0].endpoint.zone, "blue");
    }

    #[test]
    fn another_server_is_believed_anew_and_silent_data_centers_go_last() {
        let mut pushed = Pushed::default();
        heard(&mut pushed, &push("east", 5, &[1]));
        heard(&mut pushed, &push("west", 5, &[2]));
        pushed.begin_session();
        assert!(pushed.settle().is_empty(), "nothing was said in this session yet");
        assert_eq!(heard(&mut pushed, &push("east", 2, &[3])), Some(vec![2, 3]));
        let settled = pushed.settle();
        assert_eq!(settled.iter().map(ports).collect::<Vec<_>>(), [[3]]);
        assert!(pushed.settle().is_empty());
    }

    #[test]
    fn what_is_no_address_is_left_out() {
        let mut other = push("east", 1, &[1]);
        let boxes = other.data.get_mut("blue").unwrap();
        boxes.data.push(DataBox { data: "no address".to_owned() });
        boxes.data.push(DataBox { data: "bolt://10.0.0.2:7?zone=red".to_owned() });
        let said = Pushed::default().hear("a", &other).unwrap();
        let zones: Vec<&str> = said.providers.iter().map(|one| &*one.endpoint.zone).collect();
        assert_eq!((ports(&said), zones), (vec![1, 7], vec!["blue", "red"]));
    }
}
