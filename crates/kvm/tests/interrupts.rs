//! Interrupts of every kind, NMIs, start-up IPIs and triple faults under KVM.

mod support;

use std::{sync::Arc, thread, time::Duration};

use iced_x86::code_asm::*;
use ruse_arch::{
    MpState, VcpuState,
    state::{reg, seg},
};
use ruse_engine::{Engine, Halt, Message, VcpuHandle, Vm};
use support::*;

/// Where messages to the first vCPU go, in physical destination mode (SDM volume 3, 10.11.1).
const FIRST: u64 = 0xfee0_0000;
/// The local APIC's register for ends of interrupts.
const EOI: u32 = 0xfee0_00b0;
const TRIGGER_LEVEL: u32 = 1 << 15;
/// Long enough for a vCPU to halt.
const A_WHILE: Duration = Duration::from_millis(30);

/// Waits with interrupts on until handlers have counted to `number`. Some hosts interrupt a guest only now and then.
fn take_interrupts(a: &mut CodeAssembler, number: u32) {
    a.sti().unwrap();
    let mut top = a.create_label();
    a.set_label(&mut top).unwrap();
    a.cmp(word_ptr(COUNT), number).unwrap();
    a.jb(top).unwrap();
    a.cli().unwrap();
}

/// A machine before a program in real mode, whose interrupts of these vectors say their number. The local APIC is enabled.
fn real(vectors: &[u8], program: impl FnOnce(&mut CodeAssembler)) -> Option<Rig> {
    let mut rig = Rig::new(&kvm()?);
    let mut state = real_mode();
    state.lapic = Some(rig.enabled_lapic());
    rig.put(CODE, &assemble(16, CODE, program));
    rig.put_handlers(vectors);
    rig.vcpu.set_state(&state).unwrap();
    Some(rig)
}

/// Says 1, halts with interrupts on, and says 2 when something has woken it.
fn halt_once(a: &mut CodeAssembler) {
    a.cli().unwrap();
    say(a, 1);
    a.sti().unwrap();
    a.hlt().unwrap();
    say(a, 2);
    end(a).unwrap();
}

#[test]
fn an_interrupt_of_the_8259s_waits_until_the_guest_takes_it() {
    let Some(mut rig) = real(&[0x30], |a| {
        a.cli().unwrap();
        say(a, 1);
        say(a, 2);
        take_interrupts(a, 1);
        say(a, 3);
        end(a).unwrap();
    }) else {
        return;
    };
    let bus = Recorder::with_hook(|bus, value| {
        if value == 1 {
            bus.offered.lock().unwrap().push_back(0x30);
        }
    });
    bus.run(&mut *rig.vcpu);
    assert_eq!(bus.written(), [1, 2, 0x30, 3]);
}

#[test]
fn interrupts_of_the_8259s_come_one_after_the_other() {
    let Some(mut rig) = real(&[0x30, 0x31], |a| {
        a.cli().unwrap();
        say(a, 1);
        take_interrupts(a, 2);
        say(a, 2);
        end(a).unwrap();
    }) else {
        return;
    };
    let bus = Recorder::with_hook(|bus, value| {
        if value == 1 {
            bus.offered.lock().unwrap().extend([0x30, 0x31]);
        }
    });
    bus.run(&mut *rig.vcpu);
    assert_eq!(bus.written(), [1, 0x30, 0x31, 2]);
}

#[test]
fn an_interrupt_of_the_8259s_wakes_a_vcpu_that_halts() {
    let Some(mut rig) = real(&[0x30], halt_once) else { return };
    let bus = Arc::new(Recorder::default());
    let device = thread::spawn({
        let bus = bus.clone();
        let handle = rig.vcpu.handle();
        move || {
            thread::sleep(A_WHILE);
            bus.offered.lock().unwrap().push_back(0x30);
            handle.notify_interrupt();
        }
    });
    bus.run(&mut *rig.vcpu);
    device.join().unwrap();
    assert_eq!(bus.written(), [1, 0x30, 2]);
}

#[test]
fn a_message_wakes_a_vcpu_that_halts() {
    let Some(mut rig) = real(&[0x40], halt_once) else { return };
    let vm = rig.vm.clone();
    let bus = Recorder::with_hook(move |_, value| {
        if value == 1 {
            let vm = vm.clone();
            thread::spawn(move || {
                thread::sleep(A_WHILE);
                vm.local_apics().unwrap().deliver(Message { address: FIRST, data: 0x40 });
            });
        }
    });
    bus.run(&mut *rig.vcpu);
    assert_eq!(bus.written(), [1, 0x40, 2]);
    assert_eq!(rig.vcpu.state().unwrap().mp_state, MpState::Running);
}

#[test]
fn an_nmi_comes_with_interrupts_off() {
    let Some(mut rig) = real(&[2], |a| {
        a.cli().unwrap();
        say(a, 1);
        a.hlt().unwrap();
        say(a, 3);
        end(a).unwrap();
    }) else {
        return;
    };
    let handle = rig.vcpu.handle();
    let bus = Recorder::with_hook(move |_, value| {
        if value == 1 {
            let handle = handle.clone();
            thread::spawn(move || {
                thread::sleep(A_WHILE);
                handle.nmi();
            });
        }
    });
    bus.run(&mut *rig.vcpu);
    assert_eq!(bus.written(), [1, 2, 3]);
}

#[test]
fn the_state_has_an_interrupt_that_was_acknowledged_but_has_not_arrived() {
    let program = |a: &mut CodeAssembler| {
        a.cli().unwrap();
        say(a, 1);
        take_interrupts(a, 1);
        say(a, 2);
        end(a).unwrap();
    };
    let Some(mut rig) = real(&[0x30], program) else { return };
    let offer = |bus: &Recorder, value| {
        if value == 1 {
            bus.offered.lock().unwrap().push_back(0x30);
        }
    };
    let first = Recorder::with_hook(offer).kicking_at_acknowledgement();
    first.attend(&*rig.vcpu);
    assert_eq!(rig.vcpu.run(&first).unwrap(), Halt::Kicked);
    assert_eq!(first.written(), [1]);
    let state = rig.vcpu.state().unwrap();
    assert_eq!(state.interrupt, Some(0x30));
    // It arrives here, and in another vCPU with this state.
    let Some(mut other) = real(&[0x30], program) else { return };
    other.vcpu.set_state(&state).unwrap();
    for vcpu in [rig.vcpu, other.vcpu].iter_mut() {
        let bus = Recorder::default();
        bus.run(&mut **vcpu);
        assert_eq!(bus.written(), [0x30, 2]);
    }
}

/// A program in long mode whose interrupts say their vector and end.
fn long(vectors: &[u8], program: impl FnOnce(&mut CodeAssembler)) -> Option<Rig> {
    let mut rig = Rig::new(&kvm()?);
    let mut state = long_mode(&rig.ram, 0);
    state.lapic = Some(rig.enabled_lapic());
    rig.put(CODE, &assemble(64, CODE, program));
    for &vector in vectors {
        let at = HANDLERS + 0x20 * u64::from(vector);
        let handler = assemble(64, at, |a| {
            say(a, vector.into());
            a.mov(ebx, EOI).unwrap();
            a.mov(dword_ptr(rbx), 0).unwrap();
            a.inc(word_ptr(COUNT)).unwrap();
            a.iretq().unwrap();
        });
        rig.put(at, &handler);
        put_gate(&rig.ram, vector, at);
    }
    rig.vcpu.set_state(&state).unwrap();
    Some(rig)
}

/// Sets pin 9 of the I/O APIC to a message and sends that.
fn raise(vm: &dyn Vm, data: u32) {
    let message = Message { address: FIRST, data };
    let mut pins = vec![None; 24];
    pins[9] = (data & TRIGGER_LEVEL != 0).then_some(message);
    let apics = vm.local_apics().unwrap();
    apics.set_pins(&pins);
    apics.deliver(message);
}

#[test]
fn the_end_of_a_level_triggered_interrupt_comes_back() {
    let (level, edge) = (0x51, 0x61);
    let Some(mut rig) = long(&[level, edge], |a| {
        for number in [1, 2] {
            a.cli().unwrap();
            say(a, number);
            take_interrupts(a, number);
        }
        say(a, 3);
        end(a).unwrap();
    }) else {
        return;
    };
    let vm = rig.vm.clone();
    let bus = Recorder::with_hook(move |_, value| match value {
        1 => raise(&*vm, TRIGGER_LEVEL | u32::from(level)),
        2 => raise(&*vm, edge.into()),
        _ => {}
    });
    bus.run(&mut *rig.vcpu);
    assert_eq!(bus.written(), [1, u64::from(level), 2, u64::from(edge), 3]);
    assert_eq!(bus.ends(), [level]);
}

#[test]
fn an_exception_that_cannot_be_delivered_is_a_triple_fault() {
    // The table of gates is empty.
    let Some(mut rig) = long(&[], |a| a.ud2().unwrap()) else { return };
    assert_eq!(rig.vcpu.run(&Recorder::default()).unwrap(), Halt::TripleFault);
}

#[test]
fn a_start_up_ipi_starts_the_second_vcpu() {
    let Some(engine) = kvm() else { return };
    let rig = Rig::new(&engine);
    rig.put(
        HANDLERS,
        &assemble(16, 0, |a| {
            a.mov(ax, cs).unwrap();
            a.out(PORT, ax).unwrap();
            end(a).unwrap();
        }),
    );
    let waiting = VcpuState { mp_state: MpState::WaitForSipi, ..VcpuState::default() };
    // First one that was told to wait, then one that waits already, as a snapshot would have it.
    for with_init in [true, false] {
        let id = if with_init { 1 } else { 2 };
        let mut second = rig.vm.create_vcpu(id, engine.supported_cpuid()).unwrap();
        second.set_state(&waiting).unwrap();
        let handle = second.handle();
        let starter = thread::spawn(move || {
            thread::sleep(A_WHILE);
            if with_init {
                handle.init();
                thread::sleep(A_WHILE);
            }
            handle.sipi((HANDLERS >> 12) as u8);
        });
        let bus = Recorder::default();
        bus.run(&mut *second);
        starter.join().unwrap();
        assert_eq!(bus.written(), [HANDLERS >> 4]);
        let state = second.state().unwrap();
        assert_eq!((state.mp_state, state.seg[seg::CS].base), (MpState::Running, HANDLERS));
    }
}

#[test]
fn what_is_withdrawn_does_not_arrive() {
    let Some(engine) = kvm() else { return };
    let Some(mut rig) = real(&[2], |a| {
        a.mov(ax, si).unwrap();
        a.out(PORT, ax).unwrap();
        end(a).unwrap();
    }) else {
        return;
    };
    let mut start = rig.vcpu.state().unwrap();
    let handle = rig.vcpu.handle();
    // INIT clears the register.
    let send: [fn(&dyn VcpuHandle); 2] = [|vcpu| vcpu.nmi(), |vcpu| vcpu.init()];
    for (value, send) in (0x77..).zip(send) {
        send(&*handle);
        handle.withdraw();
        start.gpr[reg::RSI] = value;
        rig.vcpu.set_state(&start).unwrap();
        let bus = Recorder::default();
        bus.run(&mut *rig.vcpu);
        assert_eq!(bus.written(), [value]);
    }
    // One that waits goes on waiting, and starts when it is told to afterwards.
    let waiting = VcpuState { mp_state: MpState::WaitForSipi, ..VcpuState::default() };
    let mut second = rig.vm.create_vcpu(1, engine.supported_cpuid()).unwrap();
    second.set_state(&waiting).unwrap();
    let handle = second.handle();
    handle.sipi(0x70);
    handle.withdraw();
    second.set_state(&waiting).unwrap();
    rig.put(HANDLERS, &assemble(16, 0, |a| end(a).unwrap()));
    let starter = thread::spawn(move || {
        thread::sleep(A_WHILE);
        handle.sipi((HANDLERS >> 12) as u8);
    });
    Recorder::default().run(&mut *second);
    starter.join().unwrap();
    assert_eq!(second.state().unwrap().seg[seg::CS].base, HANDLERS);
}
