//! The serial port as Linux's 8250 driver and terminals use it.

use super::*;
use crate::Effects;

struct Rig {
    port: Serial,
    effects: Effects,
}

impl Rig {
    fn new() -> Self {
        Self { port: Serial::new(4), effects: Effects::default() }
    }
    fn with<R>(&mut self, f: impl FnOnce(&mut Serial, &mut Access) -> R) -> R {
        f(&mut self.port, &mut Access { now: 0, effects: &mut self.effects })
    }
    fn read(&mut self, register: u64) -> u8 {
        let mut data = [0];
        self.with(|p, a| p.read(a, register, &mut data));
        data[0]
    }
    fn write(&mut self, register: u64, value: u8) {
        self.with(|p, a| p.write(a, register, &[value]));
    }
    fn input(&mut self, bytes: &[u8]) -> usize {
        self.with(|p, a| p.queue_input(a, bytes))
    }
    fn output(&mut self) -> Vec<u8> {
        self.with(|p, a| p.take_output(a))
    }
    fn lines(&mut self) -> Vec<bool> {
        self.effects.lines.drain(..).map(|(irq, level)| (assert_eq!(irq, 4), level).1).collect()
    }
}

/// The steps of Linux's `autoconfig` and `autoconfig_16550a` (drivers/tty/serial/8250/8250_port.c).
#[test]
fn linux_finds_a_16550a() {
    let mut r = Rig::new();
    r.write(1, 0);
    assert_eq!(r.read(1), 0);
    r.write(1, 0x0f);
    assert_eq!(r.read(1), 0x0f);
    r.write(1, 0);
    r.write(4, 0x1a);
    assert_eq!(r.read(6) & 0xf0, 0x90);
    r.write(4, 0);
    r.write(3, 0xbf);
    r.write(2, 0);
    r.write(3, 0);
    r.write(2, 1);
    assert_eq!(r.read(2) >> 6, 3);
    r.write(3, 0x80);
    assert_ne!(r.read(2), 0, "16650");
    r.write(3, 0xbf);
    assert_ne!(r.read(2), 0, "16650V2");
    r.write(3, 0);
    r.write(2, 0x21);
    assert_eq!(r.read(2) >> 5, 6, "16750");
    r.write(1, 0x40);
    assert_eq!(r.read(1), 0, "XScale");
    assert!(r.lines().is_empty());
}

/// The test of `serial8250_do_startup` for ports that do not raise the interrupt again.
#[test]
fn transmitter_interrupt_comes_at_each_enabling() {
    let mut r = Rig::new();
    r.write(4, 0x08);
    for _ in 0..2 {
        r.write(1, 2);
        assert_eq!(r.read(2), 0x02);
        assert_eq!(r.read(2), 0x01, "reading acknowledges");
        r.write(1, 0);
    }
    assert_eq!(r.lines(), [true, false, true, false]);
    r.write(1, 2);
    r.read(2);
    r.write(0, b'x');
    assert_eq!(r.read(2), 0x02, "sent at once");
    assert_eq!(r.read(5), 0x60);
    assert_eq!(r.output(), b"x");
}

#[test]
fn received_bytes_interrupt_by_trigger_and_timeout() {
    let mut r = Rig::new();
    r.write(2, 0x81);
    r.write(4, 0x0b);
    r.write(1, 5);
    assert_eq!(r.input(b"abc"), 3);
    assert_eq!(r.read(2), 0xcc);
    assert_eq!(r.input(b"defghijklmnopqrst"), 13);
    assert_eq!(r.port.input_space(), 0);
    assert_eq!(r.read(2), 0xc4);
    assert_eq!(r.read(5), 0x61);
    let got: Vec<u8> = (0..16).map(|_| r.read(0)).collect();
    assert_eq!(got, b"abcdefghijklmnop");
    assert_eq!((r.read(2), r.read(5), r.read(0)), (0xc1, 0x60, 0));
    assert_eq!(r.lines(), [true, false]);
}

#[test]
fn without_fifos_there_is_one_byte() {
    let mut r = Rig::new();
    assert_eq!(r.input(b"ab"), 1);
    r.write(1, 1);
    assert_eq!(r.read(2), 0x04);
    assert!(r.lines().is_empty(), "OUT2 is off");
    r.write(4, 8);
    assert_eq!(r.lines(), [true]);
    r.write(2, 1);
    assert_eq!((r.read(5), r.lines()), (0x60, vec![false]), "enabling FIFOs clears");
}

#[test]
fn loopback_overruns_and_tells_modem_changes() {
    let mut r = Rig::new();
    r.write(2, 1);
    r.write(4, 0x10);
    assert_eq!(r.read(6), 0x0b, "DCD, DSR and CTS fell");
    assert_eq!(r.input(b"x"), 0);
    for i in 0..17 {
        r.write(0, i);
    }
    r.write(1, 0x0f);
    assert_eq!(r.read(2), 0xc6);
    assert_eq!(r.read(5), 0x63);
    assert_eq!(r.read(2), 0xc4);
    r.write(2, 3);
    assert_eq!(r.read(2), 0xc2);
    r.write(4, 0x14);
    r.read(6);
    r.write(4, 0x10);
    assert_eq!(r.read(2), 0xc0);
    assert_eq!(r.read(6), 0x04, "the ring ended");
    assert_eq!(r.read(2), 0xc1);
    assert_eq!((r.output(), r.lines()), (vec![], vec![]));
}

/// A driver that finds the transmitter empty writes a whole FIFO without a further look (`serial8250_tx_chars`).
#[test]
fn no_byte_of_a_fifo_that_was_offered_is_lost() {
    let mut r = Rig::new();
    r.write(2, 1);
    let mut sent = Vec::new();
    // Not a multiple of a FIFO, so that the limit comes amid one.
    for n in 0..1001u32 {
        r.write(0, n as u8);
        sent.push(n as u8);
    }
    while r.read(5) & 0x20 != 0 {
        for n in 0..16 {
            r.write(0, n);
            sent.push(n);
        }
    }
    assert!(sent.len() > OUTPUT_LIMIT - FIFO);
    assert_eq!(r.output(), sent);
    assert_eq!(r.read(5) & 0x60, 0x60);
}

#[test]
fn output_that_nobody_takes_stops_the_transmitter() {
    let mut r = Rig::new();
    r.write(4, 8);
    r.write(1, 2);
    for _ in 0..OUTPUT_LIMIT + 10 {
        r.write(0, b'z');
    }
    assert_eq!(r.read(5), 0);
    r.lines();
    assert_eq!(r.output().len(), OUTPUT_LIMIT);
    assert_eq!((r.read(5), r.lines()), (0x60, vec![true]));
}

#[test]
fn divisor_latch_covers_data_and_enables() {
    let mut r = Rig::new();
    r.write(3, 0x83);
    r.write(0, 0x34);
    r.write(1, 0x12);
    assert_eq!((r.read(0), r.read(1)), (0x34, 0x12));
    r.write(3, 0x03);
    assert_eq!((r.read(1), r.port.state().divisor), (0, 0x1234));
    r.write(7, 0x5a);
    assert_eq!(r.read(7), 0x5a);
}
