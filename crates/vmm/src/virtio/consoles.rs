//! Virtio consoles and ports: the ends of a configuration as devices of a machine.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use ruse_devices::pci::PciAddress;
use ruse_memory::GuestRam;
use ruse_virtio::console::{Console, ConsoleSize, End, Ports};
use ruse_virtio::listener::{ListenError, listen};

use super::{PlugError, Server, SharedTransport, plug};
use crate::board::Board;
use crate::config::{ConsoleConfig, ConsoleEnd};
use crate::console::output_file;
use crate::pci_slots;

/// Why a console cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// Nobody can listen at its socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Its file cannot be written.
    #[error("cannot write '{path}': {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// The host refused.
    #[error(transparent)]
    Host(#[from] io::Error),
}

/// The ends of consoles, open before there is a machine. Dropped, it removes the sockets that were made.
#[derive(Default)]
pub(crate) struct Consoles {
    console: Option<End>,
    ports: Vec<(String, End)>,
    /// The machine's side of the program's own input and output.
    pub(crate) stdio: Option<UnixStream>,
    made: Vec<PathBuf>,
}

impl Consoles {
    /// Opens files and makes sockets.
    pub(crate) fn open(configs: &[ConsoleConfig]) -> Result<Self, ConsoleError> {
        let mut consoles = Self::default();
        for config in configs {
            let end = consoles.end(&config.end)?;
            match &config.name {
                Some(name) => consoles.ports.push((name.clone(), end)),
                None => consoles.console = Some(end),
            }
        }
        Ok(consoles)
    }

    fn end(&mut self, end: &ConsoleEnd) -> Result<End, ConsoleError> {
        Ok(match end {
            ConsoleEnd::Null => End::Nowhere,
            ConsoleEnd::Stdio => {
                let (near, far) = UnixStream::pair()?;
                self.stdio = Some(near);
                End::Stream(far)
            }
            ConsoleEnd::File(path) => {
                let file = output_file(path);
                End::File(file.map_err(|source| ConsoleError::File { path: path.clone(), source })?)
            }
            ConsoleEnd::Socket(path) => {
                let listener = listen(path)?;
                self.made.push(path.clone());
                End::Listener(listener)
            }
        })
    }

    /// Plugs the devices in.
    pub(crate) fn plug(
        &mut self,
        board: &Arc<Board>,
        ram: &GuestRam,
        gsi: impl Fn(PciAddress) -> u8,
    ) -> Result<(Option<AttachedConsole>, Vec<Server>), PlugError> {
        let (mut attached, mut all) = (None, Vec::new());
        if let Some(end) = self.console.take() {
            let size = ConsoleSize::default();
            let (device, handlers) = Console::new(size.clone(), end)?;
            let at = PciAddress::new(pci_slots::CONSOLE, 0);
            let (function, servers) = plug(board, ram, at, gsi(at), "console", Box::new(device), handlers)?;
            attached = Some(AttachedConsole { size, function });
            all.extend(servers);
        }
        if !self.ports.is_empty() {
            let (device, handlers) = Ports::new(std::mem::take(&mut self.ports))?;
            let at = PciAddress::new(pci_slots::SMALL, pci_slots::PORTS);
            all.extend(plug(board, ram, at, gsi(at), "ports", Box::new(device), handlers)?.1);
        }
        Ok((attached, all))
    }
}

impl Drop for Consoles {
    fn drop(&mut self) {
        // Somebody may have removed them before.
        self.made.iter().for_each(|path| drop(fs::remove_file(path)));
    }
}

/// The console of a machine.
pub(crate) struct AttachedConsole {
    size: ConsoleSize,
    function: SharedTransport,
}

impl AttachedConsole {
    /// Its window has another size, of which the guest is told.
    pub(crate) fn resize(&self, board: &Board, columns: u16, rows: u16) {
        if self.size.set(columns, rows) {
            board.access_function(&*self.function, |function, access| function.config_changed(access));
        }
    }
}
