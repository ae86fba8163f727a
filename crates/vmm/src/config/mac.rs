//! Ethernet addresses in words.

use std::fmt::{self, Display};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The address of a network device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// The address of device `number` of a machine of this name on this host: the same one each time, and another one
    /// wherever one of the three is another.
    pub fn of(machine: &str, number: usize) -> Self {
        let host = std::fs::read("/etc/machine-id").unwrap_or_default();
        let mut hasher = DefaultHasher::new();
        (host, machine, number).hash(&mut hasher);
        let [a, b, c, d, e, ..] = hasher.finish().to_le_bytes();
        // Of one device, and administered locally.
        Self([0x02, a, b, c, d, e])
    }
}

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let byte = |text: &str| u8::from_str_radix(text, 16).ok().filter(|_| text.len() == 2);
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        let address: Option<[u8; 6]> = bytes.and_then(|bytes| bytes.try_into().ok());
        match address {
            Some(address) if address[0] & 1 == 0 && address != [0; 6] => Ok(Self(address)),
            _ => Err("mac: expected the address of one device, such as 02:00:00:00:00:01".into()),
        }
    }
}

impl TryFrom<String> for MacAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(address: MacAddress) -> Self {
        address.to_string()
    }
}

impl Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_understood() {
        assert_eq!("02:00:00:00:aB:01".parse(), Ok(MacAddress([2, 0, 0, 0, 0xab, 1])));
        assert_eq!(MacAddress([2, 0, 0, 0, 0xab, 1]).to_string(), "02:00:00:00:ab:01");
        for bad in [
            "",
            "02:00:00:00:00",
            "01:00:00:00:00:01",
            "00:00:00:00:00:00",
            "2:0:0:0:0:1",
            "02:00:00:00:00:01:00",
        ] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn each_device_has_its_own() {
        let all = [("a", 0), ("a", 1), ("b", 0)].map(|(name, number)| MacAddress::of(name, number));
        assert_eq!(all[0], MacAddress::of("a", 0));
        assert!(all[0] != all[1] && all[0] != all[2] && all[1] != all[2]);
        assert!(all.iter().all(|address| address.to_string().parse() == Ok(*address)));
    }
}
