// SPDX-License-Identifier: Apache-2.0
//! The network namespaces in which weir listens, dials and captures: the one it was started in, and
//! those of workloads. What is done in another one is done on a thread that has gone there.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{RunError, capturing};
use crate::capture::{OwnPorts, Plan};
use crate::config::{Captured, Config, Namespace};
use crate::sys::netns::Netns;
use crate::worker;

/// A network namespace and what is captured there.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) captured: Vec<Captured>,
    /// As workers see it.
    pub(super) for_workers: Arc<worker::Place>,
    /// Of the workload that lives here; empty at home.
    name: String,
    namespace: Namespace,
}

impl Place {
    /// Every place of a config; first the one that weir was started in, whatever it does there.
    pub(super) fn all(config: &Config) -> Result<Vec<Place>, RunError> {
        let elsewhere = config.workloads.iter().filter(|captured| captured.is_elsewhere());
        let mut places = vec![Place::home(config)];
        for captured in elsewhere.cloned() {
            places.push(Place::elsewhere(captured)?);
        }
        Ok(places)
    }

    /// As `all`, without those that cannot be entered just now.
    pub(super) fn reachable(config: &Config) -> Vec<Place> {
        let elsewhere = config.workloads.iter().filter(|captured| captured.is_elsewhere());
        let elsewhere = elsewhere.filter_map(|captured| Place::elsewhere(captured.clone()).ok());
        [Place::home(config)].into_iter().chain(elsewhere).collect()
    }

    pub(super) fn home(config: &Config) -> Place {
        let here = config.workloads.iter().filter(|captured| !captured.is_elsewhere());
        let captured: Vec<Captured> = here.cloned().collect();
        let own_ports = OwnPorts::new(capturing::own_ports(config, &captured));
        // Workers that move away need to know the way home; somebody may come by reload.
        let netns = Netns::own().ok().map(Arc::new);
        let for_workers = Arc::new(worker::Place { netns, number: 0, own_ports });
        Place { captured, for_workers, name: String::new(), namespace: Namespace::Own }
    }

    /// Where a workload lives.
    pub(super) fn elsewhere(captured: Captured) -> Result<Place, RunError> {
        let namespace = captured.namespace.clone();
        let failed = |source| RunError::Namespace {
            name: captured.name.clone(),
            path: namespace.path(),
            source,
        };
        let netns = Netns::open(&namespace.path()).map_err(failed)?;
        netns.within(|| ()).map_err(failed)?;
        let own_ports = OwnPorts::new(capturing::listen_ports(std::slice::from_ref(&captured)));
        let for_workers =
            Arc::new(worker::Place { netns: Some(Arc::new(netns)), number: next(), own_ports });
        let name = captured.name.clone();
        Ok(Place { captured: vec![captured], for_workers, name, namespace })
    }

    /// The same place under another config.
    pub(super) fn under(&self, config: &Config) -> Place {
        let here = |captured: &&Captured| captured.namespace == self.namespace;
        let captured: Vec<Captured> = config.workloads.iter().filter(here).cloned().collect();
        let own_ports = if self.is_home() {
            capturing::own_ports(config, &captured)
        } else {
            capturing::listen_ports(&captured)
        };
        let worker::Place { netns, number, .. } = &*self.for_workers;
        let own_ports = OwnPorts::new(own_ports);
        let for_workers = worker::Place { netns: netns.clone(), number: *number, own_ports };
        let name = captured.first().filter(|_| !self.is_home()).map(|one| one.name.clone());
        let (name, namespace) = (name.unwrap_or(self.name.clone()), self.namespace.clone());
        Place { captured, for_workers: Arc::new(for_workers), name, namespace }
    }

    /// With these parts alone.
    pub(super) fn of(&self, captured: Vec<Captured>) -> Place {
        Place { captured, ..self.clone() }
    }

    /// The same network namespace under a number of its own, for what leaves it: workers tell by it when
    /// the last of that is over.
    pub(super) fn aside(&self) -> Arc<worker::Place> {
        let worker::Place { netns, own_ports, .. } = &*self.for_workers;
        let (netns, own_ports) = (netns.clone(), own_ports.clone());
        Arc::new(worker::Place { netns, number: next(), own_ports })
    }

    /// What is captured here; `None` if nothing is.
    pub(super) fn plan(&self, config: &Config) -> Option<Plan> {
        self.plan_with(&[], config)
    }

    /// With parts that leave.
    pub(super) fn plan_with(&self, leaving: &[Captured], config: &Config) -> Option<Plan> {
        capturing::plan(&self.captured, leaving, config)
    }

    /// Does `work` in the place.
    pub(super) fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, RunError> {
        match &self.for_workers.netns {
            Some(netns) if !self.is_home() => netns.within(work).map_err(|source| {
                RunError::Namespace { name: self.name(), path: self.path(), source }
            }),
            _ => Ok(work()),
        }
    }

    /// The workload that had it is no more: its file is gone, or leads to another one.
    pub(super) fn is_gone(&self) -> bool {
        let netns = self.for_workers.netns.as_ref().filter(|_| !self.is_home());
        netns.is_some_and(|netns| !netns.is_at(&self.path()))
    }

    /// It is the place of `captured`.
    pub(super) fn is_of(&self, captured: &Captured) -> bool {
        self.namespace == captured.namespace
    }

    /// Of the workload that lives here; empty at home.
    pub(super) fn name(&self) -> String {
        self.name.clone()
    }

    /// What a shell says before a command that is meant for another place.
    pub(super) fn prefix(&self) -> Option<String> {
        (!self.is_home()).then(|| format!("nsenter --net={} ", self.path().display()))
    }

    fn path(&self) -> PathBuf {
        self.namespace.path()
    }

    fn is_home(&self) -> bool {
        self.namespace == Namespace::Own
    }
}

/// A number that no place has had.
fn next() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
