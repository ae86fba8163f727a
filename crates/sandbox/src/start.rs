//! How a sandbox begins: the program file, the shared memory, and the system calls by which its process becomes one.

use std::{
    fs::File,
    io::{self, Write},
    mem::{MaybeUninit, offset_of},
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, Stdio},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
    io::IoSliceMut,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
        recvmsg, socketpair,
    },
};

use crate::{
    KICK, filter,
    layout::{
        CODE_SIZE, Call, DATA_SIZE, ORDERS_SIZE, REPORT_SIZE, Report, STACK_OFFSET, STUB_SIZE, USER_END,
    },
    stub::Stub,
};

/// File descriptors of the sandbox: where its standard ones are, and the first that it opens itself.
pub const RAM: u64 = 0;
pub const SHARED: u64 = 1;
const SOCKET: u64 = 2;
pub const LISTENER: u64 = 3;

/// PR_SET_SYSCALL_USER_DISPATCH and PR_SYS_DISPATCH_ON.
const SET_USER_DISPATCH: u64 = 59;
const USER_DISPATCH_ON: u64 = 1;

/// Bytes at the beginning of the orders' data that are the answer to a stop (`struct seccomp_notif_resp`).
const ANSWER: usize = 24;

/// What user code's exceptions become, and the monitor's own signal.
const SIGNALS: [i32; 7] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGSYS, KICK];

/// System calls with the structures that they point to.
pub struct Script {
    stub: Stub,
    /// The calls.
    pub calls: Vec<Call>,
    /// What [`crate::layout::Orders::data`] is to hold.
    pub data: Vec<u8>,
}

impl Script {
    /// What the process does before the first user code.
    pub fn new(stub: Stub) -> Self {
        let mut script = Self { stub, calls: Vec::new(), data: vec![0; ANSWER] };
        script.memory();
        script.process();
        script.signals();
        script.listener();
        script.thread();
        script
    }

    fn memory(&mut self) {
        let (base, end) = (self.stub.base, self.stub.base + STUB_SIZE);
        self.call(libc::SYS_munmap, [0, base]);
        self.call(libc::SYS_munmap, [self.stub.report(), USER_END - self.stub.report()]);
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
        let report = [self.stub.report(), REPORT_SIZE, prot as u64, flags as u64, SHARED, ORDERS_SIZE];
        self.call(libc::SYS_mmap, report);
        debug_assert_eq!(end, self.stub.report() + REPORT_SIZE);
    }

    fn process(&mut self) {
        self.call(libc::SYS_close_range, [LISTENER, u64::from(u32::MAX), 0]);
        // The terminal's signals are the monitor's.
        self.call(libc::SYS_setsid, []);
        self.call(libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, 0]);
        self.call(libc::SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS as u64, 1]);
        let name = self.data(b"ruse-user\0");
        self.call(libc::SYS_prctl, [libc::PR_SET_NAME as u64, name]);
    }

    fn signals(&mut self) {
        const SA_RESTORER: u64 = 0x0400_0000;
        let all = self.words(&[u64::MAX]);
        self.call(libc::SYS_rt_sigprocmask, [libc::SIG_SETMASK as u64, all, 0, 8]);
        // `struct sigaction` of the kernel: handler, flags, restorer, mask. Nothing returns by the restorer.
        let flags = (libc::SA_SIGINFO | libc::SA_ONSTACK) as u64 | SA_RESTORER;
        let action = self.words(&[self.stub.trap(), flags, self.stub.trap(), u64::MAX]);
        for signal in SIGNALS {
            self.call(libc::SYS_rt_sigaction, [signal as u64, action, 0, 8]);
        }
    }

    /// Linux before 5.16 would make code under a filter slow (speculation is held back), which the monitor does not need: what
    /// it protects is in other processes.
    fn listener(&mut self) {
        let program = self.program(&filter::for_stops(self.stub));
        let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
        self.call(libc::SYS_seccomp, [libc::SECCOMP_SET_MODE_FILTER.into(), flags, program]);
        // One byte, with the descriptor as ancillary data: `struct msghdr`, `struct cmsghdr`.
        let byte = self.data(&[0]);
        let part = self.words(&[byte, 1]);
        let kind = (libc::SCM_RIGHTS as u64) << 32 | libc::SOL_SOCKET as u64;
        let rights = self.words(&[20, kind, LISTENER]);
        let message = self.words(&[0, 0, part, 1, rights, 24, 0]);
        self.call(libc::SYS_sendmsg, [SOCKET, message, 0]);
        self.call(libc::SYS_close, [SOCKET]);
    }

    fn thread(&mut self) {
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM
            | libc::CLONE_PARENT_SETTID;
        let thread = self.stub.report() + offset_of!(Report, thread) as u64;
        self.call(libc::SYS_clone, [flags as u64, 0, thread]);
        // From here on it is the new thread that calls. `stack_t`:
        let stack = self.words(&[self.stub.report() + STACK_OFFSET, 0, REPORT_SIZE - STACK_OFFSET]);
        self.call(libc::SYS_sigaltstack, [stack, 0]);
        let none = self.words(&[0]);
        self.call(libc::SYS_rt_sigprocmask, [libc::SIG_SETMASK as u64, none, 0, 8]);
        // The guest's time is not the host's: RDTSC and RDTSCP are to trap.
        self.call(libc::SYS_prctl, [libc::PR_SET_TSC as u64, libc::PR_TSC_SIGSEGV as u64]);
        // All system calls of user code are signals, also those that seccomp does not see (uprobe's, since Linux 6.14).
        self.call(libc::SYS_prctl, [SET_USER_DISPATCH, USER_DISPATCH_ON, self.stub.base, CODE_SIZE, 0]);
        let program = self.program(&filter::for_user_code(self.stub));
        let flags = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
        self.call(libc::SYS_seccomp, [libc::SECCOMP_SET_MODE_FILTER.into(), flags, program]);
    }

    fn call<const N: usize>(&mut self, number: libc::c_long, args: [u64; N]) {
        self.calls.push(Call::new(number, args));
    }

    /// Puts bytes into the orders' data; their address in the sandbox.
    fn data(&mut self, bytes: &[u8]) -> u64 {
        let at = self.data.len();
        self.data.extend(bytes);
        self.data.resize(self.data.len().next_multiple_of(8), 0);
        assert!(self.data.len() <= DATA_SIZE, "the structures are few and small");
        self.stub.data(at)
    }

    fn words(&mut self, words: &[u64]) -> u64 {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        self.data(&bytes)
    }

    /// `struct sock_fprog`.
    fn program(&mut self, filter: &[u8]) -> u64 {
        let at = self.data(filter);
        self.words(&[filter.len() as u64 / 8, at])
    }
}

/// Starts the program with the given memory files; returns the end of the socket by which it sends its listener.
pub fn spawn(stub: Stub, ram: BorrowedFd<'_>, shared: &File) -> io::Result<(Child, OwnedFd)> {
    let mut program = File::from(memfd_create("ruse-user", MemfdFlags::CLOEXEC)?);
    program.write_all(&stub.program())?;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let child = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()))
        .arg0("ruse-user")
        .env_clear()
        .stdin(Stdio::from(ram.try_clone_to_owned()?))
        .stdout(Stdio::from(shared.try_clone()?))
        .stderr(Stdio::from(theirs))
        .spawn()?;
    Ok((child, ours))
}

/// Receives the listener.
pub fn receive(socket: &OwnedFd) -> io::Result<OwnedFd> {
    const PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };
    if poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&PATIENCE))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut files) = message
            && let Some(file) = files.next()
        {
            return Ok(file);
        }
    }
    Err(io::Error::new(io::ErrorKind::Unsupported, "a process under seccomp could not be set up"))
}

/// Bytes of the shared memory, and where the report begins in it.
pub const SHARED_SIZE: u64 = ORDERS_SIZE + REPORT_SIZE;

const _: () = assert!(CODE_SIZE + SHARED_SIZE == STUB_SIZE);
