//! vCPUs of the host's KVM, whatever it is like. Where there is none, the tests say so and are left out.

mod support;

use iced_x86::code_asm::*;
use ruse_arch::{
    Segment, VcpuState,
    state::{reg, seg},
};
use ruse_dbt::{DbtEngine, DbtOptions};
use ruse_engine::{Engine, Halt};
use support::*;
use vm_memory::{Bytes, GuestAddress};

/// A machine in real mode before a program, after which comes its end.
fn rig(program: impl FnOnce(&mut CodeAssembler)) -> Option<Rig> {
    let mut rig = Rig::new(&kvm()?);
    let code = assemble(16, CODE, |a| {
        program(a);
        end(a).unwrap();
    });
    rig.put(CODE, &code);
    rig.vcpu.set_state(&real_mode()).unwrap();
    Some(rig)
}

/// Runs a program to its end; what it wrote to ports, and the state after it.
fn run(program: impl FnOnce(&mut CodeAssembler)) -> Option<(Vec<u64>, VcpuState)> {
    let mut rig = rig(program)?;
    let bus = Recorder::default();
    bus.run(&mut *rig.vcpu);
    Some((bus.written(), rig.vcpu.state().unwrap()))
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
    let Some(Rig { mut vcpu, .. }) = rig(|a| {
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
    let Some(Rig { mut vcpu, .. }) = rig(|_| {}) else { return };
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
fn a_reset_ends_what_the_guest_has_asked_kvm_to_write_to_its_memory() {
    const CLOCK: u64 = 1 << 3;
    let Some(engine) = kvm() else { return };
    if u64::from(engine.supported_cpuid().get(0x4000_0001, 0)[0]) & CLOCK == 0 {
        println!("skipped: this KVM has no clock for guests");
        return;
    }
    let mut rig = Rig::new(&engine);
    let mut state = long_mode(&rig.ram, 0);
    state.paravirt.system_time = 0x5001;
    rig.vcpu.set_state(&state).unwrap();
    assert_eq!(rig.vcpu.state().unwrap().paravirt, state.paravirt);
    rig.vcpu.set_state(&VcpuState::default()).unwrap();
    assert_eq!(rig.vcpu.state().unwrap().paravirt.system_time, 0);
}

#[test]
fn components_that_the_guest_enables_are_in_the_state() {
    let Some(engine) = kvm() else { return };
    let mut rig = Rig::new(&engine);
    let state = VcpuState { xcr0: 1, ..long_mode(&rig.ram, 0) };
    let code = assemble(64, CODE, |a| {
        a.xor(ecx, ecx).unwrap();
        a.xor(edx, edx).unwrap();
        a.mov(eax, 3).unwrap();
        a.xsetbv().unwrap();
        end(a).unwrap();
    });
    rig.put(CODE, &code);
    rig.vcpu.set_state(&state).unwrap();
    Recorder::default().run(&mut *rig.vcpu);
    assert_eq!(rig.vcpu.state().unwrap().xcr0, 3);
}

#[test]
fn the_speed_can_be_measured() {
    let Some(engine) = kvm() else { return };
    let started = std::time::Instant::now();
    let speed = ruse_kvm::probe::measure(&engine).unwrap();
    println!("{speed:?} in {:?}", started.elapsed());
    // No emulator, and no hardware, is out of these.
    assert!((1_000..100_000_000).contains(&speed.exits));
    assert!((10_000..100_000_000_000).contains(&speed.instructions));
}

/// A page with values for the mask and vector registers of AVX-512.
const VALUES: u64 = 0x3_0000;

#[test]
fn the_registers_of_avx512_go_from_vcpu_to_vcpu() {
    let Some(engine) = kvm() else { return };
    if engine.supported_cpuid().get(7, 0)[1] >> 16 & 1 == 0 {
        println!("skipped: KVM offers no AVX-512 here");
        return;
    }
    let rig = |program: fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>| {
        let rig = Rig::new(&engine);
        rig.put(CODE, &assemble(64, CODE, |a| program(a).and_then(|()| end(a)).unwrap()));
        let values: Vec<u8> = (0..=255).collect();
        rig.put(VALUES, &values);
        rig
    };
    let mut first = rig(|a| {
        a.kmovw(k1, word_ptr(VALUES + 1))?;
        a.vmovdqu64(zmm0, zmmword_ptr(VALUES))?;
        a.vmovdqu64(zmm31, zmmword_ptr(VALUES + 64))
    });
    let state = VcpuState { xcr0: 0xe7, ..long_mode(&first.ram, 3) };
    first.vcpu.set_state(&state).unwrap();
    Recorder::default().run(&mut *first.vcpu);
    let state = VcpuState { rip: CODE, ..first.vcpu.state().unwrap() };
    assert!(state.fpu.extended.keys().eq(&[5, 6, 7]), "{:?}", state.fpu.extended.keys());

    let mut second = rig(|a| {
        a.kmovw(word_ptr(VALUES + 128), k1)?;
        a.vmovdqu64(zmmword_ptr(VALUES + 192), zmm0)?;
        a.vmovdqu64(zmmword_ptr(VALUES + 256), zmm31)
    });
    long_mode(&second.ram, 3);
    second.vcpu.set_state(&state).unwrap();
    Recorder::default().run(&mut *second.vcpu);
    let mut stored = [0; 192];
    second.ram.memory().read_slice(&mut stored, GuestAddress(VALUES + 128)).unwrap();
    let vectors: Vec<u8> = (0..128).collect();
    assert_eq!((&stored[..2], &stored[64..]), (&[1, 2][..], &vectors[..]));

    let lost = DbtEngine::new(DbtOptions::default());
    let error = Rig::new(&lost).vcpu.set_state(&state).unwrap_err().to_string();
    assert!(error.contains("extended state 5"), "{error}");
}
