//! Answers at a machine's sockets.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Builder;
use std::time::Duration;

use ruse_vmm::{Control, DeviceConfig, NetOption, Phase};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::getuid;

use crate::protocol::{Answer, Call, ErrorKind, Info, LINE_LIMIT, Request};
use crate::{ConsoleHub, Registration};

/// Most connections at the control socket at a time.
const MOST_CLIENTS: usize = 32;
/// How long viewers have for the last output when the machine has ended.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// How long to wait before somebody is let in who could not be.
const PAUSE: Duration = Duration::from_millis(50);

/// What requests are about.
pub trait Target: Send + Sync + 'static {
    /// Carries out a request. It does not wait for the guest.
    fn request(&self, request: Request) -> Answer;
}

impl Target for Control {
    fn request(&self, request: Request) -> Answer {
        let goes_on = match request {
            Request::Info => return info(self),
            Request::Pause => self.pause(),
            Request::Resume => self.resume(),
            Request::Reset => {
                self.reset();
                self.phase() != Phase::Ended
            }
            Request::PowerButton => {
                self.press_power_button();
                self.phase() != Phase::Ended
            }
            Request::Stop => {
                self.stop();
                true
            }
            Request::Memory { size } => match self.resize_memory(size) {
                Ok(()) => true,
                Err(error) => return Answer::error(ErrorKind::Impossible, error.to_string()),
            },
            Request::Balloon { size } if !self.resize_balloon(size) => {
                return Answer::error(ErrorKind::Impossible, "it was started without --balloon");
            }
            Request::Balloon { .. } => true,
            Request::Link { up, device } => return link(self, up, device.as_deref()),
            Request::AttachDisk { disk } => return attach(self, disk.parse().map(DeviceConfig::Disk)),
            Request::AttachNet { net } => return attach(self, net.parse().and_then(network)),
            Request::Detach { id, force } => return detach(self, &id, force),
        };
        if goes_on { Answer::Done } else { Answer::error(ErrorKind::Ended, "it has ended") }
    }
}

fn link(control: &Control, up: bool, device: Option<&str>) -> Answer {
    match (control.set_link(device, up), device) {
        (true, _) => Answer::Done,
        (false, Some(id)) => {
            let id = id.escape_debug();
            Answer::error(ErrorKind::Impossible, format!("'{id}' is no network device that it serves itself"))
        }
        (false, None) => {
            Answer::error(ErrorKind::Impossible, "it has no network device that it serves itself")
        }
    }
}

fn network(option: NetOption) -> Result<DeviceConfig, String> {
    option.0.map(DeviceConfig::Net).ok_or_else(|| "'none' is no network".into())
}

fn attach(control: &Control, device: Result<DeviceConfig, String>) -> Answer {
    let attached = device.and_then(|device| control.attach(device).map_err(|error| error.to_string()));
    match attached {
        Ok(id) => Answer::Attached { id },
        Err(error) => Answer::error(ErrorKind::Impossible, error),
    }
}

fn detach(control: &Control, id: &str, force: bool) -> Answer {
    match control.detach(id, force) {
        Ok(()) => Answer::Done,
        Err(error) => Answer::error(ErrorKind::Impossible, error.to_string()),
    }
}

fn info(control: &Control) -> Answer {
    match control.refresh_disks() {
        Ok(disks) => Answer::Info(Box::new(Info {
            ruse: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            machine: control.info(),
            pluggable: control.memory(),
            balloon: control.balloon(Duration::ZERO),
            disks,
            nets: control.nets(),
            config: control.config().clone(),
        })),
        Err(error) => Answer::error(ErrorKind::Failed, format!("cannot look at a disk: {error}")),
    }
}

/// A machine's sockets and the threads behind them. Dropped, viewers of the console see its last output, and the
/// machine's folder is removed.
pub struct Guests {
    hub: Arc<ConsoleHub>,
    _registration: Registration,
}

impl Drop for Guests {
    fn drop(&mut self) {
        self.hub.close(LAST_WORDS);
    }
}

/// Answers at the sockets of a machine for `target`; viewers go to `hub`.
pub fn serve(registration: Registration, target: impl Target, hub: Arc<ConsoleHub>) -> io::Result<Guests> {
    let (control, console) = (registration.control.try_clone()?, registration.console.try_clone()?);
    let (target, viewers) = (Arc::new(target), hub.clone());
    let clients = Arc::new(AtomicUsize::new(0));
    Builder::new().name("ruse-control".into()).spawn(move || {
        loop {
            let mut files = [&control, &console].map(|socket| PollFd::new(socket, PollFlags::IN));
            if !matches!(poll(&mut files, None), Ok(_) | Err(Errno::INTR)) {
                return;
            }
            let [control_ready, console_ready] = files.map(|file| !file.revents().is_empty());
            let admitted = match (control_ready, console_ready) {
                (true, _) => control.accept().and_then(|(client, _)| admit(client, &target, &clients)),
                (_, true) => console.accept().and_then(|(viewer, _)| match is_ours(&viewer) {
                    true => viewers.admit(viewer),
                    false => Ok(()),
                }),
                _ => Ok(()),
            };
            if let Err(error) = admitted {
                tracing::debug!(%error, "a client of the control socket is not served");
                // It is still there; perhaps the process has no file for it just now.
                std::thread::sleep(PAUSE);
            }
        }
    })?;
    Ok(Guests { hub, _registration: registration })
}

/// The folder keeps others out already; a descriptor that has got out of it must not let them in.
fn is_ours(peer: &impl AsFd) -> bool {
    socket_peercred(peer).is_ok_and(|peer| peer.uid == getuid() || peer.uid.is_root())
}

fn admit(client: UnixStream, target: &Arc<impl Target>, clients: &Arc<AtomicUsize>) -> io::Result<()> {
    if clients.load(Ordering::Relaxed) >= MOST_CLIENTS || !is_ours(&client) {
        return Ok(());
    }
    clients.fetch_add(1, Ordering::Relaxed);
    let (target, clients) = (target.clone(), clients.clone());
    Builder::new().name("ruse-client".into()).spawn(move || {
        if let Err(error) = converse(client, &*target) {
            tracing::debug!(%error, "a client has gone");
        }
        clients.fetch_sub(1, Ordering::Relaxed);
    })?;
    Ok(())
}

/// Answers one client until it goes.
fn converse(mut client: UnixStream, target: &impl Target) -> io::Result<()> {
    let mut lines = BufReader::new(client.try_clone()?);
    loop {
        let mut line = Vec::new();
        (&mut lines).take(LINE_LIMIT).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(());
        }
        let cut_off = line.last() != Some(&b'\n');
        let answer = match Call::parse(&line) {
            _ if cut_off => Answer::error(ErrorKind::BadRequest, "the line is cut off, or too long"),
            Ok(call) => target.request(call.request),
            Err(answer) => answer,
        };
        let mut text = serde_json::to_vec(&answer)?;
        text.push(b'\n');
        client.write_all(&text)?;
        if cut_off {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests;
