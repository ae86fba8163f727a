//! How other threads reach a vCPU: messages to its local APIC, and a signal that gets its thread out of KVM_RUN.

use std::{
    cell::Cell,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, Once, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    thread,
};

use kvm_bindings::KVM_VCPUEVENT_VALID_NMI_PENDING;
use ruse_engine::{Message, VcpuHandle};

use crate::{ioctl, vm::Shared};

/// Delivery modes of messages (SDM volume 3, 10.11.2).
const MODE_NMI: u32 = 4 << 8;
const MODE_INIT: u32 = 5 << 8;
const MODE_SIPI: u32 = 6 << 8;

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(std::ptr::null()) };
}

/// The handle of a vCPU.
pub struct Handle {
    id: u32,
    vm: Arc<Shared>,
    /// The vCPU's file.
    file: OwnedFd,
    /// How often KVM_RUN was called or has returned: odd inside.
    crossings: AtomicU64,
    /// Somebody wants `run` to return.
    kicked: AtomicBool,
    /// The thread inside `run`.
    thread: Mutex<Option<libc::pthread_t>>,
}

/// As long as it lives, its thread runs the vCPU and hears signals.
pub struct Running<'a>(&'a Handle);

impl Handle {
    /// The handle of vCPU `id` with this file.
    pub fn new(id: u32, vm: Arc<Shared>, file: OwnedFd) -> Self {
        install();
        let (crossings, kicked) = (AtomicU64::new(0), AtomicBool::new(false));
        Self { id, vm, file, crossings, kicked, thread: Mutex::default() }
    }

    /// This thread runs the vCPU now. `immediate_exit` is the field of its `kvm_run`, which outlives the guard.
    pub fn enter(&self, immediate_exit: *const AtomicU8) -> Running<'_> {
        IMMEDIATE_EXIT.set(immediate_exit);
        // SAFETY: has no preconditions.
        *self.lock() = Some(unsafe { libc::pthread_self() });
        Running(self)
    }

    /// The vCPU's file.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether there was a kick since the last time.
    pub fn take_kick(&self) -> bool {
        self.kicked.swap(false, Ordering::SeqCst)
    }

    /// The thread is about to call KVM_RUN, or has come back.
    pub fn cross(&self) {
        self.crossings.fetch_add(1, Ordering::SeqCst);
    }

    /// Returns when the vCPU has been outside of KVM_RUN since the call.
    pub fn wait_outside(&self) {
        let before = self.crossings.load(Ordering::SeqCst);
        if before.is_multiple_of(2) {
            return;
        }
        self.signal();
        while self.crossings.load(Ordering::SeqCst) == before {
            thread::yield_now();
        }
    }

    /// Takes back what is on its way. INIT and start-up IPIs are taken over into the state, which is set anew after a
    /// reset; KVM has no other way to be rid of them.
    fn take_back(&self) -> io::Result<()> {
        ioctl::mp_state(self.file())?;
        let mut events = ioctl::events(self.file())?;
        events.flags = KVM_VCPUEVENT_VALID_NMI_PENDING;
        (events.nmi.pending, events.nmi.injected) = (0, 0);
        ioctl::set_events(self.file(), &events)
    }

    /// Gets the thread out of KVM_RUN, or keeps it from entering.
    fn signal(&self) {
        let thread = self.lock();
        if let Some(thread) = *thread {
            // SAFETY: the thread is inside `run`: leaving takes the lock that is held here.
            unsafe { libc::pthread_kill(thread, libc::SIGRTMIN()) };
        }
    }

    fn message(&self, data: u32) {
        self.vm.deliver(Message { address: 0xfee0_0000 | u64::from(self.id & 0xff) << 12, data });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<libc::pthread_t>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        *self.0.lock() = None;
        IMMEDIATE_EXIT.set(std::ptr::null());
    }
}

impl VcpuHandle for Handle {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.signal();
    }
    fn notify_interrupt(&self) {
        self.signal();
    }
    fn nmi(&self) {
        self.message(MODE_NMI);
    }
    fn init(&self) {
        self.message(MODE_INIT);
    }
    fn sipi(&self, vector: u8) {
        self.message(MODE_SIPI | u32::from(vector));
    }
    fn withdraw(&self) {
        if let Err(error) = self.take_back() {
            tracing::warn!(%error, vcpu = self.id, "what was sent to a vCPU before the reset may still arrive");
        }
    }
}

/// Installs the signal's handler, once for the process.
fn install() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        // SAFETY: a plain C structure for which zeroes are valid.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: the structure is valid and the handler is async-signal-safe.
        unsafe { libc::sigaction(libc::SIGRTMIN(), &action, std::ptr::null_mut()) };
    });
}

/// If the signal comes before KVM_RUN, that returns at once. Reads a thread-local without destructor and stores a byte.
extern "C" fn on_signal(_: libc::c_int) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: set by `enter` for as long as the field is mapped.
        unsafe { (*flag).store(1, Ordering::SeqCst) };
    }
}
