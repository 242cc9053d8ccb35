// SPDX-License-Identifier: Apache-2.0
//! The same loads on the crate tokio-uring: the baseline that shows what the raw ring gains.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio_uring::buf::BoundedBuf as _;
use tokio_uring::net::TcpStream;

use super::outcome::{ErrorKind, Outcome, Recorder};
use super::sizes::Sizes;
use super::{Kind, Window, thread_cpu};
use crate::arguments::Run;
use crate::signals::is_interrupted;
use crate::watch::{Memory, Watch};

/// What every connection needs.
struct Load {
    churn: u32,
    kind: Kind,
    recorder: RefCell<Recorder>,
    sizes: Sizes,
    think: Duration,
    to: std::net::SocketAddr,
}

pub(super) fn measure(arguments: &Run, watch: Watch, memory: Memory) -> Result<Outcome> {
    let load = Rc::new(Load {
        churn: if arguments.kind == Kind::Connections { 1 } else { arguments.churn },
        kind: arguments.kind,
        recorder: RefCell::new(Recorder::new(&arguments.watch_cpu)?),
        sizes: arguments.size.clone(),
        think: arguments.think,
        to: arguments.to,
    });
    tokio_uring::start(async {
        for _ in 0..arguments.connections {
            tokio_uring::spawn(again_and_again(Rc::clone(&load)));
        }
        pass(arguments.warmup, &load).await;
        let window = Window::open(watch, memory);
        load.recorder.borrow_mut().begin(Instant::now());
        pass(arguments.duration, &load).await;
        let cpu = thread_cpu();
        load.recorder.borrow_mut().end(Instant::now());
        let outcome = load.recorder.borrow().outcome();
        window.close(arguments, cpu, outcome)
    })
}

async fn pass(span: Duration, load: &Load) {
    let until = Instant::now() + span;
    while Instant::now() < until && !is_interrupted() {
        let left = until.saturating_duration_since(Instant::now());
        tokio::time::sleep(left.min(TICK)).await;
        load.recorder.borrow_mut().tick(Instant::now());
    }
}

async fn again_and_again(load: Rc<Load>) {
    loop {
        if let Err(error) = once(&load).await {
            let kind = ErrorKind::of(error.raw_os_error().unwrap_or(0));
            load.recorder.borrow_mut().error(kind);
            tokio::time::sleep(TICK).await;
        }
    }
}

/// One connection, to its end.
async fn once(load: &Load) -> io::Result<()> {
    let mut began = Instant::now();
    let stream = TcpStream::connect(load.to).await?;
    stream.set_nodelay(true)?;
    let mut number = 0;
    let mut outgoing = vec![b'Z'; load.sizes.largest()];
    let mut incoming = vec![0; INCOMING_BYTES];
    loop {
        let size = load.sizes.at(number);
        if load.kind != Kind::Connections {
            began = Instant::now();
        }
        let (result, slice) = stream.write_all(outgoing.slice(..size)).await;
        outgoing = slice.into_inner();
        result?;
        let mut missing = if load.kind == Kind::Bulk { usize::MAX } else { size };
        while missing > 0 {
            let (result, back) = stream.read(incoming).await;
            incoming = back;
            let bytes = result?;
            if bytes == 0 {
                return Err(io::Error::from_raw_os_error(0));
            }
            missing -= bytes.min(missing);
            load.recorder.borrow_mut().bytes(bytes as u64);
        }
        load.recorder.borrow_mut().done(began, Instant::now());
        number += 1;
        if number == u64::from(load.churn) {
            return Ok(());
        }
        if !load.think.is_zero() {
            tokio::time::sleep(load.think).await;
        }
    }
}

const INCOMING_BYTES: usize = 64 << 10;
const TICK: Duration = Duration::from_millis(10);
