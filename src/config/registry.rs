// SPDX-License-Identifier: Apache-2.0
//! The registries of a config, and the file of a `file` registry.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::service;
use crate::service::Endpoint;
use crate::yaml::{Mistakes, Section};

pub use self::sofa::{Scope, Sofa};
pub use self::tls::{Identity, Tls};

mod sofa;
mod tls;

/// Where services are kept.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Registry {
    /// Which one.
    pub kind: RegistryKind,
    /// Unique; in logs and tables.
    pub name: String,
}

impl Registry {
    /// Whose word it is, to know it again after a restart; `None` if its word is in the config.
    #[must_use]
    pub fn identity(&self) -> Option<String> {
        match &self.kind {
            RegistryKind::Etcd(tree) => Some(tree.identity("etcd")),
            RegistryKind::File(path) => Some(format!("file {}", path.display())),
            RegistryKind::Sofa(settings) => Some(settings.identity()),
            RegistryKind::Static(_) => None,
            RegistryKind::Zookeeper(tree) => Some(tree.identity("zookeeper")),
        }
    }
}

/// A kind of registry, with what it needs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum RegistryKind {
    /// etcd, version 3.
    Etcd(Tree),
    /// A YAML file, looked at again whenever it changes. Read only.
    File(PathBuf),
    /// SOFARegistry.
    Sofa(Sofa),
    /// In the config itself; what local applications publish is added while weir runs.
    Static(Vec<Named>),
    /// ZooKeeper.
    Zookeeper(Tree),
}

/// Servers that keep a tree, and how services are written there.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Tree {
    /// Who we are there; everybody if not said.
    pub credentials: Option<Credentials>,
    /// How services are written.
    pub layout: Layout,
    /// Where they are written, without a slash at its end.
    pub root: String,
    /// At least one, with port.
    pub servers: Vec<String>,
    /// A weir that says nothing for so long is gone, and with it what it published.
    pub session_timeout: Duration,
    /// How their servers are known; in plain text if not said.
    pub tls: Option<Tls>,
}

impl Tree {
    fn identity(&self, kind: &str) -> String {
        let mut servers = self.servers.clone();
        servers.sort_unstable();
        format!("{kind} {} {} {}", servers.join(","), self.root, self.layout.word())
    }
}

/// A name and where its password is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Credentials {
    /// Its first line is the password; read at every connect, never shown.
    pub password_file: PathBuf,
    /// The name.
    pub user: String,
}

/// How a registry's tree says which service lives where.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Layout {
    /// As Dubbo writes it: `/dubbo/INTERFACE/providers/URL`.
    Dubbo,
    /// As SOFARPC writes it: `/sofa-rpc/INTERFACE/providers/URL`.
    Sofa,
}

impl Layout {
    /// The words of a config.
    const WORDS: [(&str, Layout); 2] = [("dubbo", Layout::Dubbo), ("sofa", Layout::Sofa)];

    /// The word of a config.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Layout::Dubbo => "dubbo",
            Layout::Sofa => "sofa",
        }
    }

    /// Where others who use this layout look.
    #[must_use]
    pub fn usual_root(self) -> &'static str {
        match self {
            Layout::Dubbo => "/dubbo",
            Layout::Sofa => "/sofa-rpc",
        }
    }
}

/// A service as a static registry or a file holds it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Named {
    /// Where it lives.
    pub endpoints: Vec<Endpoint>,
    /// As its registry calls it.
    pub name: String,
    /// What its consumers are told, as `v=4.0&p=1`.
    pub parameters: String,
}

/// The services of a registry's file.
///
/// # Errors
///
/// Every mistake in the text.
pub fn registry_file(file: &str, text: &str) -> Result<Vec<Named>, Mistakes> {
    Section::document(file, text, named)
}

pub(super) fn registries(
    section: &mut Section,
    directory: Option<&Path>,
    mistakes: &mut Mistakes,
) -> Vec<Registry> {
    let items = section.list("registries").unwrap_or_default();
    let mut names = BTreeSet::new();
    let mut registries = Vec::with_capacity(items.len());
    for (index, item) in items.into_iter().enumerate() {
        let (place, path) = (item.place, format!("takeover.registries[{index}]"));
        let mut section = Section::open(Some(item), &path, mistakes);
        let name = section.parsed::<String>("name", "a word", mistakes);
        let name = name.unwrap_or_else(|| format!("registry-{index}"));
        let word = section.word("kind", &KINDS, mistakes).unwrap_or(Kind::Static);
        forbid(word, &section, mistakes);
        let directory = directory.unwrap_or(Path::new(""));
        let kind = match word {
            Kind::Etcd => {
                built(cfg!(feature = "etcd"), "etcd", &section, mistakes);
                tree(&mut section, word, directory, mistakes).map(RegistryKind::Etcd)
            }
            Kind::File => file(&mut section, directory, mistakes),
            Kind::Sofa => sofa::sofa(&mut section, mistakes),
            Kind::Static => Some(RegistryKind::Static(named(&mut section, mistakes))),
            Kind::Zookeeper => {
                built(cfg!(feature = "zookeeper"), "zookeeper", &section, mistakes);
                tree(&mut section, word, directory, mistakes).map(RegistryKind::Zookeeper)
            }
        };
        // Said already, where they do not belong.
        let others = KEYS.iter().filter(|(_, kinds)| !kinds.contains(&word));
        others.for_each(|(key, _)| drop(section.take(key)));
        section.finish(mistakes);
        if !names.insert(name.clone()) {
            mistakes.add(place, &path, format!("the name {name} is taken"));
        }
        registries.extend(kind.map(|kind| Registry { kind, name }));
    }
    if registries.is_empty() && mistakes.is_empty() {
        let kind = RegistryKind::Static(Vec::new());
        registries.push(Registry { kind, name: "main".to_owned() });
    }
    registries
}

/// A key that another kind has is a mistake that can be explained.
fn forbid(kind: Kind, section: &Section, mistakes: &mut Mistakes) {
    for (key, kinds) in
        KEYS.iter().filter(|(key, kinds)| section.has(key) && !kinds.contains(&kind))
    {
        let has =
            |kind: &Kind| KINDS.iter().find(|(_, other)| other == kind).map(|(word, _)| *word);
        let words: Vec<&str> = kinds.iter().filter_map(has).collect();
        let text = format!("only a registry of kind {} has a `{key}`", words.join(" or "));
        mistakes.add(section.place(), &section.path(key), text);
    }
}

fn file(section: &mut Section, directory: &Path, mistakes: &mut Mistakes) -> Option<RegistryKind> {
    let (place, path) = (section.place(), section.path("path"));
    if !section.has("path") {
        mistakes.add(place, &path, "a registry of kind file needs a `path`");
    }
    let file = section.parsed::<PathBuf>("path", "a path", mistakes)?;
    Some(RegistryKind::File(directory.join(file)))
}

fn built(is_built: bool, feature: &str, section: &Section, mistakes: &mut Mistakes) {
    if !is_built {
        let text = format!("this weir was built without it (cargo feature `{feature}`)");
        mistakes.add(section.place(), &section.path("kind"), text);
    }
}

fn tree(
    section: &mut Section,
    kind: Kind,
    directory: &Path,
    mistakes: &mut Mistakes,
) -> Option<Tree> {
    let servers = servers(section, mistakes);
    let layout = section.word("layout", &Layout::WORDS, mistakes).unwrap_or(Layout::Sofa);
    let root = root(section, layout.usual_root(), mistakes);
    let session = section.number("session_timeout_ms", SESSION_MS, mistakes);
    let credentials = credentials(section, directory, mistakes);
    let tls = tls::tls(section, kind, directory, mistakes);
    let session_timeout = Duration::from_millis(session.unwrap_or(SESSION_MS_USUAL));
    Some(Tree { credentials, layout, root, servers: servers?, session_timeout, tls })
}

fn servers(section: &mut Section, mistakes: &mut Mistakes) -> Option<Vec<String>> {
    let (place, path) = (section.place(), section.path("servers"));
    let items = section.list("servers").unwrap_or_default();
    if items.is_empty() {
        mistakes.add(place, &path, "is missing: must be a list of `host:port`");
    }
    let mut servers = Vec::with_capacity(items.len());
    for item in items {
        let is_server = |text: &&str| {
            let port = text
                .rsplit_once(':')
                .filter(|(host, _)| !host.is_empty() && !host.contains(['/', ',', ' ']));
            port.is_some_and(|(_, port)| port.parse::<u16>().is_ok_and(|port| port > 0))
        };
        match item.text().filter(is_server) {
            Some(text) => servers.push(text.to_owned()),
            None => {
                let is_url = item.text().is_some_and(|text| text.contains("://"));
                let more =
                    if is_url { ", without a scheme: TLS is asked for with `tls`" } else { "" };
                let text = format!("{}must be `host:port`{more}", item.said());
                mistakes.add(item.place, &path, text);
            }
        }
    }
    (!servers.is_empty()).then_some(servers)
}

fn root(section: &mut Section, usual: &str, mistakes: &mut Mistakes) -> String {
    let (place, path) = (section.place(), section.path("root"));
    let root = section.parsed::<String>("root", "a path such as /dubbo", mistakes);
    let root = root.unwrap_or_else(|| usual.to_owned());
    let is_path = root.starts_with('/') && root.split('/').skip(1).all(is_path_part);
    if !is_path {
        mistakes.add(place, &path, format!("`{root}`: must be a path such as {usual}"));
    }
    root
}

/// What ZooKeeper takes, too: no letters of private use, none that are no letters.
fn is_path_part(part: &str) -> bool {
    let is_letter =
        |letter: char| !matches!(letter, '\u{e000}'..='\u{f8ff}' | '\u{fff0}'..='\u{ffff}');
    is_service_name(part) && part.chars().all(is_letter)
}

fn credentials(
    section: &mut Section,
    directory: &Path,
    mistakes: &mut Mistakes,
) -> Option<Credentials> {
    let place = section.place();
    let user = section.parsed::<String>("user", "a name", mistakes);
    let file = section.parsed::<PathBuf>("password_file", "a path", mistakes);
    match (user, file) {
        (Some(user), Some(file)) => Some(Credentials { password_file: directory.join(file), user }),
        (None, None) => None,
        _ => {
            let text = "`user` and `password_file` belong together";
            mistakes.add(place, &section.path("user"), text);
            None
        }
    }
}

fn named(section: &mut Section, mistakes: &mut Mistakes) -> Vec<Named> {
    let path = section.path("services");
    let items = section.list("services").unwrap_or_default();
    let mut found: Vec<Named> = Vec::with_capacity(items.len());
    for item in items {
        let place = item.place;
        let mut section = Section::open(Some(item), &path, mistakes);
        let name = service_name(&mut section, mistakes);
        let parameters = section.parsed::<String>("parameters", "text as `v=4.0&p=1`", mistakes);
        let endpoints = service::endpoints(&mut section, mistakes).unwrap_or_default();
        section.finish(mistakes);
        let Some(name) = name else { continue };
        if found.iter().any(|other| other.name == name) {
            mistakes.add(place, &path, format!("the service {name} is there twice"));
        }
        found.push(Named { endpoints, name, parameters: parameters.unwrap_or_default() });
    }
    found
}

pub(super) fn service_name(section: &mut Section, mistakes: &mut Mistakes) -> Option<String> {
    let (place, path, is_there) = (section.place(), section.path("name"), section.has("name"));
    let name = section.parsed::<String>("name", "a name", mistakes);
    let is_right = name.as_deref().is_some_and(is_service_name);
    if !is_there || (name.is_some() && !is_right) {
        mistakes.add(
            place,
            &path,
            "must be a name of at most 512 letters, without `/` and spaces; what stands before its \
             first `:` may not be empty, `.` or `..`",
        );
    }
    name.filter(|_| is_right)
}

/// A name that can stand in a registry's path, in a table and in a log. What comes before its first
/// colon, the interface, is a part of a path, where nothing, `.` and `..` mean something else.
#[must_use]
pub fn is_service_name(name: &str) -> bool {
    let is_letter = |letter: char| !letter.is_control() && !letter.is_whitespace() && letter != '/';
    let interface = name.split(':').next().unwrap_or_default();
    name.len() <= 512 && name.chars().all(is_letter) && !matches!(interface, "" | "." | "..")
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Etcd,
    File,
    Sofa,
    Static,
    Zookeeper,
}

const KINDS: [(&str, Kind); 5] = [
    ("etcd", Kind::Etcd),
    ("file", Kind::File),
    ("sofa", Kind::Sofa),
    ("static", Kind::Static),
    ("zookeeper", Kind::Zookeeper),
];
/// Which kinds have a key.
const KEYS: [(&str, &[Kind]); 13] = [
    ("group", &[Kind::Sofa]),
    ("heartbeat_ms", &[Kind::Sofa]),
    ("layout", &[Kind::Etcd, Kind::Zookeeper]),
    ("password_file", &[Kind::Etcd, Kind::Zookeeper]),
    ("path", &[Kind::File]),
    ("root", &[Kind::Etcd, Kind::Zookeeper]),
    ("scope", &[Kind::Sofa]),
    ("servers", &[Kind::Etcd, Kind::Sofa, Kind::Zookeeper]),
    ("services", &[Kind::Static]),
    ("session_timeout_ms", &[Kind::Etcd, Kind::Zookeeper]),
    ("tls", &[Kind::Etcd, Kind::Zookeeper]),
    ("user", &[Kind::Etcd, Kind::Zookeeper]),
    ("zone", &[Kind::Sofa]),
];
/// Servers usually allow 2 to 20 of their ticks, which is 4 to 40 s.
const SESSION_MS: RangeInclusive<u64> = 1_000..=120_000;
const SESSION_MS_USUAL: u64 = 10_000;
