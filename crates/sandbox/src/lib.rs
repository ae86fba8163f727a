//! A process that runs user code over pages of a memory file, and reports its traps.
//!
//! A [`Sandbox`] is an address space that is empty but for a few pages of its own ([`layout`]) and what the monitor maps into it
//! from one file. The monitor sets registers and lets code run there, directly on the host's CPU, until it traps: by a system
//! call, an exception, or because the monitor asks ([`Kicker`]). The code can make no system call, and reaches no memory but
//! what is mapped for it.
//!
//! Needs Linux 5.11 on x86-64 with FSGSBASE, and leave to start processes and to filter their system calls; nothing of it
//! needs privileges.

mod filter;
mod frame;
pub mod layout;
mod place;
mod start;
mod stub;

use std::{
    collections::HashMap,
    fs::File,
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    process::Child,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use ruse_arch::paging::is_canonical;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
    mm::{MapFlags, ProtFlags},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
    rand::{GetRandomFlags, getrandom},
    thread::futex,
};

use self::{
    frame::Frame,
    layout::{CALLS, Call, ORDERS_SIZE, Orders, PAGE, Report, STUB_SIZE, USER_END, USER_START},
    start::{SHARED_SIZE, Script},
    stub::Stub,
};
pub use self::{
    frame::{Registers, Trap},
    place::Place,
};

/// The signal by which the monitor stops user code.
pub const KICK: i32 = libc::SIGUSR1;

/// Why user code cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The host lacks something.
    #[error("user code cannot run in a process of its own: {0}")]
    Unsupported(&'static str),
    /// The host refused to make the process.
    #[error("cannot make a process for user code: {0}")]
    Start(#[source] io::Error),
    /// The process ended, and the registers of user code with it.
    #[error("the process of user code has ended")]
    Ended,
    /// The host refused to change the mappings, or has ended the process while it was stopped. User code has not run since its
    /// last trap, and the registers are those of then.
    #[error("the host refused to map memory for user code, or has ended its process")]
    Refused,
    /// The range cannot be mapped.
    #[error("nothing can be mapped at {0:#x}")]
    Range(u64),
    /// There is no room for a copy.
    #[error("there is no room for more copied pages")]
    Copies,
}

/// What user code may do with a page beside reading it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rights {
    /// Write to it.
    pub write: bool,
    /// Execute it.
    pub execute: bool,
}

/// A process for user code. It belongs to the thread that made it, and ends with it.
pub struct Sandbox {
    child: Process,
    stub: Stub,
    shared: Shared,
    listener: OwnedFd,
    kicker: Arc<Kicker>,
    /// Calls to be made before user code goes on.
    queue: Vec<Call>,
    order: u32,
    /// The stop that is to be answered.
    stop: u64,
    frame: Frame,
    thread: u32,
    /// The host's CPU that it is kept on.
    cpu: Option<usize>,
    fs_base: u64,
    gs_base: u64,
    /// The shared memory's file, behind which the copied pages lie.
    file: File,
    /// Their numbers, by address.
    copies: HashMap<u64, u64>,
    /// Numbers that are free again.
    free: Vec<u64>,
}

impl Sandbox {
    /// Makes a process over the pages of `ram`. Takes about a millisecond.
    pub fn new(ram: BorrowedFd<'_>) -> Result<Self, SandboxError> {
        if !has_fsgsbase() {
            return Err(SandboxError::Unsupported("the host does not let programs change FS and GS bases"));
        }
        Self::start(ram).map_err(SandboxError::Start)
    }

    /// Whether there can be such processes on this host.
    ///
    /// # Errors
    /// As [`Sandbox::new`]: why not.
    pub fn probe() -> Result<(), SandboxError> {
        let file = memfd_create("probe", MemfdFlags::CLOEXEC).map_err(|e| SandboxError::Start(e.into()))?;
        Self::new(file.as_fd()).map(drop)
    }

    fn start(ram: BorrowedFd<'_>) -> io::Result<Self> {
        let stub = Stub { base: random_base()? };
        let file = File::from(memfd_create("ruse-user-shared", MemfdFlags::CLOEXEC)?);
        file.set_len(SHARED_SIZE)?;
        let mut shared = Shared::new(&file)?;
        shared.orders().parent = std::process::id();
        let (child, socket) = start::spawn(stub, ram, &file)?;
        let child = Process(child);
        let pidfd = pidfd_open(Pid::from_child(&child.0), PidfdFlags::empty())?;
        let script = Script::new(stub);
        shared.orders().data[..script.data.len()].copy_from_slice(&script.data);
        assert!(script.calls.len() <= CALLS, "one order");
        shared.order(1, &script.calls);
        let listener = start::receive(&socket)?;
        let mut sandbox = Self {
            child,
            stub,
            frame: Frame::none(shared.report_ptr().cast()),
            shared,
            listener,
            kicker: Arc::new(Kicker { pidfd, pending: AtomicBool::new(false) }),
            queue: Vec::new(),
            order: 1,
            stop: 0,
            thread: 0,
            cpu: None,
            fs_base: 0,
            gs_base: 0,
            file,
            copies: HashMap::new(),
            free: Vec::new(),
        };
        // The thread's first trap says that it is there; no user code has run before.
        let stop = sandbox.receive().map_err(io::Error::other)?;
        sandbox.trap(&stop).map_err(io::Error::other)?;
        sandbox.thread = sandbox.shared.report().thread;
        Ok(sandbox)
    }

    /// Makes pages of the file accessible before user code goes on. What was there before is replaced.
    ///
    /// # Errors
    /// [`SandboxError::Range`] if it is not whole pages of user space, or where the sandbox itself lies.
    pub fn map(&mut self, address: u64, size: u64, offset: u64, rights: Rights) -> Result<(), SandboxError> {
        self.check(address, size)?;
        let mut prot = libc::PROT_READ;
        prot |= if rights.write { libc::PROT_WRITE } else { 0 };
        prot |= if rights.execute { libc::PROT_EXEC } else { 0 };
        let mut flags = libc::MAP_SHARED | libc::MAP_FIXED;
        if size <= POPULATE {
            flags |= libc::MAP_POPULATE;
        }
        let args = [address, size, prot as u64, flags as u64, start::RAM, offset];
        self.forget_copies(address, size);
        self.queue.push(Call::new(libc::SYS_mmap, args));
        Ok(())
    }

    /// Makes a page with these bytes executable before user code goes on, in place of one of the file.
    ///
    /// # Errors
    /// As [`Sandbox::map`], and [`SandboxError::Copies`].
    pub fn map_copy(&mut self, address: u64, bytes: &[u8]) -> Result<(), SandboxError> {
        self.check(address, PAGE)?;
        self.forget_copies(address, PAGE);
        let new = (self.copies.len() + self.free.len()) as u64;
        let slot = self.free.pop().unwrap_or(new);
        if slot >= MOST_COPIES {
            return Err(SandboxError::Copies);
        }
        let offset = SHARED_SIZE + slot * PAGE;
        self.file.write_all_at(&bytes[..PAGE as usize], offset).map_err(|_| SandboxError::Copies)?;
        self.copies.insert(address, slot);
        let (prot, flags) = (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_SHARED | libc::MAP_FIXED);
        let args = [address, PAGE, prot as u64, flags as u64, start::SHARED, offset];
        self.queue.push(Call::new(libc::SYS_mmap, args));
        Ok(())
    }

    /// Makes pages inaccessible before user code goes on.
    ///
    /// # Errors
    /// As [`Sandbox::map`].
    pub fn unmap(&mut self, address: u64, size: u64) -> Result<(), SandboxError> {
        self.check(address, size)?;
        self.forget_copies(address, size);
        self.queue.push(Call::new(libc::SYS_munmap, [address, size]));
        Ok(())
    }

    /// Makes everything inaccessible before user code goes on.
    pub fn clear(&mut self) {
        let own = self.own_pages();
        self.forget_copies(0, u64::MAX);
        self.queue.clear();
        self.queue.push(Call::new(libc::SYS_munmap, [0, own.start]));
        self.queue.push(Call::new(libc::SYS_munmap, [own.end, USER_END - own.end]));
    }

    /// The copies in a range give their places in the file to later ones.
    fn forget_copies(&mut self, address: u64, size: u64) {
        if !self.copies.is_empty() {
            let free = &mut self.free;
            self.copies.retain(|&copy, &mut slot| {
                let stays = copy.wrapping_sub(address) >= size;
                free.extend((!stays).then_some(slot));
                stays
            });
        }
    }

    /// Whether mappings are to be changed before user code goes on.
    pub fn changes_mappings(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Whether something can be mapped there.
    pub fn can_map(&self, address: u64, size: u64) -> bool {
        self.check(address, size).is_ok()
    }

    /// Where the sandbox itself lies: addresses of which user code's own pages cannot be seen.
    pub fn own_pages(&self) -> std::ops::Range<u64> {
        self.stub.base..self.stub.base + STUB_SIZE
    }

    fn check(&self, address: u64, size: u64) -> Result<(), SandboxError> {
        let own = self.own_pages();
        let end = address.checked_add(size).filter(|&end| end <= USER_END && size > 0);
        let aligned = address.is_multiple_of(PAGE) && size.is_multiple_of(PAGE);
        let free = end.is_some_and(|end| end <= own.start || address >= own.end);
        if address >= USER_START && aligned && free { Ok(()) } else { Err(SandboxError::Range(address)) }
    }

    /// Lets user code run until its next trap.
    ///
    /// # Errors
    /// [`SandboxError::Ended`] and [`SandboxError::Refused`]. The registers are those before, and nothing can be done with the
    /// sandbox any more.
    pub fn run(&mut self) -> Result<Trap, SandboxError> {
        self.prepare();
        let ordered = !self.queue.is_empty();
        let mut answered = if ordered {
            self.carry_out()?;
            true
        } else {
            answer(&self.listener, self.stop)
        };
        loop {
            let stop = self.receive().map_err(|error| match error {
                SandboxError::Ended if !answered => SandboxError::Refused,
                error => error,
            })?;
            if !self.is_again(&stop) {
                return self.trap(&stop);
            }
            // The stub may still be at work, and user code must not see mappings of before.
            if ordered {
                self.wait_for_order()?;
            }
            self.prepare();
            answered = answer(&self.listener, stop.id);
        }
    }

    /// Makes the frame and the report ready for the return to user code.
    fn prepare(&mut self) {
        let frame = self.frame.prepare(self.stub.report());
        let report = self.shared.report();
        (report.fs_base, report.gs_base, report.frame) = (self.fs_base, self.gs_base, frame);
        report.flags = self.frame.registers().rflags & NESTED_AND_ID;
    }

    /// Whether a stop is the last one once more. The host makes the stub's call again where it has interrupted it to stop the
    /// process (job control, a freezer), and has lost the answer, if there was one.
    fn is_again(&self, stop: &Stop) -> bool {
        stop.args[0] == self.frame.address() && self.frame.is_answered()
    }

    /// Has the queued calls made, the last of which is the answer to the stop.
    fn carry_out(&mut self) -> Result<(), SandboxError> {
        let mut queue = std::mem::take(&mut self.queue);
        self.shared.orders().data[..8].copy_from_slice(&self.stop.to_le_bytes());
        queue.push(Call::new(libc::SYS_ioctl, [start::LISTENER, SEND, self.stub.data(0)]));
        let mut chunks = queue.chunks(CALLS).peekable();
        while let Some(calls) = chunks.next() {
            // User code may have written anything there; it is stopped now.
            self.shared.report().done.store(self.order, Ordering::Release);
            self.order = self.order.wrapping_add(1);
            self.shared.order(self.order, calls);
            if chunks.peek().is_some() {
                self.wait_for_order()?;
            }
        }
        queue.clear();
        self.queue = queue;
        Ok(())
    }

    /// Waits until the order has been carried out. User code is stopped and cannot pretend that it has.
    fn wait_for_order(&mut self) -> Result<(), SandboxError> {
        loop {
            let done = &self.shared.report().done;
            let seen = done.load(Ordering::Acquire);
            if seen == self.order {
                return Ok(());
            }
            let _ = futex::wait(done, futex::Flags::empty(), seen, Some(&PATIENCE));
            if !matches!(self.child.0.try_wait(), Ok(None)) {
                return Err(self.end());
            }
        }
    }

    /// Why there is nothing more to come from the process.
    fn end(&mut self) -> SandboxError {
        let _ = self.child.0.kill();
        // Only the stub can exit, and does if it is refused something.
        let refused = self.child.0.wait().is_ok_and(|status| status.code().is_some());
        if refused { SandboxError::Refused } else { SandboxError::Ended }
    }

    /// Why user code has stopped.
    fn trap(&mut self, stop: &Stop) -> Result<Trap, SandboxError> {
        self.kicker.pending.store(false, Ordering::SeqCst);
        self.stop = stop.id;
        [_, self.fs_base, self.gs_base, ..] = stop.args;
        // No CPU gives such a base: user code has called the stub itself.
        if !is_canonical(self.fs_base) || !is_canonical(self.gs_base) {
            return Err(SandboxError::Ended);
        }
        // SAFETY: the mapping lives as long as `self.shared`.
        let frame = unsafe { Frame::find(self.shared.report_ptr().cast(), self.stub.report(), stop.args[0]) };
        self.frame = frame.ok_or(SandboxError::Ended)?;
        if !is_canonical(self.frame.registers().rip) {
            return Err(SandboxError::Ended);
        }
        self.frame.trap().ok_or(SandboxError::Ended)
    }

    fn receive(&mut self) -> Result<Stop, SandboxError> {
        let (mut unheard, mut deaf) = (false, Deaf::default());
        loop {
            let ready = poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], Some(&PATIENCE));
            if let Ok(1..) = ready
                && let Some(stop) = receive_stop(&self.listener)
            {
                return Ok(stop);
            }
            // A kick that is not heard: user code has blocked the signal, or the host is very busy.
            unheard |= self.kicker.pending.load(Ordering::SeqCst);
            // A thread that cannot be seen is given up.
            let cpu = self.cpu_ticks();
            let lost = unheard && cpu.is_none_or(|cpu| deaf.is_for_good(self.blocks_kicks(), cpu));
            if lost || !matches!(self.child.0.try_wait(), Ok(None)) {
                return Err(self.end());
            }
        }
    }

    /// The CPU time of the thread of user code, in the kernel's ticks.
    fn cpu_ticks(&self) -> Option<u64> {
        let stat = format!("/proc/{}/task/{}/stat", self.child.0.id(), self.thread);
        let text = std::fs::read_to_string(stat).ok()?;
        // Behind the name in parentheses: times in user and in system mode are fields 14 and 15 (proc(5)).
        let (_, rest) = text.rsplit_once(')')?;
        let mut ticks = rest.split_whitespace().skip(11).map(|field| field.parse::<u64>().ok());
        Some(ticks.next()?? + ticks.next()??)
    }

    /// Whether the thread of user code blocks the signal. The stub's handler does, but not for long.
    fn blocks_kicks(&self) -> bool {
        let status = format!("/proc/{}/task/{}/status", self.child.0.id(), self.thread);
        let text = std::fs::read_to_string(status).unwrap_or_default();
        let blocked = text.lines().find_map(|line| line.strip_prefix("SigBlk:"));
        let mask = blocked.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(u64::MAX);
        mask >> (KICK - 1) & 1 != 0
    }

    /// User code's registers.
    pub fn registers(&self) -> Registers {
        self.frame.registers()
    }
    /// Sets user code's registers.
    pub fn set_registers(&mut self, registers: &Registers) {
        self.frame.set_registers(registers);
    }
    /// Selector of CS that user code has come to: not that of 64-bit code if it has jumped to 32-bit code.
    pub fn code_selector(&self) -> u16 {
        self.frame.code_selector()
    }
    /// Bases of FS and GS.
    pub fn bases(&self) -> (u64, u64) {
        (self.fs_base, self.gs_base)
    }
    /// Sets the bases of FS and GS, which have to be canonical.
    pub fn set_bases(&mut self, fs: u64, gs: u64) {
        (self.fs_base, self.gs_base) = (fs, gs);
    }
    /// Copies x87 and SSE registers (as FXSAVE64 lays them out) and the upper halves of the YMM registers out of the sandbox.
    pub fn load_fpu(&self, fxsave: &mut [u8; 512], ymm_high: &mut [[u64; 2]; 16]) {
        self.frame.load_fpu(fxsave, ymm_high);
    }
    /// Sets x87, SSE and AVX registers; all others become what they are after reset.
    pub fn store_fpu(&mut self, fxsave: &[u8; 512], ymm_high: &[[u64; 2]; 16]) {
        self.frame.store_fpu(fxsave, ymm_high);
    }

    /// How other threads stop user code.
    pub fn kicker(&self) -> Arc<Kicker> {
        self.kicker.clone()
    }
}

/// A process that ends with its owner.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Stops the user code of a sandbox.
#[derive(Debug)]
pub struct Kicker {
    pidfd: OwnedFd,
    pending: AtomicBool,
}

impl Kicker {
    /// User code traps with [`Trap::Kicked`] soon, if it runs, else when it runs next.
    pub fn kick(&self) {
        self.pending.store(true, Ordering::SeqCst);
        // It may have ended.
        let _ = pidfd_send_signal(&self.pidfd, Signal::USR1);
    }
}

/// After this time, see whether the sandbox is still there.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// CPU time for which the signal may be blocked while a kick is not heard, in the kernel's ticks: 200 ms.
const DEAF: u64 = 20;

/// A thread that blocks the signal while a kick waits. The stub's handler does for some microseconds of CPU time, however
/// long a busy host takes to give it those; user code that blocks it for good uses up more.
#[derive(Debug, Default)]
struct Deaf {
    /// Its CPU time when it was found so.
    since: Option<u64>,
}

impl Deaf {
    /// Takes what was found, and says whether it is more than a handler that is on its way.
    fn is_for_good(&mut self, blocked: bool, cpu: u64) -> bool {
        let since = *self.since.get_or_insert(cpu);
        self.since = Some(since).filter(|_| blocked);
        blocked && cpu.saturating_sub(since) >= DEAF
    }
}

/// RFLAGS.NT and RFLAGS.ID.
const NESTED_AND_ID: u64 = 1 << 14 | 1 << 21;
/// Copied pages at most.
const MOST_COPIES: u64 = 1024;
/// Bytes that are mapped at once with all their page-table entries.
const POPULATE: u64 = 2 << 20;

/// The memory that the monitor shares with the sandbox.
struct Shared {
    at: NonNull<u8>,
}

// SAFETY: it owns a mapping.
unsafe impl Send for Shared {}

impl Shared {
    fn new(file: &File) -> io::Result<Self> {
        let (prot, size) = (ProtFlags::READ | ProtFlags::WRITE, SHARED_SIZE as usize);
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe { rustix::mm::mmap(std::ptr::null_mut(), size, prot, MapFlags::SHARED, file, 0) }?;
        Ok(Self { at: NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)? })
    }

    fn orders(&mut self) -> &mut Orders {
        // SAFETY: mapped, large enough, and valid for any bytes. The sandbox only reads it, after `order` has told it.
        unsafe { self.at.cast().as_mut() }
    }

    fn report(&mut self) -> &mut Report {
        // SAFETY: as above; the sandbox's thread is stopped while the monitor looks, and any bytes are valid.
        unsafe { self.report_ptr().as_mut() }
    }

    fn report_ptr(&self) -> NonNull<Report> {
        // SAFETY: within the mapping.
        unsafe { self.at.add(ORDERS_SIZE as usize) }.cast()
    }

    /// Has the sandbox make calls.
    fn order(&mut self, number: u32, calls: &[Call]) {
        let orders = self.orders();
        orders.calls[..calls.len()].copy_from_slice(calls);
        orders.count = calls.len() as u32;
        orders.number.store(number, Ordering::Release);
        let _ = futex::wake(&orders.number, futex::Flags::empty(), 1);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this size.
        let _ = unsafe { rustix::mm::munmap(self.at.as_ptr().cast(), SHARED_SIZE as usize) };
    }
}

/// `struct seccomp_notif`.
#[repr(C)]
struct Stop {
    id: u64,
    thread: u32,
    flags: u32,
    number: i32,
    architecture: u32,
    pointer: u64,
    args: [u64; 6],
}

/// SECCOMP_IOCTL_NOTIF_RECV and _SEND.
const RECEIVE: u64 = 0xc050_2100;
const SEND: u64 = 0xc018_2101;

fn receive_stop(listener: &OwnedFd) -> Option<Stop> {
    let mut stop = MaybeUninit::<Stop>::zeroed();
    // SAFETY: the structure has the size that the request names.
    let done = unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE, stop.as_mut_ptr()) };
    // SAFETY: integers, zeroed or written by the kernel.
    (done == 0).then(|| unsafe { stop.assume_init() })
}

/// Whether the stop was still there.
fn answer(listener: &OwnedFd, stop: u64) -> bool {
    let mut answer = [stop, 0, 0];
    // SAFETY: the structure has the size that the request names.
    unsafe { libc::ioctl(listener.as_raw_fd(), SEND, answer.as_mut_ptr()) == 0 }
}

/// Whether Linux has enabled RDFSBASE and its like (`HWCAP2_FSGSBASE`).
fn has_fsgsbase() -> bool {
    // SAFETY: has no preconditions.
    unsafe { libc::getauxval(libc::AT_HWCAP2) & 2 != 0 }
}

/// A place where hardly any program has something of its own: above position-independent programs, below libraries.
fn random_base() -> io::Result<u64> {
    const FIRST: u64 = 0x6200_0000_0000;
    const BITS: u32 = 43;
    let mut bytes = [0; 8];
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(FIRST + (u64::from_le_bytes(bytes) & ((1 << BITS) - 1) & !(PAGE - 1)))
}

#[cfg(test)]
mod tests;
