//! Devices that another process serves: the front end of vhost-user, as its specification has it
//! (<https://qemu-project.gitlab.io/qemu/interop/vhost-user.html>).

mod connection;

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ruse_virtio::features;
use ruse_virtio::fs::TAG_LEN;
use ruse_virtio::listener::connect_to;
use ruse_virtio::net::Mac;

use crate::backend::{Backend, BackendError, Region, RingSetup};
use crate::device::{Kind, OpenDevice, VhostDevice};
use connection::{Code, Connection, MOST_FILES};

/// How long a backend may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// A feature bit of rings: there are protocol features.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Protocol features.
const MQ: u64 = 1 << 0;
const REPLY_ACK: u64 = 1 << 3;
const CONFIG: u64 = 1 << 9;

/// Features of block devices that need nothing here (5.2.3): SIZE_MAX, SEG_MAX, GEOMETRY, RO, BLK_SIZE, FLUSH, TOPOLOGY,
/// DISCARD, WRITE_ZEROES.
const BLOCK_FEATURES: u64 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 13 | 1 << 14;
/// There is a limit for the bytes of a buffer.
const BLOCK_LIMIT: u64 = 1 << 1;
/// The device has several queues.
const BLOCK_MQ: u64 = 1 << 12;
/// The guest cannot write.
const BLOCK_READ_ONLY: u64 = 1 << 5;
/// Bytes of a block device's configuration (5.2.4), and where in it the number of queues and the most bytes of a buffer are.
const BLOCK_CONFIG: usize = 60;
const BLOCK_QUEUES: usize = 34;
const BLOCK_SIZE_MAX: Range<usize> = 8..12;
const SECTOR: u64 = 512;
/// Features of network devices that need nothing here (5.1.3): CSUM, GUEST_CSUM, GUEST_TSO4 to GUEST_UFO, HOST_TSO4 to
/// HOST_UFO, MRG_RXBUF, GUEST_USO4, GUEST_USO6, HOST_USO.
const NET_FEATURES: u64 = 0b11 | 0b1111 << 7 | 0b1_1111 << 11 | 0b111 << 54;
/// Features of a network device that are Ruse's: the largest packet, the address, the state of the link.
pub(crate) const NET_MTU: u64 = 1 << 3;
pub(crate) const NET_OWN: u64 = 1 << 5 | 1 << 16;

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// Nobody is there.
    #[error("nobody serves a device at '{path}': {source}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// Somebody is there who cannot be used.
    #[error("the vhost-user backend at '{path}': {source}")]
    Backend {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        source: BackendError,
    },
}

/// Where a backend is reached.
#[derive(Clone, Debug)]
pub struct Peer {
    path: PathBuf,
    patience: Duration,
}

impl Peer {
    /// The backend that listens at this socket.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), patience: PATIENCE }
    }

    /// The same; an answer may take so long at most.
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    fn name(&self) -> String {
        format!("the vhost-user backend at '{}'", self.path.display())
    }

    fn connect(&self) -> Result<User, BackendError> {
        let stream = connect_to(&self.path)?;
        User::open(Connection::new(stream, self.patience)?)
    }

    /// Connects for the first time.
    fn open(&self) -> Result<User, VhostUserError> {
        self.connect().map_err(|source| match source {
            BackendError::Host(source) => VhostUserError::Connect { path: self.path.clone(), source },
            source => self.error(source),
        })
    }

    fn error(&self, source: BackendError) -> VhostUserError {
        VhostUserError::Backend { path: self.path.clone(), source }
    }

    fn unfit(&self, what: impl Into<String>) -> VhostUserError {
        self.error(BackendError::Unfit(what.into()))
    }

    /// The device, whose backend may end and come back if its configuration is the same then.
    fn device(&self, device: VhostDevice, user: User) -> OpenDevice {
        let (peer, config) = (self.clone(), user.config.clone());
        let again = move || {
            let mut user = peer.connect()?;
            if let Some(config) = &config
                && user.read_config(config.len())? != *config
            {
                return Err(BackendError::Unfit("it has come back with another configuration".into()));
            }
            Ok(Box::new(user) as Box<dyn Backend>)
        };
        OpenDevice::new(device, self.name(), Box::new(user)).with_connect(Box::new(again))
    }
}

/// A disk. Without a number of queues it has as many as the backend, at most `usual`. Says whether the guest can write.
pub fn block(peer: &Peer, queues: Option<u16>, usual: u16) -> Result<(OpenDevice, bool), VhostUserError> {
    let mut user = peer.open()?;
    let most = user.queues(1).map_err(|error| peer.error(error))?;
    let queues = queues.unwrap_or(usual.min(most)).max(1);
    if queues > most {
        return Err(peer.unfit(format!("it has {most} queues, fewer than {queues}")));
    }
    let mut config = user.read_config(BLOCK_CONFIG).map_err(|error| peer.error(error))?;
    user.config = Some(config.clone());
    config[BLOCK_QUEUES..BLOCK_QUEUES + 2].copy_from_slice(&queues.to_le_bytes());
    let sectors = u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|n| config[n]));
    if sectors == 0 || sectors.checked_mul(SECTOR).is_none() {
        return Err(peer.unfit("its disk has no size"));
    }
    let several = if queues > 1 { BLOCK_MQ } else { 0 };
    // That of QEMU has a limit for the bytes of a buffer, which is nothing.
    let senseless = if config[BLOCK_SIZE_MAX] == [0; 4] { BLOCK_LIMIT } else { 0 };
    let features = user.offered & BLOCK_FEATURES & !senseless | several;
    let device = VhostDevice::new(Kind::Block, features, queues, config);
    let writable = user.offered & BLOCK_READ_ONLY == 0;
    Ok((peer.device(device, user), writable))
}

/// A network device with one pair of queues.
pub fn net(peer: &Peer, mac: Mac, mtu: Option<u16>) -> Result<OpenDevice, VhostUserError> {
    let user = peer.open()?;
    let known = if mtu.is_some() { NET_MTU } else { 0 };
    let features = user.offered & NET_FEATURES | NET_OWN | known;
    let device = VhostDevice::new(Kind::Net, features, 2, net_config(mac, mtu));
    Ok(peer.device(device, user))
}

/// The configuration of a network device whose link is up (5.1.4): address, status, pairs of queues, largest packet.
pub(crate) fn net_config(mac: Mac, mtu: Option<u16>) -> Vec<u8> {
    let words = [1, 1, mtu.unwrap_or(0)].map(u16::to_le_bytes).concat();
    [&mac[..], &words].concat()
}

/// A shared folder by the name that the guest mounts it by.
pub fn fs(peer: &Peer, tag: &str) -> Result<OpenDevice, VhostUserError> {
    let mut user = peer.open()?;
    // One for what must not wait for others, and one for requests.
    if user.queues(2).map_err(|error| peer.error(error))? < 2 {
        return Err(peer.unfit("it serves no file system: that has two queues at least"));
    }
    let mut config = [0; TAG_LEN + 4];
    config.iter_mut().zip(tag.bytes().take(TAG_LEN)).for_each(|(to, from)| *to = from);
    config[TAG_LEN] = 1;
    let device = VhostDevice::new(Kind::Fs, 0, 2, config.to_vec());
    Ok(peer.device(device, user))
}

/// A backend behind a socket.
struct User {
    connection: Connection,
    /// Features of the device and of rings.
    offered: u64,
    /// Protocol features that both have.
    protocol: u64,
    /// The device's configuration, where the backend has it.
    config: Option<Vec<u8>>,
}

impl User {
    /// Says hello.
    fn open(mut connection: Connection) -> Result<Self, BackendError> {
        let offered = connection.ask(Code::GetFeatures)?;
        if offered & features::VERSION_1 == 0 {
            return Err(BackendError::Unfit("it knows devices of before virtio 1.0 only".into()));
        }
        connection.tell(Code::SetOwner, &[], &[])?;
        let mut protocol = 0;
        if offered & PROTOCOL_FEATURES != 0 {
            protocol = connection.ask(Code::GetProtocolFeatures)? & (MQ | REPLY_ACK | CONFIG);
            connection.tell(Code::SetProtocolFeatures, &protocol.to_le_bytes(), &[])?;
            connection.acks = protocol & REPLY_ACK != 0;
        }
        Ok(Self { connection, offered, protocol, config: None })
    }

    /// The most queues; `usual` if the backend does not say it.
    fn queues(&mut self, usual: u16) -> Result<u16, BackendError> {
        match self.protocol & MQ {
            0 => Ok(usual),
            _ => Ok(self.connection.ask(Code::GetQueueNum)?.min(u16::MAX.into()) as u16),
        }
    }

    fn read_config(&mut self, len: usize) -> Result<Vec<u8>, BackendError> {
        if self.protocol & CONFIG == 0 {
            return Err(BackendError::Unfit("it does not tell the configuration of its device".into()));
        }
        // Offset, bytes, flags, and room for them.
        const HEAD: usize = 12;
        let mut body = vec![0; HEAD + len];
        body[4..8].copy_from_slice(&(len as u32).to_le_bytes());
        let answer = self.connection.ask_bytes(Code::GetConfig, &body, body.len())?;
        if answer[..8] != body[..8] {
            return Err(BackendError::Nonsense("another part of the configuration than was asked for"));
        }
        Ok(answer[HEAD..].to_vec())
    }

    /// Sets a number of a ring's.
    fn set(&mut self, code: Code, index: u16, value: u32) -> Result<(), BackendError> {
        let body = [u32::from(index), value].map(u32::to_le_bytes).concat();
        self.connection.tell(code, &body, &[])
    }
}

impl Backend for User {
    fn features(&self) -> u64 {
        self.offered
    }

    fn configure(&mut self, features: u64, memory: &[Region]) -> Result<(), BackendError> {
        // Rings are Ruse's own, whatever the driver has taken for its.
        let of_rings = features::VERSION_1 | features::INDIRECT_DESC | PROTOCOL_FEATURES;
        let of_device = features & !features::COMMON;
        let taken = self.offered & (of_device | of_rings);
        self.connection.tell(Code::SetFeatures, &taken.to_le_bytes(), &[])?;
        if memory.len() > MOST_FILES {
            return Err(BackendError::Unfit("the guest's memory has more parts than it can have".into()));
        }
        let mut table = (memory.len() as u64).to_le_bytes().to_vec();
        for region in memory {
            for number in [region.gpa, region.size, region.host, region.offset] {
                table.extend(number.to_le_bytes());
            }
        }
        let files: Vec<_> = memory.iter().map(|region| region.file).collect();
        self.connection.tell(Code::SetMemTable, &table, &files)
    }

    fn start(&mut self, index: u16, ring: &RingSetup) -> Result<(), BackendError> {
        self.set(Code::SetVringNum, index, ring.size.into())?;
        self.set(Code::SetVringBase, index, 0)?;
        let mut places = u64::from(index).to_le_bytes().to_vec();
        for place in [ring.descriptors, ring.used, ring.available, 0] {
            places.extend(place.to_le_bytes());
        }
        self.connection.tell(Code::SetVringAddr, &places, &[])?;
        let number = u64::from(index).to_le_bytes();
        self.connection.tell(Code::SetVringCall, &number, &[ring.call])?;
        self.connection.tell(Code::SetVringKick, &number, &[ring.kick])?;
        if self.offered & PROTOCOL_FEATURES != 0 {
            self.set(Code::SetVringEnable, index, 1)?;
        }
        Ok(())
    }

    fn stop(&mut self, index: u16) -> Result<(), BackendError> {
        if self.offered & PROTOCOL_FEATURES != 0 {
            self.set(Code::SetVringEnable, index, 0)?;
        }
        let body = [u32::from(index), 0].map(u32::to_le_bytes).concat();
        let answer = self.connection.ask_bytes(Code::GetVringBase, &body, body.len())?;
        match answer[..4] == body[..4] {
            true => Ok(()),
            false => Err(BackendError::Nonsense("the state of another ring than it was asked for")),
        }
    }

    fn life(&self) -> Option<BorrowedFd<'_>> {
        Some(self.connection.socket())
    }
}
