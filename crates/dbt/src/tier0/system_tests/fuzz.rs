//! A hostile guest: random system instructions in random states over random tables neither panic nor hang.

use ruse_arch::{
    Segment,
    flags::{cr0, rflags},
    state::reg,
};
use ruse_random::Random;

use super::*;
use crate::{
    cpu::Cpu,
    tier0::{
        interrupt::{Event, deliver},
        testing::{CODE, DATA, NullBus, STACK},
    },
};

/// An address or selector that has a chance to mean something, or anything.
fn value(r: &mut Random) -> u64 {
    let near = r.below(0x80);
    match r.below(8) {
        0 => DATA + near,
        1 => STACK - near,
        2 => near,
        3 => u64::MAX - near,
        4 => (1 << 47) - near,
        5 => 0xffff_ffff - near,
        _ => r.word(),
    }
}

const OPCODES: &[&[u8]] = &[
    &[0x8e],
    &[0x8c],
    &[0x07],
    &[0x17],
    &[0x1f],
    &[0x06],
    &[0x0e],
    &[0x0f, 0xa1],
    &[0x0f, 0xa9],
    &[0x0f, 0xa0],
    &[0xc4],
    &[0xc5],
    &[0x0f, 0xb2],
    &[0x0f, 0xb4],
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0x02],
    &[0x0f, 0x03],
    &[0x63],
    &[0xea],
    &[0x9a],
    &[0xff],
    &[0xca],
    &[0xcb],
    &[0xcf],
    &[0xcd],
    &[0xcc],
    &[0xce],
    &[0xf1],
    &[0x0f, 0x20],
    &[0x0f, 0x21],
    &[0x0f, 0x22],
    &[0x0f, 0x23],
    &[0x0f, 0x06],
    &[0x0f, 0x05],
    &[0x0f, 0x07],
    &[0x0f, 0x34],
    &[0x0f, 0x35],
    &[0x0f, 0x30],
    &[0x0f, 0x32],
    &[0x0f, 0x33],
    &[0x0f, 0xa2],
    &[0x0f, 0x31],
    &[0xfa],
    &[0xfb],
    &[0xf4],
    &[0x6c],
    &[0x6d],
    &[0x6e],
    &[0x6f],
    &[0xe4],
    &[0xed],
    &[0xe7],
    &[0xee],
    &[0x0f, 0xc7],
    &[0x0f, 0xae],
    &[0x66, 0x0f, 0x38, 0x82],
];

fn segment(r: &mut Random) -> Segment {
    let limit = r.pick(&[0, 0xff, 0xffff, u32::MAX]);
    Segment { base: value(r), limit, attr: r.word() as u16 & 0xf0ff, selector: r.word() as u16 }
}

fn scramble(m: &mut Machine, r: &mut Random) {
    for i in 0..32 {
        let descriptor = r.word() & !(1 << 52) | r.pick(&[0, 0x80]) << 40;
        m.write_u64(GDT + 8 * i, if r.below(3) == 0 { m.read_u64(GDT + 8) } else { descriptor });
    }
    for i in 0..64 {
        let gate = r.word() & !0xff_0000_0000 | r.pick(&[0x85, 0x8e, 0xee, 0x8f, 0x86]) << 40;
        m.write_u64(IDT + 8 * i, gate);
        m.write_u64(TSS_BASE + 8 * (i % 16), value(r));
        m.write_u64(STACK - 256 + 8 * i, r.pick(&[8, 0x10, 0x18, 0x2b, 0x33, CODE, HANDLER, 0x2_0202]));
        let value = value(r);
        m.write_u64(DATA + 8 * i, value);
    }
    for i in 0..16 {
        m.cpu.gpr[i] = value(r);
    }
    m.cpu.gpr[reg::RSP] = STACK - r.below(64);
    m.cpu.gpr[reg::RDX] = r.word();
    m.cpu.rflags = r.word() & 0x3f_7fd5 & !r.pick(&[0, rflags::VM]) | rflags::FIXED;
    if r.below(4) == 0 {
        m.cpu.ldtr = segment(r);
        m.cpu.tr = segment(r);
        let s = r.below(6) as usize;
        m.cpu.seg[s] = segment(r);
    }
    m.cpu.dr7 = r.pick(&[0x400, 0x2400, 0xffff_27ff]);
    m.cpu.update_mode();
}

#[test]
fn hostile_states_do_no_harm() {
    let mut r = Random::new(0);
    for round in 0..300 {
        let mut m = match round % 4 {
            0 => with_levels(Machine::long()),
            1 => with_levels(Machine::flat32()),
            2 => Machine::real(),
            _ => with_levels(Machine::long()),
        };
        for _ in 0..40 {
            scramble(&mut m, &mut r);
            if round % 4 == 3 {
                to_user(&mut m);
            }
            if round % 4 == 1 {
                m.cpu.paging.cr0 &= !cr0::PG;
            }
            let mut code = r.pick(&[&[][..], &[0x66], &[0xf3], &[0x48], &[0x67], &[0xf2, 0x66]]).to_vec();
            code.extend_from_slice(r.pick(OPCODES));
            code.extend(r.word().to_le_bytes());
            m.load(&code);
            for _ in 0..3 {
                let Err(fault) = m.step() else { continue };
                let interrupt = Event::Interrupt(r.word() as u8);
                let event = r.pick(&[Event::Exception(fault), interrupt, Event::Nmi]);
                let _ = m.cpu.with_bus(&NullBus, |cpu: &mut Cpu| deliver(cpu, event));
            }
        }
    }
}
