//! The stack: frames of the guest's on one side, sockets of the host on the other.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::addresses::{Destination, GATEWAY4, destination, is_local, is_own};
use super::dhcp;
use super::echo::Echo;
use super::hosts::Hosts;
use super::icmp::{self, Why};
use super::link::{Link, Ready};
use super::poller::{Happened, Poller, Token};
use super::resolver::Resolver;
use super::tcp::{self, Tcp};
use super::udp::{Udp, UdpListener};
use super::wire::{Content, Mac, Packet, parse, protocol};
use super::{Listeners, UserConfig};
use crate::{Driver, HEADER_LEN, Received, Slice, vectors};

/// The router says so often that it is one.
const ANNOUNCE: Duration = Duration::from_secs(600);
/// How long nobody is let in at a published port after somebody could not be.
const RETRY: Duration = Duration::from_millis(200);
/// After so many frames it is looked whether anything has happened.
const LOOK_AFTER: u32 = 32;

/// Who answers the guest.
struct Policy {
    loopback: bool,
    restrict: bool,
    resolver: Resolver,
}

impl Policy {
    /// To whom on the host something goes.
    fn host(&self, to: SocketAddr) -> Result<SocketAddr, Why> {
        match destination(to, self.loopback) {
            Destination::To(to) if self.restrict && !to.ip().is_loopback() => Err(Why::Forbidden),
            Destination::Resolver if self.restrict && !self.resolver.is_given() => Err(Why::Port),
            Destination::To(to) => Ok(to),
            Destination::Resolver => self.resolver.server().ok_or(Why::Port),
            Destination::Closed => Err(Why::Port),
            Destination::Nowhere => Err(Why::Network),
        }
    }
}

pub(super) struct Stack {
    link: Link,
    policy: Policy,
    hosts: Hosts,
    tcp: Tcp,
    udp: Udp,
    echo: Echo,
    tcp_listeners: Vec<(TcpListener, u16)>,
    udp_listeners: Vec<UdpListener>,
    /// Listeners of TCP at which nobody could be let in, and when it is tried again.
    refused: Vec<u32>,
    retry: Option<Instant>,
    /// The frame that is looked at, where it has to be whole.
    frame: Vec<u8>,
    announce: Option<Instant>,
    since_look: u32,
    /// It was looked since the receiver had all there was.
    looked: bool,
}

impl Stack {
    pub(super) fn new(config: &UserConfig, mac: Mac, listeners: Listeners) -> io::Result<Self> {
        let poller = Poller::new()?;
        let mut number = 0;
        let mut token = || {
            number += 1;
            Token::Listener(number - 1)
        };
        for (socket, _) in &listeners.tcp {
            poller.listen(socket, token())?;
        }
        for listener in &listeners.udp {
            poller.listen(&listener.socket, token())?;
        }
        Ok(Self {
            link: Link::new(poller, config.mtu),
            policy: Policy {
                loopback: config.loopback,
                restrict: config.restrict,
                resolver: Resolver::new(config.dns),
            },
            hosts: Hosts::new(mac),
            tcp: Tcp::new(),
            udp: Udp::new(),
            echo: Echo::new(),
            tcp_listeners: listeners.tcp,
            udp_listeners: listeners.udp,
            refused: Vec::new(),
            retry: None,
            frame: Vec::new(),
            announce: None,
            since_look: 0,
            looked: false,
        })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.link.poller.fd()
    }

    /// A driver has started.
    pub(super) fn start(&mut self, driver: Driver) {
        self.link.start(driver);
        self.hosts.clear();
        self.tcp.clear();
        self.udp.clear();
        self.echo.clear();
        self.announce = Some(Instant::now());
        self.link.poller.arm(Instant::now());
    }

    pub(super) fn set_offloads(&mut self, offloads: crate::Offloads) {
        self.link.driver.offloads = offloads;
    }

    /// Takes a frame of the guest's, with its header.
    pub(super) fn input(&mut self, frame: &[Slice]) {
        let mut head = [0; HEADER_LEN + tcp::HEAD];
        let count = vectors::copy_head(frame, &mut head);
        let (head, len) =
            (head.get(HEADER_LEN..count).unwrap_or(&[]), vectors::total(frame).saturating_sub(HEADER_LEN));
        match parse(head, len) {
            Some(Content::Ip(packet)) if !is_possible(packet.from) => {}
            Some(Content::Ip(packet)) => {
                self.hosts.hear(packet.from, packet.mac);
                match packet.protocol {
                    protocol::TCP => {
                        let policy = &self.policy;
                        self.tcp.input(&mut self.link, &packet, head, frame, |to| policy.host(to));
                    }
                    _ => self.whole(frame, |stack, frame| stack.packet(&packet, frame)),
                }
            }
            Some(Content::Arp) => self.whole(frame, |stack, frame| {
                if let Some(heard) = super::arp::take(frame) {
                    stack.hosts.hear(heard.address.into(), heard.mac);
                    heard.answer.into_iter().for_each(|answer| stack.link.send(answer));
                }
            }),
            None => {}
        }
    }

    /// Gives `call` all of a frame but its header.
    fn whole(&mut self, frame: &[Slice], call: impl FnOnce(&mut Self, &[u8])) {
        let mut bytes = std::mem::take(&mut self.frame);
        bytes.resize(vectors::total(frame), 0);
        vectors::copy_head(frame, &mut bytes);
        call(self, bytes.get(HEADER_LEN..).unwrap_or(&[]));
        self.frame = bytes;
    }

    /// A packet that is not of TCP.
    fn packet(&mut self, packet: &Packet, frame: &[u8]) {
        let (at, len) = packet.payload;
        let Some(payload) = frame.get(at..at + len) else { return };
        match packet.protocol {
            protocol::UDP if is_dhcp(packet, payload) => {
                let answer = dhcp::answer(payload.get(8..).unwrap_or(&[]), &mut self.hosts, self.link.mtu());
                answer.into_iter().for_each(|answer| self.link.send(answer));
            }
            protocol::UDP if is_for_many(packet.to) => {}
            protocol::UDP => {
                let policy = &self.policy;
                self.udp.input(&mut self.link, packet, payload, &self.udp_listeners, |to| policy.host(to));
                self.arm();
            }
            protocol::ICMP if packet.from.is_ipv4() => self.icmp(packet, payload),
            protocol::ICMP6 if packet.from.is_ipv6() => {
                match icmp::discovery(packet, payload, self.link.mtu()) {
                    Some(answer) => self.link.send(answer),
                    None => self.icmp(packet, payload),
                }
            }
            _ => {}
        }
    }

    fn icmp(&mut self, packet: &Packet, message: &[u8]) {
        let Some(identifier) = icmp::echo_request(packet.from, message) else { return };
        if is_own(packet.to) {
            return self.link.send(icmp::echo_reply(packet.to, packet.from, packet.mac, message));
        }
        if is_for_many(packet.to) {
            return;
        }
        // Ports mean nothing here.
        let host = self.policy.host(SocketAddr::new(packet.to, 0));
        let sent = host.and_then(|host| self.echo.input(&self.link, packet, identifier, message, host.ip()));
        if let (Err(why), Some(start)) = (sent, message.first_chunk()) {
            let ends = [packet.from, packet.to].map(|address| SocketAddr::new(address, 0));
            self.link.send(icmp::unreachable(ends[0], ends[1], packet.mac, packet.protocol, *start, why));
        }
        self.arm();
    }

    /// Before a socket ends for want of traffic, time has to pass at least.
    fn arm(&mut self) {
        self.link.poller.arm(Instant::now() + Duration::from_secs(5));
    }

    /// Gives the next frame for the guest to `take`.
    pub(super) fn output(&mut self, take: &mut dyn FnMut(&[&[u8]]) -> bool) -> Received {
        self.since_look += 1;
        if self.since_look >= LOOK_AFTER {
            self.look();
        }
        loop {
            if let Some(frame) = self.link.frame() {
                if !take(&[frame]) {
                    return Received::Refused;
                }
                self.link.frame_taken();
                return Received::Taken;
            }
            let Some(ready) = self.link.ready.pop_front() else {
                // Once is enough: of what happens from now on, the source tells.
                self.looked = !self.looked && self.look();
                if self.looked {
                    continue;
                }
                return Received::Nothing;
            };
            match ready {
                Ready::Tcp(id) => match self.tcp.output(&mut self.link, id, take) {
                    Some(true) => {
                        self.link.ready.push_back(ready);
                        return Received::Taken;
                    }
                    Some(false) => {
                        self.link.ready.push_front(ready);
                        return Received::Refused;
                    }
                    None => {}
                },
                Ready::Udp(id) if self.udp.output(&mut self.link, id) => self.link.ready.push_back(ready),
                Ready::Echo(id) if self.echo.output(&mut self.link, id) => self.link.ready.push_back(ready),
                Ready::Udp(_) | Ready::Echo(_) => {}
            }
        }
    }

    /// Looks what has happened; says whether anything has.
    fn look(&mut self) -> bool {
        self.since_look = 0;
        let all = self.link.poller.poll();
        for &Happened { token, readable, writable } in &all {
            match token {
                Token::Timer => self.pass(Instant::now()),
                Token::Tcp(id) => self.tcp.event(&mut self.link, id, readable, writable),
                Token::Udp(id) => self.udp.event(&mut self.link, id),
                Token::Echo(id) => self.echo.event(&mut self.link, id),
                Token::Listener(number) => self.accept(number),
            }
        }
        !all.is_empty()
    }

    fn accept(&mut self, number: u32) {
        match self.tcp_listeners.get(number as usize) {
            Some((listener, port)) => {
                if let Err(error) = self.tcp.accept(&mut self.link, listener, &self.hosts, *port) {
                    tracing::debug!(%error, "a connection to a published port has to wait");
                    self.link.poller.ignore(listener);
                    self.refused.push(number);
                    let retry = *self.retry.get_or_insert_with(|| Instant::now() + RETRY);
                    self.link.poller.arm(retry);
                }
            }
            None => {
                let number = number - self.tcp_listeners.len() as u32;
                if let Some(listener) = self.udp_listeners.get(number as usize) {
                    self.udp.accept(&mut self.link, number, listener, &self.hosts);
                    self.arm();
                }
            }
        }
    }

    /// Lets those in again who could not be.
    fn listen_again(&mut self) {
        self.retry = None;
        let (listeners, poller) = (&self.tcp_listeners, &self.link.poller);
        self.refused.retain(|&number| {
            let listener = listeners.get(number as usize);
            listener.is_some_and(|(listener, _)| poller.listen(listener, Token::Listener(number)).is_err())
        });
        if !self.refused.is_empty() {
            self.retry = Some(Instant::now() + RETRY);
        }
    }

    /// It is so late now: what is due is done.
    pub(super) fn pass(&mut self, now: Instant) {
        if self.retry.is_some_and(|at| at <= now) {
            self.listen_again();
        }
        let tcp = self.tcp.tick(&mut self.link, now);
        let (udp, unanswered) = self.udp.tick(now);
        if unanswered {
            self.policy.resolver.failed();
        }
        let echo = self.echo.tick(now);
        if self.announce.is_some_and(|at| at <= now) {
            self.announce = Some(now + ANNOUNCE);
            let announcement = icmp::announcement(self.link.mtu());
            self.link.send(announcement);
        }
        let next = [tcp, udp, echo, self.announce, self.retry].into_iter().flatten().min();
        next.into_iter().for_each(|at| self.link.poller.arm(at));
    }
}

/// Whether a guest can have an address.
fn is_possible(address: IpAddr) -> bool {
    !is_own(address) && (is_local(address) || address.is_unspecified())
}

fn is_for_many(address: IpAddr) -> bool {
    address.is_multicast()
        || matches!(address, IpAddr::V4(address) if address.is_broadcast() || address.octets()[3] == 255 && is_local(address.into()))
}

/// Whether a datagram is for the DHCP server: from a client without an address, or to us.
fn is_dhcp(packet: &Packet, datagram: &[u8]) -> bool {
    let port = datagram.get(2..4).is_some_and(|port| port == dhcp::SERVER_PORT.to_be_bytes());
    port && (is_for_many(packet.to) || packet.to == GATEWAY4)
}
