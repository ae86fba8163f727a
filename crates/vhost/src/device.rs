//! What the guest sees of the device, and the link to whoever serves it.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ruse_memory::GuestRam;
use ruse_timer::OneShot;
use ruse_virtio::{Device, Handler, Identity, Work, features};

use crate::backend::{Backend, BackendError, Region, RingSetup};
use crate::relay::Relay;
use crate::shadow::Area;

/// How long it is waited before somebody looks whether a backend has come back.
const RETRY: Duration = Duration::from_secs(1);

/// A type of device whose rings others serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A block device (virtio 1.2, 5.2).
    Block,
    /// A network device (5.1).
    Net,
    /// A file system device (5.11).
    Fs,
    /// A socket device (5.10).
    Vsock,
}

impl Kind {
    fn identity(self) -> Identity {
        let (kind, pci_class) = match self {
            Self::Block => (2, 0x01_80_00),
            Self::Net => (1, 0x02_00_00),
            Self::Fs => (26, 0x01_80_00),
            Self::Vsock => (19, 0x07_80_00),
        };
        Identity { kind, pci_class }
    }

    /// Entries of each queue. A request of 1 MiB to a file system has 256 pages and what stands before them.
    fn entries(self) -> u16 {
        if self == Self::Fs { 1024 } else { 256 }
    }

    /// What a backend that ends has does not keep the next one from going on: it knew nothing that the guest relies on.
    fn returns(self) -> bool {
        matches!(self, Self::Block | Self::Net)
    }

    /// All that the backend has is answered soon.
    fn drains(self) -> bool {
        matches!(self, Self::Block | Self::Fs)
    }
}

/// The registers' side.
#[derive(Clone, Debug)]
pub struct VhostDevice {
    kind: Kind,
    features: u64,
    queues: u16,
    config: Vec<u8>,
}

impl VhostDevice {
    /// A device with these features of its type, so many queues and this configuration.
    pub fn new(kind: Kind, type_features: u64, queues: u16, config: Vec<u8>) -> Self {
        Self { kind, features: features::COMMON | type_features, queues, config }
    }

    /// The configuration that the driver sees.
    pub fn configuration(&self) -> &[u8] {
        &self.config
    }
}

impl Device for VhostDevice {
    fn identity(&self) -> Identity {
        self.kind.identity()
    }
    fn features(&self) -> u64 {
        self.features
    }
    fn queues(&self) -> Vec<u16> {
        vec![self.kind.entries(); self.queues.into()]
    }
    fn config(&self) -> Vec<u8> {
        self.config.clone()
    }
}

/// Finds a backend again that has ended.
pub(crate) type Connect = Box<dyn Fn() -> Result<Box<dyn Backend>, BackendError> + Send + Sync>;

/// A device, and what serves its queues.
pub type Parts = (Box<dyn Device>, Vec<Box<dyn Handler>>);

/// A device whose backend is there, but not the memory of its guest.
pub struct OpenDevice {
    /// What the guest sees.
    pub device: VhostDevice,
    name: String,
    backend: Box<dyn Backend>,
    connect: Option<Connect>,
    /// Queues that a backend serves: the first ones.
    served: u16,
}

impl OpenDevice {
    /// A device that `backend` serves, all queues of it. Messages call the backend `name`.
    pub fn new(device: VhostDevice, name: String, backend: Box<dyn Backend>) -> Self {
        Self { served: device.queues, device, name, backend, connect: None }
    }

    /// The same, with a way to have a backend anew after this one has ended.
    pub(crate) fn with_connect(self, connect: Connect) -> Self {
        Self { connect: Some(connect), ..self }
    }

    /// The same, where of the queues only the first ones are the backend's; the guest's driver gets nothing from the others.
    pub(crate) fn with_served(self, served: u16) -> Self {
        Self { served, ..self }
    }

    /// The same with split rings only, for drivers that make mistakes with packed ones.
    pub fn with_split_rings(mut self) -> Self {
        self.device.features &= !features::RING_PACKED;
        self
    }

    /// What the guest sees, and what serves its queues, in this memory.
    pub fn plug(self, ram: &GuestRam) -> io::Result<Parts> {
        let Self { device, name, backend, connect, served } = self;
        let kind = device.kind;
        let retry = OneShot::new()?;
        let link = Arc::new(Link {
            area: Arc::new(Area::new(served.into(), kind.entries())?),
            retry,
            entries: kind.entries(),
            drains: kind.drains(),
            returns: kind.returns(),
            name,
            state: Mutex::new(State {
                offered: backend.features(),
                backend: Some(backend),
                connection: 1,
                configured: None,
                broken: None,
                wakes: Vec::new(),
            }),
            connect,
        });
        let relay = |index| Ok(Box::new(Relay::new(link.clone(), index, ram.clone())?) as Box<dyn Handler>);
        let handlers = (0..served).map(relay).collect::<io::Result<_>>()?;
        Ok((Box::new(device), handlers))
    }
}

/// How it is about the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// It is there, under this connection.
    Connected(u64),
    /// It has ended and may come back.
    Away,
    /// It is not trusted before the driver starts anew.
    Broken,
}

/// The backend of a device, as all of its relays share it.
pub(crate) struct Link {
    pub(crate) area: Arc<Area>,
    /// Runs out when it is to be looked whether the backend has come back.
    pub(crate) retry: OneShot,
    pub(crate) entries: u16,
    pub(crate) drains: bool,
    returns: bool,
    name: String,
    state: Mutex<State>,
    connect: Option<Connect>,
}

struct State {
    backend: Option<Box<dyn Backend>>,
    /// What the first one offered.
    offered: u64,
    connection: u64,
    /// For which driver ([`Work::resets`]) the backend is set up.
    configured: Option<u64>,
    /// Under which driver it failed for good.
    broken: Option<u64>,
    /// Wake the relays.
    wakes: Vec<OwnedFd>,
}

impl State {
    fn wake_all(&self) {
        for wake in &self.wakes {
            // It can only fail because so many wait already.
            let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
        }
    }

    /// The backend, if it still is this one.
    fn backend(&mut self, connection: u64) -> Result<&mut Box<dyn Backend>, BackendError> {
        let current = self.connection == connection;
        self.backend.as_mut().filter(|_| current).ok_or(BackendError::Closed)
    }
}

impl Link {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An eventfd of a relay's, to be signalled when something has changed.
    pub(crate) fn wakes(&self, event: OwnedFd) {
        self.lock().wakes.push(event);
    }

    /// How it is, for a driver that has started after so many resets.
    pub(crate) fn status(&self, resets: u64) -> Status {
        let mut state = self.lock();
        if state.broken.is_some_and(|at| at != resets) {
            state.broken = None;
            self.arm(Duration::ZERO);
        }
        match (&state.backend, state.broken) {
            (_, Some(_)) => Status::Broken,
            (Some(_), None) => Status::Connected(state.connection),
            (None, None) => Status::Away,
        }
    }

    /// The connection, if there is one.
    pub(crate) fn connection(&self) -> Option<u64> {
        let state = self.lock();
        state.backend.as_ref().map(|_| state.connection)
    }

    /// Whether chains may be in tables of their own.
    pub(crate) fn has_tables(&self) -> bool {
        let state = self.lock();
        state.backend.as_ref().is_some_and(|backend| backend.features() & features::INDIRECT_DESC != 0)
    }

    /// Has the backend serve a ring; `watch` gets the file that is hung up when it ends.
    pub(crate) fn start(
        &self,
        connection: u64,
        index: u16,
        ring: &RingSetup,
        work: &Work,
        ram: &GuestRam,
        watch: impl FnOnce(BorrowedFd) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        let mut state = self.lock();
        let configured = state.configured == Some(work.resets);
        let backend = state.backend(connection)?;
        if !configured {
            backend.configure(work.features, &memory(ram, &self.area))?;
        }
        backend.start(index, ring)?;
        if let Some(life) = backend.life() {
            watch(life)?;
        }
        state.configured = Some(work.resets);
        Ok(())
    }

    /// Has the backend serve a ring no more.
    pub(crate) fn stop(&self, connection: u64, index: u16, resets: u64) {
        let result = self.lock().backend(connection).map(|backend| backend.stop(index));
        if let Ok(Err(error)) = result {
            self.fail(connection, &error, resets);
        }
    }

    /// The backend has failed under this connection; the driver is that after so many resets.
    pub(crate) fn fail(&self, connection: u64, error: &BackendError, resets: u64) {
        let mut state = self.lock();
        if state.backend(connection).is_err() {
            return;
        }
        state.backend = None;
        state.configured = None;
        self.give_up(&mut state, error, resets);
        state.wake_all();
    }

    fn give_up(&self, state: &mut State, error: &BackendError, resets: u64) {
        if self.returns && self.connect.is_some() && matches!(error, BackendError::Closed) {
            tracing::warn!("{}: {error}; the guest waits for it to come back", self.name);
            self.arm(RETRY);
        } else {
            tracing::error!("{}: {error}; the device does not work until the guest resets it", self.name);
            state.broken = Some(resets);
        }
    }

    fn arm(&self, after: Duration) {
        if let Err(error) = self.retry.set(after) {
            tracing::warn!(%error, "no timer: a backend that comes back is not seen");
        }
    }

    /// The timer has run out: looks whether the backend has come back.
    pub(crate) fn retry(&self, resets: u64) {
        let mut state = self.lock();
        if !self.retry.take() || state.backend.is_some() {
            return;
        }
        let Some(connect) = &self.connect else { return };
        match connect() {
            Ok(backend) if state.offered & !backend.features() != 0 => {
                let error = BackendError::Unfit("it has come back with less than it had".into());
                self.give_up(&mut state, &error, resets);
            }
            Ok(backend) => {
                tracing::warn!("{}: it is back", self.name);
                state.backend = Some(backend);
                state.connection += 1;
            }
            Err(BackendError::Closed | BackendError::Host(_)) => self.arm(RETRY),
            Err(error) => self.give_up(&mut state, &error, resets),
        }
        state.wake_all();
    }
}

/// What a backend reaches: the guest's RAM, but no files that are in its memory, and the rings.
fn memory<'a>(ram: &'a GuestRam, area: &'a Area) -> Vec<Region<'a>> {
    let regions = ram.regions().iter().filter_map(|region| {
        let (gpa, size, host) = (region.gpa, region.size, region.host as u64);
        Some(Region { gpa, size, host, file: ram.file(), offset: ram.file_offset(gpa)? })
    });
    regions.chain([area.region()]).collect()
}
