//! The addresses of the network, and what the guest may reach by which.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::wire::Mac;

/// The address of all that is on our side.
pub(super) const OWN_MAC: Mac = [0x52, 0x55, 10, 0, 2, 2];
/// The gateway, which answers pings; with `loopback` it leads to the host's own services.
pub(super) const GATEWAY4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The name server.
pub(super) const DNS4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// What the first guest gets.
pub(super) const GUEST4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The network's mask.
pub(super) const MASK4: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
/// The prefix of the network, of 64 bits; a unique local one (RFC 4193), over which guests prefer IPv4.
pub(super) const PREFIX6: Ipv6Addr = Ipv6Addr::new(0xfd52, 0x7573, 0x6500, 0, 0, 0, 0, 0);
/// As [`GATEWAY4`].
pub(super) const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd52, 0x7573, 0x6500, 0, 0, 0, 0, 2);
/// As [`DNS4`].
pub(super) const DNS6: Ipv6Addr = Ipv6Addr::new(0xfd52, 0x7573, 0x6500, 0, 0, 0, 0, 3);
/// The router that is announced.
pub(super) const ROUTER6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
/// Where names are asked for.
pub(super) const DNS_PORT: u16 = 53;

/// Whether an address is on the guest's network.
pub(super) fn is_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.octets()[..3] == GATEWAY4.octets()[..3],
        IpAddr::V6(address) => {
            address.segments()[..4] == PREFIX6.segments()[..4] || address.is_unicast_link_local()
        }
    }
}

/// Whether an address is one of ours.
pub(super) fn is_own(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => [GATEWAY4, DNS4].contains(&address),
        IpAddr::V6(address) => [GATEWAY6, DNS6, ROUTER6].contains(&address),
    }
}

/// Where clouds tell their machines what nobody else may know, besides link-local addresses: Alibaba, Azure; Amazon, Google,
/// Oracle.
const METADATA4: [Ipv4Addr; 2] = [Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(168, 63, 129, 16)];
const METADATA6: [Ipv6Addr; 3] = [
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd00, 0xc1, 0, 0, 0, 0, 0xa9fe, 0xa9fe),
];

/// Whether a host out there can have an address. What leads back to this host's loopback, in whatever disguise, to
/// nobody or to many, and what no router passes on, does not count.
pub(super) fn is_outside(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            let first = address.octets()[0];
            let nobody = first == 0 || first >= 240 || address.is_loopback() || METADATA4.contains(&address);
            !(nobody || address.is_multicast() || address.is_link_local() || is_local(address.into()))
        }
        IpAddr::V6(address) => {
            // ::, ::1, and IPv4 addresses within (RFC 4291, 2.5.5), which the host's sockets take for IPv4.
            let embedded = address.segments()[..5] == [0; 5];
            !(embedded || METADATA6.contains(&address) || address.is_multicast() || is_local(address.into()))
        }
    }
}

/// Where the guest's packets to an address go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Destination {
    /// To this one.
    To(SocketAddr),
    /// To the host's name server.
    Resolver,
    /// The port is closed.
    Closed,
    /// There is no way to it.
    Nowhere,
}

/// Says where packets to an address go. `loopback`: the gateway leads to the host's own services.
pub(super) fn destination(to: SocketAddr, loopback: bool) -> Destination {
    let address = to.ip();
    let dns = address == DNS4 || address == DNS6;
    let gateway = address == GATEWAY4 || address == GATEWAY6;
    if dns && to.port() == DNS_PORT {
        Destination::Resolver
    } else if gateway && loopback {
        let host: IpAddr =
            if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
        Destination::To(SocketAddr::new(host, to.port()))
    } else if is_own(address) {
        Destination::Closed
    } else if is_outside(address) {
        Destination::To(to)
    } else {
        Destination::Nowhere
    }
}

/// As whom the guest sees a host that connects to a published port.
pub(super) fn peer(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        address @ IpAddr::V4(_) if is_outside(address) => address,
        // The guest is reached over IPv4, whatever its peer has.
        _ => GATEWAY4.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_of_the_host_is_out_of_reach() {
        for address in [
            "127.0.0.1:80",
            "127.1.2.3:80",
            "0.0.0.0:80",
            "0.1.2.3:80",
            "224.0.0.1:80",
            "255.255.255.255:80",
            "169.254.169.254:80",
            "10.0.2.15:80",
            "10.0.2.99:80",
            "[::]:80",
            "[::1]:80",
            "[::ffff:127.0.0.1]:80",
            "[::127.0.0.1]:80",
            "[::ffff:8.8.8.8]:80",
            "[ff02::1]:80",
            "[fe80::1]:80",
            "[fd52:7573:6500::15]:80",
        ] {
            for loopback in [false, true] {
                assert_eq!(
                    destination(address.parse().unwrap(), loopback),
                    Destination::Nowhere,
                    "{address}"
                );
            }
        }
        for address in ["10.0.2.2:80", "10.0.2.3:80", "[fd52:7573:6500::2]:80", "[fe80::2]:80"] {
            assert_eq!(destination(address.parse().unwrap(), false), Destination::Closed, "{address}");
        }
        let host = |text: &str| Destination::To(text.parse().unwrap());
        assert_eq!(destination("10.0.2.2:80".parse().unwrap(), true), host("127.0.0.1:80"));
        assert_eq!(destination("[fd52:7573:6500::2]:80".parse().unwrap(), true), host("[::1]:80"));
        assert_eq!(destination("10.0.2.3:53".parse().unwrap(), false), Destination::Resolver);
        for address in ["9.9.9.9:53", "10.0.3.2:80", "192.168.1.1:80", "[2001:db8::1]:80"] {
            assert_eq!(destination(address.parse().unwrap(), false), host(address));
        }
    }

    #[test]
    fn peers_are_who_they_are_where_the_guest_can_answer() {
        for (real, seen) in [
            ("127.0.0.1", "10.0.2.2"),
            ("::1", "10.0.2.2"),
            ("10.0.2.15", "10.0.2.2"),
            ("2001:db8::1", "10.0.2.2"),
            ("192.168.7.7", "192.168.7.7"),
            ("::ffff:192.168.7.7", "192.168.7.7"),
        ] {
            assert_eq!(peer(real.parse().unwrap()).to_string(), seen, "{real}");
        }
    }
}
