//! Speaks to a machine.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{PidfdFlags, pidfd_open};

use crate::protocol::{Answer, Call, Info, Request, VERSION};
use crate::{ManagerError, Registry};

/// How long a machine may take for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often it is looked whether a device has left.
const DETACH_LOOK: Duration = Duration::from_millis(100);

/// A connection to a machine's control socket.
pub struct Client {
    name: String,
    pid: u32,
    stream: BufReader<UnixStream>,
    process: OwnedFd,
}

/// How a machine that was asked to shut down has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The guest has shut down.
    ByItself,
    /// It did not in time, and was ended.
    Forced,
}

/// Connects to a machine's serial console: the last output comes first, then all that follows; what is sent is typed.
pub fn attach(registry: &Registry, name: &str) -> Result<UnixStream, ManagerError> {
    registry.connect_console(name)
}

impl Client {
    /// Connects to a machine.
    pub fn connect(registry: &Registry, name: &str) -> Result<Self, ManagerError> {
        let stream = registry.connect_control(name)?;
        let failed = ManagerError::io("use the control socket in", &registry.folder(name));
        let open = || -> io::Result<_> {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            let pid = socket_peercred(&stream)?.pid;
            // While it has not answered, this may be another process of the same number; `request` tells.
            Ok((pid.as_raw_nonzero().get().unsigned_abs(), pidfd_open(pid, PidfdFlags::empty())?))
        };
        let (pid, process) = match open() {
            Ok(opened) => opened,
            // It ended meanwhile.
            Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {
                return Err(ManagerError::NoMachine { name: name.to_owned() });
            }
            Err(error) => return Err(failed(error)),
        };
        Ok(Self { name: name.to_owned(), pid, stream: BufReader::new(stream), process })
    }

    /// Asks for something that has no answer but that it is done.
    pub fn request(&mut self, request: Request) -> Result<(), ManagerError> {
        self.call(request).map(drop)
    }

    /// Asks what the machine is doing.
    pub fn info(&mut self) -> Result<Info, ManagerError> {
        match self.call(Request::Info)? {
            Answer::Info(info) => Ok(*info),
            _ => Err(self.silent()),
        }
    }

    /// Asks for a device to be put into a slot; what it is called there.
    pub fn attach(&mut self, request: Request) -> Result<String, ManagerError> {
        match self.call(request)? {
            Answer::Attached { id } => Ok(id),
            _ => Err(self.silent()),
        }
    }

    /// Has a device taken out of its slot, and waits until it is. The guest's system has so much time to let go of it.
    pub fn detach(&mut self, id: &str, force: bool, patience: Duration) -> Result<(), ManagerError> {
        let until = Instant::now() + patience;
        self.request(Request::Detach { id: id.to_owned(), force })?;
        loop {
            let info = self.info()?;
            let mut ids = info.disks.iter().map(|disk| &disk.id).chain(info.nets.iter().map(|net| &net.id));
            if !ids.any(|there| there == id) {
                return Ok(());
            }
            if Instant::now() >= until {
                let (name, id) = (self.name.clone(), id.to_owned());
                return Err(ManagerError::Kept { name, id, seconds: patience.as_secs() });
            }
            std::thread::sleep(DETACH_LOOK);
        }
    }

    fn call(&mut self, request: Request) -> Result<Answer, ManagerError> {
        let answer = self.exchange(request).map_err(|error| {
            tracing::debug!(%error, "no answer");
            self.silent()
        })?;
        match answer {
            Answer::Error { kind, message } => {
                Err(ManagerError::Refused { name: self.name.clone(), kind, message })
            }
            answer => Ok(answer),
        }
    }

    fn exchange(&mut self, request: Request) -> io::Result<Answer> {
        let mut line = serde_json::to_vec(&Call { version: VERSION, request })?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line)?;
        line.clear();
        if self.stream.read_until(b'\n', &mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_slice(&line)?)
    }

    fn silent(&self) -> ManagerError {
        ManagerError::Silent { name: self.name.clone(), pid: Some(self.pid) }
    }

    /// Presses the power button and waits for the end, which is forced after so much time.
    pub fn shut_down(mut self, patience: Duration) -> Result<Ended, ManagerError> {
        // A machine that is just ending does not answer any more.
        let asked = self.request(Request::PowerButton);
        let patience = if asked.is_ok() { patience } else { PATIENCE };
        if self.wait(patience) {
            return Ok(Ended::ByItself);
        }
        asked?;
        self.end()?;
        Ok(Ended::Forced)
    }

    /// Ends the machine at once.
    pub fn end(mut self) -> Result<(), ManagerError> {
        let asked = self.request(Request::Stop);
        match self.wait(PATIENCE) {
            true => Ok(()),
            false => Err(asked.err().unwrap_or_else(|| self.silent())),
        }
    }

    /// Waits for the end of the machine's process; `false` if that takes longer.
    fn wait(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        loop {
            let rest = until.saturating_duration_since(Instant::now());
            let limit = Timespec { tv_sec: rest.as_secs() as i64, tv_nsec: i64::from(rest.subsec_nanos()) };
            match poll(&mut [PollFd::new(&self.process, PollFlags::IN)], Some(&limit)) {
                Err(Errno::INTR) => {}
                Ok(count) => return count > 0,
                Err(_) => return false,
            }
        }
    }
}
