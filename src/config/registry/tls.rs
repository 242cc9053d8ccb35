// SPDX-License-Identifier: Apache-2.0
//! What a config says of TLS to a registry.

use std::path::{Path, PathBuf};

use super::Kind;
use crate::yaml::{Mistakes, Section};

/// Whom to trust, and who weir is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Tls {
    /// Certificates of those who may vouch for a server, in PEM.
    pub ca: PathBuf,
    /// With which weir shows who it is; nobody in particular if not said.
    pub identity: Option<Identity>,
    /// Whom a server must be, if not the host that was dialled.
    pub server_name: Option<String>,
}

/// Files in PEM; read whenever a session begins.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Identity {
    /// The certificate, with those that lead to its authority.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

pub(super) fn tls(
    section: &mut Section,
    kind: Kind,
    directory: &Path,
    mistakes: &mut Mistakes,
) -> Option<Tls> {
    let path = section.path("tls");
    let node = section.take("tls")?;
    let place = node.place;
    let mut section = Section::open(Some(node), &path, mistakes);
    let mut file = |key| {
        let file = section.parsed::<PathBuf>(key, "a path", mistakes);
        file.map(|file| directory.join(file))
    };
    let (ca, certificate, key) = (file("ca"), file("certificate"), file("key"));
    if ca.is_none() {
        let text = "is missing: must be a file with the certificates of the servers' authority";
        mistakes.add(place, &section.path("ca"), text);
    }
    if certificate.is_some() != key.is_some() {
        let text = "`certificate` and `key` belong together";
        mistakes.add(place, &section.path("certificate"), text);
    }
    let server_name = section.parsed::<String>("server_name", "a name", mistakes);
    if kind == Kind::Zookeeper && server_name.is_some() {
        let text = "a server of ZooKeeper must have the name under which `servers` has it";
        mistakes.add(place, &section.path("server_name"), text);
    }
    section.finish(mistakes);
    let identity = certificate.zip(key).map(|(certificate, key)| Identity { certificate, key });
    Some(Tls { ca: ca?, identity, server_name })
}
