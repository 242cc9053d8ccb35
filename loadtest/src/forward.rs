// SPDX-License-Identifier: Apache-2.0
//! Plain forwarders of the kind that everybody writes first: baselines for `compare`.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::rc::Rc;

use anyhow::{Context, Result};
use clap::ValueEnum;
use tokio_uring::buf::BoundedBuf as _;

use crate::arguments::Forward;

/// By what bytes are moved.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Engine {
    /// `copy_bidirectional` on one thread
    Tokio,
    /// Two loops of read and write a flow, on one thread
    TokioUring,
}

/// Forwards until the process is ended.
pub(crate) fn forward(arguments: &Forward) -> Result<()> {
    match arguments.engine {
        Engine::Tokio => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
            let work = by_tokio(arguments.listen, arguments.to);
            runtime.block_on(tokio::task::LocalSet::new().run_until(work))
        }
        Engine::TokioUring => tokio_uring::start(by_tokio_uring(arguments.listen, arguments.to)),
    }
    .with_context(|| format!("forward {} to {}", arguments.listen, arguments.to))
}

async fn by_tokio(listen: SocketAddr, to: SocketAddr) -> io::Result<()> {
    let listener = tokio::net::TcpListener::bind(listen).await?;
    loop {
        let (mut downstream, _) = listener.accept().await?;
        tokio::task::spawn_local(async move {
            downstream.set_nodelay(true)?;
            let mut upstream = tokio::net::TcpStream::connect(to).await?;
            upstream.set_nodelay(true)?;
            tokio::io::copy_bidirectional(&mut downstream, &mut upstream).await
        });
    }
}

async fn by_tokio_uring(listen: SocketAddr, to: SocketAddr) -> io::Result<()> {
    let listener = tokio_uring::net::TcpListener::bind(listen)?;
    loop {
        let (downstream, _) = listener.accept().await?;
        tokio_uring::spawn(async move {
            downstream.set_nodelay(true)?;
            let upstream = Rc::new(tokio_uring::net::TcpStream::connect(to).await?);
            upstream.set_nodelay(true)?;
            let downstream = Rc::new(downstream);
            tokio_uring::spawn(half(Rc::clone(&upstream), Rc::clone(&downstream)));
            half(downstream, upstream).await
        });
    }
}

async fn half(
    from: Rc<tokio_uring::net::TcpStream>,
    to: Rc<tokio_uring::net::TcpStream>,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let (result, back) = from.read(buffer).await;
        buffer = back;
        let bytes = match result {
            Ok(0) => return to.shutdown(Shutdown::Write),
            Ok(bytes) => bytes,
            Err(error) => {
                // The other half must notice.
                let _ = to.shutdown(Shutdown::Both);
                return Err(error);
            }
        };
        let (result, slice) = to.write_all(buffer.slice(..bytes)).await;
        buffer = slice.into_inner();
        result?;
    }
}

/// What tokio's copy uses for each direction.
const BUFFER_BYTES: usize = 8 << 10;
