//! The translator on any bytes in 64-bit mode: it lifts, makes code, runs it, and stops when it is told to. Every other
//! input is run in check mode, where both executors must agree on each instruction.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use arbitrary::Unstructured;
use ruse_dbt::{DbtEngine, DbtOptions};
use ruse_engine::{Clock, Engine, EngineError, VcpuHandle};

use crate::bus::FuzzBus;
use crate::input::one_in;
use crate::vcpu::{Guest, Mode};

/// Turns of the vCPU's loop of one input at most. Each may be many instructions.
const MOST_TURNS: u64 = 200;
/// How long linked code may go in circles.
const MOST_TIME: Duration = Duration::from_millis(3);

/// Runs the target.
pub(crate) fn run(data: &[u8]) {
    let u = &mut Unstructured::new(data);
    let check = one_in(u, 2);
    let guest = Guest::new(u, &[Mode::Long]);
    let ram = Guest::ram();
    guest.load(&ram);
    let engine = DbtEngine::new(DbtOptions { check, audit: true, ..DbtOptions::default() });
    let clock = Arc::new(Clock::with_frequency(2_000_000_000));
    let vm = engine.create_vm(ram.clone(), clock).expect("a VM");
    let mut vcpu = vm.create_vcpu(0, engine.supported_cpuid()).expect("a vCPU");
    vcpu.set_state(&guest.state).expect("a state");
    let bus = FuzzBus::new(ram, guest.seed);
    bus.stop_after(MOST_TURNS, vcpu.handle());
    let watch = Watch::over(vcpu.handle());
    let result = vcpu.run(&bus);
    drop(watch);
    if let Err(error @ EngineError::Mismatch(_)) = result {
        panic!("{error}");
    }
    let state = vcpu.state().expect("the state");
    assert_eq!(state.rflags & 0x2a, 2, "flags {:#x}", state.rflags);
}

/// Kicks a vCPU after [`MOST_TIME`], unless it is dropped before.
struct Watch;

/// Begins (with a handle) or ends (with none) a watch.
type Message = Option<Arc<dyn VcpuHandle>>;

/// The way to the thread that watches, made when first needed.
static WATCHER: LazyLock<Mutex<Sender<Message>>> = LazyLock::new(|| {
    let (sender, receiver) = channel::<Message>();
    std::thread::spawn(move || {
        while let Ok(message) = receiver.recv() {
            let Some(handle) = message else { continue };
            if let Err(RecvTimeoutError::Timeout) = receiver.recv_timeout(MOST_TIME) {
                handle.kick();
            }
        }
    });
    Mutex::new(sender)
});

impl Watch {
    fn over(handle: Arc<dyn VcpuHandle>) -> Self {
        Self::tell(Some(handle));
        Self
    }

    fn tell(message: Message) {
        WATCHER.lock().expect("nobody panics here").send(message).expect("the watcher never ends");
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        Self::tell(None);
    }
}
