//! How interfaces are had and set: `ioctl`s of the tun driver and of sockets.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::TapKind;
use crate::{HEADER_LEN, Offloads};

/// The tun driver.
const TUN: &str = "/dev/net/tun";
/// Names of taps that are made here; the kernel puts a number in.
const NEW_TAP: &str = "ruse%d";
/// What the guest may be left to do (linux/if_tun.h).
const TUN_F: [(Offloads, libc::c_ulong); 5] = [
    (Offloads::CHECKSUM, 0x01),
    (Offloads::TSO4, 0x02),
    (Offloads::TSO6, 0x04),
    (Offloads::ECN, 0x08),
    (Offloads::USO, 0x60),
];

/// Puts an interface at a bridge (linux/sockios.h).
const SIOCBRADDIF: libc::Ioctl = 0x89a2;

/// What was opened.
pub(super) struct Interface {
    /// A file for each queue.
    pub(super) files: Vec<File>,
    pub(super) mtu: u16,
    /// The address of frames that it lets through.
    pub(super) mac: Option<[u8; 6]>,
}

/// Opens an interface with so many queues.
pub(super) fn open(kind: &TapKind, pairs: u16) -> io::Result<Interface> {
    let socket = control_socket()?;
    match kind {
        TapKind::Tap(name) => {
            // The kernel would make one that is not there, with nobody at its other end.
            index(name)?;
            let files = open_tap(name, pairs)?.0;
            Ok(Interface { files, mtu: mtu(&socket, name)?, mac: None })
        }
        TapKind::Bridge(bridge) => {
            index(bridge)?;
            let (files, name) = open_tap(NEW_TAP, pairs)?;
            let mut request = request(bridge)?;
            request.ifr_ifru.ifru_ifindex = index(&name)?;
            ioctl(&socket, SIOCBRADDIF, &mut request)?;
            set_up(&socket, &name)?;
            Ok(Interface { files, mtu: mtu(&socket, bridge)?, mac: None })
        }
        TapKind::Macvtap(name) => {
            let path = format!("/dev/tap{}", index(name)?);
            let open = |_| {
                let file = open_file(&path)?;
                set_interface(&file, name, 0)?;
                Ok(file)
            };
            let files = (0..pairs).map(open).collect::<io::Result<_>>()?;
            let mut request = request(name)?;
            ioctl(&socket, libc::SIOCGIFHWADDR as _, &mut request)?;
            // SAFETY: the kernel has filled an address in.
            let address = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
            let mac = std::array::from_fn(|n| address[n] as u8);
            Ok(Interface { files, mtu: mtu(&socket, name)?, mac: Some(mac) })
        }
    }
}

/// Opens a tap; gives its name as well.
fn open_tap(name: &str, pairs: u16) -> io::Result<(Vec<File>, String)> {
    let several = if pairs > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let mut files = Vec::new();
    let mut name = name.to_owned();
    for _ in 0..pairs {
        let file = open_file(TUN)?;
        name = match set_interface(&file, &name, several) {
            // A tap that was made for several queues takes nothing else.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput && pairs == 1 => {
                set_interface(&file, &name, libc::IFF_MULTI_QUEUE)?
            }
            result => result?,
        };
        files.push(file);
    }
    Ok((files, name))
}

fn open_file(path: &str) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
    file.map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))
}

/// Makes a file that of an interface, with headers of virtio before frames; gives the interface's name.
fn set_interface(file: &File, name: &str, flags: i32) -> io::Result<String> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | flags) as libc::c_short;
    ioctl(file, libc::TUNSETIFF as _, &mut request)?;
    ioctl(file, libc::TUNSETVNETHDRSZ as _, &mut (HEADER_LEN as libc::c_int))?;
    let name = request.ifr_name.iter().take_while(|&&byte| byte != 0).map(|&byte| byte as u8);
    String::from_utf8(name.collect()).map_err(io::Error::other)
}

/// Says what the guest may be left to do.
pub(super) fn set_offloads(file: &File, offloads: Offloads) -> io::Result<()> {
    // Without checksums there is none of the others.
    let offloads = if offloads.contains(Offloads::CHECKSUM) { offloads } else { Offloads::empty() };
    let bits =
        TUN_F.iter().filter(|(offload, _)| offloads.contains(*offload)).fold(0, |all, (_, bit)| all | bit);
    // SAFETY: this ioctl takes bits.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD as _, bits) })
}

/// Has the interface use a queue, or not.
pub(super) fn attach(file: &File, on: bool) -> io::Result<()> {
    let mut request = request("")?;
    let flags = if on { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    ioctl(file, libc::TUNSETQUEUE as _, &mut request)
}

fn control_socket() -> io::Result<OwnedFd> {
    // SAFETY: `socket` takes numbers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: the file was just opened, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn index(name: &str) -> io::Result<libc::c_int> {
    let name = CString::new(name)?;
    // SAFETY: the name ends with a zero byte.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::new(io::ErrorKind::NotFound, "there is no such interface")),
        index => Ok(index as libc::c_int),
    }
}

fn mtu(socket: &OwnedFd, name: &str) -> io::Result<u16> {
    let mut request = request(name)?;
    ioctl(socket, libc::SIOCGIFMTU as _, &mut request)?;
    // SAFETY: the kernel has filled the number in.
    let mtu = unsafe { request.ifr_ifru.ifru_mtu };
    Ok(mtu.clamp(0, 65520) as u16)
}

fn set_up(socket: &OwnedFd, name: &str) -> io::Result<()> {
    let mut request = request(name)?;
    ioctl(socket, libc::SIOCGIFFLAGS as _, &mut request)?;
    // SAFETY: the kernel has filled the flags in.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    ioctl(socket, libc::SIOCSIFFLAGS as _, &mut request)
}

/// A request about an interface.
fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all zero is a request about nothing.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "names of interfaces have at most 15 characters",
        ));
    }
    request.ifr_name.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from as libc::c_char);
    Ok(request)
}

fn ioctl<T>(file: &impl AsRawFd, number: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: all callers give what their ioctl reads and writes.
    check(unsafe { libc::ioctl(file.as_raw_fd(), number, std::ptr::from_mut(argument)) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
