//! Published ports: `[ADDR:]HOSTPORT:GUESTPORT[/udp]`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::tcp::set_options;
use super::udp::UdpListener;

/// A port of the host that leads to one of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publish {
    /// Where the host listens.
    pub host: SocketAddr,
    /// The guest's port.
    pub guest: u16,
    /// UDP, not TCP.
    pub udp: bool,
}

impl FromStr for Publish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || "expected [ADDR:]HOSTPORT:GUESTPORT[/tcp|/udp]".to_owned();
        let (rest, udp) = match text.rsplit_once('/') {
            Some((rest, "udp")) => (rest, true),
            Some((rest, "tcp")) => (rest, false),
            Some(_) => return Err(bad()),
            None => (text, false),
        };
        let port = |text: &str| text.parse::<u16>().ok().filter(|&port| port > 0).ok_or_else(bad);
        let (rest, guest) = rest.rsplit_once(':').ok_or_else(bad)?;
        let (address, host) = match rest.rsplit_once(':') {
            None => (IpAddr::V4(Ipv4Addr::LOCALHOST), rest),
            Some((address, host)) => {
                let plain = address.strip_prefix('[').and_then(|address| address.strip_suffix(']'));
                (plain.unwrap_or(address).parse().map_err(|_| bad())?, host)
            }
        };
        Ok(Self { host: SocketAddr::new(address, port(host)?), guest: port(guest)?, udp })
    }
}

/// Why a network cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A port cannot be had.
    #[error("--publish: cannot listen on {address}{}: {source}", if *udp { "/udp" } else { "" })]
    Port {
        /// The address.
        address: SocketAddr,
        /// It is one of UDP.
        udp: bool,
        /// The host's answer.
        source: io::Error,
    },
    /// The host refused something else.
    #[error("cannot set up the network: {0}")]
    Host(io::Error),
}

/// The sockets of published ports.
#[derive(Default)]
pub(super) struct Listeners {
    pub(super) tcp: Vec<(TcpListener, u16)>,
    pub(super) udp: Vec<UdpListener>,
}

impl Listeners {
    pub(super) fn open(all: &[Publish]) -> Result<Self, PublishError> {
        let mut listeners = Self::default();
        for &Publish { host, guest, udp } in all {
            listeners.add(host, guest, udp).map_err(|source| PublishError::Port {
                address: host,
                udp,
                source,
            })?;
        }
        Ok(listeners)
    }

    fn add(&mut self, host: SocketAddr, guest: u16, udp: bool) -> io::Result<()> {
        if udp {
            let socket = UdpSocket::bind(host)?;
            socket.set_nonblocking(true)?;
            self.udp.push(UdpListener { socket, port: guest });
        } else {
            let socket = TcpListener::bind(host)?;
            socket.set_nonblocking(true)?;
            set_options(&socket)?;
            self.tcp.push((socket, guest));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_understood() {
        for (text, host, guest, udp) in [
            ("2222:22", "127.0.0.1:2222", 22, false),
            ("0.0.0.0:80:8080/tcp", "0.0.0.0:80", 8080, false),
            ("[::1]:53:5353/udp", "[::1]:53", 5353, true),
            ("53:53/udp", "127.0.0.1:53", 53, true),
        ] {
            assert_eq!(text.parse(), Ok(Publish { host: host.parse().unwrap(), guest, udp }), "{text}");
        }
        for bad in ["", "22", "0:22", "22:0", "22:70000", "x:1:2", "1:2/sctp", "[::1:1:2", "1:2:", "a.b:1:2"]
        {
            assert!(bad.parse::<Publish>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_port_in_use_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = taken.local_addr().unwrap();
        let error = Listeners::open(&[Publish { host, guest: 1, udp: false }]).err().unwrap().to_string();
        assert!(error.starts_with(&format!("--publish: cannot listen on {host}: ")), "{error}");
    }
}
