//! The user's network under a hostile guest: frames that mean something, and any bytes in their places. The host's side of
//! connections is one server here, at the place of the name server; nothing else is reached.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;

use arbitrary::Unstructured;
use ruse_net::user::{User, UserConfig};
use ruse_net::{Driver, HEADER_LEN, Header, Network, Offloads, Port, Slice};

use crate::input::{byte, number, one_in, pick, steps};

/// Steps of one input at most.
const MOST_STEPS: usize = 300;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Addresses of the guest, the gateway, the name server and someone outside.
const GUEST: [u8; 4] = [10, 0, 2, 15];
const OTHERS: [[u8; 4]; 6] =
    [[10, 0, 2, 3], [10, 0, 2, 3], [10, 0, 2, 3], [10, 0, 2, 2], [192, 0, 2, 1], [127, 0, 0, 1]];

struct Bench {
    network: Arc<User>,
    port: Port,
    listener: TcpListener,
    socket: UdpSocket,
    peers: Vec<TcpStream>,
    /// What the guest's TCP is to send and acknowledge next.
    seq: u32,
    ack: u32,
    /// Checksums may be left to the guest, segments too.
    offloads: Offloads,
}

/// Runs the target.
pub(crate) fn run(data: &[u8]) {
    let u = &mut Unstructured::new(data);
    let mut bench = Bench::new();
    steps(u, MOST_STEPS, |u| bench.step(u));
}

impl Bench {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        listener.set_nonblocking(true).expect("it can be set");
        let address = listener.local_addr().expect("it has an address");
        // The same port may be in use for UDP: then there are no datagrams.
        let socket =
            UdpSocket::bind(address).or_else(|_| UdpSocket::bind("127.0.0.1:0")).expect("a port is free");
        socket.set_nonblocking(true).expect("it can be set");
        let config = UserConfig { dns: Some(address), restrict: true, ..UserConfig::default() };
        let (network, port) = User::open(&config, MAC).expect("it can be had");
        let offloads = Offloads::CHECKSUM | Offloads::TSO4;
        network.start(Driver { offloads, knows_mtu: true });
        Self { network, port, listener, socket, peers: Vec::new(), seq: 1000, ack: 0, offloads }
    }

    fn step(&mut self, u: &mut Unstructured) {
        match byte(u) % 16 {
            0 => {
                self.offloads = Offloads::from_bits_truncate(byte(u));
                self.network.start(Driver { offloads: self.offloads, knows_mtu: one_in(u, 2) });
            }
            1 => {
                self.offloads = Offloads::from_bits_truncate(byte(u));
                self.network.set_offloads(self.offloads);
            }
            2..=7 => {
                let frame = self.frame(u);
                self.send(u, frame);
            }
            8 => {
                let len = usize::from(u.arbitrary::<u16>().unwrap_or(0)) % 2000;
                let bytes = u.bytes(len.min(u.len())).unwrap_or_default().to_vec();
                self.send(u, [&[0; HEADER_LEN][..], &bytes].concat());
            }
            9..=12 => self.receive(u),
            _ => self.host(u),
        }
    }

    /// A frame, mostly as it should be.
    fn frame(&mut self, u: &mut Unstructured) -> Vec<u8> {
        let (kind, body) = match byte(u) % 8 {
            0 => return self.arp(u),
            1 => (1, [&[pick(u, &[8, 0, 3]), 0, 0, 0, 0, 1, 0, 1][..], &[7; 20]].concat()),
            2 => (17, dhcp(u)),
            3 => (17, datagram(u, [4000, 53])),
            _ => (6, self.segment(u)),
        };
        let to = if kind == 17 && one_in(u, 3) { [255; 4] } else { pick(u, &OTHERS) };
        let mut frame = [&[0; HEADER_LEN + 6][..], &MAC, &[8, 0]].concat();
        let len = ((20 + body.len()) as u16).to_be_bytes();
        frame.extend([0x45, 0, len[0], len[1], 0, 0, 0, 0, 64, kind, 0, 0]);
        frame.extend([GUEST, to].concat());
        frame.extend(body);
        frame
    }

    fn arp(&self, u: &mut Unstructured) -> Vec<u8> {
        let mut frame =
            [&[0; HEADER_LEN][..], &[0xff; 6], &MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &MAC, &GUEST].concat();
        frame.extend([0; 6]);
        frame.extend(pick(u, &OTHERS));
        frame
    }

    fn segment(&mut self, u: &mut Unstructured) -> Vec<u8> {
        let flags = pick(u, &[2u8, 16, 16, 24, 17, 4, 20, 18, 0]);
        let len = if flags == 2 { 0 } else { pick(u, &[0, 0, 1, 100, 1000, 60_000]) };
        let seq = if one_in(u, 8) { self.seq.wrapping_add(number(u) as u32) } else { self.seq };
        let ack = if one_in(u, 8) { self.ack.wrapping_add(number(u) as u32) } else { self.ack };
        let window = pick(u, &[0xffffu16, 0, 1, 1000]);
        let mut segment = [4000u16.to_be_bytes(), 53u16.to_be_bytes()].concat();
        segment.extend([seq.to_be_bytes(), ack.to_be_bytes()].concat());
        segment.extend([if flags & 2 != 0 { 0x70 } else { 0x50 }, flags]);
        segment.extend(window.to_be_bytes());
        segment.extend([0; 4]);
        if flags & 2 != 0 {
            let mss = pick(u, &[1460u16, 0, 1, 536, 65535]).to_be_bytes();
            segment.extend([2, 4, mss[0], mss[1], 3, 3, byte(u), 0]);
        }
        segment.resize(segment.len() + len, 5);
        if seq == self.seq && !one_in(u, 8) {
            self.seq = self.seq.wrapping_add(len as u32 + u32::from(flags & 3 != 0));
        }
        segment
    }

    /// Sends a frame in some parts, mostly without damage.
    fn send(&mut self, u: &mut Unstructured, mut frame: Vec<u8>) {
        while one_in(u, 4) {
            let at = usize::from(u.arbitrary::<u16>().unwrap_or(0)) % frame.len().min(200);
            frame[at] = byte(u);
        }
        if one_in(u, 16) {
            frame.truncate(usize::from(byte(u)));
        }
        let cut = usize::from(byte(u)).min(frame.len());
        let (one, other) = frame.split_at_mut(cut);
        self.port.sender.send(&[Slice::from(one), Slice::from(other)]);
    }

    /// Takes frames, which have to be such that a driver takes them.
    fn receive(&mut self, u: &mut Unstructured) {
        let (offloads, ack) = (self.offloads, &mut self.ack);
        for _ in 0..=byte(u) % 8 {
            let refuse = one_in(u, 8);
            self.port.receiver.receive(&mut |frame| {
                let frame = frame.concat();
                let header = frame.first_chunk().and_then(Header::parse).expect("a header");
                assert!((HEADER_LEN + 14..=HEADER_LEN + 14 + 65535).contains(&frame.len()));
                assert!(header.checksum.is_none() || offloads.contains(Offloads::CHECKSUM));
                if let [0x45, _, l0, l1, _, _, _, _, _, 6, ..] = frame[HEADER_LEN + 14..] {
                    let len = usize::from(u16::from_be_bytes([l0, l1]));
                    assert_eq!(len, frame.len() - HEADER_LEN - 14);
                    let tcp = &frame[HEADER_LEN + 34..];
                    let seq = u32::from_be_bytes(*tcp[4..].first_chunk().expect("a header"));
                    let payload = tcp.len() - usize::from(tcp[12] >> 4) * 4;
                    *ack = seq.wrapping_add(payload as u32 + u32::from(tcp[13] & 3 != 0));
                }
                !refuse
            });
        }
    }

    /// The host's side.
    fn host(&mut self, u: &mut Unstructured) {
        if let Ok((peer, _)) = self.listener.accept() {
            peer.set_nonblocking(true).expect("it can be set");
            self.peers.push(peer);
        }
        let mut buffer = [0; 1000];
        while let Ok((len, from)) = self.socket.recv_from(&mut buffer) {
            let _sent = self.socket.send_to(&buffer[..len], from);
        }
        let count = self.peers.len().max(1);
        let which = usize::from(byte(u)) % count;
        if let Some(peer) = self.peers.get_mut(which) {
            match byte(u) % 4 {
                0 => drop(self.peers.swap_remove(which)),
                1 => drop(peer.read(&mut [0; 10_000])),
                _ => drop(peer.write(&vec![9; usize::from(u.arbitrary::<u16>().unwrap_or(0))])),
            }
        }
    }
}

fn datagram(u: &mut Unstructured, ports: [u16; 2]) -> Vec<u8> {
    let len = usize::from(byte(u)) * 4;
    let words = [ports[0], ports[1], (8 + len) as u16, 0].map(u16::to_be_bytes);
    [words.as_flattened(), &vec![3; len]].concat()
}

fn dhcp(u: &mut Unstructured) -> Vec<u8> {
    let mut message = vec![0; 236];
    message[..3].copy_from_slice(&[1, 1, 6]);
    message[28..34].copy_from_slice(&MAC);
    message.extend([99, 130, 83, 99, 53, 1, pick(u, &[1, 3, 8, 4])]);
    message.extend([50, 4, 10, 0, 2, pick(u, &[15, 15, 16])]);
    message.push(255);
    let words = [68, 67, (8 + message.len()) as u16, 0].map(u16::to_be_bytes);
    [words.as_flattened(), &message].concat()
}
