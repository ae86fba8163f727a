use std::sync::Arc;
use std::sync::atomic::Ordering;

use ruse_devices::rtc::{Rtc, RtcConfig};
use ruse_engine::Clock;

use super::*;
use crate::fake::{FakeHandle, windows};
use crate::lifecycle::{Lifecycle, Phase};
use crate::platform::{Platform, lock, number};
use crate::report::Outcome;

fn board(cpus: u32) -> (Board, Vec<Arc<FakeHandle>>) {
    let platform = Platform::new(Rtc::new(RtcConfig::default()), true, Some(windows())).unwrap();
    let lifecycle = Arc::new(Lifecycle::new(cpus).unwrap());
    let board = Board::new(cpus, Arc::new(Clock::start()), platform, lifecycle, None).unwrap();
    let handles: Vec<Arc<FakeHandle>> = (0..cpus).map(|_| Arc::default()).collect();
    board.connect(handles.iter().map(|h| h.clone() as _).collect());
    (board, handles)
}

fn outb(board: &Board, port: u16, value: u8) {
    board.pio_write(0, port, &[value]);
}
fn inb(board: &Board, port: u16) -> u8 {
    let mut data = [0];
    board.pio_read(0, port, &mut data);
    data[0]
}
fn lapic_write(board: &Board, vcpu: u32, offset: u64, value: u32) {
    board.mmio_write(vcpu, 0xfee0_0000 + offset, &value.to_le_bytes());
}
fn mmio_read(board: &Board, vcpu: u32, gpa: u64) -> u32 {
    let mut data = [0; 4];
    board.mmio_read(vcpu, gpa, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn accesses_find_their_devices() {
    let (board, _) = board(1);
    outb(&board, 0x3ff, 0x5a);
    assert_eq!(inb(&board, 0x3ff), 0x5a, "COM1's scratch register");
    outb(&board, 0x2ef, 0xa5);
    assert_eq!((inb(&board, 0x2ef), inb(&board, 0x2ff)), (0xa5, 0), "COM4's");
    outb(&board, 0x21, 0xfb);
    assert_eq!(inb(&board, 0x21), 0xfb, "mask of the 8259");
    outb(&board, 0x70, 0x0d);
    assert_eq!(inb(&board, 0x71), 0x80, "the clock is valid");
    assert_eq!(inb(&board, 0x64) & 1, 0, "nothing from the keyboard");
    let mut bridge = [0; 4];
    board.pio_write(0, 0xcf8, &0x8000_0000u32.to_le_bytes());
    board.pio_read(0, 0xcfc, &mut bridge);
    assert_eq!(u32::from_le_bytes(bridge), mmio_read(&board, 0, 0xe000_0000), "ECAM shows the same bridge");
    assert_eq!(inb(&board, 0x1234), 0xff);
    assert_eq!(mmio_read(&board, 0, 0xd000_0000), u32::MAX);
    // The I/O APIC's version through its window.
    board.mmio_write(0, 0xfec0_0000, &1u32.to_le_bytes());
    assert_eq!(mmio_read(&board, 0, 0xfec0_0010) & 0xff, 0x20);
}

#[test]
fn every_address_and_width_is_survived() {
    let (board, _) = board(1);
    for port in 0..=u16::MAX {
        for width in [1, 2, 4] {
            board.pio_read(0, port, &mut [0; 4][..width]);
            board.pio_write(0, port, &[0xff; 4][..width]);
        }
    }
    for page in [0xfec0_0000u64, 0xfee0_0000, 0xe000_0000, u64::MAX - 0xfff] {
        for offset in 0..0x1000 {
            board.mmio_read(7, page + offset, &mut [0; 8]);
            board.mmio_read(0, page + offset, &mut [0; 4]);
            board.mmio_write(0, page + offset, &[0xff; 8]);
        }
    }
}

#[test]
fn each_vcpu_has_its_own_local_apic() {
    let (board, handles) = board(2);
    assert_eq!(mmio_read(&board, 0, 0xfee0_0020) >> 24, 0);
    assert_eq!(mmio_read(&board, 1, 0xfee0_0020) >> 24, 1);
    lapic_write(&board, 1, 0xf0, 0x1ff);
    // vCPU 0 sends vector 0x41 to vCPU 1, then INIT and start-up.
    lapic_write(&board, 0, 0x310, 1 << 24);
    lapic_write(&board, 0, 0x300, 0x4041);
    assert!(board.interrupt_pending(1) && !board.interrupt_pending(0));
    assert_eq!(handles[1].notified.load(Ordering::SeqCst), 1);
    board.set_cr8(1, 4);
    assert!(!board.interrupt_pending(1), "held back by the task priority");
    board.set_cr8(1, 3);
    assert_eq!(board.cr8(1), 3);
    assert_eq!(board.acknowledge_interrupt(1), Some(0x41));
    assert_eq!(board.acknowledge_interrupt(1), None);
    lapic_write(&board, 0, 0x300, 0x4500);
    lapic_write(&board, 0, 0x300, 0x4699);
    assert_eq!(*lock(&handles[1].others), ["init", "sipi 0x99"]);
    assert_eq!(board.apic_msr(9, 0x1b), Err(MsrFault));
    assert_eq!(board.apic_msr(0, 0x1b), Ok(0xfee0_0900));
    assert_eq!(board.set_apic_msr(0, 0x1b, 0xfee0_0900 | 1 << 63), Err(MsrFault));
}

#[test]
fn a_device_interrupts_through_the_io_apic() {
    let (board, handles) = board(1);
    lapic_write(&board, 0, 0xf0, 0x1ff);
    for (register, value) in [(0x10 + 2 * 4, 0x34u32), (0x11 + 2 * 4, 0)] {
        board.mmio_write(0, 0xfec0_0000, &u32::to_le_bytes(register));
        board.mmio_write(0, 0xfec0_0010, &value.to_le_bytes());
    }
    outb(&board, 0x3fc, 0x08);
    outb(&board, 0x3f9, 0x01);
    assert!(!board.interrupt_pending(0));
    let taken = board.with_serial(0, |serial, access| serial.queue_input(access, b"x"));
    assert_eq!(taken, Some(1));
    assert!(board.interrupt_pending(0) && handles[0].notified.load(Ordering::SeqCst) > 0);
    assert_eq!(board.acknowledge_interrupt(0), Some(0x34));
    assert_eq!(inb(&board, 0x3f8), b'x');
}

#[test]
fn the_x87_error_is_latched() {
    let (board, _) = board(1);
    for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0xfb)] {
        outb(&board, port, value);
    }
    for (port, value) in [(0xa0, 0x11), (0xa1, 0x38), (0xa1, 2), (0xa1, 1), (0xa1, 0xdf)] {
        outb(&board, port, value);
    }
    board.x87_error(0);
    assert!(board.interrupt_pending(0));
    assert_eq!(board.acknowledge_interrupt(0), Some(0x38 + 5));
    outb(&board, 0xf0, 0);
}

#[test]
fn power_is_carried_out() {
    let (machine, handles) = board(2);
    outb(&machine, 0xcf9, 6);
    assert_eq!(machine.lifecycle.phase(), Phase::Resetting);
    assert!(handles.iter().all(|handle| handle.kicked.load(Ordering::SeqCst)));
    outb(&machine, 0xf4, 3);
    assert_eq!(machine.lifecycle.phase(), Phase::Ended);
    machine.pio_write(0, 0x604, &[0x01, 0x34]);
    machine.lifecycle.finish();
    assert!(matches!(machine.lifecycle.wait_outcome(), Outcome::DebugExit(7)), "the first counts");
}

#[test]
fn a_reset_restores_the_power_up_state() {
    let (board, handles) = board(2);
    outb(&board, 0x3ff, 0x5a);
    lapic_write(&board, 0, 0xf0, 0x1ff);
    lapic_write(&board, 0, 0x320, 0x40);
    lapic_write(&board, 0, 0x380, 1_000_000_000);
    lapic_write(&board, 0, 0x310, 1 << 24);
    lapic_write(&board, 0, 0x300, 0x4500);
    assert_eq!(*lock(&handles[1].others), ["init"]);
    board.reset();
    assert!(lock(&handles[1].others).is_empty(), "vCPU 1 does not hear of the old system's INIT");
    assert_eq!(inb(&board, 0x3ff), 0);
    assert_eq!(mmio_read(&board, 0, 0xfee0_0380), 0);
    assert!(!board.alarm.is_due(number::COUNT, u64::MAX - 1), "the timer is off");
}
