//! Pings: each of the guest's is one of a host's ICMP socket, where the host lets us have those.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, ipproto, recv, send, socket_with,
};

use super::icmp::{Why, echo_reply};
use super::link::{Link, Ready};
use super::poller::Token;
use super::slab::{Id, Slab};
use super::wire::{Mac, Packet};

/// Most pings at once; with more, the one that was silent for longest ends.
const MOST: usize = 64;
/// How long one waits for answers.
const IDLE: Duration = Duration::from_secs(60);
/// The largest message.
const LARGEST: usize = 65535 - 20;

/// Who pings whom, by which identifier.
type Key = (IpAddr, IpAddr, u16);

struct Ping {
    key: Key,
    mac: Mac,
    socket: OwnedFd,
    queued: bool,
    last: Instant,
}

/// All pings.
pub(super) struct Echo {
    pings: Slab<Ping>,
    by_key: HashMap<Key, Id>,
    buffer: Vec<u8>,
}

impl Echo {
    pub(super) fn new() -> Self {
        Self { pings: Slab::new(), by_key: HashMap::new(), buffer: vec![0; LARGEST] }
    }

    /// Ends all.
    pub(super) fn clear(&mut self) {
        *self = Self::new();
    }

    /// A request of the guest's, to `host`.
    pub(super) fn input(
        &mut self,
        link: &Link,
        packet: &Packet,
        identifier: u16,
        request: &[u8],
        host: IpAddr,
    ) -> Result<(), Why> {
        let key = (packet.from, packet.to, identifier);
        let id = match self.by_key.get(&key) {
            Some(&id) => id,
            None => self.open(link, key, packet.mac, host).map_err(super::tcp::why)?,
        };
        let Some(ping) = self.pings.get_mut(id) else { return Ok(()) };
        ping.last = Instant::now();
        match send(&ping.socket, request, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(_) | Err(Errno::AGAIN | Errno::NOBUFS | Errno::MSGSIZE) => Ok(()),
            Err(error) => Err(super::tcp::why(error)),
        }
    }

    fn open(&mut self, link: &Link, key: Key, mac: Mac, host: IpAddr) -> Result<Id, Errno> {
        let (family, number) = match host {
            IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP),
            IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6),
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(family, SocketType::DGRAM, flags, Some(number))?;
        connect(&socket, &SocketAddr::new(host, 0))?;
        if self.pings.len() >= MOST {
            let oldest = self.pings.iter_mut().min_by_key(|(_, ping)| ping.last).map(|(id, _)| id);
            oldest.into_iter().for_each(|id| self.remove(id));
        }
        let id = self.pings.insert(Ping { key, mac, socket, queued: false, last: Instant::now() });
        self.by_key.insert(key, id);
        let watched = self.pings.get_mut(id).map(|ping| link.poller.watch(&ping.socket, Token::Echo(id)));
        if let Some(Err(error)) = watched {
            self.remove(id);
            return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
        }
        Ok(id)
    }

    fn remove(&mut self, id: Id) {
        if let Some(ping) = self.pings.remove(id) {
            self.by_key.remove(&ping.key);
        }
    }

    /// A ping may have an answer.
    pub(super) fn event(&mut self, link: &mut Link, id: Id) {
        if let Some(ping) = self.pings.get_mut(id)
            && !ping.queued
        {
            ping.queued = true;
            link.ready.push_back(Ready::Echo(id));
        }
    }

    /// Takes an answer; says whether there was one.
    pub(super) fn output(&mut self, link: &mut Link, id: Id) -> bool {
        let Some(ping) = self.pings.get_mut(id) else { return false };
        match recv(&ping.socket, &mut self.buffer[..], RecvFlags::DONTWAIT) {
            Ok((len, _)) if len >= 8 => {
                let (guest, remote, identifier) = ping.key;
                // The host has an identifier of its own.
                self.buffer[4..6].copy_from_slice(&identifier.to_be_bytes());
                link.send(echo_reply(remote, guest, ping.mac, &self.buffer[..len]));
                true
            }
            Ok(_) | Err(Errno::INTR) => true,
            Err(_) => {
                ping.queued = false;
                false
            }
        }
    }

    /// Ends those that are silent. Gives the next deadline.
    pub(super) fn tick(&mut self, now: Instant) -> Option<Instant> {
        let silent: Vec<_> =
            self.pings.iter_mut().filter(|(_, ping)| ping.last + IDLE <= now).map(|(id, _)| id).collect();
        silent.into_iter().for_each(|id| self.remove(id));
        self.pings.iter_mut().map(|(_, ping)| ping.last + IDLE).min()
    }
}
