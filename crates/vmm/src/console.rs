//! Where a serial port leads outside of the machine.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;

/// Bytes that come in from outside.
pub trait ConsoleInput: Send {
    /// What becomes readable when there is input.
    fn fd(&self) -> BorrowedFd<'_>;
    /// Reads what there is, after [`ConsoleInput::fd`] has become readable. Bytes for the guest are put at the end of
    /// `to_guest`, none where the input took them for itself. `false` at the end of the input.
    fn read(&mut self, to_guest: &mut Vec<u8>) -> io::Result<bool>;
    /// Whether some of the bytes are not for the guest. Such input is read even while the guest takes none.
    fn has_keys(&self) -> bool {
        false
    }
}

/// Where the guest's bytes go.
pub trait ConsoleOutput: Send {
    /// What becomes writable when there is room; `None` where there is always.
    fn fd(&self) -> Option<BorrowedFd<'_>>;
    /// Writes some of the bytes and says how many.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;
    /// Whether output is to be held back for now.
    fn is_held(&self) -> bool {
        false
    }
}

/// Both ends of COM1.
#[derive(Default)]
pub struct Console {
    /// Input, if any.
    pub input: Option<Box<dyn ConsoleInput>>,
    /// Output; without one what the guest sends is lost.
    pub output: Option<Box<dyn ConsoleOutput>>,
}

impl Console {
    /// Output into a file or pipe and no input.
    pub fn to_file(file: File) -> Self {
        Self { input: None, output: Some(Box::new(FileOutput(file))) }
    }
}

/// Makes a file for output, or opens the pipe that is there. Nobody is waited for who may read it some time: a pipe that
/// nobody reads is an error.
pub fn output_file(path: &Path) -> io::Result<File> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let opened = File::options().write(true).create(true).truncate(true).custom_flags(flags).open(path);
    opened.map_err(|error| match std::fs::metadata(path) {
        Ok(found) if found.file_type().is_fifo() && is_unread(&error) => {
            io::Error::other("nobody reads this pipe")
        }
        _ => error,
    })
}

/// What opening a pipe without a reader comes to (open(2), ENXIO).
fn is_unread(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::NXIO.raw_os_error())
}

/// Output into an open file.
struct FileOutput(File);

impl ConsoleOutput for FileOutput {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }
}
