// SPDX-License-Identifier: Apache-2.0
//! How sockets end: close, reset, FIN by either road.

use super::*;

/// Threads that the kernel has made for the ring of this thread.
fn kernel_threads() -> usize {
    let name = format!("iou-wrk-{}", nix::unistd::gettid());
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names =
        tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|comm| comm.trim() == name).count()
}

#[test]
fn close_sends_fin_and_close_with_reset_sends_reset() {
    let mut bench = Bench::open();
    let (kind, harsh) = (bench.joined(0), bench.joined(1));
    bench.ring.close(FlowId::new(0), Side::Downstream, false);
    bench.ring.close(FlowId::new(1), Side::Downstream, true);
    bench.assert_silent();
    assert_eq!((end_of(&kind), end_of(&harsh)), (Ok(0), Err(ErrorKind::ConnectionReset)));
}

#[test]
fn shutdown_sends_fin_and_the_other_direction_goes_on() {
    for descriptor_install in [true, false] {
        let mut bench = Bench::open();
        bench.ring.features.descriptor_install &= descriptor_install;
        let mut peer = bench.joined(0);
        let fin = token(Kind::ShutdownDownstream, 0, 1);
        bench.ring.shutdown(fin, Side::Downstream);
        assert_eq!(result_of(bench.next(Kind::ShutdownDownstream)), (fin, 0, false));
        assert_eq!(end_of(&peer), Ok(0));
        peer.write_all(b"still here").unwrap();
        drop(peer);
        bench.receive(0, 100);
        assert_eq!(bench.receive_all(), (b"still here".to_vec(), 0));
        bench.assert_silent();
    }
}

#[test]
fn shutdown_of_an_empty_slot_fails() {
    for descriptor_install in [true, false] {
        let mut bench = Bench::open();
        bench.ring.features.descriptor_install &= descriptor_install;
        bench.ring.shutdown(token(Kind::ShutdownUpstream, 0, 1), Side::Upstream);
        assert_eq!(bench.next(Kind::ShutdownUpstream).result, -libc::EBADF);
    }
}

#[test]
fn both_roads_to_a_fin_may_share_a_turn() {
    let mut bench = Bench::open();
    let peers = [bench.joined(0), bench.joined(1), bench.joined(2)];
    for (slot, descriptor_install) in [(0, false), (1, true), (2, false)] {
        bench.ring.features.descriptor_install = descriptor_install;
        bench.ring.shutdown(token(Kind::ShutdownDownstream, slot, 1), Side::Downstream);
    }
    bench.ring.features.descriptor_install = true;
    // The kernel thread is done when its peers have the FIN; then all three share one turn.
    bench.ring.enter(0, None).unwrap();
    assert_eq!((end_of(&peers[0]), end_of(&peers[2])), (Ok(0), Ok(0)));
    for _ in 0..3 {
        assert_eq!(bench.next(Kind::ShutdownDownstream).result, 0);
    }
    assert_eq!(end_of(&peers[1]), Ok(0));
    // A result of 0 is no descriptor: ours must still be open.
    assert!(nix::sys::stat::fstat(std::io::stdin()).is_ok());
}

#[test]
fn five_thousand_fins_make_no_heap_of_threads() {
    for (descriptor_install, threads_max) in [(true, 0), (false, 2)] {
        let mut bench = Bench::open();
        bench.ring.features.descriptor_install = descriptor_install;
        let peers: Vec<TcpStream> = (0..FLOWS_MAX).map(|slot| bench.joined(slot)).collect();
        let mut threads_seen = 0;
        for _ in 0..5000 / FLOWS_MAX + 1 {
            for slot in 0..FLOWS_MAX {
                bench.ring.shutdown(token(Kind::ShutdownDownstream, slot, 1), Side::Downstream);
            }
            for _ in 0..FLOWS_MAX {
                assert_eq!(bench.next(Kind::ShutdownDownstream).result, 0);
            }
            threads_seen = threads_seen.max(kernel_threads());
        }
        assert!(threads_seen <= threads_max, "{threads_seen} threads, {descriptor_install}");
        assert_eq!(end_of(&peers[0]), Ok(0));
    }
}
