//! What drivers do: accesses that belong together, with random parameters. Without them chips would hardly ever be set
//! up to do anything.

use arbitrary::Unstructured;
use ruse_devices::{ioapic, pic, pit, rtc, serial};

use super::board::Board;
use crate::input::{byte, number, one_in, pick};

/// One driver does one thing.
pub(super) fn run(board: &mut Board, u: &mut Unstructured, cpu: u32) {
    match byte(u) % 8 {
        0 => timer(board, u),
        1 => legacy_interrupts(board, u),
        2 => io_apic(board, u),
        3 | 4 => local_apic(board, u, cpu),
        5 => clock(board, u),
        6 => serial_port(board, u),
        _ => pci(board, u),
    }
}

/// A count for a channel of the 8254.
fn timer(board: &mut Board, u: &mut Unstructured) {
    let channel = byte(u) % 3;
    let count = number(u) as u16;
    let mode = byte(u) % 8;
    let bcd = u8::from(one_in(u, 8));
    board.port_write(pit::PORT + 3, &[channel << 6 | 0x30 | mode << 1 | bcd]);
    board.port_write(pit::PORT + u16::from(channel), &[count as u8]);
    board.port_write(pit::PORT + u16::from(channel), &[(count >> 8) as u8]);
}

/// The initialisation of an 8259, or a command.
fn legacy_interrupts(board: &mut Board, u: &mut Unstructured) {
    let (command, data, cascade) =
        pick(u, &[(pic::MASTER_COMMAND, pic::MASTER_DATA, 4), (pic::SLAVE_COMMAND, pic::SLAVE_DATA, 2)]);
    if one_in(u, 2) {
        // End of interrupt, poll, registers, special mask mode, rotation.
        board.port_write(command, &[pick(u, &[0x20, 0x0c, 0x0a, 0x0b, 0x68, 0x48, 0x63, 0xa0, 0x80, 0xc3])]);
        board.port_read(command, &mut [0]);
        return;
    }
    board.port_write(command, &[0x11]);
    for word in [byte(u), cascade, 1 | byte(u) & 0x12] {
        board.port_write(data, &[word]);
    }
    board.port_write(data, &[if one_in(u, 4) { byte(u) } else { 0 }]);
}

/// An entry of the redirection table.
fn io_apic(board: &mut Board, u: &mut Unstructured) {
    let register = 0x10 + byte(u) % 48;
    let vector = u32::from(byte(u));
    let options = pick(u, &[0, 1 << 15, 1 << 8, 1 << 11, 1 << 16, 7 << 8, 4 << 8]);
    let value = if register.is_multiple_of(2) { vector | options } else { u32::from(byte(u)) << 24 };
    board.memory_write(0, ioapic::BASE, &[register, 0, 0, 0]);
    board.memory_write(0, ioapic::BASE + 0x10, &value.to_le_bytes());
}

/// A timer, an interrupt to others, an end of interrupt.
fn local_apic(board: &mut Board, u: &mut Unstructured, cpu: u32) {
    let Some(page) = board.lapic_page(cpu) else { return };
    let mut write = |offset: u64, value: u32| board.memory_write(cpu, page + offset, &value.to_le_bytes());
    match byte(u) % 4 {
        0 => {
            write(0xf0, 0x100 | u32::from(byte(u)));
            write(0x320, u32::from(byte(u)) | u32::from(byte(u) % 4) << 17);
            write(0x3e0, u32::from(byte(u)));
            write(0x380, number(u) as u32);
        }
        1 => {
            write(0x310, u32::from(byte(u) % 8) << 24);
            let mode = u32::from(byte(u) % 8) << 8;
            write(0x300, u32::from(byte(u)) | mode | u32::from(byte(u)) << 12 & 0xc_c000);
        }
        2 => write(0xb0, 0),
        _ => write(0x350 + 0x10 * u64::from(byte(u) % 3), u32::from(byte(u)) | u32::from(byte(u) % 8) << 8),
    }
}

/// A register of the clock.
fn clock(board: &mut Board, u: &mut Unstructured) {
    let register = if one_in(u, 4) { byte(u) } else { byte(u) % 14 };
    board.port_write(rtc::RTC_PORT, &[register]);
    if one_in(u, 3) {
        board.port_read(rtc::RTC_PORT + 1, &mut [0]);
    } else {
        board.port_write(rtc::RTC_PORT + 1, &[byte(u)]);
    }
}

/// A port that is opened, or output.
fn serial_port(board: &mut Board, u: &mut Unstructured) {
    let port = pick(u, &serial::COM_PORTS);
    if one_in(u, 2) {
        board.port_write(port + 3, &[3]);
        board.port_write(port + 2, &[byte(u)]);
        board.port_write(port + 4, &[0x08 | byte(u) & 0x13]);
        board.port_write(port + 1, &[byte(u)]);
    } else {
        let len = if one_in(u, 32) { 5000 } else { byte(u).into() };
        for _ in 0..len {
            board.port_write(port, b"x");
        }
    }
}

/// A register of a function's configuration space.
fn pci(board: &mut Board, u: &mut Unstructured) {
    let address = 0x8000_0000 | u32::from(byte(u)) << 2 | u32::from(byte(u) % 4) << 8;
    board.port_write(0xcf8, &address.to_le_bytes());
    let width = pick(u, &[1, 2, 4]);
    let at = 0xcfc + u16::from(byte(u) % 4);
    if one_in(u, 2) {
        board.port_read(at, &mut [0; 4][..width]);
    } else {
        board.port_write(at, &number(u).to_le_bytes()[..width]);
    }
}
