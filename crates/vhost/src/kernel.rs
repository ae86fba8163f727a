//! Devices that the host's kernel serves: /dev/vhost-net with a tap, and /dev/vhost-vsock (linux/vhost.h).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use ruse_net::tap::Tap;
use ruse_net::{Driver, Network};
use ruse_virtio::features;
use ruse_virtio::net::{Mac, offered_offloads, taken_offloads};

use crate::backend::{Backend, BackendError, Region, RingSetup};
use crate::device::{Kind, OpenDevice, VhostDevice};
use crate::user::{NET_MTU, NET_OWN, net_config};

/// The drivers.
const NET: &str = "/dev/vhost-net";
const VSOCK: &str = "/dev/vhost-vsock";

/// Requests of all drivers, and of each.
const GET_FEATURES: libc::Ioctl = 0x8008_af00u32 as _;
const SET_FEATURES: libc::Ioctl = 0x4008_af00;
const SET_OWNER: libc::Ioctl = 0xaf01;
const SET_MEM_TABLE: libc::Ioctl = 0x4008_af03;
const SET_VRING_NUM: libc::Ioctl = 0x4008_af10;
const SET_VRING_ADDR: libc::Ioctl = 0x4028_af11;
const SET_VRING_BASE: libc::Ioctl = 0x4008_af12;
const SET_VRING_KICK: libc::Ioctl = 0x4008_af20;
const SET_VRING_CALL: libc::Ioctl = 0x4008_af21;
const NET_SET_BACKEND: libc::Ioctl = 0x4008_af30;
const VSOCK_SET_GUEST_CID: libc::Ioctl = 0x4008_af60;
const VSOCK_SET_RUNNING: libc::Ioctl = 0x4004_af61;

/// Frames may be in several chains (5.1.3).
const MRG_RXBUF: u64 = 1 << 15;
/// Sockets of streams and of packets in sequence (5.10.3).
const STREAM: u64 = 1 << 0;
const SEQPACKET: u64 = 1 << 1;

/// Why the kernel serves no device.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The driver is not there, or not for this user.
    #[error("cannot open {path}: {source}")]
    Open {
        /// The driver.
        path: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// The driver refuses something.
    #[error("{path}: cannot {what}: {source}")]
    Refused {
        /// The driver.
        path: &'static str,
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
}

/// Whether this user can have network devices of the kernel.
pub fn has_vhost_net() -> bool {
    Kernel::open(NET, Role::Vsock { running: [false; 2] }).is_ok()
}

/// A network device with one pair of queues, whose frames go between the guest and a tap.
pub fn net(tap: Arc<Tap>, mac: Mac) -> Result<OpenDevice, KernelError> {
    let offer = tap.offer();
    let kernel = Kernel::open(NET, Role::Net { tap })?;
    let mtu = if offer.mtu.is_some() { NET_MTU } else { 0 };
    let features = kernel.offered & MRG_RXBUF | offered_offloads(offer) | NET_OWN | mtu;
    let device = VhostDevice::new(Kind::Net, features, 2, net_config(mac, offer.mtu));
    Ok(OpenDevice::new(device, NET.into(), Box::new(kernel)))
}

/// A socket device: programs of the host reach the guest by AF_VSOCK, at this address.
pub fn vsock(cid: u32) -> Result<OpenDevice, KernelError> {
    let kernel = Kernel::open(VSOCK, Role::Vsock { running: [false; 2] })?;
    kernel.number(VSOCK_SET_GUEST_CID, u64::from(cid)).map_err(|source| {
        let what = "give the guest this address";
        KernelError::Refused { path: VSOCK, what, source }
    })?;
    let features = STREAM | kernel.offered & SEQPACKET;
    let config = u64::from(cid).to_le_bytes().to_vec();
    let device = VhostDevice::new(Kind::Vsock, features, 3, config);
    // The kernel has no events for the guest.
    Ok(OpenDevice::new(device, VSOCK.into(), Box::new(kernel)).with_served(2))
}

/// What the driver is for.
enum Role {
    Net {
        tap: Arc<Tap>,
    },
    /// Which rings are to be served: the driver starts and stops both together.
    Vsock {
        running: [bool; 2],
    },
}

/// A driver of the kernel's.
struct Kernel {
    file: File,
    offered: u64,
    role: Role,
}

impl Kernel {
    fn open(path: &'static str, role: Role) -> Result<Self, KernelError> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
        let file = file.map_err(|source| KernelError::Open { path, source })?;
        let mut kernel = Self { file, offered: 0, role };
        let refused = |what| move |source| KernelError::Refused { path, what, source };
        let mut offered = 0u64;
        // SAFETY: this request writes a number of 64 bits.
        let result = unsafe { kernel.ioctl(GET_FEATURES, (&raw mut offered).cast()) };
        result.map_err(refused("ask for its features"))?;
        // SAFETY: this request looks at no argument.
        unsafe { kernel.ioctl(SET_OWNER, std::ptr::null()) }.map_err(refused("have a device"))?;
        kernel.offered = offered;
        Ok(kernel)
    }

    /// # Safety
    /// The argument points to what the request reads and writes.
    unsafe fn ioctl(&self, request: libc::Ioctl, argument: *const libc::c_void) -> io::Result<()> {
        // SAFETY: as the caller says.
        match unsafe { libc::ioctl(self.file.as_raw_fd(), request, argument) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// A request with a number of 64 bits.
    fn number(&self, request: libc::Ioctl, number: u64) -> io::Result<()> {
        // SAFETY: the requests of this function read 64 bits.
        unsafe { self.ioctl(request, (&raw const number).cast()) }
    }

    /// A request with a ring's index and a number or file.
    fn ring(&self, request: libc::Ioctl, index: u16, value: u32) -> io::Result<()> {
        self.number(request, u64::from(index) | u64::from(value) << 32)
    }

    /// Begins or ends the service of a ring.
    fn serve(&mut self, index: u16, on: bool) -> io::Result<()> {
        match &mut self.role {
            Role::Net { tap } => {
                let file = if on { tap.file().as_raw_fd() } else { -1 };
                self.ring(NET_SET_BACKEND, index, file as u32)
            }
            Role::Vsock { running } => {
                let before = running.iter().all(|&on| on);
                if let Some(one) = running.get_mut(usize::from(index)) {
                    *one = on;
                }
                let after = running.iter().all(|&on| on);
                if before == after {
                    return Ok(());
                }
                let number = i32::from(after);
                // SAFETY: this request reads an int.
                unsafe { self.ioctl(VSOCK_SET_RUNNING, (&raw const number).cast()) }
            }
        }
    }
}

fn raw(file: BorrowedFd) -> u32 {
    file.as_raw_fd() as u32
}

impl Backend for Kernel {
    fn features(&self) -> u64 {
        self.offered
    }

    fn configure(&mut self, features: u64, memory: &[Region]) -> Result<(), BackendError> {
        if let Role::Net { tap } = &self.role {
            let offloads = taken_offloads(features);
            tap.start(Driver { offloads, knows_mtu: features & NET_MTU != 0 });
        }
        let of_device = match self.role {
            Role::Net { .. } => MRG_RXBUF,
            Role::Vsock { .. } => STREAM | SEQPACKET,
        };
        let of_rings = features::VERSION_1 | features::INDIRECT_DESC;
        self.number(SET_FEATURES, self.offered & (features & of_device | of_rings))?;
        // struct vhost_memory: the number of regions, then each (struct vhost_memory_region) with no flags.
        let mut table = vec![memory.len() as u64];
        table.extend(memory.iter().flat_map(|region| [region.gpa, region.size, region.host, 0]));
        // SAFETY: the table says itself how many regions it has.
        Ok(unsafe { self.ioctl(SET_MEM_TABLE, table.as_ptr().cast()) }?)
    }

    fn start(&mut self, index: u16, ring: &RingSetup) -> Result<(), BackendError> {
        self.ring(SET_VRING_NUM, index, ring.size.into())?;
        self.ring(SET_VRING_BASE, index, 0)?;
        // struct vhost_vring_addr: index and flags, then descriptors, used and available ring, and no log.
        let address = [index.into(), ring.descriptors, ring.used, ring.available, 0];
        // SAFETY: this request reads a structure of that size.
        unsafe { self.ioctl(SET_VRING_ADDR, address.as_ptr().cast()) }?;
        self.ring(SET_VRING_CALL, index, raw(ring.call))?;
        self.ring(SET_VRING_KICK, index, raw(ring.kick))?;
        Ok(self.serve(index, true)?)
    }

    fn stop(&mut self, index: u16) -> Result<(), BackendError> {
        Ok(self.serve(index, false)?)
    }
}
