// SPDX-License-Identifier: Apache-2.0
//! Connections of the control thread's own: with a mark, by which weir's captures leave them alone.

use std::io;
use std::net::SocketAddr;

use tokio::net::{TcpSocket, TcpStream};

/// To `addr`; `mark` if anything may be captured here.
///
/// # Errors
///
/// It cannot be reached, or nobody may set a mark.
pub async fn connect(addr: SocketAddr, mark: Option<u32>) -> io::Result<TcpStream> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(mark) = mark {
        socket2::SockRef::from(&socket).set_mark(mark)?;
    }
    socket.connect(addr).await
}

/// To `server`, a host and a port: the first of its addresses that can be reached.
///
/// # Errors
///
/// None can be.
pub async fn dial(server: &str, mark: Option<u32>) -> io::Result<TcpStream> {
    let mut trouble = io::ErrorKind::NotFound.into();
    for addr in tokio::net::lookup_host(server).await? {
        match connect(addr, mark).await {
            Ok(stream) => return Ok(stream),
            Err(error) => trouble = error,
        }
    }
    Err(trouble)
}
