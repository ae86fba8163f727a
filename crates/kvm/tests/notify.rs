//! Writes that are not calls of the bus, and eventfds that interrupt: doorbells, coalesced writes and read-only memory under
//! both engines, message sources where the engine has local APICs.

mod support;

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
};

use iced_x86::code_asm::*;
use ruse_engine::{Doorbell, DoorbellValue, IoAddress, Message};
use ruse_memory::{GuestRam, Layout};
use rustix::event::EventfdFlags;
use support::*;
use vm_memory::{Bytes, GuestAddress};

fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()
}

/// How often an eventfd was signalled since the last call.
fn signals(event: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    rustix::io::read(event, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
}

fn signal(event: &OwnedFd) {
    rustix::io::write(event, &1u64.to_ne_bytes()).unwrap();
}

/// Runs a program in real mode; what it wrote.
fn run_real(rig: &mut Rig, program: impl FnOnce(&mut CodeAssembler)) -> Vec<u64> {
    rig.put(CODE, &assemble(16, CODE, program));
    rig.vcpu.set_state(&real_mode()).unwrap();
    let bus = Recorder::default();
    bus.run(&mut *rig.vcpu);
    bus.written()
}

#[test]
fn a_doorbell_is_rung_by_its_value_and_the_bus_does_not_hear_of_it() {
    /// FFFF:7FF0, above the RAM.
    const GPA: u64 = 0x10_7fe0;
    let bells = [
        Doorbell { at: IoAddress::Port(0x31), only: None },
        Doorbell { at: IoAddress::Port(0x30), only: Some(DoorbellValue { width: 1, value: 2 }) },
        Doorbell { at: IoAddress::Memory(GPA), only: Some(DoorbellValue { width: 2, value: 0x4321 }) },
    ];
    let program = |a: &mut CodeAssembler| {
        for value in [1u32, 2, 3, 2] {
            a.mov(eax, value).unwrap();
            a.out(0x30u32, al).unwrap();
        }
        a.out(0x30u32, ax).unwrap();
        a.out(0x31u32, al).unwrap();
        a.out(0x31u32, ax).unwrap();
        a.mov(ax, 0xffffu32).unwrap();
        a.mov(es, ax).unwrap();
        for value in [0x4320u32, 0x4321, 0x21] {
            a.mov(word_ptr(0x7ff0).es(), value).unwrap();
        }
        a.mov(byte_ptr(0x7ff0).es(), 0x21u32).unwrap();
        end(a).unwrap();
    };
    for engine in engines() {
        let mut rig = Rig::new(&*engine);
        let events = bells.map(|_| eventfd());
        for (bell, event) in bells.iter().zip(&events) {
            rig.vm.doorbells().add(*bell, event.try_clone().unwrap()).unwrap();
        }
        assert_eq!(run_real(&mut rig, program), [1, 3, 2, 0x4320, 0x21, 0x21], "{}", engine.name());
        assert_eq!(events.each_ref().map(signals), [2, 2, 1], "{}", engine.name());
        rig.vm.doorbells().remove(&bells[1]);
        rig.vm.doorbells().remove(&bells[2]);
        let all = [1, 2, 3, 2, 2, 0x4320, 0x4321, 0x21, 0x21];
        assert_eq!(run_real(&mut rig, program), all, "{}", engine.name());
        assert_eq!(events.each_ref().map(signals), [2, 0, 0], "{}", engine.name());
    }
}

#[test]
fn doorbells_that_one_write_would_ring_are_refused() {
    for engine in engines() {
        let rig = Rig::new(&*engine);
        let at = IoAddress::Memory(0x1000_0000);
        let value = Doorbell { at, only: Some(DoorbellValue { width: 4, value: 7 }) };
        let any = Doorbell { at, only: None };
        rig.vm.doorbells().add(value, eventfd()).unwrap();
        assert!(rig.vm.doorbells().add(any, eventfd()).is_err());
        rig.vm.doorbells().remove(&value);
        rig.vm.doorbells().add(any, eventfd()).unwrap();
    }
}

#[test]
fn an_eventfd_delivers_the_message_of_the_moment() {
    let Some(engine) = kvm() else { return };
    let mut rig = Rig::new(&engine);
    let mut state = real_mode();
    state.lapic = Some(rig.enabled_lapic());
    // Each of a higher class, for nobody ends them (SDM volume 3, 10.8.3.1).
    let vectors = [0x40u8, 0x50, 0x60];
    rig.put_handlers(&vectors);
    // Says a number, and halts until so many interrupts have come.
    let step = |a: &mut CodeAssembler, number: u32, count: u32| {
        let (mut top, mut done) = (a.create_label(), a.create_label());
        say(a, number);
        a.set_label(&mut top).unwrap();
        a.cli().unwrap();
        a.cmp(word_ptr(COUNT), count).unwrap();
        a.jae(done).unwrap();
        a.sti().unwrap();
        a.hlt().unwrap();
        a.jmp(top).unwrap();
        a.set_label(&mut done).unwrap();
    };
    let code = assemble(16, CODE, |a| {
        a.cli().unwrap();
        step(a, 1, 1);
        step(a, 2, 2);
        say(a, 3);
        // Masked: there is time for an interrupt, but none comes.
        a.sti().unwrap();
        (10..20).for_each(|number| say(a, number));
        a.cli().unwrap();
        step(a, 4, 3);
        say(a, 5);
        end(a).unwrap();
    });
    rig.put(CODE, &code);
    rig.vcpu.set_state(&state).unwrap();
    let event = eventfd();
    let source = rig.vm.local_apics().unwrap().connect(event.try_clone().unwrap()).unwrap();
    let source = Mutex::new(Some(source));
    let message = |vector: u8| Some(Message { address: 0xfee0_0000, data: vector.into() });
    let bus = Recorder::with_hook(move |_, number| {
        let source = source.lock().unwrap();
        let set = |message| source.as_ref().unwrap().set(message).unwrap();
        match number {
            1 => set(message(0x40)),
            2 => set(message(0x50)),
            3 => set(None),
            // What was signalled three times while it was masked is one message.
            4 => return set(message(0x60)),
            _ => return,
        }
        (0..if number == 3 { 3 } else { 1 }).for_each(|_| signal(&event));
    });
    bus.run(&mut *rig.vcpu);
    let expected: Vec<u64> = [1, 0x40, 2, 0x50, 3].into_iter().chain(10..20).chain([4, 0x60, 5]).collect();
    assert_eq!(bus.written(), expected);
}

#[test]
fn numbers_of_message_sources_are_given_back() {
    let Some(engine) = kvm() else { return };
    let rig = Rig::new(&engine);
    let apics = rig.vm.local_apics().unwrap();
    for round in 0..3 {
        let sources: Vec<_> = (0..100).map(|_| apics.connect(eventfd()).unwrap()).collect();
        for (n, source) in sources.iter().enumerate() {
            source.set(Some(Message { address: 0xfee0_0000, data: 0x40 + n as u32 + round })).unwrap();
        }
        apics.set_pins(&[Some(Message { address: 0xfee0_0000, data: 0x30 + round })]);
    }
}

#[test]
fn writes_that_wait_come_in_their_order_and_before_other_accesses() {
    const ROUNDS: u64 = 500;
    for engine in engines() {
        let mut rig = Rig::new(&*engine);
        rig.vm.coalesce_writes(IoAddress::Port(0x80), 1);
        rig.vm.coalesce_writes(IoAddress::Memory(0x10_7fe0), 2);
        let written = run_real(&mut rig, |a| {
            let mut top = a.create_label();
            a.mov(ax, 0xffffu32).unwrap();
            a.mov(es, ax).unwrap();
            a.mov(cx, 1u32).unwrap();
            // More than a ring holds.
            a.set_label(&mut top).unwrap();
            a.mov(al, cl).unwrap();
            a.out(0x80u32, al).unwrap();
            a.mov(word_ptr(0x7ff0).es(), cx).unwrap();
            a.inc(cx).unwrap();
            a.cmp(cx, ROUNDS as u32 + 1).unwrap();
            a.jb(top).unwrap();
            say(a, 1);
            a.out(0x80u32, al).unwrap();
            a.mov(word_ptr(0x7ff2).es(), 2u32).unwrap();
            a.out(0x80u32, al).unwrap();
            end(a).unwrap();
        });
        let rounds = (1..=ROUNDS).flat_map(|n| [n & 0xff, n]);
        let expected: Vec<_> = rounds.chain([1, 1, 2, 1]).collect();
        assert_eq!(written, expected, "{}", engine.name());
        if engine.name() == "kvm" && kvm_has_coalesced_ports() {
            let exits = rig.vcpu.counters().get("exits.port");
            println!("FIGURE {exits} exits for {} writes to ports", ROUNDS + 4);
            assert!(exits < ROUNDS / 4, "{exits} exits");
        }
    }
}

fn kvm_has_coalesced_ports() -> bool {
    let cap = u64::from(kvm_bindings::KVM_CAP_COALESCED_PIO);
    kvm_ioctls::Kvm::new().is_ok_and(|kvm| kvm.check_extension_raw(cap) > 0)
}

#[test]
fn read_only_memory_is_read_and_executed_and_writes_to_it_are_the_machine_s() {
    const ROM: u64 = 0x20_0000;
    const ROUTINE: u64 = ROM + 0x1000;
    for engine in engines() {
        let layout = Layout::of_ram(1 << 20).unwrap().with_read_only(ROM, 0x2000).unwrap();
        let mut rig = Rig::over(&*engine, GuestRam::with_layout(&layout).unwrap());
        rig.put(ROM, &[7, 0, 0, 0, 0, 0, 0, 0, 0x11, 0, 0, 0]);
        let routine = assemble(64, ROUTINE, |a| {
            a.add(eax, dword_ptr(rbx)).unwrap();
            a.ret().unwrap();
        });
        rig.put(ROUTINE, &routine);
        let state = long_mode(&rig.ram, 0);
        let code = assemble(64, CODE, |a| {
            a.mov(ebx, ROM as u32).unwrap();
            a.mov(ebp, ROUTINE as u32).unwrap();
            for _ in 0..2 {
                a.mov(rax, qword_ptr(rbx)).unwrap();
                a.add(rax, 1).unwrap();
                a.mov(qword_ptr(rbx), rax).unwrap();
                a.inc(dword_ptr(rbx + 8)).unwrap();
                a.mov(ecx, 0x22).unwrap();
                a.lock().xadd(dword_ptr(rbx + 8), ecx).unwrap();
                a.mov(eax, 5).unwrap();
                a.call(rbp).unwrap();
                a.out(PORT, al).unwrap();
                a.mov(al, cl).unwrap();
                a.out(PORT, al).unwrap();
            }
            end(a).unwrap();
        });
        rig.put(CODE, &code);
        rig.vcpu.set_state(&state).unwrap();
        let bus = Recorder::default();
        bus.run(&mut *rig.vcpu);
        let round = [8, 0x12, 0x33, 12, 0x11];
        assert_eq!(bus.written(), [round, round].concat(), "{}", engine.name());
        let word: u64 = rig.ram.memory().read_obj(GuestAddress(ROM)).unwrap();
        assert_eq!(word, 7, "{}", engine.name());
    }
}

#[test]
fn doorbells_can_be_changed_while_a_vcpu_rings_them() {
    for engine in engines() {
        let mut rig = Rig::new(&*engine);
        let bell = Doorbell { at: IoAddress::Port(0x31), only: None };
        let event = Arc::new(eventfd());
        let (vm, rung) = (rig.vm.clone(), event.clone());
        let code = assemble(16, CODE, |a| {
            for _ in 0..20 {
                say(a, 1);
                a.out(0x31u32, al).unwrap();
                say(a, 2);
                a.out(0x31u32, al).unwrap();
            }
            end(a).unwrap();
        });
        rig.put(CODE, &code);
        rig.vcpu.set_state(&real_mode()).unwrap();
        let bus = Recorder::with_hook(move |_, number| match number {
            1 => vm.doorbells().add(bell, rung.try_clone().unwrap()).unwrap(),
            _ => vm.doorbells().remove(&bell),
        });
        bus.run(&mut *rig.vcpu);
        // The second write of a pair removes what is not there.
        assert_eq!(bus.written(), [1, 2, 2].repeat(20), "{}", engine.name());
        assert_eq!(signals(&event), 20, "{}", engine.name());
    }
}
