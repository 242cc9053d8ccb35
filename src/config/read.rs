// SPDX-License-Identifier: Apache-2.0
//! A config from YAML: every key looked at, every mistake noted.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::claims::{ADDRESS, Claim, Dial, address, loops, overlaps};
use super::{Admin, Config, Forward, OnChange, OnExit, Workers, service, takeover, workloads};
use crate::profile::Profile;
use crate::yaml::{self, Kind, Mistakes, Node, Section, nearest, parsed};

impl Config {
    /// A config file by its path.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or every mistake in it.
    pub fn load(path: &Path) -> Result<Config, Mistakes> {
        let text = yaml::read(path)?;
        Config::parse(&path.display().to_string(), path.parent(), &text)
    }

    /// A config text. `file` is how messages call it; a profile given as a path is looked for
    /// from `directory` on.
    ///
    /// # Errors
    ///
    /// Every mistake in the text.
    pub fn parse(file: &str, directory: Option<&Path>, text: &str) -> Result<Config, Mistakes> {
        Section::document(file, text, |section, mistakes| read(section, directory, mistakes))
    }
}

fn read(section: &mut Section, directory: Option<&Path>, mistakes: &mut Mistakes) -> Config {
    let (mut claims, mut dials) = (Vec::new(), Vec::new());
    let takeover = section.take("takeover");
    let config = Config {
        profile: profile(section, directory, mistakes),
        workers: workers(section, mistakes),
        on_change: section.word("on_change", &ON_CHANGE, mistakes).unwrap_or(OnChange::Repair),
        on_exit: section.word("on_exit", &ON_EXIT, mistakes).unwrap_or(OnExit::Open),
        workloads: workloads::all(section, &mut claims, mistakes),
        forward: forwards(section, (&mut claims, &mut dials), mistakes),
        takeover: takeover.map(|node| takeover::takeover(node, directory, &mut claims, mistakes)),
        admin: admin(section.section("admin", mistakes), &mut claims, mistakes),
    };
    let captures = !config.workloads.is_empty();
    let takes_over = config.takeover.is_some();
    if !captures && !takes_over && config.forward.is_empty() && mistakes.is_empty() {
        let text = "asks for nothing: give it `inbound:`, `outbound:`, `takeover:`, or a list \
                    `forward:` or `workloads:`";
        mistakes.add(section.place(), "", text);
    }
    overlaps(&claims, mistakes);
    loops(&claims, &dials, mistakes);
    config
}

fn profile(section: &mut Section, directory: Option<&Path>, mistakes: &mut Mistakes) -> Profile {
    let Some(node) = section.take("profile") else { return Profile::default() };
    let name = node.text().unwrap_or_default();
    if Path::new(name).extension().is_some_and(|end| end == "yaml") {
        let path = directory.unwrap_or(Path::new("")).join(name);
        return Profile::load(&path).unwrap_or_else(|inner| {
            mistakes.add(node.place, "profile", format!("this profile has mistakes:\n{inner}"));
            Profile::default()
        });
    }
    Profile::named(name).unwrap_or_else(|| {
        let names = Profile::names();
        let hint = nearest(name, &names).unwrap_or_default();
        let known = names.join(", ");
        let text = format!("`{name}`: must be {known} or a path ending in .yaml{hint}");
        mistakes.add(node.place, "profile", text);
        Profile::default()
    })
}

fn workers(section: &mut Section, mistakes: &mut Mistakes) -> Workers {
    let Some(node) = section.take("workers") else { return Workers::Auto };
    match &node.kind {
        Kind::Scalar(word) if word == "auto" => Workers::Auto,
        Kind::List(items) => {
            let cpu = |item: &Node| {
                parsed::<u16>(item, "workers", "a CPU number", mistakes).map(usize::from)
            };
            let cpus: Vec<usize> = items.iter().filter_map(cpu).collect();
            if items.is_empty() || cpus.iter().collect::<BTreeSet<_>>().len() != items.len() {
                mistakes.add(
                    node.place,
                    "workers",
                    "must be a list of at least one CPU, each once",
                );
            }
            Workers::Cpus(cpus)
        }
        _ => {
            let count =
                parsed(&node, "workers", "auto, a number above 0, or a list of CPUs", mistakes);
            count.map_or(Workers::Auto, Workers::Count)
        }
    }
}

fn forwards(
    section: &mut Section,
    (claims, dials): (&mut Vec<Claim>, &mut Vec<Dial>),
    mistakes: &mut Mistakes,
) -> Vec<Forward> {
    let items = section.list("forward").unwrap_or_default();
    let mut forwards: Vec<Forward> = Vec::with_capacity(items.len());
    for (index, item) in items.into_iter().enumerate() {
        let place = item.place;
        let path = format!("forward[{index}]");
        let Some(forward) = forward(item, &path, index, dials, mistakes) else { continue };
        for other in &forwards {
            if other.name == forward.name {
                mistakes.add(place, &path, format!("the name {} is taken", forward.name));
            }
        }
        claims.push(Claim::new(&path, place, forward.listen));
        forwards.push(forward);
    }
    forwards
}

fn forward(
    item: Node,
    path: &str,
    index: usize,
    dials: &mut Vec<Dial>,
    mistakes: &mut Mistakes,
) -> Option<Forward> {
    let mut section = Section::open(Some(item), path, mistakes);
    let name = section.parsed("name", "a word", mistakes);
    let is_silent = !section.has("listen");
    let listen = address(&mut section, "listen", mistakes);
    let manner = service::manner(&mut section, mistakes);
    let endpoints_path = section.path("endpoints");
    let endpoints = service::placed_endpoints(&mut section, mistakes).unwrap_or_default();
    if endpoints.is_empty() {
        mistakes.add(section.place(), &endpoints_path, "must name at least one address");
    }
    dials.extend(endpoints.iter().map(|(place, endpoint)| Dial {
        addr: endpoint.addr,
        path: endpoints_path.clone(),
        place: *place,
    }));
    let endpoints = endpoints.into_iter().map(|(_, endpoint)| endpoint).collect();
    if is_silent {
        mistakes.add(
            section.place(),
            &section.path("listen"),
            format!("is missing: must be {ADDRESS}"),
        );
    }
    section.finish(mistakes);
    let name = name.unwrap_or_else(|| format!("forward-{index}"));
    Some(Forward { endpoints, listen: listen?, manner, name })
}

fn admin(mut section: Section, claims: &mut Vec<Claim>, mistakes: &mut Mistakes) -> Admin {
    let socket = section.parsed::<PathBuf>("socket", "a path", mistakes);
    let http = address(&mut section, "http", mistakes);
    claims.extend(http.map(|addr| Claim::new("admin.http", section.place(), addr)));
    section.finish(mistakes);
    Admin { http, socket: Some(socket.unwrap_or_else(|| PathBuf::from(SOCKET))) }
}

const ON_CHANGE: [(&str, OnChange); 2] = [("alarm", OnChange::Alarm), ("repair", OnChange::Repair)];
const ON_EXIT: [(&str, OnExit); 2] = [("closed", OnExit::Closed), ("open", OnExit::Open)];
/// Where commands look too.
const SOCKET: &str = "/run/weir/admin.sock";
