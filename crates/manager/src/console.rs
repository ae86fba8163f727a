//! The serial console for any number of viewers: what came before, then what comes, and what they type.
//!
//! The guest's output goes into a buffer of limited size from which each viewer's thread takes it at its own pace. A
//! viewer who is too slow misses what is in the middle; nobody holds up the guest.

use std::collections::VecDeque;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use ruse_vmm::{Console, ConsoleInput, ConsoleOutput};
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};

/// Bytes of output that are kept for viewers who come later.
pub const SCROLLBACK: usize = 256 << 10;
/// Most viewers at a time.
const MOST_VIEWERS: usize = 16;
/// Most bytes that are given to or taken from a viewer at a time.
const CHUNK: usize = 4096;

/// A console that viewers can come to.
pub struct ConsoleHub {
    state: Mutex<State>,
    changed: Condvar,
    typed: Mutex<PipeWriter>,
}

#[derive(Default)]
struct State {
    /// The last output.
    bytes: VecDeque<u8>,
    /// Bytes of output that there were before those.
    before: u64,
    /// There will be no more.
    closed: bool,
    viewers: usize,
}

impl State {
    fn publish(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
        let surplus = self.bytes.len().saturating_sub(SCROLLBACK);
        self.bytes.drain(..surplus);
        self.before += surplus as u64;
    }

    /// Takes what follows `position`, which moves on.
    fn take(&self, position: &mut u64, out: &mut Vec<u8>) {
        let from = position.saturating_sub(self.before) as usize;
        out.extend(self.bytes.iter().skip(from).take(CHUNK));
        *position = self.before + (from + out.len()) as u64;
    }
}

impl ConsoleHub {
    /// A hub around a console of the program's own, which may be none; and what the machine is to have as its console.
    pub fn around(local: Console) -> io::Result<(Arc<Self>, Console)> {
        let (reader, writer) = io::pipe()?;
        let hub =
            Arc::new(Self { state: Mutex::default(), changed: Condvar::new(), typed: Mutex::new(writer) });
        let input = SharedInput::around(local.input, reader)?;
        let output = SharedOutput { hub: hub.clone(), local: local.output };
        Ok((hub, Console { input: Some(input), output: Some(Box::new(output)) }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, bytes: &[u8]) {
        self.lock().publish(bytes);
        self.changed.notify_all();
    }

    /// Lets a viewer in, with threads of its own.
    pub(crate) fn admit(self: &Arc<Self>, viewer: UnixStream) -> io::Result<()> {
        let mut state = self.lock();
        if state.viewers >= MOST_VIEWERS || state.closed {
            return viewer.shutdown(Shutdown::Both);
        }
        state.viewers += 1;
        let position = state.before;
        drop(state);
        let keyboard = viewer.try_clone()?;
        let hub = self.clone();
        Builder::new().name("ruse-viewer".into()).spawn(move || hub.show(viewer, position))?;
        let hub = self.clone();
        Builder::new().name("ruse-typist".into()).spawn(move || hub.listen(keyboard))?;
        Ok(())
    }

    /// Shows a viewer all output.
    fn show(&self, mut viewer: UnixStream, mut position: u64) {
        let mut bytes = Vec::with_capacity(CHUNK);
        loop {
            let mut state = self.lock();
            bytes.clear();
            loop {
                state.take(&mut position, &mut bytes);
                if !bytes.is_empty() || state.closed {
                    break;
                }
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            drop(state);
            if bytes.is_empty() || viewer.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = viewer.shutdown(Shutdown::Both);
        self.lock().viewers -= 1;
        self.changed.notify_all();
    }

    /// Takes what a viewer types. One who has gone is noticed here, even if the guest says nothing.
    fn listen(&self, mut viewer: UnixStream) {
        let mut bytes = [0; CHUNK];
        while let Ok(count @ 1..) = viewer.read(&mut bytes) {
            let mut typed = self.typed.lock().unwrap_or_else(PoisonError::into_inner);
            if typed.write_all(&bytes[..count]).is_err() {
                return;
            }
        }
    }

    /// The machine has ended: viewers see the rest, for which they have so much time, and are sent away.
    pub(crate) fn close(&self, patience: Duration) {
        let until = Instant::now() + patience;
        let mut state = self.lock();
        state.closed = true;
        self.changed.notify_all();
        while state.viewers > 0 {
            let Some(rest) = until.checked_duration_since(Instant::now()) else { return };
            state = self.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The guest's output, for the program's own console and all viewers.
struct SharedOutput {
    hub: Arc<ConsoleHub>,
    local: Option<Box<dyn ConsoleOutput>>,
}

impl ConsoleOutput for SharedOutput {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.local.as_ref()?.fd()
    }
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = match &mut self.local {
            Some(local) => local.write(bytes)?,
            None => bytes.len(),
        };
        self.hub.publish(&bytes[..written]);
        Ok(written)
    }
    fn is_held(&self) -> bool {
        self.local.as_ref().is_some_and(|local| local.is_held())
    }
}

/// What viewers type, together with the program's own input.
struct SharedInput {
    /// Readable when one of the others is.
    epoll: OwnedFd,
    typed: PipeReader,
    local: Option<Box<dyn ConsoleInput>>,
}

impl SharedInput {
    fn around(local: Option<Box<dyn ConsoleInput>>, typed: PipeReader) -> io::Result<Box<dyn ConsoleInput>> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = epoll::EventData::new_u64(0);
        epoll::add(&epoll, &typed, data, epoll::EventFlags::IN)?;
        if let Some(local) = local {
            // A regular file is always readable, which epoll does not take: it is read alone.
            if epoll::add(&epoll, local.fd(), data, epoll::EventFlags::IN).is_err() {
                return Ok(local);
            }
            return Ok(Box::new(Self { epoll, typed, local: Some(local) }));
        }
        Ok(Box::new(Self { epoll, typed, local: None }))
    }
}

impl ConsoleInput for SharedInput {
    fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    fn read(&mut self, to_guest: &mut Vec<u8>) -> io::Result<bool> {
        if let Some(local) = &mut self.local
            && is_readable(local.fd())
            && !local.read(to_guest)?
        {
            epoll::delete(&self.epoll, local.fd())?;
            self.local = None;
        }
        if is_readable(self.typed.as_fd()) {
            let mut bytes = [0; CHUNK];
            let count = self.typed.read(&mut bytes)?;
            to_guest.extend(&bytes[..count]);
        }
        Ok(true)
    }

    fn has_keys(&self) -> bool {
        self.local.as_ref().is_some_and(|local| local.has_keys())
    }
}

fn is_readable(fd: BorrowedFd) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(n) if n > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn viewer(hub: &Arc<ConsoleHub>) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        hub.admit(theirs).unwrap();
        ours
    }

    fn read(viewer: &mut UnixStream, count: usize) -> String {
        let mut bytes = vec![0; count];
        viewer.read_exact(&mut bytes).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn viewers_see_what_came_before_and_what_comes() {
        let (hub, mut console) = ConsoleHub::around(Console::default()).unwrap();
        let output = console.output.as_mut().unwrap();
        assert_eq!(output.write(b"before ").unwrap(), 7);
        let (mut one, mut two) = (viewer(&hub), viewer(&hub));
        assert_eq!((read(&mut one, 7), read(&mut two, 7)), ("before ".into(), "before ".into()));
        output.write(b"now").unwrap();
        assert_eq!((read(&mut one, 3), read(&mut two, 3)), ("now".into(), "now".into()));
        output.write(b" and the end").unwrap();
        hub.close(Duration::from_secs(60));
        let mut rest = String::new();
        one.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, " and the end");
    }

    #[test]
    fn what_viewers_type_reaches_the_guest_beside_the_programs_own_input() {
        let (reader, mut writer) = io::pipe().unwrap();
        struct Pipe(PipeReader);
        impl ConsoleInput for Pipe {
            fn fd(&self) -> BorrowedFd<'_> {
                self.0.as_fd()
            }
            fn read(&mut self, to_guest: &mut Vec<u8>) -> io::Result<bool> {
                let mut bytes = [0; 64];
                let count = self.0.read(&mut bytes)?;
                to_guest.extend(&bytes[..count]);
                Ok(count > 0)
            }
        }
        let local = Console { input: Some(Box::new(Pipe(reader))), output: None };
        let (hub, mut console) = ConsoleHub::around(local).unwrap();
        let input = console.input.as_mut().unwrap();
        let mut wait = |count: usize| {
            let mut bytes = Vec::new();
            while bytes.len() < count {
                let mut fds = [PollFd::from_borrowed_fd(input.fd(), PollFlags::IN)];
                poll(&mut fds, None).unwrap();
                assert!(input.read(&mut bytes).unwrap(), "there may always be more");
            }
            String::from_utf8(bytes).unwrap()
        };
        writer.write_all(b"own").unwrap();
        assert_eq!(wait(3), "own");
        let mut one = viewer(&hub);
        one.write_all(b"viewer's").unwrap();
        assert_eq!(wait(8), "viewer's");
        drop(writer);
        one.write_all(b"!").unwrap();
        assert_eq!(wait(1), "!", "the end of the program's input is not the end of the viewers'");
    }

    #[test]
    fn a_viewer_who_does_not_read_holds_up_nobody() {
        let (hub, mut console) = ConsoleHub::around(Console::default()).unwrap();
        let output = console.output.as_mut().unwrap();
        let mut slow = viewer(&hub);
        for number in 0..200_000 {
            output.write(format!("{number:09}\n").as_bytes()).unwrap();
        }
        let mut late = viewer(&hub);
        let seen = read(&mut late, SCROLLBACK / 10 * 10);
        assert!(seen.contains("\n000199998\n"), "the last output is kept");
        slow.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let (mut all, mut bytes) = (Vec::new(), [0; 65536]);
        while !all.ends_with(b"000199999\n") {
            let count = slow.read(&mut bytes).unwrap();
            all.extend(&bytes[..count]);
        }
        assert!(all.len() < 2_000_000, "what is too much is left out");
    }

    #[test]
    fn too_many_viewers_are_sent_away() {
        let (hub, _console) = ConsoleHub::around(Console::default()).unwrap();
        let _viewers: Vec<_> = (0..MOST_VIEWERS).map(|_| viewer(&hub)).collect();
        assert_eq!(viewer(&hub).read(&mut [0]).unwrap(), 0);
    }
}
