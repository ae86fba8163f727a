//! Network devices of a machine.

use std::io;
use std::sync::Arc;

use ruse_devices::pci::PciAddress;
use ruse_memory::GuestRam;
use ruse_net::switch::{Switch, SwitchError};
use ruse_net::tap::{Tap, TapConfig, TapError, TapKind};
use ruse_net::user::{PublishError, USER_MTU, User, UserConfig};
use ruse_net::{Network, Port};
use ruse_vhost::{KernelError, OpenDevice, Peer, VhostUserError};
use ruse_virtio::net::{Link, Net};
use ruse_virtio::{Device, Handler};
use serde::{Deserialize, Serialize};

use super::slots::{Prepared, SlotAddress};
use super::{PlugError, Server, SharedTransport, plug, prepare};
use crate::board::Board;
use crate::config::{HostInterface, MacAddress, NetConfig, NetworkConfig, Vhost};
use crate::host::runtime_dir;
use crate::pci_slots;

/// Why a network cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The network of an ordinary user.
    #[error(transparent)]
    User(#[from] PublishError),
    /// A switch.
    #[error(transparent)]
    Switch(#[from] SwitchError),
    /// An interface of the host.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// Another process that serves the device.
    #[error("--net: {0}")]
    VhostUser(#[from] VhostUserError),
    /// The host's kernel.
    #[error("--net: vhost=on: {0}")]
    Vhost(#[from] KernelError),
}

/// What a network device of a machine is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetInfo {
    /// Which one of the machine: `netN`, or `slotN` of one that was attached.
    pub id: String,
    /// What is behind it.
    pub network: String,
    /// Its address.
    pub mac: MacAddress,
    /// Its link is up.
    pub up: bool,
}

/// A network device of a machine.
pub(crate) struct AttachedNet {
    id: String,
    what: String,
    mac: MacAddress,
    /// Its cable; none if somebody else serves it.
    link: Option<Link>,
    function: SharedTransport,
}

impl AttachedNet {
    /// Which one of the machine it is.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// What it is now.
    pub(crate) fn info(&self) -> NetInfo {
        let (id, network) = (self.id.clone(), self.what.clone());
        NetInfo { id, network, mac: self.mac, up: self.link.as_ref().is_none_or(Link::is_up) }
    }

    /// Plugs or pulls its cable, of which the guest is told; `false` if it has none.
    pub(crate) fn set_link(&self, board: &Board, up: bool) -> bool {
        if self.link.as_ref().is_some_and(|link| link.set_up(up)) {
            board.access_function(&*self.function, |function, access| function.config_changed(access));
        }
        self.link.is_some()
    }
}

/// A network device that is not plugged in yet. What it needs of the host is there.
pub(crate) struct OpenNet {
    what: String,
    end: End,
    mac: MacAddress,
    split_rings: bool,
}

/// A network device, what serves its queues, and its cable.
type NetDevice = (Box<dyn Device>, Vec<Box<dyn Handler>>, Option<Link>);

/// Who passes the frames of a network device.
enum End {
    /// This process.
    Here(Arc<dyn Network>, Vec<Port>),
    /// Somebody else.
    Outside(Box<OpenDevice>),
}

impl OpenNet {
    /// Opens what is behind the network devices of a machine of this name.
    pub(crate) fn open_all(machine: &str, configs: &[NetConfig]) -> Result<Vec<Self>, NetError> {
        let open = |(number, config)| Self::open(machine, number, config);
        configs.iter().enumerate().map(open).collect()
    }

    /// Opens what is behind a network device, of which the machine has others with other numbers.
    pub(crate) fn open(machine: &str, number: usize, config: &NetConfig) -> Result<Self, NetError> {
        let mut mac = config.mac.unwrap_or_else(|| MacAddress::of(machine, number));
        let end = match &config.network {
            NetworkConfig::User { dns, loopback, restrict, publish } => {
                let mtu = config.mtu.unwrap_or(USER_MTU);
                let (loopback, restrict) = (*loopback, *restrict);
                let user = UserConfig { mtu, dns: *dns, loopback, restrict, publish: publish.clone() };
                let (user, port) = User::open(&user, mac.0)?;
                End::Here(user, vec![port])
            }
            NetworkConfig::Switch(name) => {
                let (switch, port) = Switch::open(&runtime_dir(), name, config.mtu)?;
                End::Here(switch, vec![port])
            }
            NetworkConfig::VhostUser(path) => {
                End::Outside(Box::new(ruse_vhost::net(&Peer::new(path), mac.0, config.mtu)?))
            }
            NetworkConfig::Tap(interface)
            | NetworkConfig::Bridge(interface)
            | NetworkConfig::Macvtap(interface) => {
                let (tap, ports) = Tap::open(&tap(config, interface))?;
                // Frames to another address would not come through.
                mac = config.mac.or(tap.mac().map(MacAddress)).unwrap_or(mac);
                match interface.vhost {
                    Vhost::On => End::Outside(Box::new(ruse_vhost::kernel_net(tap, mac.0)?)),
                    Vhost::Auto if interface.queues == 1 && ruse_vhost::has_vhost_net() => {
                        End::Outside(Box::new(ruse_vhost::kernel_net(tap, mac.0)?))
                    }
                    Vhost::Auto | Vhost::Off => End::Here(tap, ports),
                }
            }
        };
        Ok(Self { what: config.network.to_string(), end, mac, split_rings: config.split_rings })
    }

    /// Plugs network devices in, each at the address of its number.
    pub(crate) fn plug_all(
        board: &Arc<Board>,
        ram: &GuestRam,
        gsi: impl Fn(PciAddress) -> u8,
        nets: Vec<Self>,
    ) -> Result<(Vec<AttachedNet>, Vec<Server>), PlugError> {
        let (mut attached, mut all) = (Vec::new(), Vec::new());
        for (number, net) in (0u8..).zip(nets) {
            let at = PciAddress::new(pci_slots::NETS.start + number, 0);
            let (id, what, mac) = (format!("net{number}"), net.what.clone(), net.mac);
            let (device, handlers, link) = net.device(ram)?;
            let (function, servers) = plug(board, ram, at, gsi(at), &id, device, handlers)?;
            attached.push(AttachedNet { id, what, mac, link, function });
            all.extend(servers);
        }
        Ok((attached, all))
    }

    /// A network device for a slot, which is not plugged in yet.
    pub(super) fn prepare(
        self,
        board: &Arc<Board>,
        ram: &GuestRam,
        slot: &SlotAddress,
    ) -> io::Result<(AttachedNet, Prepared)> {
        let (id, what, mac) = (slot.id(), self.what.clone(), self.mac);
        let (device, handlers, link) = self.device(ram)?;
        let (function, servers) = prepare(board, ram, slot.at, slot.gsi, &id, device, handlers)?;
        Ok((AttachedNet { id, what, mac, link, function: function.clone() }, (function, servers)))
    }

    /// The device, with what serves its queues, and its cable.
    fn device(self, ram: &GuestRam) -> io::Result<NetDevice> {
        match self.end {
            End::Here(network, ports) => {
                let (device, handlers) = Net::new(network, ports, self.mac.0);
                let device = if self.split_rings { device.with_split_rings() } else { device };
                let link = device.link();
                Ok((Box::new(device), handlers, Some(link)))
            }
            End::Outside(device) => {
                let device = if self.split_rings { device.with_split_rings() } else { *device };
                let (device, handlers) = device.plug(ram)?;
                Ok((device, handlers, None))
            }
        }
    }
}

fn tap(config: &NetConfig, interface: &HostInterface) -> TapConfig {
    let name = interface.name.clone();
    let kind = match config.network {
        NetworkConfig::Bridge(_) => TapKind::Bridge(name),
        NetworkConfig::Macvtap(_) => TapKind::Macvtap(name),
        _ => TapKind::Tap(name),
    };
    TapConfig { kind, pairs: interface.queues, namespace: interface.namespace.clone(), mtu: config.mtu }
}
