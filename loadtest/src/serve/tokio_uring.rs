// SPDX-License-Identifier: Apache-2.0
//! The same servers on the crate tokio-uring: the baseline that shows what the raw ring gains.

use std::rc::Rc;

use anyhow::{Result, bail};
use tokio_uring::net::{TcpListener, TcpStream};

use super::{Kind, SOURCE_BYTES, listen};
use crate::arguments::Serve;

pub(super) fn serve(arguments: &Serve) -> Result<()> {
    let kind = arguments.kind;
    if !matches!(kind, Kind::Echo | Kind::Sink | Kind::Source) || arguments.check {
        bail!("--engine tokio-uring knows echo, sink and source only, and no --check");
    }
    let listener = listen(arguments)?;
    tokio_uring::start(async move {
        let listener = TcpListener::from_std(listener.into());
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            tokio_uring::spawn(one(kind, Rc::new(stream)));
        }
    })
}

async fn one(kind: Kind, stream: Rc<TcpStream>) {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut is_started = false;
    loop {
        let (result, back) = stream.read(buffer).await;
        buffer = back;
        let Ok(bytes @ 1..) = result else { return };
        if kind == Kind::Echo {
            use tokio_uring::buf::BoundedBuf as _;
            let (result, slice) = stream.write_all(buffer.slice(..bytes)).await;
            buffer = slice.into_inner();
            if result.is_err() {
                return;
            }
        }
        if kind == Kind::Source && !std::mem::replace(&mut is_started, true) {
            tokio_uring::spawn(pour(Rc::clone(&stream)));
        }
    }
}

/// Sends until the peer is gone.
async fn pour(stream: Rc<TcpStream>) {
    let mut chunk = vec![b'Z'; SOURCE_BYTES];
    loop {
        let (result, back) = stream.write_all(chunk).await;
        chunk = back;
        if result.is_err() {
            return;
        }
    }
}

const BUFFER_BYTES: usize = 64 << 10;
