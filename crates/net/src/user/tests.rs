//! The stack as a guest sees it: frames in, frames out, and sockets of this host behind it.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use super::addresses::{DNS4, GATEWAY4, GUEST4, OWN_MAC};
use super::wire::{Content, Packet, Route, Sum, packet, parse, protocol};
use super::*;
use crate::{HEADER_LEN, Header};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PATIENCE: Duration = Duration::from_secs(30);
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// A guest without a system: it makes frames and looks at those that come.
struct Guest {
    network: Arc<User>,
    port: Port,
}

/// A segment of TCP that came.
#[derive(Clone, Debug)]
struct Segment {
    seq: u32,
    ack: u32,
    flags: u8,
    payload: Vec<u8>,
}

impl Guest {
    fn new(config: UserConfig, offloads: Offloads) -> Self {
        let (network, port) = User::open(&config, MAC).unwrap();
        network.start(Driver { offloads, knows_mtu: true });
        Self { network, port }
    }

    fn with_loopback(offloads: Offloads) -> Self {
        Self::new(UserConfig { loopback: true, mtu: 1500, ..UserConfig::default() }, offloads)
    }

    fn send(&mut self, mut frame: Vec<u8>) {
        self.port.sender.send(&[Slice::from(&mut frame[..])]);
    }

    fn packet(&mut self, to: Ipv4Addr, number: u8, payload: &[u8], checksum_at: usize) {
        let route = Route { own: MAC, mac: OWN_MAC, from: GUEST4.into(), to: to.into() };
        self.send(packet(&route, number, payload, checksum_at));
    }

    fn datagram(&mut self, to: Ipv4Addr, ports: [u16; 2], payload: &[u8]) {
        let words = [ports[0], ports[1], 8 + payload.len() as u16, 0].map(u16::to_be_bytes);
        self.packet(to, protocol::UDP, &[words.as_flattened(), payload].concat(), 6);
    }

    fn segment(&mut self, ports: [u16; 2], seq: u32, ack: u32, flags: u8, payload: &[u8]) {
        let mut header = [ports[0].to_be_bytes(), ports[1].to_be_bytes()].concat();
        header.extend([seq.to_be_bytes(), ack.to_be_bytes()].concat());
        header.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        header.extend(payload);
        self.packet(GATEWAY4, protocol::TCP, &header, 16);
    }

    /// The next packet that `wanted` takes, its payload with it. Others are passed over.
    fn wait<R>(&mut self, mut wanted: impl FnMut(&Header, &Packet, &[u8]) -> Option<R>) -> R {
        self.try_wait(PATIENCE, &mut wanted).expect("a packet comes")
    }

    fn try_wait<R>(
        &mut self,
        patience: Duration,
        wanted: &mut impl FnMut(&Header, &Packet, &[u8]) -> Option<R>,
    ) -> Option<R> {
        let limit = Instant::now() + patience;
        while Instant::now() < limit {
            let mut found = None;
            let received = self.port.receiver.receive(&mut |frame| {
                let frame = frame.concat();
                let header = Header::parse(frame.first_chunk().unwrap()).unwrap();
                let frame = &frame[HEADER_LEN..];
                if let Some(Content::Ip(packet)) = parse(frame, frame.len()) {
                    let (at, len) = packet.payload;
                    check_sum(&header, &packet, &frame[at..at + len]);
                    found = wanted(&header, &packet, &frame[at..at + len]);
                }
                true
            });
            if found.is_some() {
                return found;
            }
            if received == Received::Nothing {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        None
    }

    fn wait_segment(&mut self, wanted: impl Fn(&Segment) -> bool) -> Segment {
        self.wait(|_, packet, bytes| read_segment(packet, bytes).filter(&wanted))
    }

    /// Connects to a port of this host; where our and its sequence numbers go on.
    fn connect(&mut self, ports: [u16; 2]) -> (u32, u32) {
        self.segment(ports, 1000, 0, SYN, &[]);
        let answer = self.wait_segment(|segment| segment.flags & SYN != 0);
        assert_eq!((answer.flags, answer.ack), (SYN | ACK, 1001));
        let theirs = answer.seq.wrapping_add(1);
        self.segment(ports, 1001, theirs, ACK, &[]);
        (1001, theirs)
    }
}

/// Whatever is left to be done of a packet, its checksum has to be right when that is done.
fn check_sum(header: &Header, packet: &Packet, payload: &[u8]) {
    let pseudo = match packet.protocol {
        protocol::ICMP => Sum::default(),
        number => Sum::pseudo(packet.from, packet.to, number, payload.len()),
    };
    match header.checksum {
        None => assert_eq!(pseudo.add(payload).checksum(), 0),
        Some((_, offset)) => {
            let at = usize::from(offset);
            assert_eq!(payload[at..at + 2], pseudo.folded().to_be_bytes());
        }
    }
}

fn read_segment(packet: &Packet, bytes: &[u8]) -> Option<Segment> {
    let long = |at: usize| u32::from_be_bytes(*bytes[at..].first_chunk().unwrap());
    let len = usize::from(bytes.get(12)? >> 4) * 4;
    (packet.protocol == protocol::TCP).then(|| Segment {
        seq: long(4),
        ack: long(8),
        flags: bytes[13],
        payload: bytes[len..].to_vec(),
    })
}

/// A server on this host, and its port.
fn server() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

#[test]
fn bytes_go_both_ways_and_both_sides_end() {
    for offloads in [Offloads::empty(), Offloads::CHECKSUM, Offloads::CHECKSUM | Offloads::TSO4] {
        let (listener, port) = server();
        let mut guest = Guest::with_loopback(offloads);
        let ports = [4000, port];
        let (mut seq, mut ack) = guest.connect(ports);
        let (mut peer, _) = listener.accept().unwrap();
        guest.segment(ports, seq, ack, ACK, b"hello ");
        // What came before comes again with more behind it.
        guest.segment(ports, seq, ack, ACK, b"hello you");
        // What would leave a gap is not taken.
        guest.segment(ports, seq + 100, ack, ACK, b"gap");
        seq += 9;
        guest.wait_segment(|segment| segment.ack == seq);
        let mut bytes = [0; 9];
        peer.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hello you");

        let sent: Vec<u8> = (0..5000u32).map(|n| n as u8).collect();
        peer.write_all(&sent).unwrap();
        drop(peer);
        let (mut got, mut ended) = (Vec::<u8>::new(), false);
        while !ended {
            let segment = guest.wait_segment(|segment| segment.seq == ack);
            ended = segment.flags & FIN != 0;
            got.extend(&segment.payload);
            ack = ack.wrapping_add(segment.payload.len() as u32 + u32::from(ended));
            guest.segment(ports, seq, ack, ACK, &[]);
        }
        assert_eq!(got, sent);
        guest.segment(ports, seq, ack, FIN | ACK, &[]);
        guest.wait_segment(|segment| segment.ack == seq + 1);
        // Nobody knows of the connection any more.
        let limit = Instant::now() + PATIENCE;
        loop {
            guest.segment(ports, seq + 1, ack, ACK, b"more");
            let mut reset = |_: &Header, packet: &Packet, bytes: &[u8]| {
                read_segment(packet, bytes).filter(|segment| segment.flags & RST != 0)
            };
            if guest.try_wait(Duration::from_millis(100), &mut reset).is_some() {
                break;
            }
            assert!(Instant::now() < limit);
        }
    }
}

#[test]
fn segments_are_as_large_as_the_guest_lets_them_be() {
    let (listener, port) = server();
    let largest = |offloads| {
        let mut guest = Guest::with_loopback(offloads);
        let ports = [4000, port];
        guest.connect(ports);
        let (mut peer, _) = listener.accept().unwrap();
        peer.write_all(&[1; 60_000]).unwrap();
        let mut total = 0;
        let mut most = 0;
        while total < 60_000 {
            let (len, gso) = guest.wait(|header, packet, bytes| {
                read_segment(packet, bytes)
                    .filter(|s| !s.payload.is_empty())
                    .map(|s| (s.payload.len(), header.segment))
            });
            assert_eq!(gso, if len > 536 { 536 } else { 0 });
            (total, most) = (total + len, most.max(len));
        }
        most
    };
    assert_eq!(largest(Offloads::CHECKSUM), 536, "of a guest that says nothing of it");
    assert!(largest(Offloads::CHECKSUM | Offloads::TSO4) > 20_000);
}

#[test]
fn what_is_lost_is_sent_again() {
    let (listener, port) = server();
    let mut guest = Guest::with_loopback(Offloads::empty());
    let ports = [4000, port];
    let (seq, ack) = guest.connect(ports);
    let (mut peer, _) = listener.accept().unwrap();
    peer.write_all(&[7; 2000]).unwrap();
    // The first segments are lost: the guest asks again and again.
    guest.wait_segment(|segment| segment.seq == ack.wrapping_add(536));
    for _ in 0..3 {
        guest.segment(ports, seq, ack, ACK, &[]);
    }
    guest.wait_segment(|segment| segment.seq == ack && !segment.payload.is_empty());
    // Now it says nothing.
    let start = Instant::now();
    guest.wait_segment(|segment| segment.seq == ack && !segment.payload.is_empty());
    assert!(start.elapsed() > Duration::from_millis(300));
}

#[test]
fn a_peer_that_does_not_read_makes_the_window_smaller() {
    let (listener, port) = server();
    let mut guest = Guest::with_loopback(Offloads::empty());
    let ports = [4000, port];
    let (mut seq, ack) = guest.connect(ports);
    let (mut peer, _) = listener.accept().unwrap();
    let block = [3; 60_000];
    let mut sent = 0;
    loop {
        guest.segment(ports, seq, ack, ACK, &block);
        let taken = guest.wait_segment(|segment| segment.flags == ACK).ack.wrapping_sub(seq);
        seq = seq.wrapping_add(taken);
        sent += taken as usize;
        if taken == 0 {
            break;
        }
        assert!(sent < 64 << 20, "somebody takes all of it");
    }
    let mut bytes = vec![0; sent];
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    let reader = std::thread::spawn(move || {
        peer.read_exact(&mut bytes).unwrap();
        (bytes, peer)
    });
    // The guest hears that there is room, and nothing is lost.
    guest.wait(|_, packet, bytes| {
        let window = u16::from_be_bytes([bytes[14], bytes[15]]);
        read_segment(packet, bytes).filter(|_| window > 30_000)
    });
    let limit = Instant::now() + PATIENCE;
    while !reader.is_finished() {
        guest.try_wait(Duration::from_millis(10), &mut |_, _, _| None::<()>);
        assert!(Instant::now() < limit);
    }
    let (bytes, _peer) = reader.join().unwrap();
    assert!(bytes.iter().all(|&byte| byte == 3));
}

#[test]
fn who_is_not_there_is_told() {
    let (listener, port) = server();
    drop(listener);
    let mut guest = Guest::with_loopback(Offloads::empty());
    guest.segment([4000, port], 1000, 0, SYN, &[]);
    let answer = guest.wait_segment(|_| true);
    assert_eq!((answer.flags, answer.ack), (RST | ACK, 1001));
    guest.datagram(GATEWAY4, [4000, port], b"anybody?");
    let quoted = guest.wait(|_, packet, bytes| {
        let unreachable = packet.protocol == protocol::ICMP && bytes[..2] == [3, 3];
        unreachable.then(|| bytes[28..32].to_vec())
    });
    assert_eq!(quoted, [4000u16.to_be_bytes(), port.to_be_bytes()].concat());
    // Without the right to it there is no loopback.
    let (_listener, port) = server();
    let mut guest = Guest::new(UserConfig::default(), Offloads::empty());
    guest.segment([4000, port], 1000, 0, SYN, &[]);
    assert_eq!(guest.wait_segment(|_| true).flags, RST | ACK);
    let localhost = Ipv4Addr::LOCALHOST;
    guest.datagram(localhost, [4000, port], b"anybody?");
    let code =
        guest.wait(|_, packet, bytes| (packet.protocol == protocol::ICMP).then(|| bytes[..2].to_vec()));
    assert_eq!(code, [3, 0]);
    let mut guest = Guest::new(UserConfig { restrict: true, ..UserConfig::default() }, Offloads::empty());
    for (to, port, expected) in [(Ipv4Addr::new(192, 0, 2, 77), 80, [3, 13]), (DNS4, 53, [3, 3])] {
        guest.datagram(to, [4000, port], b"anybody?");
        let code =
            guest.wait(|_, packet, bytes| (packet.protocol == protocol::ICMP).then(|| bytes[..2].to_vec()));
        assert_eq!(code, expected, "it is forbidden");
    }
}

#[test]
fn datagrams_and_questions_for_names_are_answered() {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let address = socket.local_addr().unwrap();
    let config = UserConfig { loopback: true, dns: Some(address), mtu: 1500, ..UserConfig::default() };
    let mut guest = Guest::new(config, Offloads::empty());
    let mut buffer = [0; 100];
    for (to, port) in [(GATEWAY4, address.port()), (DNS4, 53)] {
        guest.datagram(to, [4000, port], b"ping");
        let (len, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], b"ping");
        socket.send_to(b"pong", from).unwrap();
        let (seen, bytes) = guest.wait(|_, packet, bytes| {
            (packet.protocol == protocol::UDP).then(|| (packet.from, bytes.to_vec()))
        });
        assert_eq!(seen, IpAddr::V4(to));
        assert_eq!(bytes[..4], [port.to_be_bytes(), 4000u16.to_be_bytes()].concat());
        assert_eq!(&bytes[8..], b"pong");
        // Nobody else can answer.
        let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
        let _ = stranger.send_to(b"me too", from);
        let mut any =
            |_: &Header, packet: &Packet, _: &[u8]| (packet.protocol == protocol::UDP).then_some(());
        assert!(guest.try_wait(Duration::from_millis(50), &mut any).is_none());
    }
}

#[test]
fn large_datagrams_come_in_fragments() {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let port = socket.local_addr().unwrap().port();
    let mut guest = Guest::with_loopback(Offloads::empty());
    guest.datagram(GATEWAY4, [4000, port], b"ping");
    let (_, from) = socket.recv_from(&mut [0; 100]).unwrap();
    let sent: Vec<u8> = (0..4000u32).map(|n| (n / 3) as u8).collect();
    socket.send_to(&sent, from).unwrap();
    let mut whole = Vec::new();
    let limit = Instant::now() + PATIENCE;
    while whole.len() < 4008 {
        guest.port.receiver.receive(&mut |frame| {
            let frame = frame.concat();
            let ip = &frame[HEADER_LEN + 14..];
            if ip[9] == protocol::UDP && frame[HEADER_LEN + 12..HEADER_LEN + 14] == [8, 0] {
                assert!(ip.len() <= 1500 && Sum::default().add(&ip[..20]).checksum() == 0);
                let place = u16::from_be_bytes([ip[6], ip[7]]);
                assert_eq!(usize::from(place & 0x1fff) * 8, whole.len());
                whole.extend(&ip[20..]);
                assert_eq!(place & 0x2000 == 0, whole.len() == 4008);
            }
            true
        });
        assert!(Instant::now() < limit);
    }
    assert_eq!(whole[8..], sent);
    let sum = Sum::pseudo(GATEWAY4.into(), GUEST4.into(), protocol::UDP, whole.len()).add(&whole);
    assert_eq!(sum.checksum(), 0);
}

#[test]
fn published_ports_lead_to_the_guest() {
    let [tcp, udp] = [false, true].map(publish);
    let config = UserConfig { publish: vec![tcp.clone(), udp.clone()], ..UserConfig::default() };
    let mut guest = Guest::new(config, Offloads::empty());
    let mut peer = TcpStream::connect(tcp.host).unwrap();
    let (call, from, ports) = guest.wait(|_, packet, bytes| {
        let segment = read_segment(packet, bytes)?;
        Some((segment, packet.from, [22, u16::from_be_bytes([bytes[0], bytes[1]])]))
    });
    assert_eq!((call.flags, from, ports[1]), (SYN, IpAddr::V4(GATEWAY4), peer.local_addr().unwrap().port()));
    guest.segment(ports, 5000, call.seq.wrapping_add(1), SYN | ACK, &[]);
    let answer = guest.wait_segment(|segment| segment.flags == ACK);
    guest.segment(ports, 5001, answer.seq, ACK, b"SSH-2.0");
    let mut banner = [0; 7];
    peer.read_exact(&mut banner).unwrap();
    assert_eq!(&banner, b"SSH-2.0");
    // The guest ends it with a reset, which the peer hears.
    guest.segment(ports, 5008, answer.seq, RST, &[]);
    assert_eq!(peer.read(&mut banner).unwrap_err().kind(), ErrorKind::ConnectionReset);

    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    peer.send_to(b"ping", udp.host).unwrap();
    let port = guest.wait(|_, packet, bytes| {
        (packet.protocol == protocol::UDP).then(|| u16::from_be_bytes([bytes[0], bytes[1]]))
    });
    guest.datagram(GATEWAY4, [22, port], b"pong");
    let mut buffer = [0; 100];
    let (len, from) = peer.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..len], from), (&b"pong"[..], udp.host));
}

#[test]
fn a_guest_that_remembers_a_connection_of_the_same_ends_is_told_that_it_is_over() {
    let tcp = publish(false);
    let config = UserConfig { publish: vec![tcp.clone()], ..UserConfig::default() };
    let mut guest = Guest::new(config, Offloads::empty());
    let mut peer = TcpStream::connect(tcp.host).unwrap();
    let call = guest.wait_segment(|segment| segment.flags == SYN);
    let ports = [22, peer.local_addr().unwrap().port()];
    // What a socket in TIME-WAIT answers.
    guest.segment(ports, 900, 777, ACK, &[]);
    let reset = guest.wait_segment(|segment| segment.flags & RST != 0);
    assert_eq!(reset.seq, 777);
    let again = guest.wait_segment(|_| true);
    assert_eq!((again.flags, again.seq), (SYN, call.seq));
    guest.segment(ports, 5000, call.seq.wrapping_add(1), SYN | ACK, &[]);
    let answer = guest.wait_segment(|segment| segment.flags == ACK);
    guest.segment(ports, 5001, answer.seq, ACK, b"x");
    assert_eq!(peer.read(&mut [0; 2]).unwrap(), 1);
}

/// A free port of this host, as one that is published.
fn publish(udp: bool) -> Publish {
    let host = match udp {
        true => UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap(),
        false => TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap(),
    };
    Publish { host, guest: 22, udp }
}

#[test]
fn peers_of_the_same_port_are_not_mixed_up() {
    let published = publish(true);
    let mut guest =
        Guest::new(UserConfig { publish: vec![published.clone()], ..Default::default() }, Offloads::empty());
    let first = UdpSocket::bind("127.0.0.1:0").unwrap();
    let second = UdpSocket::bind(("127.0.0.2", first.local_addr().unwrap().port())).unwrap();
    let mut port_of = |socket: &UdpSocket, word: &[u8]| {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.send_to(word, published.host).unwrap();
        guest.wait(|_, packet, bytes| {
            let from = u16::from_be_bytes([bytes[0], bytes[1]]);
            (packet.protocol == protocol::UDP && &bytes[8..] == word).then_some(from)
        })
    };
    let ports = [port_of(&first, b"one"), port_of(&second, b"two"), port_of(&second, b"again")];
    assert!(ports[0] != ports[1] && ports[1] == ports[2], "{ports:?}");
    for (socket, port) in [(&second, ports[1]), (&first, ports[0])] {
        guest.datagram(GATEWAY4, [22, port], &port.to_be_bytes());
        let mut buffer = [0; 2];
        socket.recv(&mut buffer).unwrap();
        assert_eq!(buffer, port.to_be_bytes());
    }
}

/// Whether the receiver has something to do.
fn is_ready(guest: &Guest) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::from_borrowed_fd(guest.port.receiver.source(), PollFlags::IN)], Some(&now)).unwrap()
        > 0
}

#[test]
fn who_finds_no_file_waits_and_is_let_in_later() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let published = publish(false);
    let config = UserConfig { publish: vec![published.clone()], ..Default::default() };
    let mut guest = Guest::new(config, Offloads::empty());
    let nothing = |guest: &mut Guest| guest.port.receiver.receive(&mut |_| true) == Received::Nothing;
    while !nothing(&mut guest) {}
    let _peer = TcpStream::connect(published.host).unwrap();
    let next = std::os::fd::AsRawFd::as_raw_fd(&TcpListener::bind("127.0.0.1:0").unwrap());
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(next as u64), ..limit }).unwrap();
    let quiet = nothing(&mut guest) && !is_ready(&guest);
    setrlimit(Resource::Nofile, limit).unwrap();
    assert!(quiet, "the receiver does not wake for what is in vain");
    assert_eq!(guest.wait_segment(|_| true).flags, SYN);
}

#[test]
fn a_connection_that_is_half_closed_ends_some_time() {
    let (listener, port) = server();
    let mut guest = Guest::with_loopback(Offloads::empty());
    let ports = [4000, port];
    let (seq, ack) = guest.connect(ports);
    let (mut peer, _) = listener.accept().unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    let pass = |guest: &mut Guest, time| {
        while guest.port.receiver.receive(&mut |_| true) != Received::Nothing {}
        guest.network.stack().pass(Instant::now() + time);
    };
    pass(&mut guest, 2 * tcp::HALF_CLOSED);
    guest.segment(ports, seq, ack, FIN | ACK, &[]);
    assert_eq!(peer.read(&mut [0; 9]).unwrap(), 0, "it has lived until now");
    pass(&mut guest, tcp::HALF_CLOSED / 2);
    peer.write_all(b"still there").unwrap();
    guest.wait_segment(|segment| segment.payload == b"still there");
    guest.segment(ports, seq + 1, ack + 11, ACK, &[]);
    pass(&mut guest, 2 * tcp::HALF_CLOSED);
    assert_eq!(guest.wait_segment(|_| true).flags, RST | ACK);
    assert!(peer.write_all(b"and now?").is_err());
}

#[test]
fn a_driver_that_starts_anew_has_no_connections() {
    let (listener, port) = server();
    let mut guest = Guest::with_loopback(Offloads::empty());
    let ports = [4000, port];
    let (seq, ack) = guest.connect(ports);
    let (mut peer, _) = listener.accept().unwrap();
    guest.network.start(Driver { offloads: Offloads::empty(), knows_mtu: true });
    assert_eq!(peer.read(&mut [0; 9]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    guest.segment(ports, seq, ack, ACK, b"still there?");
    assert_eq!(guest.wait_segment(|_| true).flags, RST);
}

#[test]
fn the_gateway_answers_pings_and_others_are_tried() {
    let mut guest = Guest::with_loopback(Offloads::empty());
    let request = [&[8, 0, 0, 0, 0x12, 0x34, 0, 1][..], b"payload"].concat();
    guest.packet(GATEWAY4, protocol::ICMP, &request, 2);
    let answer = guest.wait(|_, packet, bytes| (packet.protocol == protocol::ICMP).then(|| bytes.to_vec()));
    assert_eq!((answer[0], &answer[4..]), (0, &request[4..]));
    let lost = Ipv4Addr::new(10, 0, 2, 200);
    guest.packet(lost, protocol::ICMP, &request, 2);
    let answer = guest.wait(|_, packet, bytes| (packet.protocol == protocol::ICMP).then(|| bytes.to_vec()));
    assert_eq!(answer[..2], [3, 0]);
}
