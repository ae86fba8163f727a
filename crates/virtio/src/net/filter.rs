//! Which frames the driver wants to have (virtio 1.2, 5.1.6.5.1 to 5.1.6.5.3).

use super::Mac;

/// Most addresses of each table; with more, all of that kind pass.
const MOST_ADDRESSES: usize = 64;
/// VLANs that there are.
const VLANS: usize = 4096;
/// Type of a frame with a VLAN.
const VLAN: [u8; 2] = [0x81, 0x00];

/// Classes of frames that pass, or do not, whatever their address; in the order of the commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Promiscuous = 0,
    AllMulticast = 1,
    AllUnicast = 2,
    NoMulticast = 3,
    NoUnicast = 4,
    NoBroadcast = 5,
}

impl Mode {
    /// The mode of a command.
    pub(super) fn of(command: u8) -> Option<Self> {
        use Mode::*;
        let all = [Promiscuous, AllMulticast, AllUnicast, NoMulticast, NoUnicast, NoBroadcast];
        all.get(usize::from(command)).copied()
    }
}

/// What passes.
#[derive(Debug)]
pub(super) struct Filter {
    modes: [bool; 6],
    mac: Mac,
    /// `None` for a table that has run over.
    unicast: Option<Vec<Mac>>,
    multicast: Option<Vec<Mac>>,
    /// A bit for each VLAN that passes; `None` if all do.
    vlans: Option<Vec<bool>>,
}

impl Filter {
    /// As after a reset: everything passes until the driver says otherwise, but of VLANs, none.
    pub(super) fn new(mac: Mac, by_vlan: bool) -> Self {
        let vlans = by_vlan.then(|| vec![false; VLANS]);
        Self {
            modes: [true, false, false, false, false, false],
            mac,
            unicast: Some(Vec::new()),
            multicast: Some(Vec::new()),
            vlans,
        }
    }

    pub(super) fn set_mode(&mut self, mode: Mode, on: bool) {
        self.modes[mode as usize] = on;
    }

    pub(super) fn set_mac(&mut self, mac: Mac) {
        self.mac = mac;
    }

    /// Takes tables of addresses.
    pub(super) fn set_tables(&mut self, unicast: Vec<Mac>, multicast: Vec<Mac>) {
        let fits = |table: Vec<Mac>| (table.len() <= MOST_ADDRESSES).then_some(table);
        (self.unicast, self.multicast) = (fits(unicast), fits(multicast));
    }

    /// Lets a VLAN pass, or not; says whether there is such a VLAN.
    pub(super) fn set_vlan(&mut self, vlan: u16, on: bool) -> bool {
        let place = self.vlans.as_mut().and_then(|vlans| vlans.get_mut(usize::from(vlan)));
        place.map(|place| *place = on).is_some()
    }

    /// Whether a frame that begins so passes.
    pub(super) fn passes(&self, frame: &[u8]) -> bool {
        let Some((to, rest)) = frame.split_first_chunk::<6>() else { return false };
        if let (Some(vlans), Some(&[t0, t1, high, low])) =
            (&self.vlans, rest.get(6..10).and_then(|b| b.first_chunk()))
            && [t0, t1] == VLAN
            && !vlans[usize::from(u16::from_be_bytes([high & 0xf, low]))]
        {
            return false;
        }
        let on = |mode: Mode| self.modes[mode as usize];
        let listed = |table: &Option<Vec<Mac>>| table.as_ref().is_none_or(|table| table.contains(to));
        if on(Mode::Promiscuous) {
            true
        } else if *to == [0xff; 6] {
            !on(Mode::NoBroadcast)
        } else if to[0] & 1 != 0 {
            !on(Mode::NoMulticast) && (on(Mode::AllMulticast) || listed(&self.multicast))
        } else {
            !on(Mode::NoUnicast) && (on(Mode::AllUnicast) || *to == self.mac || listed(&self.unicast))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = [2, 0, 0, 0, 0, 1];
    const OTHER: Mac = [2, 0, 0, 0, 0, 2];
    const GROUP: Mac = [1, 0, 0x5e, 0, 0, 1];

    fn frame(to: Mac) -> Vec<u8> {
        [&to[..], &[0; 6], &[8, 0, 0, 0]].concat()
    }

    #[test]
    fn modes_and_tables_say_what_passes() {
        let mut filter = Filter::new(OWN, false);
        assert!([OWN, OTHER, GROUP, [0xff; 6]].iter().all(|&to| filter.passes(&frame(to))));
        filter.set_mode(Mode::Promiscuous, false);
        let passing =
            |filter: &Filter| [OWN, OTHER, GROUP, [0xff; 6]].map(|to| u8::from(filter.passes(&frame(to))));
        assert_eq!(passing(&filter), [1, 0, 0, 1]);
        filter.set_tables(vec![OTHER], vec![GROUP]);
        assert_eq!(passing(&filter), [1, 1, 1, 1]);
        filter.set_tables(Vec::new(), vec![OTHER; MOST_ADDRESSES + 1]);
        assert_eq!(passing(&filter), [1, 0, 1, 1], "a table that has run over");
        for (mode, expected) in [
            (Mode::NoMulticast, [1, 0, 0, 1]),
            (Mode::NoBroadcast, [1, 0, 0, 0]),
            (Mode::AllUnicast, [1, 1, 0, 0]),
            (Mode::NoUnicast, [0, 0, 0, 0]),
        ] {
            filter.set_mode(mode, true);
            assert_eq!(passing(&filter), expected, "{mode:?}");
        }
        filter.set_mode(Mode::NoUnicast, false);
        filter.set_mode(Mode::AllUnicast, false);
        filter.set_mac(OTHER);
        assert_eq!(passing(&filter), [0, 1, 0, 0]);
        assert!(!filter.passes(&[2, 0]));
    }

    #[test]
    fn vlans_pass_that_were_named() {
        let tagged = [&OWN[..], &[0; 6], &[0x81, 0, 0x20, 5, 8, 0]].concat();
        assert!(Filter::new(OWN, false).passes(&tagged));
        let mut filter = Filter::new(OWN, true);
        assert!(!filter.passes(&tagged) && filter.passes(&frame(OWN)));
        assert!(filter.set_vlan(5, true) && filter.passes(&tagged));
        assert!(filter.set_vlan(5, false) && !filter.passes(&tagged));
        assert!(!filter.set_vlan(4096, true));
    }
}
