//! The host's name servers.

use std::net::{IpAddr, SocketAddr};

use super::addresses::DNS_PORT;

/// Where the host says who its name servers are.
const FILE: &str = "/etc/resolv.conf";

/// Chooses a name server.
pub(super) struct Resolver {
    given: Option<SocketAddr>,
    failures: usize,
}

impl Resolver {
    /// `given`: the one to take; else the host's.
    pub(super) fn new(given: Option<SocketAddr>) -> Self {
        Self { given, failures: 0 }
    }

    /// Whether the one to take was given.
    pub(super) fn is_given(&self) -> bool {
        self.given.is_some()
    }

    /// The server to ask now. The host's may be others each time.
    pub(super) fn server(&self) -> Option<SocketAddr> {
        if self.given.is_some() {
            return self.given;
        }
        let text = std::fs::read_to_string(FILE).unwrap_or_default();
        let servers = servers(&text);
        let chosen = self.failures.checked_rem(servers.len())?;
        servers.get(chosen).map(|&address| SocketAddr::new(address, DNS_PORT))
    }

    /// The server has not answered: the next one's turn.
    pub(super) fn failed(&mut self) {
        self.failures = self.failures.wrapping_add(1);
    }
}

/// The name servers of a resolv.conf(5). Addresses with a zone are left out.
fn servers(text: &str) -> Vec<IpAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse().ok())?
    };
    text.lines().filter_map(server).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_found() {
        let text = "# nameserver 1.1.1.1\nsearch x\nnameserver 127.0.0.53\n nameserver fe80::1%eth0\nnameserver\t::1 # x\n";
        let expected: [IpAddr; 2] = ["127.0.0.53".parse().unwrap(), "::1".parse().unwrap()];
        assert_eq!(servers(text), expected);
    }

    #[test]
    fn the_one_that_is_given_is_taken() {
        let given = "127.0.0.1:5353".parse().ok();
        let mut resolver = Resolver::new(given);
        resolver.failed();
        assert_eq!(resolver.server(), given);
    }
}
