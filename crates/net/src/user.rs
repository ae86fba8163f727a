//! The network of an ordinary user: the guest's connections are sockets of this process. Nothing of the host has to be set
//! up for it, and the guest has no way to do on the network what the user could not.
//!
//! `docs/network.md` says what the guest finds there, and why this is a stack of its own.

mod addresses;
mod arp;
mod dhcp;
mod echo;
mod fragments;
mod hosts;
mod icmp;
mod link;
mod poller;
mod publish;
mod resolver;
mod ring;
mod slab;
mod stack;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;
mod wire;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use publish::{Publish, PublishError};

use crate::{Driver, Network, Offer, Offloads, Port, Received, Receiver, Sender, Slice};
use publish::Listeners;
use stack::Stack;

/// The largest packet for which nothing is said: what a frame has room for, in whole words of 16 bytes.
pub const USER_MTU: u16 = 65520;

/// How the network is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserConfig {
    /// The largest packet.
    pub mtu: u16,
    /// The name server; without one, those of the host.
    pub dns: Option<SocketAddr>,
    /// The gateway leads to the host's own services.
    pub loopback: bool,
    /// Nothing outside is reached, but a name server that is given.
    pub restrict: bool,
    /// Ports of the host that lead to the guest.
    pub publish: Vec<Publish>,
}

impl Default for UserConfig {
    fn default() -> Self {
        Self { mtu: USER_MTU, dns: None, loopback: false, restrict: false, publish: Vec::new() }
    }
}

/// The network.
pub struct User {
    stack: Mutex<Stack>,
    mtu: u16,
}

impl User {
    /// A network for a device with this Ethernet address. Published ports are open from now on.
    pub fn open(config: &UserConfig, mac: [u8; 6]) -> Result<(Arc<Self>, Port), PublishError> {
        let listeners = Listeners::open(&config.publish)?;
        let stack = Stack::new(config, mac, listeners).map_err(PublishError::Host)?;
        let source = stack.fd().try_clone_to_owned().map_err(PublishError::Host)?;
        let user = Arc::new(Self { stack: Mutex::new(stack), mtu: config.mtu });
        let receiver = UserReceiver { user: user.clone(), source };
        let port = Port { sender: Box::new(UserSender(user.clone())), receiver: Box::new(receiver) };
        Ok((user, port))
    }

    fn stack(&self) -> MutexGuard<'_, Stack> {
        self.stack.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Network for User {
    fn offer(&self) -> Offer {
        let tso = Offloads::CHECKSUM | Offloads::TSO4 | Offloads::TSO6;
        Offer { takes: tso | Offloads::ECN, gives: tso, mtu: Some(self.mtu) }
    }

    fn start(&self, driver: Driver) {
        self.stack().start(driver);
    }

    fn set_offloads(&self, offloads: Offloads) {
        self.stack().set_offloads(offloads);
    }

    fn answers(&self) -> bool {
        true
    }
}

struct UserSender(Arc<User>);

impl Sender for UserSender {
    fn send(&mut self, frame: &[Slice]) {
        self.0.stack().input(frame);
    }
}

struct UserReceiver {
    user: Arc<User>,
    /// The stack's own file, which needs no lock.
    source: OwnedFd,
}

impl Receiver for UserReceiver {
    fn source(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.source)
    }

    fn receive(&mut self, take: &mut dyn FnMut(&[&[u8]]) -> bool) -> Received {
        self.user.stack().output(take)
    }
}

/// A host's error as one of opening a network.
impl From<io::Error> for PublishError {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}
