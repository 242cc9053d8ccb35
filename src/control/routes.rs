// SPDX-License-Identifier: Apache-2.0
//! The listeners that need no capture, and where their connections go.

use std::net::SocketAddr;

use super::takeover;
use crate::config::{Config, Forward};
use crate::metrics::Origin;
use crate::service::{Balance, ServiceId};
use crate::worker::Route;

/// A listener that needs no capture.
pub(super) struct Plain {
    pub(super) listen: SocketAddr,
    /// `None`: the first request says it.
    service: Option<(ServiceId, Balance)>,
    origin: Origin,
}

impl Plain {
    /// Where its connections go.
    pub(super) fn route(&self) -> Route {
        let origin = self.origin;
        self.service.map_or(Route::Named, |(id, balance)| Route::Service { balance, id, origin })
    }
}

/// Plain listeners, and those of takeover.
pub(super) fn all(
    config: &Config,
    services: &[ServiceId],
    entered: Option<&takeover::Entered>,
) -> Vec<Plain> {
    let plain = |(forward, id): (&Forward, &ServiceId)| Plain {
        listen: forward.listen,
        service: Some((*id, forward.manner.balance)),
        origin: Origin::Forward,
    };
    let mut routes: Vec<Plain> = config.forward.iter().zip(services).map(plain).collect();
    let Some((takeover, entered)) = config.takeover.as_ref().zip(entered) else { return routes };
    for (wanted, id) in takeover.services.iter().zip(&entered.wanted) {
        let service = Some((*id, takeover.manner.balance));
        let origin = Origin::OutboundTakeover;
        routes.extend(wanted.listen.map(|listen| Plain { listen, service, origin }));
    }
    routes.push(Plain {
        listen: takeover.inbound,
        service: Some((entered.inbound, Balance::RoundRobin)),
        origin: Origin::InboundTakeover,
    });
    routes.push(Plain {
        listen: takeover.outbound,
        service: None,
        origin: Origin::OutboundTakeover,
    });
    routes
}
