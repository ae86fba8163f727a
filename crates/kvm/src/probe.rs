//! Measures in a few milliseconds whether this host's KVM is hardware: a tiny guest counts down at CPL 0 and writes to
//! a port.

use std::{
    cell::RefCell,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use ruse_arch::state::reg;
use ruse_engine::{Bus, Clock, Engine, EngineError, Halt, VcpuHandle};

use crate::{KvmEngine, trial};

/// The program: `loop: dec ecx; jnz loop; out 10h, al; mov ecx, ebx; jmp loop`.
const PROGRAM: [u8; 10] = [0xff, 0xc9, 0x75, 0xfc, 0xe6, PORT, 0x89, 0xd9, 0xeb, 0xf6];
const PORT: u8 = 0x10;
/// Counts of the first, short rounds, which measure the exits.
const SHORT: u64 = 1;
/// Rounds of that kind, with two that warm up.
const ROUNDS: usize = 18;
/// Instructions of long rounds: as few as an emulator needs a fraction of a millisecond for, and more while that is too
/// short to be measured beside an exit.
const LONG: [u64; 3] = [1_000, 8_000, 64_000];
/// Nanoseconds that are long enough.
const MEASURABLE: u64 = 100_000;
/// Instructions a second above which KVM is hardware: emulators are below ten million, hardware is above a thousand.
const HARDWARE: u64 = 100_000_000;

/// How fast KVM runs guests here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Speed {
    /// Port accesses a second that come to this process.
    pub exits: u64,
    /// Instructions at CPL 0 a second.
    pub instructions: u64,
}

impl Speed {
    /// Whether a CPU's virtualization is behind /dev/kvm, and not a program.
    pub fn is_hardware(&self) -> bool {
        self.instructions >= HARDWARE
    }
}

/// Takes the time of each port access, and stops the vCPU after the last.
struct Stopwatch {
    handle: Arc<dyn VcpuHandle>,
    times: Mutex<Vec<Instant>>,
    wanted: usize,
}

impl Bus for Stopwatch {
    fn pio_write(&self, _: u32, _: u16, _: &[u8]) {
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        times.push(Instant::now());
        if times.len() == self.wanted {
            self.handle.kick();
        }
    }
}

/// Measures.
pub fn measure(engine: &KvmEngine) -> Result<Speed, EngineError> {
    let vm = engine.create_vm(trial::ram(&PROGRAM)?, Arc::new(Clock::with_frequency(1_000_000_000)))?;
    let vcpu = RefCell::new(vm.create_vcpu(0, engine.supported_cpuid())?);
    // Nanoseconds of the fastest round: whatever else the host does only makes rounds longer.
    let fastest = |count: u64, rounds: usize| {
        let mut vcpu = vcpu.borrow_mut();
        let watch = Stopwatch { handle: vcpu.handle(), times: Mutex::default(), wanted: rounds };
        let mut state = trial::state(0);
        (state.gpr[reg::RCX], state.gpr[reg::RBX]) = (count, count);
        vcpu.set_state(&state)?;
        if vcpu.run(&watch)? != Halt::Kicked {
            return Err(EngineError::Guest("KVM does not run a loop of five instructions".into()));
        }
        let times = watch.times.into_inner().unwrap_or_else(PoisonError::into_inner);
        let fastest = times.windows(2).map(|pair| (pair[1] - pair[0]).as_nanos() as u64).min();
        Ok::<_, EngineError>(fastest.unwrap_or(u64::MAX).max(1))
    };
    let exit = fastest(SHORT, ROUNDS)?;
    let per_second = |events: u64, ns: u64| events * 1_000_000_000 / ns.max(1);
    let mut instructions = 0;
    for count in LONG {
        let long = fastest(count / 2, 5)?.saturating_sub(exit);
        instructions = per_second(count, long);
        if long >= MEASURABLE {
            break;
        }
    }
    trial::dispose(vcpu.into_inner(), vm);
    Ok(Speed { exits: per_second(1, exit), instructions })
}
