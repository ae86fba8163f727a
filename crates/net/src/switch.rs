//! A switch between machines of one user, without a process of its own: each port is a socket in the switch's directory, and
//! sends to those of the others. Where an Ethernet address is, is learned from what comes from there.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, open};
use rustix::process::geteuid;

use crate::frame::{Fit, LARGEST};
use crate::{Driver, HEADER_LEN, Network, Offer, Offloads, Port, Received, Receiver, Sender, Slice, vectors};

/// How long a port whose reader is slow is waited for. One that was too slow is not until it takes something again.
const PATIENCE: Duration = Duration::from_millis(20);
/// Most addresses that are remembered.
const MOST_ADDRESSES: usize = 4096;
/// Bytes that may be on their way, if the host allows as many.
const ON_THE_WAY: usize = 1 << 20;

/// Where all switches are in the user's directory.
const ALL: &str = ".switches";
/// What the names of sockets to peers begin with.
const NAME_PREFIX: &[u8] = b"ruse-switch/";

type Mac = [u8; 6];

/// Why there is no switch.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// Others than its owner could use it.
    #[error("--net: '{}' is not a directory of this user's alone", .0.display())]
    NotOurs(PathBuf),
    /// The host refuses something.
    #[error("--net: cannot use '{}': {source}", .path.display())]
    Host {
        /// The switch's directory.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
}

/// Another port.
#[derive(Debug)]
struct Peer {
    path: PathBuf,
    name: OsString,
    /// What it is sent to by: what it has not read fills this socket only.
    socket: UnixDatagram,
    /// It did not take what it was sent.
    slow: bool,
}

#[derive(Default)]
struct Peers {
    all: Vec<Peer>,
    by_mac: HashMap<Mac, OsString>,
    /// How many there have been.
    count: u64,
    /// When ports last came or went, as the directory says.
    changed: Option<(i64, i64)>,
}

/// A port of a switch.
pub struct Switch {
    socket: UnixDatagram,
    /// The directory, which may have a path that is too long for a socket's address.
    dir: OwnedFd,
    name: OsString,
    mtu: Option<u16>,
    peers: Mutex<Peers>,
    fit: Fit,
}

impl Switch {
    /// A new port of the switch of this name, whose directory is made below the user's own if need be.
    pub fn open(user: &Path, name: &str, mtu: Option<u16>) -> Result<(Arc<Self>, Port), SwitchError> {
        let all = user.join(ALL);
        let dir = all.join(name);
        for dir in [user, &all, &dir] {
            make_private(dir)?;
        }
        let switch = Self::in_dir(&dir, mtu).map_err(|source| SwitchError::Host { path: dir, source })?;
        let switch = Arc::new(switch);
        let receiver = SwitchReceiver { switch: switch.clone(), buffer: vec![0; LARGEST], held: 0 };
        let port = Port { sender: Box::new(SwitchSender(switch.clone())), receiver: Box::new(receiver) };
        Ok((switch, port))
    }

    fn in_dir(dir: &Path, mtu: Option<u16>) -> io::Result<Self> {
        let dir = open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let mut number = [0; 8];
        rustix::rand::getrandom(&mut number, rustix::rand::GetRandomFlags::empty())?;
        let name = OsString::from(format!("{:016x}", u64::from_ne_bytes(number)));
        let socket = UnixDatagram::bind(place(&dir).join(&name))?;
        Ok(Self { socket, dir, name, mtu, peers: Mutex::default(), fit: Fit::default() })
    }

    fn peers(&self) -> MutexGuard<'_, Peers> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks which ports there are, if that has changed.
    fn look(&self, peers: &mut Peers) -> io::Result<()> {
        let place = place(&self.dir);
        let found = fs::metadata(&place)?;
        let changed = Some((found.mtime(), found.mtime_nsec()));
        if peers.changed == changed {
            return Ok(());
        }
        let mut names = Vec::new();
        for entry in fs::read_dir(&place)? {
            names.push(entry?.file_name());
        }
        peers.all.retain(|peer| names.contains(&peer.name));
        for name in names {
            if name != self.name && !peers.all.iter().any(|peer| peer.name == name) {
                peers.count += 1;
                let socket = self.socket_to_peer(peers.count)?;
                peers.all.push(Peer { path: place.join(&name), name, socket, slow: false });
            }
        }
        // Whatever comes in the same tick of the file system's clock is seen the next time.
        let settled = std::time::SystemTime::now()
            .duration_since(found.modified()?)
            .is_ok_and(|since| since > Duration::from_millis(50));
        peers.changed = changed.filter(|_| settled);
        Ok(())
    }

    /// A socket for one peer. Its name, which is no file, says to the peer whose it is.
    fn socket_to_peer(&self, number: u64) -> io::Result<UnixDatagram> {
        let name = [NAME_PREFIX, self.name.as_bytes(), format!(".{number}").as_bytes()].concat();
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
        socket.set_write_timeout(Some(PATIENCE))?;
        rustix::net::sockopt::set_socket_send_buffer_size(&socket, ON_THE_WAY)?;
        Ok(socket)
    }

    fn send(&self, frame: &[Slice]) {
        let mut head = [0; HEADER_LEN + 6];
        if vectors::copy_head(frame, &mut head) < head.len() {
            return;
        }
        let to: Mac = head[HEADER_LEN..].try_into().unwrap_or_default();
        let mut peers = self.peers();
        let peers = &mut *peers;
        let known =
            peers.by_mac.get(&to).and_then(|name| peers.all.iter().position(|peer| peer.name == *name));
        let gone = match known {
            Some(one) => self.send_to(&mut peers.all[one..=one], frame),
            None => {
                if let Err(error) = self.look(peers) {
                    tracing::warn!(%error, "the ports of a switch cannot be found");
                }
                self.send_to(&mut peers.all, frame)
            }
        };
        for name in gone {
            peers.all.retain(|peer| peer.name != name);
            peers.by_mac.retain(|_, at| *at != name);
        }
    }

    /// Sends a frame to ports; gives those that are no more.
    fn send_to(&self, peers: &mut [Peer], frame: &[Slice]) -> Vec<OsString> {
        let mut gone = Vec::new();
        for peer in peers {
            let flags = if peer.slow { libc::MSG_DONTWAIT } else { 0 };
            let sent = vectors::send_to(peer.socket.as_fd(), frame, peer.path.as_os_str().as_bytes(), flags);
            match sent {
                Ok(_) => peer.slow = false,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => peer.slow = true,
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    // Its machine has died.
                    if let Err(error) = fs::remove_file(&peer.path) {
                        tracing::debug!(%error, "a port that nobody has is left");
                    }
                    gone.push(peer.name.clone());
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => gone.push(peer.name.clone()),
                Err(error) => tracing::debug!(%error, "a frame is lost"),
            }
        }
        gone
    }

    /// Remembers where an address is.
    fn learn(&self, mac: Mac, name: &OsStr) {
        let mut peers = self.peers();
        let peers = &mut *peers;
        if peers.by_mac.get(&mac).is_some_and(|known| known == name) {
            return;
        }
        if !peers.all.iter().any(|peer| peer.name == name)
            && let Err(error) = self.look(peers)
        {
            tracing::warn!(%error, "the ports of a switch cannot be found");
        }
        if peers.by_mac.len() < MOST_ADDRESSES {
            peers.by_mac.insert(mac, name.to_owned());
        }
    }
}

/// The port that sends by the socket of this name.
fn sender(socket: &[u8]) -> Option<&OsStr> {
    let name = socket.strip_prefix(NAME_PREFIX)?;
    name.split(|&byte| byte == b'.').next().map(OsStr::from_bytes)
}

/// Makes a directory that is its owner's alone, or sees that it is.
fn make_private(dir: &Path) -> Result<(), SwitchError> {
    let host = |source: io::Error| SwitchError::Host { path: dir.to_owned(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(host)?;
    let found = fs::symlink_metadata(dir).map_err(host)?;
    match found.is_dir() && found.uid() == geteuid().as_raw() && found.mode() & 0o077 == 0 {
        true => Ok(()),
        false => Err(SwitchError::NotOurs(dir.to_owned())),
    }
}

/// A short path of a directory; it holds while the file does.
fn place(dir: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", dir.as_raw_fd()).into()
}

impl Drop for Switch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(place(&self.dir).join(&self.name)) {
            tracing::debug!(%error, "a port that nobody has is left");
        }
    }
}

impl Network for Switch {
    fn offer(&self) -> Offer {
        // Whatever one machine leaves to the other is done before a driver that does not take it gets it.
        let takes = Offloads::CHECKSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN;
        Offer { takes, gives: takes, mtu: self.mtu }
    }

    fn start(&self, driver: Driver) {
        self.fit.set(driver.offloads);
    }

    fn set_offloads(&self, offloads: Offloads) {
        self.fit.set(offloads);
    }
}

struct SwitchSender(Arc<Switch>);

impl Sender for SwitchSender {
    fn send(&mut self, frame: &[Slice]) {
        self.0.send(frame);
    }
}

struct SwitchReceiver {
    switch: Arc<Switch>,
    buffer: Vec<u8>,
    /// Bytes of a frame in it that nobody has taken.
    held: usize,
}

impl SwitchReceiver {
    /// Takes a frame from the socket; says whether there was one.
    fn fill(&mut self) -> bool {
        while self.held == 0 {
            let flags = rustix::net::RecvFlags::DONTWAIT;
            match rustix::net::recvfrom(&self.switch.socket, &mut self.buffer[..], flags) {
                Ok((len, _, from)) if len >= HEADER_LEN + 14 => {
                    let mac = self.buffer[HEADER_LEN + 6..HEADER_LEN + 12].try_into().unwrap_or_default();
                    let from = from.and_then(|from| rustix::net::SocketAddrUnix::try_from(from).ok());
                    let from = from.as_ref().and_then(|from| sender(from.abstract_name()?));
                    from.into_iter().for_each(|name| self.switch.learn(mac, name));
                    self.held = len;
                }
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
        true
    }
}

impl Receiver for SwitchReceiver {
    fn source(&self) -> BorrowedFd<'_> {
        self.switch.socket.as_fd()
    }

    fn receive(&mut self, take: &mut dyn FnMut(&[&[u8]]) -> bool) -> Received {
        if !self.fill() {
            return Received::Nothing;
        }
        if !self.switch.fit.offer(&mut self.buffer[..self.held], take) {
            return Received::Refused;
        }
        self.held = 0;
        Received::Taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(to: Mac, from: Mac, text: &[u8]) -> Vec<u8> {
        [&[0; HEADER_LEN][..], &to, &from, &[0x88, 0xb5], text].concat()
    }

    fn send(port: &mut Port, mut frame: Vec<u8>) {
        port.sender.send(&[Slice::from(&mut frame[..])]);
    }

    /// What comes to a port, without its header.
    fn received(port: &mut Port) -> Option<Vec<u8>> {
        let mut got = None;
        port.receiver.receive(&mut |parts| {
            got = Some(parts.concat()[HEADER_LEN..].to_vec());
            true
        });
        got
    }

    const A: Mac = [2, 0, 0, 0, 0, 0xa];
    const B: Mac = [2, 0, 0, 0, 0, 0xb];
    const ALL: Mac = [0xff; 6];

    #[test]
    fn frames_go_where_their_address_was_seen() {
        let dir = tempfile::tempdir().unwrap();
        // Longer than a socket's address.
        let dir = dir.path().join("x".repeat(120));
        let [mut a, mut b, mut c] = [0; 3].map(|_| Switch::open(&dir, "s", None).unwrap());
        send(&mut a.1, frame(ALL, A, b"who is b"));
        assert!(received(&mut b.1).is_some() && received(&mut c.1).is_some() && received(&mut a.1).is_none());
        send(&mut b.1, frame(A, B, b"me"));
        assert_eq!(received(&mut a.1).unwrap()[14..], *b"me");
        assert!(received(&mut c.1).is_none(), "it was known where a is");
        send(&mut a.1, frame(B, A, b"hello b"));
        assert!(received(&mut b.1).is_some() && received(&mut c.1).is_none());
        drop(b);
        send(&mut a.1, frame(B, A, b"still there?"));
        send(&mut a.1, frame(B, A, b"or elsewhere?"));
        assert_eq!(received(&mut c.1).unwrap()[14..], *b"or elsewhere?");
        assert_eq!(fs::read_dir(dir.join(".switches/s")).unwrap().count(), 2);
    }

    #[test]
    fn a_port_that_reads_nothing_does_not_hold_the_others_up() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("switch");
        let [mut a, _b, mut c] = [0; 3].map(|_| Switch::open(&dir, "s", None).unwrap());
        let start = std::time::Instant::now();
        for _ in 0..3000 {
            send(&mut a.1, frame(ALL, A, &[0; 100]));
            assert!(received(&mut c.1).is_some());
        }
        assert!(start.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_port_that_reads_nothing_takes_no_room_of_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("switch");
        let [mut a, mut c, ..] = [0; 8].map(|_| Switch::open(&dir, "s", None).unwrap());
        for n in 0..100 {
            send(&mut a.1, frame(ALL, A, &[0; 60_000]));
            assert!(received(&mut c.1).is_some(), "frame {n}");
        }
    }

    #[test]
    fn what_is_left_of_a_dead_machine_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("switch");
        let mut a = Switch::open(&dir, "s", None).unwrap();
        let dir = dir.join(".switches/s");
        drop(UnixDatagram::bind(dir.join("dead")).unwrap());
        send(&mut a.1, frame(ALL, A, b""));
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    }

    #[test]
    fn a_directory_that_others_can_enter_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o750)).unwrap();
        assert!(matches!(Switch::open(dir.path(), "s", None), Err(SwitchError::NotOurs(_))));
    }
}
