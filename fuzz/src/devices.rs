//! The registers of all devices together: ports, memory-mapped registers and MSRs in any order and width, interrupts
//! acknowledged, time that passes a little or a lot, and timers that are called when they are due.

mod board;
mod drivers;

use arbitrary::Unstructured;
use ruse_arch::msr;
use ruse_devices::fabric::Msi;

use self::board::Board;
use crate::input::{byte, number, one_in, pick, steps};

/// Accesses of one input at most.
const MOST_STEPS: usize = 2000;

/// Runs the target.
pub(crate) fn run(data: &[u8]) {
    let u = &mut Unstructured::new(data);
    let cpus = u32::from(byte(u) % 8);
    let mut board = Board::new((cpus > 0).then_some(cpus));
    steps(u, MOST_STEPS, |u| {
        step(&mut board, u);
        board.check();
    });
}

fn step(board: &mut Board, u: &mut Unstructured) {
    let cpu = u32::from(byte(u)) % board.cpus();
    match byte(u) % 16 {
        0..=1 => ports(board, u),
        2 => memory(board, u, cpu),
        3 => msrs(board, u, cpu),
        4..=7 => drivers::run(board, u, cpu),
        8..=10 => pass_time(board, u),
        11 => {
            board.acknowledge(cpu);
        }
        12 => board.interrupts(|chips, _| chips.set_cr8(cpu, number_u8(u))),
        13 => from_outside(board, u),
        14 => board.save_and_restore(),
        _ => {
            if one_in(u, 16) {
                board.reset();
            } else {
                board.receive(usize::from(byte(u) % 4), &number(u).to_le_bytes());
            }
        }
    }
}

fn number_u8(u: &mut Unstructured) -> u8 {
    number(u) as u8
}

fn ports(board: &mut Board, u: &mut Unstructured) {
    let port = if one_in(u, 16) { number(u) as u16 } else { Board::some_port(usize::from(byte(u))) };
    let width = pick(u, &[1, 1, 2, 4]);
    if one_in(u, 3) {
        board.port_read(port, &mut [0; 4][..width]);
    } else {
        board.port_write(port, &number(u).to_le_bytes()[..width]);
    }
}

fn memory(board: &mut Board, u: &mut Unstructured, cpu: u32) {
    let offset = number(u);
    let address = match byte(u) % 4 {
        0 => Board::some_memory(usize::from(byte(u)), offset),
        // The select and data registers of the I/O APIC, where all of it is.
        1 => ruse_devices::ioapic::BASE + u64::from(byte(u) % 2) * 16,
        2 => board.lapic_page(cpu).unwrap_or(0).wrapping_add(u64::from(byte(u) % 64) << 4),
        _ => offset,
    };
    let width = pick(u, &[4, 4, 1, 2, 8]);
    if one_in(u, 3) {
        board.memory_read(cpu, address, &mut [0; 8][..width]);
    } else {
        board.memory_write(cpu, address, &number(u).to_le_bytes()[..width]);
    }
}

fn msrs(board: &mut Board, u: &mut Unstructured, cpu: u32) {
    let number_of = match byte(u) % 4 {
        0 => msr::APIC_BASE,
        1 => msr::TSC_DEADLINE,
        _ => msr::X2APIC_BASE + u32::from(byte(u) % 0x48),
    };
    // A fault is as good an answer as any.
    if one_in(u, 4) {
        let _ = board.interrupts(|chips, now| chips.msr_read(cpu, number_of, now));
        return;
    }
    let value = match number_of {
        // On, rarely off; sometimes as an x2APIC.
        msr::APIC_BASE if !one_in(u, 4) => 0xfee0_0800 | u64::from(byte(u) % 8) << 8,
        _ => number(u),
    };
    let _ = board.interrupts(|chips, now| chips.msr_write(cpu, number_of, value, now));
}

fn pass_time(board: &mut Board, u: &mut Unstructured) {
    match byte(u) % 8 {
        0 => board.advance(number(u) >> (byte(u) % 64)),
        1 => board.advance(number(u) % 10_000_000_000),
        2 | 3 => board.advance(number(u) % 100_000),
        _ => board.advance_to_deadline(),
    }
}

fn from_outside(board: &mut Board, u: &mut Unstructured) {
    match byte(u) % 5 {
        0 => board.press_power_button(),
        4 => {
            let vector = byte(u);
            board.interrupts(|chips, _| {
                chips.broadcast_eoi(vector);
                chips.pin_messages();
            });
        }
        1 => board.interrupts(|chips, _| chips.nmi()),
        2 => {
            let msi = Msi { address: Msi::ADDRESS | number(u) & 0xf_ffff, data: number(u) as u32 };
            board.interrupts(|chips, _| chips.msi(msi));
        }
        _ => board.take_output(usize::from(byte(u) % 4)),
    }
}
