//! A network device in words: `user[,dns=..][,loopback][,restrict]`, `switch=NAME`, `vhost-user=SOCKET` or an interface of the host, and what all have:
//! `[,mac=..][,mtu=N][,ring=split]`.

use std::fmt::{self, Display};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use ruse_net::tap::MOST_PAIRS;
use ruse_net::user::Publish;
use serde::{Deserialize, Serialize};

use super::MacAddress;

/// The least packet that IPv6 needs, and the largest that a frame has room for.
const MTU: std::ops::RangeInclusive<u16> = 1280..=65520;
/// The port of name servers.
const DNS_PORT: u16 = 53;

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// What is behind it.
    pub network: NetworkConfig,
    /// Its address; one that follows from the machine's name if nothing is said.
    pub mac: Option<MacAddress>,
    /// The largest packet, if another than is usual for the network.
    pub mtu: Option<u16>,
    /// Its rings are split, not packed, whatever the guest's driver would like best.
    pub split_rings: bool,
}

/// What is behind a network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkConfig {
    /// Sockets of this process.
    User {
        /// The name server; without one, those of the host.
        dns: Option<SocketAddr>,
        /// The gateway leads to the host's own services.
        loopback: bool,
        /// Nothing outside is reached, but a name server that is given.
        restrict: bool,
        /// Ports of the host that lead to the guest.
        publish: Vec<Publish>,
    },
    /// A switch between machines of the same user, by its name.
    Switch(String),
    /// Another process serves the device, by the protocol of vhost-user, at this socket.
    #[serde(rename = "vhost-user")]
    VhostUser(PathBuf),
    /// A tap of the host, by its name.
    Tap(HostInterface),
    /// A new tap at a bridge of the host, by the bridge's name.
    Bridge(HostInterface),
    /// A macvtap of the host, by its name.
    Macvtap(HostInterface),
}

/// Whether the host's kernel passes frames between the guest and an interface itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Vhost {
    /// If it can, and the device has one pair of queues.
    Auto,
    /// Or there is no machine.
    On,
    /// No.
    #[default]
    Off,
}

/// An interface of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInterface {
    /// Its name.
    pub name: String,
    /// Pairs of queues.
    pub queues: u16,
    /// The network namespace that it is in, by path or name; without one, that of the process.
    pub namespace: Option<PathBuf>,
    /// Whether the kernel passes frames itself.
    pub vhost: Vhost,
}

impl Display for NetworkConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User { .. } => f.write_str("user"),
            Self::Switch(name) => write!(f, "switch={name}"),
            Self::VhostUser(path) => write!(f, "vhost-user={}", path.display()),
            Self::Tap(interface) => write!(f, "tap={}", interface.name),
            Self::Bridge(interface) => write!(f, "bridge={}", interface.name),
            Self::Macvtap(interface) => write!(f, "macvtap={}", interface.name),
        }
    }
}

impl NetConfig {
    /// The network of an ordinary user.
    pub fn user() -> Self {
        Self::new(NetworkConfig::User { dns: None, loopback: false, restrict: false, publish: Vec::new() })
    }

    /// The ports that lead to it, if its network can have any.
    pub fn published(&mut self) -> Option<&mut Vec<Publish>> {
        match &mut self.network {
            NetworkConfig::User { publish, .. } => Some(publish),
            _ => None,
        }
    }

    fn new(network: NetworkConfig) -> Self {
        Self { network, mac: None, mtu: None, split_rings: false }
    }

    fn read(network: &str, words: std::str::Split<'_, char>) -> Result<Self, String> {
        let interface = |name: &str| {
            let ok = (1..16).contains(&name.len()) && !name.contains('/');
            let interface =
                HostInterface { name: name.to_owned(), queues: 1, namespace: None, vhost: Vhost::default() };
            ok.then_some(interface).ok_or("names of interfaces have 1 to 15 characters")
        };
        let mut net = match network.split_once('=') {
            None if network == "user" => Self::user(),
            Some(("switch", name)) => Self::new(NetworkConfig::Switch(switch(name)?)),
            Some(("tap", name)) => Self::new(NetworkConfig::Tap(interface(name)?)),
            Some(("bridge", name)) => Self::new(NetworkConfig::Bridge(interface(name)?)),
            Some(("macvtap", name)) => Self::new(NetworkConfig::Macvtap(interface(name)?)),
            Some(("vhost-user", path)) if !path.is_empty() => {
                Self::new(NetworkConfig::VhostUser(path.into()))
            }
            _ => {
                return Err(format!(
                    "'{network}': expected user, switch=, vhost-user=, tap=, bridge=, macvtap= or none"
                ));
            }
        };
        for word in words {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            match (&mut net.network, name, value) {
                (_, "mac", value) => net.mac = Some(value.parse()?),
                (_, "mtu", value) => {
                    let mtu = value.parse().ok().filter(|mtu| MTU.contains(mtu));
                    net.mtu = Some(mtu.ok_or(format!("mtu: expected {} to {}", MTU.start(), MTU.end()))?);
                }
                (_, "ring", "split") => net.split_rings = true,
                (NetworkConfig::User { dns, .. }, "dns", value) => *dns = Some(server(value)?),
                (NetworkConfig::User { loopback, .. }, "loopback", "") => *loopback = true,
                (NetworkConfig::User { restrict, .. }, "restrict", "") => *restrict = true,
                (
                    NetworkConfig::Tap(tap) | NetworkConfig::Bridge(tap) | NetworkConfig::Macvtap(tap),
                    name,
                    value,
                ) => {
                    tap.read(name, value).ok_or(format!(
                        "'{word}': expected queues=1 to {MOST_PAIRS}, netns=NAME or vhost=on, off or auto"
                    ))?;
                }
                _ => return Err(format!("'{word}' is not known for '{network}'")),
            }
        }
        if let NetworkConfig::Tap(tap) | NetworkConfig::Bridge(tap) | NetworkConfig::Macvtap(tap) =
            &net.network
            && tap.vhost == Vhost::On
            && tap.queues > 1
        {
            return Err("vhost=on: expected one pair of queues".into());
        }
        Ok(net)
    }
}

impl HostInterface {
    /// Reads what only interfaces have.
    fn read(&mut self, name: &str, value: &str) -> Option<()> {
        match name {
            "queues" => {
                self.queues = value.parse().ok().filter(|queues| (1..=MOST_PAIRS).contains(queues))?
            }
            "netns" if !value.is_empty() => self.namespace = Some(value.into()),
            "vhost" => {
                self.vhost = match value {
                    "auto" => Vhost::Auto,
                    "on" => Vhost::On,
                    "off" => Vhost::Off,
                    _ => return None,
                }
            }
            _ => return None,
        }
        Some(())
    }
}

/// The name of a switch, which is that of a directory.
fn switch(name: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match (1..=32).contains(&name.len()) && name.chars().all(plain) && !name.starts_with('.') {
        true => Ok(name.to_owned()),
        false => Err("switch: expected a name of 1 to 32 letters, digits, '-', '_' and '.'".into()),
    }
}

/// A name server: an address, with or without a port.
fn server(text: &str) -> Result<SocketAddr, String> {
    let address = text.parse::<IpAddr>().map(|address| SocketAddr::new(address, DNS_PORT));
    address.or_else(|_| text.parse()).map_err(|_| "dns: expected ADDRESS or ADDRESS:PORT".into())
}

/// `--net`: a network device, or the word that there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetOption(pub Option<NetConfig>);

impl FromStr for NetOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        match (text, words.next()) {
            ("none", _) => Ok(Self(None)),
            (_, Some(network)) => Ok(Self(Some(NetConfig::read(network, words)?))),
            (_, None) => Err("expected a network".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_understood() {
        assert_eq!("none".parse(), Ok(NetOption(None)));
        assert_eq!("user".parse(), Ok(NetOption(Some(NetConfig::user()))));
        let text = "user,mac=02:00:00:00:00:07,mtu=9000,dns=::1,loopback,restrict,ring=split";
        let expected = NetConfig {
            network: NetworkConfig::User {
                dns: Some("[::1]:53".parse().unwrap()),
                loopback: true,
                restrict: true,
                publish: Vec::new(),
            },
            mac: Some(MacAddress([2, 0, 0, 0, 0, 7])),
            mtu: Some(9000),
            split_rings: true,
        };
        assert_eq!(text.parse(), Ok(NetOption(Some(expected))));
        let text = "tap=t0,queues=4,netns=/run/x,mtu=1400,vhost=auto";
        let tap = HostInterface {
            name: "t0".into(),
            queues: 4,
            namespace: Some("/run/x".into()),
            vhost: Vhost::Auto,
        };
        let expected = NetConfig { mtu: Some(1400), ..NetConfig::new(NetworkConfig::Tap(tap)) };
        assert_eq!(text.parse(), Ok(NetOption(Some(expected))));
        let expected = NetConfig::new(NetworkConfig::Switch("lab-1".into()));
        assert_eq!("switch=lab-1".parse(), Ok(NetOption(Some(expected))));
        let expected = NetConfig::new(NetworkConfig::VhostUser("/run/s".into()));
        assert_eq!("vhost-user=/run/s".parse(), Ok(NetOption(Some(expected))));
        for bad in [
            "",
            "vhost-user=",
            "vhost-user=/s,queues=2",
            "tap=t,vhost=yes",
            "tap=t,queues=2,vhost=on",
            "switch=",
            "switch=../x",
            "switch=.x",
            "switch=a,queues=2",
            "tap=",
            "tap=0123456789abcdef",
            "tap=a/b",
            "tap=t,queues=0",
            "tap=t,queues=17",
            "tap=t,netns=",
            "bridge",
            "macvtap=m,loopback",
            "users",
            "user,",
            "user,mtu=1279",
            "user,mtu=65521",
            "user,mac=1",
            "user,dns=x",
            "none,mtu=1500",
            "user,queues=2",
            "user,loopback=yes",
            "user,ring=packed",
        ] {
            assert!(bad.parse::<NetOption>().is_err(), "{bad}");
        }
    }
}
