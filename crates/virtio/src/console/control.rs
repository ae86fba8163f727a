//! The control queues: which ports there are, and who has them open (virtio 1.2, 5.3.6.2).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};

use super::port::{SharedPort, lock, quiet, wake};
use crate::core::Work;
use crate::device::{BATCH, Handler, Served, serve};
use crate::dma::Dma;
use crate::ring::RingError;

/// Bytes of a message without a name.
const MESSAGE: usize = 8;
/// Messages that wait for the driver's buffers; of one that asks for more without taking any, no more is heard.
const MOST_MESSAGES: usize = 1024;

/// What a message is about.
mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const DEVICE_ADD: u16 = 1;
    pub const PORT_READY: u16 = 3;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

/// What both control queues and the ports have in common.
pub(super) struct Control {
    names: Vec<String>,
    /// The host has them open.
    open: Vec<bool>,
    /// The driver knows of them.
    ready: Vec<bool>,
    messages: VecDeque<Vec<u8>>,
    /// Readable when there are messages.
    wake: Arc<OwnedFd>,
    resets: u64,
}

impl Control {
    pub(super) fn new(names: Vec<String>) -> io::Result<Self> {
        let count = names.len();
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            names,
            open: vec![false; count],
            ready: vec![false; count],
            messages: VecDeque::new(),
            wake: Arc::new(wake),
            resets: 0,
        })
    }

    /// The handlers of the queue to the driver and of that from it.
    pub(super) fn handlers(
        control: Arc<Mutex<Self>>,
        ports: Vec<SharedPort>,
    ) -> io::Result<[Box<dyn Handler>; 2]> {
        let wake = lock(&control).wake.clone();
        let to_driver = ToDriver { control: control.clone(), wake, starved: false };
        Ok([Box::new(to_driver), Box::new(FromDriver { control, ports })])
    }

    fn follow(&mut self, resets: u64) {
        if resets != self.resets {
            self.resets = resets;
            self.messages.clear();
            self.ready.fill(false);
        }
    }

    fn send(&mut self, port: u32, event: u16, value: u16, name: &str) {
        if self.messages.len() < MOST_MESSAGES {
            let words =
                [&port.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes(), name.as_bytes()];
            self.messages.push_back(words.concat());
            wake(&self.wake);
        }
    }

    /// The host has opened or closed a port.
    pub(super) fn set_open(&mut self, port: u32, open: bool) {
        let before = std::mem::replace(&mut self.open[port as usize], open);
        if before != open && self.ready[port as usize] {
            self.send(port, event::PORT_OPEN, open.into(), "");
        }
    }

    /// A message of the driver's; gives the port that it has opened or closed.
    fn message(&mut self, port: u32, event: u16, value: u16) -> Option<(usize, bool)> {
        if (event, value) == (event::DEVICE_READY, 1) {
            (0..self.names.len() as u32).for_each(|port| self.send(port, event::DEVICE_ADD, 1, ""));
            return None;
        }
        let place = usize::try_from(port).ok().filter(|&port| port < self.names.len())?;
        match event {
            event::PORT_READY if value == 1 => {
                self.ready[place] = true;
                let name = self.names[place].clone();
                self.send(port, event::PORT_NAME, 1, &name);
                if self.open[place] {
                    self.send(port, event::PORT_OPEN, 1, "");
                }
                None
            }
            event::PORT_OPEN => Some((place, value != 0)),
            _ => None,
        }
    }
}

/// Serves the queue to the driver.
struct ToDriver {
    control: Arc<Mutex<Control>>,
    wake: Arc<OwnedFd>,
    /// There are messages, but no buffers for them.
    starved: bool,
}

impl Handler for ToDriver {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        let mut control = lock(&self.control);
        control.follow(work.resets);
        quiet(&self.wake);
        self.starved = false;
        let mut more = true;
        for _ in 0..BATCH {
            let Some(message) = control.messages.front() else {
                more = false;
                break;
            };
            match work.queue.pop(dma)? {
                Some(chain) => {
                    chain.write(dma, 0, message)?;
                    work.queue.push(dma, &chain, message.len() as u32)?;
                    control.messages.pop_front();
                }
                None if work.queue.enable_notifications(dma)? => {}
                None => {
                    (self.starved, more) = (true, false);
                    break;
                }
            }
        }
        Ok(Served { interrupt: work.queue.needs_interrupt(dma)?, more, ..Served::default() })
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        (!self.starved).then(|| self.wake.as_fd())
    }

    fn idle(&mut self, resets: u64) {
        lock(&self.control).follow(resets);
    }
}

/// Serves the queue from the driver.
struct FromDriver {
    control: Arc<Mutex<Control>>,
    ports: Vec<SharedPort>,
}

impl Handler for FromDriver {
    fn serve(&mut self, work: &mut Work, dma: &Dma) -> Result<Served, RingError> {
        lock(&self.control).follow(work.resets);
        serve(&mut work.queue, dma, |chain| {
            let mut bytes = [0; MESSAGE];
            chain.read(dma, 0, &mut bytes)?;
            let [p0, p1, p2, p3, e0, e1, v0, v1] = bytes;
            let (port, event) = (u32::from_le_bytes([p0, p1, p2, p3]), u16::from_le_bytes([e0, e1]));
            let opened = lock(&self.control).message(port, event, u16::from_le_bytes([v0, v1]));
            if let Some((place, open)) = opened {
                lock(&self.ports[place]).set_guest_open(work.resets, open);
            }
            Ok(0)
        })
    }

    fn idle(&mut self, resets: u64) {
        lock(&self.control).follow(resets);
    }
}
