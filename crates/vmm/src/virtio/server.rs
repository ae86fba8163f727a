//! The thread that serves queues of a device.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

use ruse_engine::HaltPoll;
use ruse_memory::GuestRam;
use ruse_virtio::ring::RingError;
use ruse_virtio::{Dma, Handler, Served, Work};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::SharedTransport;
use super::gate::Pass;
use crate::board::Board;
use crate::lifecycle::Phase;
use crate::platform::lock;
use crate::report::Outcome;
use crate::threads::panic_text;

/// One of the queues that a thread serves.
pub(super) struct ServedQueue {
    index: u16,
    /// The queue's doorbell.
    event: OwnedFd,
    handler: Box<dyn Handler>,
    /// No driver has the queue running: the handler's own source of work does not count.
    idle: bool,
    /// Somebody outside may touch the queue's buffers.
    outside: bool,
    /// It is to be served: it was notified, or there was more than it could be served for.
    due: bool,
}

impl ServedQueue {
    /// Queue `index`, with its doorbell. It is looked at once without being notified.
    pub(super) fn new(index: u16, event: OwnedFd, handler: Box<dyn Handler>) -> Self {
        Self { index, event, handler, idle: true, outside: false, due: true }
    }

    /// What says that it is to be served.
    fn sources(&self) -> [BorrowedFd<'_>; 2] {
        let event = self.event.as_fd();
        [event, self.handler.source().filter(|_| !self.idle).unwrap_or(event)]
    }
}

/// Serves some queues of a device. A queue is served after those behind it: what they have set off comes by it at once.
pub(crate) struct Server {
    name: String,
    board: Arc<Board>,
    ram: GuestRam,
    pub(super) function: SharedTransport,
    pub(super) queues: Vec<ServedQueue>,
    halt_poll: HaltPoll,
    /// The device has been taken out.
    pub(super) gone: Arc<AtomicBool>,
}

impl Server {
    /// Serves one queue of the device behind `function`, until `gone` is set.
    pub(super) fn new(
        name: String,
        board: Arc<Board>,
        ram: GuestRam,
        function: SharedTransport,
        gone: Arc<AtomicBool>,
        queue: ServedQueue,
    ) -> Self {
        Self { name, board, ram, function, queues: vec![queue], halt_poll: HaltPoll::default(), gone }
    }

    /// The same, where `change` says what serves each queue.
    #[cfg(test)]
    pub(super) fn with_handlers(mut self, change: &impl Fn(Box<dyn Handler>) -> Box<dyn Handler>) -> Self {
        let queues = self.queues.into_iter();
        self.queues = queues.map(|q| ServedQueue { handler: change(q.handler), ..q }).collect();
        self
    }

    /// Starts the thread, which leaves when the machine has ended or the device is gone.
    pub(crate) fn spawn(mut self) -> io::Result<JoinHandle<()>> {
        Builder::new().name(self.name.clone()).spawn(move || {
            let failed = match catch_unwind(AssertUnwindSafe(|| self.run())) {
                Ok(Ok(())) => return,
                Ok(Err(error)) => format!("a device cannot go on: {error}"),
                Err(panic) => panic_text(&*panic),
            };
            self.board.lifecycle.end(Outcome::Failed { what: failed, vcpu: None });
            self.board.kick_all();
        })
    }

    fn run(&mut self) -> io::Result<()> {
        let board = self.board.clone();
        // Whoever waits for handlers waits for those outside as well.
        let mut kept: Option<Pass> = None;
        while !self.is_gone() {
            if kept.is_some() && board.lifecycle.phase() != Phase::Running {
                (0..self.queues.len()).for_each(|n| self.hold(n));
                kept = None;
            }
            // While the machine is held, what is to be done waits.
            let Some(pass) = kept.take().or_else(|| board.gate.enter(&board.lifecycle, &self.gone)) else {
                break;
            };
            self.serve_all();
            kept = self.queues.iter().any(|queue| queue.outside).then_some(pass);
            // While there is more to be done in one, the others have their turn.
            let due = self.queues.iter().any(|queue| queue.due);
            if !due || self.queues.len() > 1 {
                self.look(due)?;
            }
        }
        if self.is_gone() {
            // No driver is told any more, but those outside are.
            let resets = lock(&self.function).resets();
            self.queues.iter_mut().for_each(|queue| queue.handler.idle(resets));
        }
        Ok(())
    }

    /// The machine is held: takes back what is outside, for good if a driver that is to come knows nothing of it.
    fn hold(&mut self, n: usize) {
        if !self.queues[n].outside {
            return;
        }
        let paused = self.board.lifecycle.phase() == Phase::Paused;
        let index = self.queues[n].index;
        let work = paused.then(|| lock(&self.function).begin(index)).flatten();
        let Some(mut work) = work else { return self.put_down(n) };
        let result = self.queues[n].handler.recall(&mut work, &Dma::new(&self.ram));
        self.give_back(n, work, result);
    }

    /// The queue is not served for now.
    fn put_down(&mut self, n: usize) {
        let resets = lock(&self.function).resets();
        let queue = &mut self.queues[n];
        queue.handler.idle(resets);
        if std::mem::take(&mut queue.outside) {
            let index = queue.index;
            self.board.access_function(&*self.function, |function, access| function.recalled(access, index));
        }
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Looks which queues are notified, or whose handlers have a source of work of their own; waits for one, unless some are
    /// `due` already.
    fn look(&mut self, due: bool) -> io::Result<()> {
        let sources = self.queues.iter().flat_map(ServedQueue::sources);
        let files: Vec<_> = sources.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        let files = RefCell::new(files);
        let look = |time: Option<&Timespec>| poll(&mut files.borrow_mut(), time);
        let now = || look(Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        let looked = if due { now() } else { self.halt_poll.wait(|| now() != Ok(0), || look(None)) };
        match looked {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let woken: Vec<_> = files.into_inner().iter().map(|file| !file.revents().is_empty()).collect();
        for (queue, woken) in self.queues.iter_mut().zip(woken.chunks(2)) {
            queue.due |= woken.contains(&true);
            if woken[0] {
                match rustix::io::read(&queue.event, &mut [0; 8]) {
                    Ok(_) | Err(Errno::INTR | Errno::AGAIN) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    /// Serves for a while what is due, and the queues before it.
    fn serve_all(&mut self) {
        let mut due = false;
        for n in (0..self.queues.len()).rev() {
            due |= std::mem::take(&mut self.queues[n].due);
            if due {
                self.queues[n].due = self.serve(n);
            }
        }
    }

    /// Serves what waits in a queue for a while; says whether there is more.
    fn serve(&mut self, n: usize) -> bool {
        let queue = &mut self.queues[n];
        let work = lock(&self.function).begin(queue.index);
        queue.idle = work.is_none();
        let Some(mut work) = work else {
            self.put_down(n);
            return false;
        };
        let result = queue.handler.serve(&mut work, &Dma::new(&self.ram));
        if queue.handler.take_config_change() {
            self.board.access_function(&*self.function, |function, access| function.config_changed(access));
        }
        if let Some(fault) = queue.handler.take_fault() {
            tracing::error!("{}: {fault}: the machine is paused; when this is mended, resume it", self.name);
            self.board.lifecycle.pause();
            self.board.kick_all();
        }
        self.give_back(n, work, result)
    }

    /// Gives the device its queue back; says whether there is more to be done.
    fn give_back(&mut self, n: usize, work: Work, result: Result<Served, RingError>) -> bool {
        self.queues[n].outside = result.as_ref().is_ok_and(|served| served.outside);
        self.board.access_function(&*self.function, |function, access| function.finish(access, work, result))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::AtomicU32;
    use std::time::{Duration, Instant};

    use ruse_devices::Ring;
    use ruse_devices::pci::PciAddress;
    use ruse_virtio::{Device, Identity, VirtioMmio, features};

    use super::*;
    use crate::fake;

    fn at() -> PciAddress {
        PciAddress::new(8, 0)
    }

    /// Two queues that one thread serves.
    struct Pair;

    impl Device for Pair {
        fn identity(&self) -> Identity {
            Identity { kind: 42, pci_class: 0 }
        }
        fn features(&self) -> u64 {
            features::COMMON
        }
        fn queues(&self) -> Vec<u16> {
            vec![8, 8]
        }
        fn config(&self) -> Vec<u8> {
            Vec::new()
        }
        fn thread(&self, _index: u16) -> u16 {
            0
        }
    }

    /// Counts how often it serves its queue, and may always have more to do.
    #[derive(Clone, Default)]
    struct Counter {
        count: Arc<AtomicU32>,
        more: bool,
    }

    impl Handler for Counter {
        fn serve(&mut self, _work: &mut Work, _dma: &Dma) -> Result<Served, RingError> {
            self.count.fetch_add(1, Ordering::SeqCst);
            Ok(Served { more: self.more, ..Served::default() })
        }
    }

    impl Counter {
        fn await_more_than(&self, count: u32) -> u32 {
            let limit = Instant::now() + Duration::from_secs(60);
            loop {
                let now = self.count.load(Ordering::SeqCst);
                if now > count {
                    return now;
                }
                assert!(Instant::now() < limit, "the queue is not served");
                std::thread::yield_now();
            }
        }
    }

    /// A machine with the pair, whose driver has started, and the pair's only thread.
    fn start(counters: [&Counter; 2]) -> (Arc<Board>, JoinHandle<()>) {
        let (board, _) = fake::board(0, None);
        let mut mmio = VirtioMmio::new(at().id(), 16, Box::new(Pair));
        let core = ruse_virtio::Transport::core_mut(&mut mmio);
        core.set_driver_features(features::VERSION_1);
        core.set_status(11);
        for index in 0..2 {
            let start = 0x1000 * u64::from(index + 1);
            core.set_layout(index, |layout| {
                (layout.size, layout.descriptors, layout.driver, layout.device) =
                    (8, start, start + 0x400, start + 0x800);
            });
            core.enable(index);
        }
        core.set_status(15);
        let handlers = counters.map(|counter| Box::new(counter.clone()) as Box<dyn Handler>).into();
        let function: SharedTransport = Arc::new(Mutex::new(mmio));
        let ram = GuestRam::new(1 << 20).unwrap();
        let mut servers = super::super::servers(&board, &ram, at(), "pair", &function, handlers).unwrap();
        assert_eq!(servers.len(), 1);
        (board, servers.remove(0).spawn().unwrap())
    }

    fn end(board: &Board, thread: JoinHandle<()>) {
        board.lifecycle.end(Outcome::Stopped);
        board.bells.ring_all();
        thread.join().unwrap();
    }

    #[test]
    fn a_queue_is_served_after_those_behind_it() {
        let [first, second] = [Counter::default(), Counter::default()];
        let (board, thread) = start([&first, &second]);
        let (before, at_start) = (first.await_more_than(0), second.await_more_than(0));
        board.bells.ring(Ring { source: at().id(), number: 0 });
        let alone = first.await_more_than(before);
        assert_eq!(second.count.load(Ordering::SeqCst), at_start, "nothing is new in it");
        board.bells.ring(Ring { source: at().id(), number: 1 });
        second.await_more_than(at_start);
        first.await_more_than(alone);
        end(&board, thread);
    }

    #[test]
    fn a_queue_with_always_more_leaves_others_their_turn() {
        let (greedy, other) = (Counter { more: true, ..Counter::default() }, Counter::default());
        let (board, thread) = start([&greedy, &other]);
        for _ in 0..10 {
            let count = other.await_more_than(0);
            greedy.await_more_than(greedy.count.load(Ordering::SeqCst));
            board.bells.ring(Ring { source: at().id(), number: 1 });
            other.await_more_than(count);
        }
        end(&board, thread);
    }
}
