//! Who is on the guest's network: addresses that were lent or heard of.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};

use super::addresses::{GUEST4, is_local, is_own};
use super::wire::Mac;

pub(super) struct Hosts {
    /// The device's own address.
    device: Mac,
    /// Who has which address, as was last heard.
    heard: HashMap<Ipv4Addr, Mac>,
    /// To whom which address was lent.
    lent: HashMap<Mac, Ipv4Addr>,
}

impl Hosts {
    pub(super) fn new(device: Mac) -> Self {
        Self { device, heard: HashMap::new(), lent: HashMap::new() }
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        *self = Self::new(self.device);
    }

    /// Someone has used an address. There are not more than the network has.
    pub(super) fn hear(&mut self, address: IpAddr, mac: Mac) {
        if let IpAddr::V4(address) = address
            && is_local(address.into())
            && !is_own(address.into())
            && self.heard.get(&address) != Some(&mac)
        {
            self.heard.insert(address, mac);
        }
    }

    /// The address that is lent to someone: the same one each time; `None` if there is none left.
    pub(super) fn lend(&mut self, mac: Mac) -> Option<Ipv4Addr> {
        if let Some(&address) = self.lent.get(&mac) {
            return Some(address);
        }
        let [a, b, c, first] = GUEST4.octets();
        let mut all = (first..255).map(|last| Ipv4Addr::new(a, b, c, last));
        let address = all.find(|address| !self.lent.values().any(|lent| lent == address))?;
        self.lent.insert(mac, address);
        Some(address)
    }

    /// Where published ports lead to.
    pub(super) fn guest(&self) -> (Ipv4Addr, Mac) {
        let lent = self.lent.get(&self.device).copied();
        let own = || self.heard.iter().find(|(_, mac)| **mac == self.device).map(|(address, _)| *address);
        let other = || self.heard.keys().min().copied();
        let address = lent.or_else(own).or_else(other).unwrap_or(GUEST4);
        (address, self.heard.get(&address).copied().unwrap_or(self.device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_lent_once() {
        let mut hosts = Hosts::new([2; 6]);
        assert_eq!(hosts.lend([2; 6]), Some(GUEST4));
        assert_eq!(hosts.lend([3; 6]), Some(Ipv4Addr::new(10, 0, 2, 16)));
        assert_eq!(hosts.lend([2; 6]), Some(GUEST4));
        let lent = (0..=255).filter_map(|n| hosts.lend([4, 0, 0, 0, 0, n])).count();
        assert_eq!(lent, 240 - 2);
    }

    #[test]
    fn published_ports_lead_to_the_device() {
        let mut hosts = Hosts::new([2; 6]);
        assert_eq!(hosts.guest(), (GUEST4, [2; 6]));
        hosts.hear("10.0.2.77".parse().unwrap(), [5; 6]);
        hosts.hear("10.0.2.2".parse().unwrap(), [5; 6]);
        hosts.hear("10.0.3.1".parse().unwrap(), [5; 6]);
        assert_eq!(hosts.guest(), (Ipv4Addr::new(10, 0, 2, 77), [5; 6]), "a static address is heard of");
        hosts.lend([2; 6]);
        assert_eq!(hosts.guest(), (GUEST4, [2; 6]));
    }
}
