//! What the tests of the engine share: a machine that remembers what the guest does, and guests in real and long mode.

// Each program of tests uses a part of it.
#![allow(dead_code)]

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use iced_x86::{IcedError, code_asm::*};
use ruse_arch::{
    DescriptorTable, LapicState, Segment, VcpuState,
    flags::{cr0, cr4, efer, rflags},
    state::{reg, seg},
};
use ruse_dbt::{DbtEngine, DbtOptions};
use ruse_engine::{Bus, Clock, Engine, Halt, Vcpu, VcpuHandle, Vm};
use ruse_kvm::KvmEngine;
use ruse_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

/// Where programs begin.
pub const CODE: u64 = 0x1000;
/// Where handlers of interrupts are in real mode.
pub const HANDLERS: u64 = 0x2000;
/// They count here.
pub const COUNT: u32 = 0x500;
/// Where stacks end.
pub const STACK: u64 = 0x8000;
/// A write to this port ends a program.
pub const END: u16 = 0xf4;
/// Writes to this port are remembered.
pub const PORT: u32 = 0x10;

/// The host's KVM. Where there is none, says so; with RUSE_NEED_KVM in the environment that is a failure.
pub fn kvm() -> Option<KvmEngine> {
    match KvmEngine::open() {
        Ok(engine) => Some(engine),
        Err(error) => {
            assert!(std::env::var_os("RUSE_NEED_KVM").is_none(), "{error}");
            println!("skipped: {error}");
            None
        }
    }
}

/// The translator, and the host's KVM if there is one.
pub fn engines() -> Vec<Box<dyn Engine>> {
    let mut engines: Vec<Box<dyn Engine>> = vec![Box::new(DbtEngine::new(DbtOptions::default()))];
    engines.extend(kvm().map(|kvm| Box::new(kvm) as Box<dyn Engine>));
    engines
}

type Hook = Box<dyn Fn(&Recorder, u64) + Send + Sync>;

/// A machine whose ports and memory remember what was written to them. Ports read as their number, memory as its address.
#[derive(Default)]
pub struct Recorder {
    written: Mutex<Vec<u64>>,
    ends: Mutex<Vec<u8>>,
    /// Vectors that the 8259s have.
    pub offered: Mutex<VecDeque<u8>>,
    /// Whether the vCPU is kicked when it has acknowledged an interrupt.
    kicks_at_acknowledgement: bool,
    ended: AtomicBool,
    handle: Mutex<Option<Arc<dyn VcpuHandle>>>,
    hook: Option<Hook>,
}

impl Recorder {
    /// One that is told of each write after it is remembered.
    pub fn with_hook(hook: impl Fn(&Recorder, u64) + Send + Sync + 'static) -> Self {
        Self { hook: Some(Box::new(hook)), ..Self::default() }
    }

    /// Kicks the vCPU when it has acknowledged an interrupt.
    pub fn kicking_at_acknowledgement(self) -> Self {
        Self { kicks_at_acknowledgement: true, ..self }
    }

    /// Takes what was written.
    pub fn written(&self) -> Vec<u64> {
        std::mem::take(&mut *self.written.lock().unwrap())
    }
    /// Takes the vectors whose interrupts have ended.
    pub fn ends(&self) -> Vec<u8> {
        std::mem::take(&mut *self.ends.lock().unwrap())
    }
    /// Whether the program has ended.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }
    /// The handle of the vCPU that runs.
    pub fn handle(&self) -> Arc<dyn VcpuHandle> {
        self.handle.lock().unwrap().clone().expect("a vCPU runs")
    }
    /// This vCPU runs from now on.
    pub fn attend(&self, vcpu: &dyn Vcpu) {
        *self.handle.lock().unwrap() = Some(vcpu.handle());
    }

    /// Runs a vCPU until its program ends.
    pub fn run(&self, vcpu: &mut dyn Vcpu) {
        self.attend(vcpu);
        while !self.has_ended() {
            assert_eq!(vcpu.run(self).unwrap(), Halt::Kicked);
        }
    }

    fn remember(&self, data: &[u8]) {
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        self.written.lock().unwrap().push(value);
        if let Some(hook) = &self.hook {
            hook(self, value);
        }
    }
}

impl Bus for Recorder {
    fn pio_read(&self, _: u32, port: u16, data: &mut [u8]) {
        data.copy_from_slice(&port.to_le_bytes().repeat(2)[..data.len()]);
    }
    fn pio_write(&self, _: u32, port: u16, data: &[u8]) {
        if port == END {
            self.ended.store(true, Ordering::SeqCst);
            self.handle().kick();
        } else {
            self.remember(data);
        }
    }
    fn mmio_read(&self, _: u32, gpa: u64, data: &mut [u8]) {
        data.copy_from_slice(&gpa.to_le_bytes()[..data.len()]);
    }
    fn mmio_write(&self, _: u32, _: u64, data: &[u8]) {
        self.remember(data);
    }
    fn interrupt_pending(&self, _: u32) -> bool {
        !self.offered.lock().unwrap().is_empty()
    }
    fn acknowledge_interrupt(&self, _: u32) -> Option<u8> {
        if self.kicks_at_acknowledgement {
            self.handle().kick();
        }
        self.offered.lock().unwrap().pop_front()
    }
    fn end_of_interrupt(&self, vector: u8) {
        self.ends.lock().unwrap().push(vector);
    }
}

/// RAM, a VM over it, and its first vCPU.
pub struct Rig {
    pub ram: GuestRam,
    pub vm: Arc<dyn Vm>,
    pub vcpu: Box<dyn Vcpu>,
}

impl Rig {
    /// A machine with a megabyte of RAM.
    pub fn new(engine: &dyn Engine) -> Self {
        Self::over(engine, GuestRam::new(1 << 20).unwrap())
    }

    pub fn over(engine: &dyn Engine, ram: GuestRam) -> Self {
        let vm = engine.create_vm(ram.clone(), Arc::new(Clock::start())).unwrap();
        let vcpu = vm.create_vcpu(0, engine.supported_cpuid()).unwrap();
        Self { ram, vm, vcpu }
    }

    /// Writes to RAM.
    pub fn put(&self, at: u64, bytes: &[u8]) {
        put(&self.ram, at, bytes);
    }

    /// Puts real-mode handlers of interrupts from [`HANDLERS`] on. Each says its vector and adds one to [`COUNT`].
    ///
    /// An interrupt that comes before a HLT and not in it steps over the HLT. An NMI may; after STI none should, but the
    /// lab's VMRUN takes no account of the interrupt shadow that #VMEXIT has saved, so that it ends with every exit.
    pub fn put_handlers(&self, vectors: &[u8]) {
        for &vector in vectors {
            let at = HANDLERS + 0x20 * u64::from(vector);
            let handler = assemble(16, at, |a| {
                step_over_halt(a);
                say(a, vector.into());
                a.inc(word_ptr(COUNT)).unwrap();
                a.iret().unwrap();
            });
            self.put(at, &handler);
            self.put(4 * u64::from(vector), &(at as u32).to_le_bytes());
        }
    }

    /// The local APIC as the engine made it, but enabled by software (spurious-interrupt vector register, bit 8).
    pub fn enabled_lapic(&mut self) -> LapicState {
        let mut lapic = self.vcpu.state().unwrap().lapic.expect("a local APIC of the engine");
        lapic.regs[0xf] |= 1 << 8;
        lapic
    }
}

/// Kicks the vCPU that runs at random moments, until it is told to stop.
fn kick_at_random(bus: &Recorder, stop: &AtomicBool) {
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    while !stop.load(Ordering::SeqCst) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let until = Instant::now() + Duration::from_micros(random % 300);
        // A sleep would be as long as the host's scheduler likes.
        while Instant::now() < until {
            thread::yield_now();
        }
        bus.handle().kick();
    }
}

/// Runs a guest from `state` to its end, in turn on the vCPUs of two machines with the same RAM, from one to the other at
/// random moments. `moved` gets the states before and after each run; the last one is returned.
pub fn move_at_random(
    rigs: &mut [Rig; 2],
    mut state: VcpuState,
    mut moved: impl FnMut(&VcpuState, &VcpuState),
) -> VcpuState {
    let (bus, stop) = (Arc::new(Recorder::default()), Arc::new(AtomicBool::new(false)));
    bus.attend(&*rigs[0].vcpu);
    let kicker = thread::spawn({
        let (bus, stop) = (bus.clone(), stop.clone());
        move || kick_at_random(&bus, &stop)
    });
    for turn in 0.. {
        let vcpu = &mut rigs[turn % 2].vcpu;
        vcpu.set_state(&state).unwrap();
        bus.attend(&**vcpu);
        assert_eq!(vcpu.run(&*bus).unwrap(), Halt::Kicked);
        let after = vcpu.state().unwrap();
        let before = std::mem::replace(&mut state, after);
        if bus.has_ended() {
            break;
        }
        moved(&before, &state);
    }
    stop.store(true, Ordering::SeqCst);
    kicker.join().unwrap();
    state
}

pub fn put(ram: &GuestRam, at: u64, bytes: &[u8]) {
    ram.memory().write_slice(bytes, GuestAddress(at)).unwrap();
}

/// Assembles a program for an address.
pub fn assemble(bits: u32, at: u64, program: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    program(&mut a);
    a.assemble(at).unwrap()
}

/// Writes a number to the port that the machine remembers.
pub fn say(a: &mut CodeAssembler, number: u32) {
    a.mov(al, number).unwrap();
    a.out(PORT, al).unwrap();
}

/// In a handler of real mode: goes back to behind the HLT if that is what it would go back to.
fn step_over_halt(a: &mut CodeAssembler) {
    /// HLT, in a segment that begins at 0.
    const HLT: u32 = 0xf4;
    let mut other = a.create_label();
    a.push(bp).unwrap();
    a.mov(bp, sp).unwrap();
    a.push(bx).unwrap();
    a.mov(bx, word_ptr(bp + 2)).unwrap();
    a.cmp(byte_ptr(bx), HLT).unwrap();
    a.jne(other).unwrap();
    a.inc(word_ptr(bp + 2)).unwrap();
    a.set_label(&mut other).unwrap();
    a.pop(bx).unwrap();
    a.pop(bp).unwrap();
}

/// Ends a program. A vCPU leaves soon, not at once.
pub fn end(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut here = a.create_label();
    a.mov(dx, u32::from(END))?;
    a.out(dx, al)?;
    a.set_label(&mut here)?;
    a.jmp(here)
}

/// A vCPU in real mode before [`CODE`].
pub fn real_mode() -> VcpuState {
    let mut state = VcpuState { rip: CODE, ..VcpuState::default() };
    (state.seg[seg::CS].base, state.seg[seg::CS].selector) = (0, 0);
    state.gpr[reg::RSP] = STACK;
    state
}

const PML4: u64 = 0x1_0000;
const PDPT: u64 = 0x1_1000;
const GDT: u64 = 0x1_2000;
const IDT: u64 = 0x1_3000;
/// Page directories of the first, the fourth and the second gigabyte.
const DIRECTORIES: u64 = 0x1_4000;
/// What is mapped at zero for all is mapped here for the kernel alone.
pub const KERNEL: u64 = 1 << 30;
/// Selectors of the kernel's code and data.
const KERNEL_CODE: u16 = 8;
const KERNEL_DATA: u16 = 0x10;

/// A vCPU in long mode at this privilege before [`CODE`]. The first and the fourth gigabyte are mapped to
/// themselves, two megabytes also at [`KERNEL`]; there is a GDT, and an IDT for [`put_gate`]. Ports are open to user code.
pub fn long_mode(ram: &GuestRam, cpl: u16) -> VcpuState {
    const PRESENT_WRITABLE: u64 = 3;
    const PRESENT_WRITABLE_USER: u64 = 7;
    const LARGE: u64 = 1 << 7;
    put(ram, PML4, &(PDPT | PRESENT_WRITABLE_USER).to_le_bytes());
    for (gigabyte, directory) in [(0, DIRECTORIES), (3, DIRECTORIES + 0x1000)] {
        put(ram, PDPT + 8 * gigabyte, &(directory | PRESENT_WRITABLE_USER).to_le_bytes());
        for page in 0..512 {
            let entry = gigabyte << 30 | page << 21 | LARGE | PRESENT_WRITABLE_USER;
            put(ram, directory + 8 * page, &entry.to_le_bytes());
        }
    }
    put(ram, PDPT + 8, &((DIRECTORIES + 0x2000) | PRESENT_WRITABLE).to_le_bytes());
    put(ram, DIRECTORIES + 0x2000, &(LARGE | PRESENT_WRITABLE).to_le_bytes());
    put(ram, GDT + u64::from(KERNEL_CODE), &0x00af_9b00_0000_ffffu64.to_le_bytes());
    put(ram, GDT + u64::from(KERNEL_DATA), &0x00cf_9300_0000_ffffu64.to_le_bytes());
    let level = cpl << 5;
    let data = Segment { base: 0, limit: u32::MAX, attr: 0xc093 | level, selector: KERNEL_DATA | cpl };
    let mut state = VcpuState {
        rip: CODE,
        rflags: rflags::FIXED | rflags::IOPL,
        cr0: cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::PG,
        cr3: PML4,
        cr4: cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE,
        efer: efer::LME | efer::LMA,
        xcr0: 7,
        gdtr: DescriptorTable { base: GDT, limit: 0x17 },
        idtr: DescriptorTable { base: IDT, limit: 0xfff },
        seg: [data; 6],
        ..VcpuState::default()
    };
    state.seg[seg::CS] =
        Segment { base: 0, limit: u32::MAX, attr: 0xa09b | level, selector: KERNEL_CODE | cpl };
    state.gpr[reg::RSP] = STACK;
    state.fpu.fcw = 0x37f;
    state
}

/// Makes `at` the handler of a vector in long mode (SDM volume 3, 6.14.1).
pub fn put_gate(ram: &GuestRam, vector: u8, at: u64) {
    const INTERRUPT_GATE: u64 = 0x8e00 << 32;
    let low = at & 0xffff | u64::from(KERNEL_CODE) << 16 | INTERRUPT_GATE | (at & 0xffff_0000) << 32;
    put(ram, IDT + 16 * u64::from(vector), &low.to_le_bytes());
    put(ram, IDT + 16 * u64::from(vector) + 8, &(at >> 32).to_le_bytes());
}
