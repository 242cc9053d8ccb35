// SPDX-License-Identifier: Apache-2.0
//! TLS to a registry: the files that the config names, read anew for each session.
//!
//! A server must show a certificate that the authority of the config vouches for, under the name that
//! was dialled or that the config says. There is no way to do without.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::config::{Identity, Tls};

/// What a session wraps its connections in.
#[derive(Clone)]
pub(super) struct Wrapper {
    connector: TlsConnector,
    /// Whom a server must be; the host that was dialled if not said.
    server_name: Option<String>,
}

/// Why there can be none.
#[derive(Debug, thiserror::Error)]
pub(in crate::takeover) enum Unusable {
    #[error("the certificate and the key of weir (tls.certificate, tls.key): {0}")]
    Identity(rustls::Error),
    #[error("`{0}` is no name that a certificate can have: say it as tls.server_name")]
    Name(String),
    #[error("{path} (tls.ca) has no certificate")]
    NoAuthority { path: PathBuf },
    #[error("read {path} (tls.{key}): {source}")]
    Read { key: &'static str, path: PathBuf, source: pem::Error },
}

impl Wrapper {
    pub(super) fn read(settings: &Tls) -> Result<Wrapper, Unusable> {
        let Tls { ca, identity, server_name } = settings;
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(certificates("ca", ca)?);
        if roots.is_empty() {
            return Err(Unusable::NoAuthority { path: ca.clone() });
        }
        let config = ClientConfig::builder().with_root_certificates(roots);
        let config =
            match identity {
                None => config.with_no_client_auth(),
                Some(Identity { certificate, key }) => {
                    let chain = certificates("certificate", certificate)?;
                    let key = PrivateKeyDer::from_pem_file(key).map_err(|source| {
                        Unusable::Read { key: "key", path: key.clone(), source }
                    })?;
                    config.with_client_auth_cert(chain, key).map_err(Unusable::Identity)?
                }
            };
        let connector = TlsConnector::from(Arc::new(config));
        Ok(Wrapper { connector, server_name: server_name.clone() })
    }

    /// The name that `server`, a host and a port, must prove.
    pub(super) fn name_of(&self, server: &str) -> Result<ServerName<'static>, Unusable> {
        let host = server.rsplit_once(':').map_or(server, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = self.server_name.as_deref().unwrap_or(host);
        ServerName::try_from(name.to_owned()).map_err(|_| Unusable::Name(name.to_owned()))
    }

    /// Once both sides have shown who they are.
    pub(super) async fn wrap(
        &self,
        server: &str,
        stream: TcpStream,
    ) -> io::Result<TlsStream<TcpStream>> {
        let name = self.name_of(server).map_err(io::Error::other)?;
        self.connector.connect(name, stream).await
    }
}

impl std::fmt::Debug for Wrapper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Wrapper").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

/// All that are in a file.
fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Unusable> {
    let read = |source| Unusable::Read { key, path: path.to_owned(), source };
    let all = CertificateDer::pem_file_iter(path).map_err(read)?;
    all.collect::<Result<_, _>>().map_err(read)
}
