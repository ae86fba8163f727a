//! vCPUs of the host's KVM, whatever it is like. Where there is none, the tests say so and are left out.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use iced_x86::code_asm::*;
use ruse_arch::{
    Segment, VcpuState,
    state::{reg, seg},
};
use ruse_engine::{Bus, Clock, Engine, Halt, MsrFault, Vcpu};
use ruse_kvm::KvmEngine;
use ruse_memory::GuestRam;

/// Where the programs are.
const CODE: u64 = 0x1000;
/// A write to this port ends a program.
const END: u16 = 0xf4;

/// A machine with one port, which remembers what was written to it, and memory that reads as its address.
#[derive(Default)]
struct Recorder {
    written: Mutex<Vec<u64>>,
    ended: AtomicBool,
    kick: Mutex<Option<Arc<dyn ruse_engine::VcpuHandle>>>,
}

impl Bus for Recorder {
    fn pio_read(&self, _: u32, port: u16, data: &mut [u8]) {
        data.copy_from_slice(&port.to_le_bytes()[..data.len()]);
    }
    fn pio_write(&self, _: u32, port: u16, data: &[u8]) {
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        if port == END {
            self.ended.store(true, Ordering::SeqCst);
            self.kick.lock().unwrap().as_ref().unwrap().kick();
        } else {
            self.written.lock().unwrap().push(u64::from_le_bytes(bytes));
        }
    }
    fn mmio_read(&self, _: u32, gpa: u64, data: &mut [u8]) {
        data.copy_from_slice(&gpa.to_le_bytes()[..data.len()]);
    }
    fn mmio_write(&self, _: u32, _: u64, data: &[u8]) {
        self.pio_write(0, 0, data);
    }
    fn interrupt_pending(&self, _: u32) -> bool {
        false
    }
    fn acknowledge_interrupt(&self, _: u32) -> Option<u8> {
        None
    }
    fn cr8(&self, _: u32) -> u8 {
        0
    }
    fn set_cr8(&self, _: u32, _: u8) {}
    fn apic_msr(&self, _: u32, _: u32) -> Result<u64, MsrFault> {
        Err(MsrFault)
    }
    fn set_apic_msr(&self, _: u32, _: u32, _: u64) -> Result<(), MsrFault> {
        Err(MsrFault)
    }
    fn apic_init(&self, _: u32) {}
    fn x87_error(&self, _: u32) {}
}

/// A vCPU in real mode before a program, which ends with a write to port [`END`].
fn vcpu(program: impl FnOnce(&mut CodeAssembler)) -> Option<(Box<dyn Vcpu>, GuestRam)> {
    let engine = match KvmEngine::open() {
        Ok(engine) => engine,
        Err(error) => {
            println!("skipped: {error}");
            return None;
        }
    };
    let mut a = CodeAssembler::new(16).unwrap();
    program(&mut a);
    a.mov(dx, u32::from(END)).unwrap();
    a.out(dx, al).unwrap();
    let code = a.assemble(CODE).unwrap();
    let ram = GuestRam::new(1 << 20).unwrap();
    use vm_memory::{Bytes, GuestAddress};
    ram.memory().write_slice(&code, GuestAddress(CODE)).unwrap();
    let vm = engine.create_vm(ram.clone(), Arc::new(Clock::start())).unwrap();
    let mut vcpu = vm.create_vcpu(0, engine.supported_cpuid()).unwrap();
    let mut state = VcpuState { rip: CODE, ..VcpuState::default() };
    state.seg[seg::CS].base = 0;
    state.seg[seg::CS].selector = 0;
    state.gpr[reg::RSP] = 0x8000;
    vcpu.set_state(&state).unwrap();
    Some((vcpu, ram))
}

/// Runs a program to its end; what it wrote to ports, and the state after it.
fn run(program: impl FnOnce(&mut CodeAssembler)) -> Option<(Vec<u64>, VcpuState)> {
    let (mut vcpu, _ram) = vcpu(program)?;
    let bus = Recorder::default();
    *bus.kick.lock().unwrap() = Some(vcpu.handle());
    while !bus.ended.load(Ordering::SeqCst) {
        assert_eq!(vcpu.run(&bus).unwrap(), Halt::Kicked);
    }
    let written = std::mem::take(&mut *bus.written.lock().unwrap());
    Some((written, vcpu.state().unwrap()))
}

#[test]
fn accesses_of_all_widths_reach_the_machine() {
    let Some((written, state)) = run(|a| {
        a.mov(dx, 0x1234u32).unwrap();
        a.in_(al, dx).unwrap();
        a.out(dx, al).unwrap();
        a.in_(ax, dx).unwrap();
        a.out(dx, ax).unwrap();
        a.mov(eax, 0xdead_beefu32).unwrap();
        a.out(dx, eax).unwrap();
    }) else {
        return;
    };
    assert_eq!(written, [0x34, 0x1234, 0xdead_beef]);
    assert_eq!(state.gpr[reg::RDX], u64::from(END));
}

#[test]
fn string_accesses_are_made_an_element_at_a_time() {
    let Some((written, state)) = run(|a| {
        a.mov(dx, 0x10u32).unwrap();
        a.mov(di, 0x4000u32).unwrap();
        a.mov(cx, 3u32).unwrap();
        a.rep().insw().unwrap();
        a.mov(si, 0x4000u32).unwrap();
        a.mov(cx, 3u32).unwrap();
        a.rep().outsw().unwrap();
    }) else {
        return;
    };
    assert_eq!(written, [0x10; 3]);
    assert_eq!((state.gpr[reg::RCX], state.gpr[reg::RDI], state.gpr[reg::RSI]), (0, 0x4006, 0x4006));
}

#[test]
fn memory_that_is_not_ram_is_the_machine() {
    let Some((written, state)) = run(|a| {
        // FFFF:7FF0 is 107FE0h: above the RAM of this machine.
        a.mov(ax, 0xffffu32).unwrap();
        a.mov(es, ax).unwrap();
        a.mov(bx, word_ptr(0x7ff0).es()).unwrap();
        a.mov(word_ptr(0x7ff0).es(), 0x4321u32).unwrap();
    }) else {
        return;
    };
    assert_eq!(written, [0x4321]);
    assert_eq!(state.gpr[reg::RBX] & 0xffff, 0x7fe0);
}

#[test]
fn a_kick_from_another_thread_ends_an_endless_loop() {
    let Some((mut vcpu, _ram)) = vcpu(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top).unwrap();
        a.jmp(top).unwrap();
    }) else {
        return;
    };
    let bus = Recorder::default();
    for _ in 0..20 {
        let handle = vcpu.handle();
        let kicker = std::thread::spawn(move || handle.kick());
        assert_eq!(vcpu.run(&bus).unwrap(), Halt::Kicked);
        kicker.join().unwrap();
    }
    assert_eq!(vcpu.state().unwrap().rip, CODE);
}

#[test]
fn a_state_comes_back_as_it_was_set() {
    let Some((mut vcpu, _ram)) = vcpu(|_| {}) else { return };
    let mut state = VcpuState { rip: 0x1234, rflags: 0x246, ..VcpuState::default() };
    for (n, value) in state.gpr.iter_mut().enumerate() {
        *value = 0x0101_0101_0101_0101 * n as u64;
    }
    state.seg[seg::CS] = Segment { base: 0x5_0000, limit: 0xffff, attr: 0x9b, selector: 0x5000 };
    state.fpu.fcw = 0x37f;
    state.fpu.mxcsr = 0x1fa0;
    for (n, ymm) in state.fpu.ymm.iter_mut().enumerate() {
        *ymm = [n as u64, 1, 2, 3];
    }
    state.xcr0 = 7;
    (state.star, state.lstar, state.kernel_gs_base) = (0x23_0010_0000_0000, 0xffff_8000_0000_1000, 0x7fff);
    (state.sysenter_cs, state.tsc_aux, state.dr[1], state.cr2) = (0x10, 5, 0x4000, 0x8888);
    (state.interrupt_shadow, state.nmi_pending) = (true, true);
    vcpu.set_state(&state).unwrap();
    let mut found = vcpu.state().unwrap();
    // The counter counts on, and the local APIC is the kernel's.
    assert!(found.lapic.take().is_some());
    (found.tsc, state.tsc) = (0, 0);
    // What a KVM does not have stays out.
    (found.spec_ctrl, found.misc_enable) = (state.spec_ctrl, state.misc_enable);
    found.tsc_aux = state.tsc_aux;
    assert_eq!(found, state);
}

#[test]
fn the_speed_can_be_measured() {
    let Ok(engine) = KvmEngine::open() else {
        println!("skipped: there is no KVM");
        return;
    };
    let started = std::time::Instant::now();
    let speed = ruse_kvm::probe::measure(&engine).unwrap();
    println!("{speed:?} in {:?}", started.elapsed());
    // No emulator, and no hardware, is out of these.
    assert!((1_000..100_000_000).contains(&speed.exits));
    assert!((10_000..100_000_000_000).contains(&speed.instructions));
}
