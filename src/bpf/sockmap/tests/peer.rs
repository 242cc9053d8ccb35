// SPDX-License-Identifier: Apache-2.0
//! A TCP peer made by hand behind a TUN device, in a network namespace of its thread: sends
//! whatever segments it is told to, as no kernel would let a program do.
#![expect(unsafe_code, reason = "TUNSETIFF has no safe wrapper")]

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Command;

use nix::sched::{CloneFlags, unshare};

/// The peer of one connection.
pub(super) struct Peer {
    /// Sequence number of its first byte.
    first: u32,
    /// What it has received of the kernel's bytes.
    their_next: u32,
    tun: File,
}

impl Peer {
    /// Puts this thread into a namespace of its own and connects to a listener there.
    pub(super) fn connected() -> (Peer, TcpStream) {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
        let mut request = [0u8; 40];
        request[..5].copy_from_slice(b"weir0");
        request[16..18].copy_from_slice(&(IFF_TUN | IFF_NO_PI).to_ne_bytes());
        // SAFETY: the request is a `struct ifreq` of 40 bytes, which outlives the call.
        let made = unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
        assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
        for words in ["link set lo up", "addr add 10.77.0.1/24 dev weir0", "link set weir0 up"] {
            assert!(Command::new("ip").args(words.split(' ')).status().unwrap().success());
        }
        let listener = TcpListener::bind("10.77.0.1:7000").unwrap();
        let mut peer = Peer { first: 0xffff_fc00, their_next: 0, tun };
        peer.segment(0xffff_fbff, SYN, b"");
        peer.their_next = peer.answer(SYN | ACK).wrapping_add(1);
        peer.segment(peer.first, ACK, b"");
        let (accepted, _) = listener.accept().unwrap();
        (peer, accepted)
    }

    /// Sends these bytes as number `at` and following of its stream, whatever it sent before.
    pub(super) fn send(&mut self, at: u32, bytes: &[u8], fin: bool) {
        let flags = ACK | PSH | if fin { FIN } else { 0 };
        self.segment(self.first.wrapping_add(at), flags, bytes);
    }

    fn segment(&mut self, sequence: u32, flags: u8, bytes: &[u8]) {
        let mut tcp = Vec::new();
        tcp.extend(5000u16.to_be_bytes());
        tcp.extend(7000u16.to_be_bytes());
        tcp.extend(sequence.to_be_bytes());
        tcp.extend(self.their_next.to_be_bytes());
        tcp.extend([5 << 4, flags]);
        tcp.extend(60_000u16.to_be_bytes());
        tcp.extend([0; 4]);
        tcp.extend(bytes);
        let length = u16::try_from(tcp.len()).unwrap();
        let pseudo = [&PEER[..], &NODE, &[0, 6], &length.to_be_bytes()].concat();
        let sum = checksum(&[&pseudo[..], &tcp].concat());
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        let mut ip = vec![0x45, 0];
        ip.extend((length + 20).to_be_bytes());
        ip.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
        ip.extend(PEER);
        ip.extend(NODE);
        let sum = checksum(&ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        self.tun.write_all(&[ip, tcp].concat()).unwrap();
    }

    /// The sequence number of the next segment with these flags.
    fn answer(&mut self, flags: u8) -> u32 {
        let mut packet = [0; 2000];
        loop {
            let bytes = self.tun.read(&mut packet).unwrap();
            let tcp = &packet[20..bytes.max(40)];
            if packet[0] == 0x45 && packet[9] == 6 && tcp[13] == flags {
                return u32::from_be_bytes(tcp[4..8].try_into().unwrap());
            }
        }
    }
}

/// Of the Internet protocols (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut words =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.by_ref().sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

const NODE: [u8; 4] = [10, 77, 0, 1];
const PEER: [u8; 4] = [10, 77, 0, 2];
const FIN: u8 = 1;
const SYN: u8 = 2;
const PSH: u8 = 8;
const ACK: u8 = 16;
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const IFF_TUN: u16 = 1;
const IFF_NO_PI: u16 = 0x1000;
