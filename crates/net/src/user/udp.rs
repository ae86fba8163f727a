//! UDP: each flow of the guest has a connected socket of the host, so that only its peer can answer. Who sends to a published
//! port is answered by that port's socket.

use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use super::addresses::{DNS_PORT, OWN_MAC};
use super::hosts::Hosts;
use super::icmp::{Why, unreachable};
use super::link::{Link, Ready};
use super::poller::Token;
use super::slab::{Id, Slab};
use super::tcp::Flow;
use super::wire::{Mac, Packet, Route, packet, protocol};

/// Most flows; with more, the one that was silent for longest ends.
const MOST: usize = 1024;
/// How long a flow lives without traffic (RFC 4787, 4.3), and one of a question to a name server.
const IDLE: Duration = Duration::from_secs(180);
const IDLE_DNS: Duration = Duration::from_secs(8);
/// Bytes of a header.
const HEADER: usize = 8;
/// The largest datagram over IPv4.
const LARGEST: usize = 65507;
/// Most datagrams that are taken from a published port at once.
const BURST: usize = 32;

/// How datagrams leave the host.
enum Way {
    /// By a socket of the flow's own.
    Own(UdpSocket),
    /// By that of a published port, to a peer.
    Published { listener: u32, peer: SocketAddr },
}

struct UdpFlow {
    flow: Flow,
    mac: Mac,
    way: Way,
    queued: bool,
    last: Instant,
    idle: Duration,
    /// A question to a name server that has no answer yet.
    asks: bool,
}

/// A published port.
pub(super) struct UdpListener {
    pub(super) socket: UdpSocket,
    /// The guest's port.
    pub(super) port: u16,
}

/// All flows.
pub(super) struct Udp {
    flows: Slab<UdpFlow>,
    by_flow: HashMap<Flow, Id>,
    /// Those of published ports, by listener and peer: two peers may look the same to the guest but for a port of ours.
    by_peer: HashMap<(u32, SocketAddr), Id>,
    buffer: Vec<u8>,
}

impl Udp {
    pub(super) fn new() -> Self {
        let (by_flow, by_peer) = (HashMap::new(), HashMap::new());
        Self { flows: Slab::new(), by_flow, by_peer, buffer: vec![0; LARGEST] }
    }

    /// Ends all flows.
    pub(super) fn clear(&mut self) {
        *self = Self::new();
    }

    /// A datagram of the guest's, its header before it. `host` says to whom on the host it goes.
    pub(super) fn input(
        &mut self,
        link: &mut Link,
        packet: &Packet,
        datagram: &[u8],
        listeners: &[UdpListener],
        host: impl FnOnce(SocketAddr) -> Result<SocketAddr, Why>,
    ) {
        let Some((header, rest)) = datagram.split_first_chunk::<HEADER>() else { return };
        let [f0, f1, t0, t1, l0, l1, ..] = *header;
        let len = usize::from(u16::from_be_bytes([l0, l1]));
        let Some(payload) = len.checked_sub(HEADER).and_then(|len| rest.get(..len)) else { return };
        let flow = Flow {
            guest: SocketAddr::new(packet.from, u16::from_be_bytes([f0, f1])),
            remote: SocketAddr::new(packet.to, u16::from_be_bytes([t0, t1])),
        };
        let found = self.by_flow.get(&flow).copied();
        let id = match found.map_or_else(|| self.open(link, flow, packet.mac, host), Ok) {
            Ok(id) => id,
            Err(why) => {
                return link.send(unreachable(
                    flow.guest,
                    flow.remote,
                    packet.mac,
                    protocol::UDP,
                    *header,
                    why,
                ));
            }
        };
        let Some(udp) = self.flows.get_mut(id) else { return };
        udp.last = Instant::now();
        let sent = match &udp.way {
            Way::Own(socket) => socket.send(payload),
            Way::Published { listener, peer } => match listeners.get(*listener as usize) {
                Some(listener) => listener.socket.send_to(payload, peer),
                None => Ok(0),
            },
        };
        if let Err(error) = sent {
            self.failed(link, id, &error);
        }
    }

    fn open(
        &mut self,
        link: &Link,
        flow: Flow,
        mac: Mac,
        host: impl FnOnce(SocketAddr) -> Result<SocketAddr, Why>,
    ) -> Result<Id, Why> {
        let to = host(flow.remote)?;
        let any: SocketAddr = if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
        let socket = UdpSocket::bind(any).and_then(|socket| {
            socket.set_nonblocking(true)?;
            socket.connect(to)?;
            Ok(socket)
        });
        let socket = socket
            .map_err(|error| rustix::io::Errno::from_io_error(&error).map_or(Why::Host, super::tcp::why))?;
        self.add(link, flow, mac, Way::Own(socket)).ok_or(Why::Host)
    }

    fn add(&mut self, link: &Link, flow: Flow, mac: Mac, way: Way) -> Option<Id> {
        if self.flows.len() >= MOST {
            let oldest = self.flows.iter_mut().min_by_key(|(_, flow)| flow.last).map(|(id, _)| id);
            oldest.into_iter().for_each(|id| self.remove(id));
        }
        let asks = flow.remote.port() == DNS_PORT;
        let idle = if asks { IDLE_DNS } else { IDLE };
        let id =
            self.flows.insert(UdpFlow { flow, mac, way, queued: false, last: Instant::now(), idle, asks });
        match &self.flows.get_mut(id)?.way {
            Way::Own(socket) => {
                if let Err(error) = link.poller.watch(socket, Token::Udp(id)) {
                    tracing::warn!(%error, "a socket cannot be watched");
                    self.flows.remove(id);
                    return None;
                }
            }
            Way::Published { listener, peer } => {
                self.by_peer.insert((*listener, *peer), id);
            }
        }
        self.by_flow.insert(flow, id);
        Some(id)
    }

    fn remove(&mut self, id: Id) {
        if let Some(udp) = self.flows.remove(id) {
            self.by_flow.remove(&udp.flow);
            if let Way::Published { listener, peer } = udp.way
                && self.by_peer.get(&(listener, peer)) == Some(&id)
            {
                self.by_peer.remove(&(listener, peer));
            }
        }
    }

    /// The host says that something is wrong with the peer: so does the guest hear.
    fn failed(&mut self, link: &mut Link, id: Id, error: &std::io::Error) {
        let Some(udp) = self.flows.get_mut(id) else { return };
        let why = match rustix::io::Errno::from_io_error(error) {
            None
            | Some(rustix::io::Errno::AGAIN | rustix::io::Errno::MSGSIZE | rustix::io::Errno::NOBUFS) => {
                return;
            }
            Some(error) => super::tcp::why(error),
        };
        let [g0, g1] = udp.flow.guest.port().to_be_bytes();
        let [r0, r1] = udp.flow.remote.port().to_be_bytes();
        let start = [g0, g1, r0, r1, 0, HEADER as u8, 0, 0];
        link.send(unreachable(udp.flow.guest, udp.flow.remote, udp.mac, protocol::UDP, start, why));
    }

    /// A flow's socket may have datagrams.
    pub(super) fn event(&mut self, link: &mut Link, id: Id) {
        if let Some(udp) = self.flows.get_mut(id)
            && !udp.queued
        {
            udp.queued = true;
            link.ready.push_back(Ready::Udp(id));
        }
    }

    /// Takes a datagram of a flow's socket; says whether there was one.
    pub(super) fn output(&mut self, link: &mut Link, id: Id) -> bool {
        let Some(udp) = self.flows.get_mut(id) else { return false };
        let Way::Own(socket) = &udp.way else { return false };
        match socket.recv(&mut self.buffer) {
            Ok(len) => {
                (udp.last, udp.asks) = (Instant::now(), false);
                link.send_datagram(udp.flow, udp.mac, &self.buffer[..len]);
                true
            }
            Err(error) => {
                let over = error.kind() == std::io::ErrorKind::WouldBlock;
                udp.queued = !over;
                self.failed(link, id, &error);
                !over
            }
        }
    }

    /// Takes datagrams that have come to a published port.
    pub(super) fn accept(&mut self, link: &mut Link, number: u32, listener: &UdpListener, hosts: &Hosts) {
        for _ in 0..BURST {
            let Ok((len, from)) = listener.socket.recv_from(&mut self.buffer) else { return };
            let (guest, mac) = hosts.guest();
            let guest = SocketAddr::new(guest.into(), listener.port);
            let known = self.by_peer.get(&(number, from)).copied();
            // A guest that has another address now is another one.
            let known = known.filter(|&id| self.flows.get_mut(id).is_some_and(|udp| udp.flow.guest == guest));
            let id = known.or_else(|| {
                let by_flow = &self.by_flow;
                let flow = Flow::to_guest(guest, from, |flow| !by_flow.contains_key(flow))?;
                self.add(link, flow, mac, Way::Published { listener: number, peer: from })
            });
            if let Some(udp) = id.and_then(|id| self.flows.get_mut(id)) {
                udp.last = Instant::now();
                link.send_datagram(udp.flow, mac, &self.buffer[..len]);
            }
        }
    }

    /// Ends flows that are silent. Gives the next deadline, and whether a name server has not answered.
    pub(super) fn tick(&mut self, now: Instant) -> (Option<Instant>, bool) {
        let late = |flow: &UdpFlow| flow.last + flow.idle <= now;
        let silent: Vec<_> =
            self.flows.iter_mut().filter(|(_, flow)| late(flow)).map(|(id, flow)| (id, flow.asks)).collect();
        silent.iter().for_each(|&(id, _)| self.remove(id));
        let next = self.flows.iter_mut().map(|(_, flow)| flow.last + flow.idle).min();
        (next, silent.iter().any(|&(_, asks)| asks))
    }
}

impl Link {
    /// Sends a datagram to the guest.
    fn send_datagram(&mut self, flow: Flow, mac: Mac, payload: &[u8]) {
        let route = Route { own: OWN_MAC, mac, from: flow.remote.ip(), to: flow.guest.ip() };
        let len = HEADER + payload.len();
        let Ok(total) = u16::try_from(len + route.ip_len()) else { return };
        if total > self.mtu() {
            return self.send_fragments(&route, flow, payload);
        }
        let words = [flow.remote.port(), flow.guest.port(), len as u16, 0].map(u16::to_be_bytes);
        self.send(packet(&route, protocol::UDP, &[words.as_flattened(), payload].concat(), 6));
    }
}
