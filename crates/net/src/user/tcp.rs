//! TCP: each connection of the guest is one of a host's socket. [`connection`] says how.

mod connection;
mod segment;

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, acceptfrom_with, connect, socket_with, sockopt};

use super::addresses::OWN_MAC;
use super::hosts::Hosts;
use super::icmp::{Why, unreachable};
use super::link::{Link, Ready};
use super::poller::Token;
use super::slab::{Id, Slab};
use super::wire::{Mac, Packet, Route, protocol};
use crate::{Offloads, Slice, vectors};
pub(super) use connection::Flow;
#[cfg(test)]
pub(super) use connection::HALF_CLOSED;
use connection::{Connection, Fate, Outgoing};
use segment::{ACK, RST, SYN, Segment};

/// Most connections. Each has buffers of up to half a MiB.
const MOST: usize = 4096;
/// The longest header that is looked at, of IP and TCP with all options.
pub(super) const HEAD: usize = 14 + 60 + 60;

/// All connections.
pub(super) struct Tcp {
    connections: Slab<Connection>,
    by_flow: HashMap<Flow, Id>,
    /// Where headers are written.
    frame: Vec<u8>,
}

impl Tcp {
    pub(super) fn new() -> Self {
        Self { connections: Slab::new(), by_flow: HashMap::new(), frame: Vec::new() }
    }

    /// Ends all connections.
    pub(super) fn clear(&mut self) {
        self.connections.iter_mut().for_each(|(_, connection)| connection.abort());
        *self = Self::new();
    }

    /// A packet of the guest's. `host` says to whom on the host a new connection goes.
    pub(super) fn input(
        &mut self,
        link: &mut Link,
        packet: &Packet,
        head: &[u8],
        frame: &[Slice],
        host: impl FnOnce(SocketAddr) -> Result<SocketAddr, Why>,
    ) {
        let (at, len) = packet.payload;
        let Some((segment, header)) =
            head.get(at..).and_then(Segment::parse).filter(|(_, header)| *header <= len)
        else {
            return;
        };
        let flow = Flow {
            guest: SocketAddr::new(packet.from, segment.from_port),
            remote: SocketAddr::new(packet.to, segment.to_port),
        };
        let payload = vectors::part(frame, crate::HEADER_LEN + at + header, len - header);
        match self.by_flow.get(&flow).copied() {
            Some(id) => {
                let most = link.mss(flow.guest);
                if self.connections.get_mut(id).is_some_and(|connection| connection.refuses(&segment)) {
                    refuse(link, flow, packet.mac, &segment, vectors::total(&payload));
                }
                self.with(link, id, |connection| connection.guest_segment(&segment, &payload, most));
            }
            None if segment.flags & (SYN | ACK | RST) == SYN => {
                self.call(link, flow, packet.mac, &segment, host)
            }
            None if segment.has(RST) => {}
            None => refuse(link, flow, packet.mac, &segment, vectors::total(&payload)),
        }
    }

    /// The guest calls someone.
    fn call(
        &mut self,
        link: &mut Link,
        flow: Flow,
        mac: Mac,
        call: &Segment,
        host: impl FnOnce(SocketAddr) -> Result<SocketAddr, Why>,
    ) {
        let to = match host(flow.remote) {
            Ok(to) => to,
            Err(Why::Port) => return refuse(link, flow, mac, call, 0),
            Err(why) => return fail(link, flow, mac, call.seq, why),
        };
        if self.connections.len() >= MOST {
            return refuse(link, flow, mac, call, 0);
        }
        match start_connecting(to) {
            Ok(socket) => {
                let (start, most) = (link.random(), link.mss(flow.guest));
                self.add(link, Connection::from_guest(flow, mac, socket, call, start, most));
            }
            Err(error) => fail(link, flow, mac, call.seq, why(error)),
        }
    }

    fn add(&mut self, link: &mut Link, connection: Connection) -> Option<Id> {
        let flow = connection.flow;
        let id = self.connections.insert(connection);
        let socket = self.connections.get_mut(id)?.socket();
        if let Err(error) = link.poller.watch(socket, Token::Tcp(id)) {
            tracing::warn!(%error, "a connection cannot be watched");
            self.connections.remove(id);
            return None;
        }
        self.by_flow.insert(flow, id);
        Some(id)
    }

    /// Takes a connection to a published port on, to `port` of the guest. An error is one of the host's, which has no files
    /// for more connections, perhaps.
    pub(super) fn accept(
        &mut self,
        link: &mut Link,
        listener: &TcpListener,
        hosts: &Hosts,
        port: u16,
    ) -> io::Result<()> {
        let (socket, from) = match acceptfrom_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok((socket, Some(from))) => (socket, from),
            // It has gone before it was taken on.
            Ok((_, None)) | Err(Errno::AGAIN | Errno::CONNABORTED) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let (guest, mac) = hosts.guest();
        let guest = SocketAddr::new(guest.into(), port);
        let from = SocketAddr::try_from(from)?;
        let flow = Flow::to_guest(guest, from, |flow| !self.by_flow.contains_key(flow));
        if let (Some(flow), true) = (flow, self.connections.len() < MOST) {
            let start = link.random();
            if let Some(id) = self.add(link, Connection::to_guest(flow, mac, socket, start)) {
                self.with(link, id, |_| Fate::Alive);
            }
        }
        Ok(())
    }

    /// Something has happened to a socket.
    pub(super) fn event(&mut self, link: &mut Link, id: Id, readable: bool, writable: bool) {
        self.with(link, id, |connection| connection.host_event(readable, writable));
    }

    /// Does something to a connection, after which it may have something to send, or be over.
    fn with(&mut self, link: &mut Link, id: Id, call: impl FnOnce(&mut Connection) -> Fate) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        let fate = call(connection);
        if fate == Fate::Alive && !connection.queued {
            connection.queued = true;
            link.ready.push_back(Ready::Tcp(id));
        }
        self.settle(link, id, fate);
    }

    fn settle(&mut self, link: &mut Link, id: Id, fate: Fate) {
        if fate == Fate::Alive {
            return;
        }
        let Some(connection) = self.connections.remove(id) else { return };
        self.by_flow.remove(&connection.flow);
        if connection.queued {
            link.ready.retain(|ready| *ready != Ready::Tcp(id));
        }
        let (flow, mac, reset) = (connection.flow, connection.mac, connection.reset());
        match fate {
            Fate::Alive | Fate::Done => {}
            Fate::Reset | Fate::Failed(Errno::CONNREFUSED | Errno::CONNRESET) => {
                connection.abort();
                send(link, flow, mac, &reset);
            }
            Fate::Failed(error) => fail(link, flow, mac, reset.ack.wrapping_sub(1), why(error)),
        }
    }

    /// Sends a segment of a connection, if it has one: `None` if it has none, else whether it was taken.
    pub(super) fn output(
        &mut self,
        link: &mut Link,
        id: Id,
        take: &mut dyn FnMut(&[&[u8]]) -> bool,
    ) -> Option<bool> {
        let connection = self.connections.get_mut(id)?;
        let (own_mss, offloads) = (link.mss(connection.flow.guest), link.driver.offloads);
        let most = most_payload(connection, offloads);
        let outgoing = match connection.outgoing(most, own_mss) {
            Ok(Some(outgoing)) => outgoing,
            Ok(None) => {
                connection.queued = false;
                connection.rest();
                let (over, deadline) = (connection.is_over(), connection.next_deadline());
                deadline.into_iter().for_each(|at| link.poller.arm(at));
                if over {
                    self.settle(link, id, Fate::Done);
                }
                return None;
            }
            Err(fate) => {
                self.settle(link, id, fate);
                return None;
            }
        };
        let taken = write(connection, &outgoing, &mut self.frame, offloads, take);
        if taken {
            connection.sent(&outgoing);
            connection.deadline.into_iter().for_each(|at| link.poller.arm(at));
        }
        Some(taken)
    }

    /// What was not acknowledged in time is sent again. Gives the next deadline.
    pub(super) fn tick(&mut self, link: &mut Link, now: Instant) -> Option<Instant> {
        let late: Vec<Id> = self
            .connections
            .iter_mut()
            .filter(|(_, c)| c.next_deadline().is_some_and(|at| at <= now))
            .map(|(id, _)| id)
            .collect();
        for id in late {
            self.with(link, id, |connection| connection.late(now));
        }
        self.connections.iter_mut().filter_map(|(_, connection)| connection.next_deadline()).min()
    }
}

/// Most bytes of payload of one frame.
fn most_payload(connection: &Connection, offloads: Offloads) -> usize {
    let (offload, headers) = match connection.flow.guest {
        SocketAddr::V4(_) => (Offloads::TSO4, 40),
        SocketAddr::V6(_) => (Offloads::TSO6, 60),
    };
    let mss = usize::from(connection.mss);
    if offloads.contains(offload) { ((65535 - headers) / mss * mss).max(mss) } else { mss }
}

fn route(flow: Flow, mac: Mac) -> Route {
    Route { own: OWN_MAC, mac, from: flow.remote.ip(), to: flow.guest.ip() }
}

fn write(
    connection: &Connection,
    outgoing: &Outgoing,
    frame: &mut Vec<u8>,
    offloads: Offloads,
    take: &mut dyn FnMut(&[&[u8]]) -> bool,
) -> bool {
    let payload = connection.payload(outgoing);
    outgoing.segment.write(frame, &route(connection.flow, connection.mac), payload, connection.mss, offloads);
    take(&[frame, payload[0], payload[1]])
}

/// Sends a segment that is nobody's.
fn send(link: &mut Link, flow: Flow, mac: Mac, segment: &Segment) {
    let mut frame = Vec::new();
    segment.write(&mut frame, &route(flow, mac), [&[], &[]], u16::MAX, Offloads::empty());
    link.send(frame);
}

/// Answers a segment that belongs to no connection (RFC 9293, 3.10.7.1).
fn refuse(link: &mut Link, flow: Flow, mac: Mac, segment: &Segment, len: usize) {
    let Flow { guest, remote } = flow;
    let ends = segment.flags & SYN | segment.flags & segment::FIN;
    let ack = segment.seq.wrapping_add(len as u32).wrapping_add(u32::from(ends != 0));
    let (seq, flags, ack) = if segment.has(ACK) { (segment.ack, RST, 0) } else { (0, RST | ACK, ack) };
    let reset =
        Segment { from_port: remote.port(), to_port: guest.port(), seq, ack, flags, ..Segment::default() };
    send(link, flow, mac, &reset);
}

/// Tells the guest that its call, whose sequence number is `seq`, has come to nothing.
fn fail(link: &mut Link, flow: Flow, mac: Mac, seq: u32, why: Why) {
    let [g0, g1] = flow.guest.port().to_be_bytes();
    let [r0, r1] = flow.remote.port().to_be_bytes();
    let [s0, s1, s2, s3] = seq.to_be_bytes();
    let start = [g0, g1, r0, r1, s0, s1, s2, s3];
    link.send(unreachable(flow.guest, flow.remote, mac, protocol::TCP, start, why));
}

/// As what the guest hears of an error of the host's.
pub(super) fn why(error: Errno) -> Why {
    match error {
        Errno::CONNREFUSED => Why::Port,
        Errno::NETUNREACH | Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL => Why::Network,
        Errno::ACCESS | Errno::PERM => Why::Forbidden,
        _ => Why::Host,
    }
}

fn start_connecting(to: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    set_options(&socket)?;
    match connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

/// The guest's own TCP says when small segments go out; peers that are gone are noticed by the host's. What a listening
/// socket accepts has its options.
pub(super) fn set_options(socket: impl AsFd) -> Result<(), Errno> {
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_socket_keepalive(&socket, true)
}
