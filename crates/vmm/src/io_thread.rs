//! The I/O thread: timers, serial input and output, resets and the end.

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use ruse_loader::LoadError;
use ruse_memory::GuestRam;
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::io::Errno;

use crate::board::{Board, OUTPUT_SLOT};
use crate::console::Console;
use crate::dump::CpuDump;
use crate::lifecycle::Phase;
use crate::panic_watch::PanicWatch;
use crate::report::Outcome;
use crate::threads::panic_text;

/// A pipe that is writable takes so many bytes without a wait (PIPE_BUF).
const WRITE_CHUNK: usize = 4096;
/// Most input with keys in it that waits for the guest; what is typed then is lost.
const INPUT_LIMIT: usize = 4096;
/// Output that waits for the outside; with more the guest's transmitter fills up.
const OUTPUT_LIMIT: usize = 16 * 1024;

/// How long a stopped machine waits for a reader of its last output, in milliseconds.
const STOP_PATIENCE_MS: i64 = 500;

/// What an event is about.
mod token {
    pub(super) const TIMER: u64 = 0;
    pub(super) const WAKE: u64 = 1;
    pub(super) const INPUT: u64 = 2;
    pub(super) const OUTPUT: u64 = 3;
}

/// Loads the guest's system into RAM anew.
pub(crate) type Reload = Box<dyn Fn() -> Result<(), LoadError> + Send>;

/// The I/O thread's own things.
pub(crate) struct IoThread {
    board: Arc<Board>,
    ram: GuestRam,
    reload: Reload,
    console: Console,
    epoll: OwnedFd,
    /// Input that COM1 has no room for yet.
    input: VecDeque<u8>,
    input_watch: Watch,
    /// Output that the outside has no room for yet.
    output: VecDeque<u8>,
    output_watch: Watch,
    watches: [PanicWatch; 4],
}

/// How the I/O thread waits for a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watch {
    /// Not.
    Off,
    /// By epoll.
    On,
    /// The file is always ready, as epoll sees regular files.
    Always,
}

impl IoThread {
    /// Prepares the thread.
    pub(crate) fn new(
        board: Arc<Board>,
        ram: GuestRam,
        console: Console,
        reload: Reload,
    ) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (fd, token) in [(board.alarm.fd(), token::TIMER), (board.lifecycle.wake_fd(), token::WAKE)] {
            epoll::add(&epoll, fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN)?;
        }
        Ok(Self {
            board,
            ram,
            reload,
            console,
            epoll,
            input: VecDeque::new(),
            input_watch: Watch::Off,
            output: VecDeque::new(),
            output_watch: Watch::Off,
            watches: Default::default(),
        })
    }

    /// Starts the thread.
    pub(crate) fn spawn(mut self) -> io::Result<JoinHandle<()>> {
        Builder::new().name("ruse-io".into()).spawn(move || {
            let lifecycle = self.board.lifecycle.clone();
            let failed = match catch_unwind(AssertUnwindSafe(|| self.run())) {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(format!("the I/O thread cannot go on: {error}")),
                Err(panic) => Some(panic_text(&*panic)),
            };
            if let Some(what) = failed {
                lifecycle.end(Outcome::Failed { what, vcpu: None });
                self.board.kick_all();
            }
            lifecycle.finish();
        })
    }

    fn run(&mut self) -> io::Result<()> {
        loop {
            match self.board.lifecycle.phase() {
                Phase::Ended => {
                    self.end();
                    return Ok(());
                }
                Phase::Resetting => {
                    self.reset();
                    continue;
                }
                Phase::Running => self.board.alarm.rearm(),
                Phase::Paused => {}
            }
            self.watch_input()?;
            self.watch_output()?;
            self.wait()?;
        }
    }

    /// Waits for events and handles them.
    fn wait(&mut self) -> io::Result<()> {
        let mut space = [MaybeUninit::<epoll::Event>::uninit(); 4];
        // A file that is always ready must not keep the others waiting.
        let ready = self.input_watch == Watch::Always && self.wants_input();
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let events = match epoll::wait(&self.epoll, &mut space, ready.then_some(&now)) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let tokens: Vec<_> = events.iter().map(|event| { event.data }.u64()).collect();
        if ready {
            self.read_input();
        }
        for token in tokens {
            match token {
                token::TIMER => self.timer(),
                token::WAKE => self.board.lifecycle.clear_wake(),
                token::INPUT => self.read_input(),
                _ => self.write_output(),
            }
        }
        self.feed_input();
        Ok(())
    }

    /// The alarm has gone off. While the machine is held nothing ticks; its resumption sets the alarm again.
    fn timer(&mut self) {
        self.board.alarm.expired();
        let held = self.board.lifecycle.phase() != Phase::Running;
        if held || self.board.alarm.is_due(OUTPUT_SLOT, self.board.clock.now_ns()) {
            self.board.alarm.set(OUTPUT_SLOT, None);
            self.take_output(OUTPUT_LIMIT);
            self.write_output_if_ready();
        }
        if !held {
            self.board.tick();
        }
    }

    fn wants_input(&self) -> bool {
        self.console.input.as_ref().is_some_and(|input| self.input.is_empty() || input.has_keys())
    }

    /// Watches the input while there is nothing left of what it gave, or something may come that is not for the guest.
    fn watch_input(&mut self) -> io::Result<()> {
        let wanted = self.wants_input();
        if let Some(input) = &self.console.input {
            set_watch(&self.epoll, input.fd(), token::INPUT, wanted, &mut self.input_watch)?;
        }
        Ok(())
    }

    fn read_input(&mut self) {
        let Some(input) = &mut self.console.input else { return };
        let mut bytes = Vec::new();
        let goes_on = match input.read(&mut bytes) {
            Ok(goes_on) => goes_on,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => true,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => true,
            Err(error) => {
                tracing::debug!(%error, "input ends");
                false
            }
        };
        self.input.extend(bytes);
        if input.has_keys() {
            self.input.truncate(INPUT_LIMIT);
        }
        if !goes_on {
            if self.input_watch == Watch::On {
                let _ = epoll::delete(&self.epoll, input.fd());
            }
            self.input_watch = Watch::Off;
            self.console.input = None;
        }
    }

    /// Gives COM1 as much input as it has room for.
    fn feed_input(&mut self) {
        while !self.input.is_empty() {
            let waiting = self.input.make_contiguous();
            let taken =
                self.board.with_serial(0, |serial, access| serial.queue_input(access, waiting)).unwrap_or(0);
            self.input.drain(..taken);
            if taken > 0 {
                continue;
            }
            self.board.set_input_waits(true);
            // The guest may have made room before it could know that someone waits.
            if self.board.with_serial(0, |serial, _| serial.input_space()).unwrap_or(0) == 0 {
                return;
            }
        }
    }

    /// Takes what the guest has sent, of COM1 only while less than `limit` bytes wait.
    fn take_output(&mut self, limit: usize) {
        for port in 0..self.watches.len() {
            if port == 0 && self.output.len() >= limit {
                continue;
            }
            let bytes = self.board.with_serial(port, |serial, access| serial.take_output(access));
            let bytes = bytes.unwrap_or_default();
            self.watches[port].feed(&bytes);
            if port == 0 && self.console.output.is_some() {
                self.output.extend(bytes);
            }
        }
    }

    /// Writes at once where that does not block; else epoll will say when.
    fn write_output_if_ready(&mut self) {
        let Some(output) = &self.console.output else { return };
        if self.output_watch != Watch::On && output.fd().is_none_or(|fd| wait_writable(fd, Some(0))) {
            self.write_output();
        }
    }

    /// Writes a piece of the output.
    fn write_output(&mut self) {
        let Some(output) = &mut self.console.output else { return };
        if output.is_held() || self.output.is_empty() {
            return;
        }
        let (bytes, _) = self.output.as_slices();
        match output.write(&bytes[..bytes.len().min(WRITE_CHUNK)]) {
            Ok(written) => drop(self.output.drain(..written)),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => self.output_fails(&error),
        }
        // What the guest could not get rid of may follow.
        if self.output.len() < OUTPUT_LIMIT && self.board.with_serial(0, |s, _| s.has_output()) == Some(true)
        {
            self.board.alarm.bring_forward(OUTPUT_SLOT, self.board.clock.now_ns());
        }
    }

    /// Nobody listens any more; the guest goes on without.
    fn output_fails(&mut self, error: &io::Error) {
        tracing::warn!(%error, "output has ended; the guest runs on without");
        if let (Watch::On, Some(fd)) = (self.output_watch, self.console.output.as_ref().and_then(|o| o.fd()))
        {
            let _ = epoll::delete(&self.epoll, fd);
        }
        self.output_watch = Watch::Off;
        self.console.output = None;
        self.output.clear();
    }

    /// Watches for room while there is output.
    fn watch_output(&mut self) -> io::Result<()> {
        let Some(output) = &self.console.output else { return Ok(()) };
        let wanted = !self.output.is_empty() && !output.is_held();
        match output.fd() {
            Some(fd) => set_watch(&self.epoll, fd, token::OUTPUT, wanted, &mut self.output_watch)?,
            None => self.output_watch = Watch::Always,
        }
        if self.output_watch == Watch::Always {
            while self.console.output.as_ref().is_some_and(|o| !o.is_held()) && !self.output.is_empty() {
                self.write_output();
            }
        }
        Ok(())
    }

    /// Writes all that is left. A reader who does not read is waited for, but not if the user wants to leave.
    fn drain_output(&mut self) {
        let patience = self.board.lifecycle.is_stopped().then_some(STOP_PATIENCE_MS);
        self.take_output(usize::MAX);
        while !self.output.is_empty() {
            let Some(output) = &self.console.output else { return };
            let ready = output.fd().is_none_or(|fd| wait_writable(fd, patience));
            if output.is_held() || !ready {
                return;
            }
            self.write_output();
        }
    }

    /// The line of a panic that the guest has printed since the last reset.
    fn panic_line(&mut self) -> Option<String> {
        self.watches.each_mut().map(PanicWatch::take).into_iter().flatten().next()
    }

    /// Resets the machine, or ends it if its system panicked.
    fn reset(&mut self) {
        self.board.lifecycle.wait_parked();
        self.take_output(usize::MAX);
        if let Some(message) = self.panic_line() {
            let (vcpu, state) = self.board.lifecycle.reset_by();
            let dump = state.map(|state| Box::new(CpuDump::new(*state, &self.ram)));
            self.board.lifecycle.end(Outcome::GuestPanic { message, vcpu, dump });
            return;
        }
        tracing::info!("the machine is reset");
        self.board.gate.wait_empty();
        self.board.reset();
        match (self.reload)() {
            Ok(()) => self.board.lifecycle.reset_done(),
            Err(error) => {
                let what = format!("cannot load the guest anew: {error}");
                self.board.lifecycle.end(Outcome::Failed { what, vcpu: None });
            }
        }
    }

    fn end(&mut self) {
        self.board.lifecycle.wait_parked();
        self.drain_output();
        let panicked = self.panic_line();
        let state = self.board.lifecycle.reset_by().1;
        self.board.lifecycle.amend(|outcome| match (outcome, panicked) {
            // The device told of it; what the system has printed says more.
            (Outcome::GuestPanic { message, vcpu, dump: None }, printed) => {
                let dump = state.map(|state| Box::new(CpuDump::new(*state, &self.ram)));
                Outcome::GuestPanic { message: printed.unwrap_or(message), vcpu, dump }
            }
            // A system that reboots after a panic may do so by a triple fault.
            (Outcome::TripleFault { vcpu, dump }, Some(message)) => {
                Outcome::GuestPanic { message, vcpu, dump: Some(dump) }
            }
            (outcome, _) => outcome,
        });
    }
}

/// Adds a file to what is waited for, or takes it away.
fn set_watch(epoll: &OwnedFd, fd: BorrowedFd, token: u64, wanted: bool, watch: &mut Watch) -> io::Result<()> {
    let kind = if token == token::OUTPUT { epoll::EventFlags::OUT } else { epoll::EventFlags::IN };
    match (*watch, wanted) {
        (Watch::Off, true) => match epoll::add(epoll, fd, epoll::EventData::new_u64(token), kind) {
            Ok(()) => *watch = Watch::On,
            Err(Errno::PERM) => *watch = Watch::Always,
            Err(error) => return Err(error.into()),
        },
        (Watch::On, false) => {
            epoll::delete(epoll, fd)?;
            *watch = Watch::Off;
        }
        _ => {}
    }
    Ok(())
}

/// Waits until a file is writable (or broken), for so many milliseconds; `None` is for ever.
fn wait_writable(fd: BorrowedFd, milliseconds: Option<i64>) -> bool {
    let limit = milliseconds.map(|ms| Timespec { tv_sec: ms / 1000, tv_nsec: ms % 1000 * 1_000_000 });
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
    matches!(poll(&mut fds, limit.as_ref()), Ok(n) if n > 0)
}
