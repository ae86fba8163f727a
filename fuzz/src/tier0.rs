//! Tier 0 on any bytes in any mode: no panic, no endless instruction, nothing touched but RAM and the bus, and a fault
//! leaves the registers as they were.

use std::cell::RefCell;
use std::sync::Arc;

use arbitrary::Unstructured;
use ruse_arch::{Exception, MpState};
use ruse_dbt::cpu::{Cpu, CpuBox};
use ruse_dbt::cpuid;
use ruse_dbt::mmu::{Mmu, watch::CodeMap};
use ruse_dbt::tier0::{self, interrupt::Event, interrupt::deliver};
use ruse_engine::{Bus, Clock};
use ruse_memory::GuestRam;

use crate::bus::FuzzBus;
use crate::vcpu::{Guest, Mode};

/// Instructions and events of one input at most.
const MOST_STEPS: u32 = 200;
const MODES: [Mode; 5] = [Mode::Real, Mode::Vm86, Mode::Protected, Mode::Compatible, Mode::Long];

/// A CPU and its RAM, kept from input to input: a whole state is loaded each time.
struct Machine {
    cpu: CpuBox,
    ram: GuestRam,
}

thread_local! {
    static MACHINE: RefCell<Machine> = RefCell::new(Machine::new());
}

impl Machine {
    fn new() -> Self {
        let ram = Guest::ram();
        let mmu = Mmu::new(ram.clone(), CodeMap::new(ram.clone()), 0);
        let clock = Arc::new(Clock::with_frequency(2_000_000_000));
        Self { cpu: CpuBox::new(0, cpuid::supported(), clock, mmu), ram }
    }

    fn run(&mut self, guest: &Guest) {
        guest.load(&self.ram);
        self.cpu.load_state(&guest.state);
        let bus = FuzzBus::new(self.ram.clone(), guest.seed);
        self.cpu.with_bus(&bus, |cpu: &mut Cpu| {
            for _ in 0..MOST_STEPS {
                if cpu.mp_state != MpState::Running || !turn(cpu, &bus) {
                    break;
                }
                check(cpu);
            }
        });
    }
}

/// Runs the target.
pub(crate) fn run(data: &[u8]) {
    let guest = Guest::new(&mut Unstructured::new(data), &MODES);
    MACHINE.with_borrow_mut(|machine| machine.run(&guest));
}

/// One instruction or event; `false` when the vCPU has shut down.
fn turn(cpu: &mut Cpu, bus: &dyn Bus) -> bool {
    let event = if cpu.interrupt_shadow {
        None
    } else if cpu.nmi_pending && !cpu.nmi_blocked {
        cpu.nmi_pending = false;
        Some(Event::Nmi)
    } else if cpu.rflags & ruse_arch::flags::rflags::IF != 0 && bus.interrupt_pending(0) {
        bus.acknowledge_interrupt(0).map(Event::Interrupt)
    } else {
        None
    };
    let event = event.or_else(|| step(cpu).err().map(Event::Exception));
    event.is_none_or(|event| deliver(cpu, event).is_ok())
}

/// Executes an instruction. A fault of its own leaves the general registers, RIP and the mode as they were; one in the
/// middle of a string instruction or of a task switch does not.
fn step(cpu: &mut Cpu) -> Result<(), Exception> {
    let insn = tier0::decode(cpu)?;
    let (gpr, rip, task) = (cpu.gpr, cpu.rip, cpu.tr);
    let result = tier0::step(cpu);
    if let Err(fault) = result
        && fault.vector != Exception::db(0).vector
        && !insn.i.is_string_instruction()
        && cpu.tr == task
    {
        assert_eq!((cpu.gpr, cpu.rip), (gpr, rip), "{:?} of {:?}", fault, insn.i.code());
    }
    result
}

/// What is kept twice agrees.
fn check(cpu: &mut Cpu) {
    let mode = cpu.mode;
    cpu.update_mode();
    assert_eq!(cpu.mode, mode);
    assert!(mode.code64 || cpu.rip >> 32 == 0, "RIP {:#x} in {mode:?}", cpu.rip);
    assert_eq!(cpu.rflags & 0x2a, 2, "flags {:#x}", cpu.rflags);
}
