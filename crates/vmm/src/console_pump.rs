//! Carries bytes between a [`Console`] and a stream, for a console that is not a serial port.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread::{Builder, JoinHandle};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::console::Console;

/// Most bytes that wait in either direction; input with keys in it beyond that is lost.
const LIMIT: usize = 4096;
/// How often a console that is held is looked at, in nanoseconds.
const HELD_NS: i64 = 50_000_000;
/// How long the last output waits for somebody to take it, in seconds.
const PATIENCE: i64 = 1;

struct Pump {
    console: Console,
    stream: UnixStream,
    input: VecDeque<u8>,
    output: VecDeque<u8>,
}

/// Starts the thread. It leaves when the other end of the stream has, and all output is written.
pub(crate) fn spawn(console: Console, stream: UnixStream) -> io::Result<JoinHandle<()>> {
    stream.set_nonblocking(true)?;
    let mut pump = Pump { console, stream, input: VecDeque::new(), output: VecDeque::new() };
    Builder::new().name("ruse-console".into()).spawn(move || {
        if let Err(error) = pump.run() {
            tracing::warn!(%error, "the console has ended; the guest runs on without");
        }
    })
}

impl Pump {
    fn run(&mut self) -> io::Result<()> {
        while self.step()? {}
        // The guest has gone: what it has said is still shown.
        while !self.output.is_empty() && self.wait_for_reader()? {
            self.write()?;
        }
        Ok(())
    }

    fn is_held(&self) -> bool {
        self.console.output.as_ref().is_some_and(|output| output.is_held())
    }

    /// Waits for something and does it; `false` when the other end has left.
    fn step(&mut self) -> io::Result<bool> {
        let held = self.is_held() && !self.output.is_empty();
        let wants_output = !held && !self.output.is_empty();
        let screen = self.console.output.as_ref().and_then(|output| output.fd()).filter(|_| wants_output);
        let keyboard = self.console.input.as_ref().filter(|input| self.input.is_empty() || input.has_keys());
        let mut stream = PollFlags::empty();
        stream.set(PollFlags::IN, self.output.is_empty());
        stream.set(PollFlags::OUT, !self.input.is_empty());
        let watched = [
            screen.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::OUT)),
            keyboard.map(|input| PollFd::from_borrowed_fd(input.fd(), PollFlags::IN)),
            // One that has left is always ready: it is looked at only where that makes a difference.
            (!stream.is_empty()).then(|| PollFd::from_borrowed_fd(self.stream.as_fd(), stream)),
        ];
        let places = [0, 1].map(|n| watched[..n].iter().flatten().count());
        let present = [0, 1].map(|n: usize| watched[n].is_some());
        let mut files: Vec<_> = watched.into_iter().flatten().collect();
        let tv_nsec = if wants_output && screen.is_none() { 0 } else { HELD_NS };
        let limit = (held || tv_nsec == 0).then_some(Timespec { tv_sec: 0, tv_nsec });
        retry(poll(&mut files, limit.as_ref()))?;
        let [show, typed] = [0, 1].map(|n: usize| present[n] && !files[places[n]].revents().is_empty());
        let show = show || wants_output && screen.is_none();
        if typed {
            self.read()?;
        }
        if show {
            self.write()?;
        }
        self.exchange()
    }

    /// Reads what is typed.
    fn read(&mut self) -> io::Result<()> {
        let Some(input) = &mut self.console.input else { return Ok(()) };
        let mut bytes = Vec::new();
        let goes_on = match input.read(&mut bytes) {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                true
            }
            result => result?,
        };
        self.input.extend(bytes);
        if input.has_keys() {
            self.input.truncate(LIMIT);
        }
        if !goes_on {
            self.console.input = None;
        }
        Ok(())
    }

    /// Shows what is there, as far as somebody takes it.
    fn write(&mut self) -> io::Result<()> {
        let written = match &mut self.console.output {
            Some(output) => output.write(self.output.as_slices().0),
            None => Ok(self.output.len()),
        };
        match written {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            result => drop(self.output.drain(..result?)),
        }
        Ok(())
    }

    /// Both ways through the stream; `false` when its other end has left.
    fn exchange(&mut self) -> io::Result<bool> {
        if !self.input.is_empty() {
            match (&self.stream).write(self.input.as_slices().0) {
                Ok(count) => drop(self.input.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.input.clear(),
            }
        }
        if !self.output.is_empty() {
            return Ok(true);
        }
        let mut bytes = [0; LIMIT];
        match (&self.stream).read(&mut bytes) {
            Ok(count) => {
                self.output.extend(&bytes[..count]);
                Ok(count > 0)
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// At the end: whether somebody takes more.
    fn wait_for_reader(&self) -> io::Result<bool> {
        let Some(fd) = self.console.output.as_ref().and_then(|output| output.fd()) else { return Ok(true) };
        let limit = Timespec { tv_sec: PATIENCE, tv_nsec: 0 };
        let mut files = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
        Ok(!self.is_held() && retry(poll(&mut files, Some(&limit)))? > 0)
    }
}

/// A signal is no error; nothing has happened then.
fn retry(result: rustix::io::Result<usize>) -> io::Result<usize> {
    match result {
        Err(rustix::io::Errno::INTR) => Ok(0),
        result => Ok(result?),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn all_output_is_written_at_the_end() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let console = Console::to_file(File::create(file.path()).unwrap());
        let (near, mut far) = UnixStream::pair().unwrap();
        let thread = spawn(console, near).unwrap();
        let text = "shown\n".repeat(10_000);
        far.write_all(text.as_bytes()).unwrap();
        drop(far);
        thread.join().unwrap();
        let mut written = String::new();
        file.read_to_string(&mut written).unwrap();
        assert_eq!(written, text);
    }
}
