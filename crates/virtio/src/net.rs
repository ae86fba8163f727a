//! The network device (virtio 1.2, 5.1) over a [`Network`].

mod control;
mod filter;
mod receive;
#[cfg(test)]
mod tests;
mod transmit;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ruse_net::{Driver, Network, Offer, Offloads, Port};

use crate::core::Work;
use crate::device::{Device, Handler, Identity};
use crate::features;
use control::ControlHandler;
use filter::Filter;
use receive::{ReceiveHandler, SecondHandler};
use transmit::TransmitHandler;

/// Device type.
const KIND: u16 = 1;
/// An Ethernet controller.
const PCI_CLASS: u32 = 0x02_00_00;
/// Entries of each queue with frames, and of the control queue.
const ENTRIES: u16 = 256;
const CONTROL_ENTRIES: u16 = 64;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Feature bits (5.1.3).
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const CTRL_RX: u64 = 1 << 18;
    pub const CTRL_VLAN: u64 = 1 << 19;
    pub const CTRL_RX_EXTRA: u64 = 1 << 20;
    pub const MQ: u64 = 1 << 22;
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
    pub const GUEST_USO4: u64 = 1 << 54;
    pub const GUEST_USO6: u64 = 1 << 55;
    pub const HOST_USO: u64 = 1 << 56;
}

/// What frames from the guest may leave to the network, by feature.
const FROM_GUEST: [(u64, Offloads); 5] = [
    (feature::CSUM, Offloads::CHECKSUM),
    (feature::HOST_TSO4, Offloads::TSO4),
    (feature::HOST_TSO6, Offloads::TSO6),
    (feature::HOST_ECN, Offloads::ECN),
    (feature::HOST_USO, Offloads::USO),
];
/// What frames to the guest may leave to it. USO stands for both of its kinds, which drivers take together.
const TO_GUEST: [(u64, Offloads); 5] = [
    (feature::GUEST_CSUM, Offloads::CHECKSUM),
    (feature::GUEST_TSO4, Offloads::TSO4),
    (feature::GUEST_TSO6, Offloads::TSO6),
    (feature::GUEST_ECN, Offloads::ECN),
    (feature::GUEST_USO4 | feature::GUEST_USO6, Offloads::USO),
];

/// The features of these offloads.
fn bits(table: &[(u64, Offloads)], offloads: Offloads) -> u64 {
    table.iter().filter(|(_, offload)| offloads.contains(*offload)).fold(0, |bits, (bit, _)| bits | bit)
}

/// The offloads of these features.
fn offloads(table: &[(u64, Offloads)], bits: u64) -> Offloads {
    table.iter().filter(|(bit, _)| bits & bit == *bit).map(|(_, offload)| *offload).collect()
}

/// The features by which a device offers what its network has.
pub fn offered_offloads(offer: Offer) -> u64 {
    bits(&FROM_GUEST, offer.takes) | bits(&TO_GUEST, offer.gives)
}

/// What frames to a driver with these features may leave to it.
pub fn taken_offloads(features: u64) -> Offloads {
    offloads(&TO_GUEST, features)
}

/// What all queues of a device share.
struct Shared {
    network: Arc<dyn Network>,
    mac: Mac,
    /// The link is down because somebody wants it so.
    pulled: AtomicBool,
    filter: Mutex<Filter>,
    /// Which of the driver's starts the network knows of.
    epoch: Mutex<Option<u64>>,
}

impl Shared {
    /// Whether frames pass.
    fn is_up(&self) -> bool {
        !self.pulled.load(Ordering::Acquire) && self.network.is_connected()
    }

    /// Before a queue is served: tells the network of a driver that has started anew.
    fn look_at(&self, work: &Work) {
        let mut epoch = lock(&self.epoch);
        if *epoch != Some(work.resets) {
            *epoch = Some(work.resets);
            *lock(&self.filter) = Filter::new(self.mac, work.features & feature::CTRL_VLAN != 0);
            let offloads = taken_offloads(work.features);
            self.network.start(Driver { offloads, knows_mtu: work.features & feature::MTU != 0 });
            self.network.set_pairs(1);
        }
    }
}

/// A lock whose holder cannot have left anything half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The link of a network device, from outside.
#[derive(Clone)]
pub struct Link(Arc<Shared>);

impl Link {
    /// Whether frames pass.
    pub fn is_up(&self) -> bool {
        self.0.is_up()
    }

    /// Lets frames pass or not, as a cable that is plugged in or pulled. Says whether that is a change, of which the driver
    /// has to be told.
    pub fn set_up(&self, up: bool) -> bool {
        let before = self.is_up();
        self.0.pulled.store(!up, Ordering::Release);
        self.is_up() != before
    }
}

/// A network device.
pub struct Net {
    shared: Arc<Shared>,
    pairs: u16,
    common_features: u64,
}

impl Net {
    /// A device with this address and a pair of queues for each port (at least one), and what serves its queues.
    pub fn new(network: Arc<dyn Network>, ports: Vec<Port>, mac: Mac) -> (Self, Vec<Box<dyn Handler>>) {
        let shared = Arc::new(Shared {
            network,
            mac,
            pulled: AtomicBool::new(false),
            filter: Mutex::new(Filter::new(mac, false)),
            epoch: Mutex::default(),
        });
        let pairs = ports.len() as u16;
        let mut handlers: Vec<Box<dyn Handler>> = Vec::new();
        for (number, port) in ports.into_iter().enumerate() {
            let receive = ReceiveHandler::new(shared.clone(), port.receiver);
            match number {
                1 => handlers
                    .push(Box::new(SecondHandler::new(receive, ControlHandler::new(shared.clone(), pairs)))),
                _ => handlers.push(Box::new(receive)),
            }
            handlers.push(Box::new(TransmitHandler::new(shared.clone(), port.sender)));
        }
        handlers.push(Box::new(ControlHandler::new(shared.clone(), pairs)));
        (Self { shared, pairs, common_features: features::COMMON }, handlers)
    }

    /// Its link.
    pub fn link(&self) -> Link {
        Link(self.shared.clone())
    }

    /// The same with split rings only, for drivers that make mistakes with packed ones.
    pub fn with_split_rings(self) -> Self {
        Self { common_features: self.common_features & !features::RING_PACKED, ..self }
    }
}

impl Device for Net {
    fn identity(&self) -> Identity {
        Identity { kind: KIND, pci_class: PCI_CLASS }
    }

    fn features(&self) -> u64 {
        let offer = self.shared.network.offer();
        let control = feature::CTRL_VQ
            | feature::CTRL_RX
            | feature::CTRL_RX_EXTRA
            | feature::CTRL_VLAN
            | feature::CTRL_MAC_ADDR
            | feature::CTRL_GUEST_OFFLOADS;
        let own = feature::MAC | feature::STATUS | feature::MRG_RXBUF | control;
        let queues = if self.pairs > 1 { feature::MQ } else { 0 };
        let mtu = if offer.mtu.is_some() { feature::MTU } else { 0 };
        self.common_features | own | queues | mtu | offered_offloads(offer)
    }

    fn queues(&self) -> Vec<u16> {
        let mut queues = vec![ENTRIES; 2 * usize::from(self.pairs)];
        queues.push(CONTROL_ENTRIES);
        queues
    }

    /// One for each pair, where what frames from the guest set off goes to the guest at once. Else sending to the host and
    /// receiving from it go on side by side.
    fn thread(&self, index: u16) -> u16 {
        if self.shared.network.answers() { index / 2 } else { index }
    }

    /// The configuration (5.1.4): address, status, pairs of queues, largest packet.
    fn config(&self) -> Vec<u8> {
        const LINK_UP: u16 = 1;
        let mtu = self.shared.network.offer().mtu.unwrap_or(0);
        let status = if self.shared.is_up() { LINK_UP } else { 0 };
        let words = [status, self.pairs, mtu].map(u16::to_le_bytes).concat();
        [&self.shared.mac[..], &words].concat()
    }
}
