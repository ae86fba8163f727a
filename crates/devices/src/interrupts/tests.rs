use super::*;

const HZ: u64 = 1_000_000_000;

fn machine(cpus: u32) -> Interrupts {
    let mut all = Interrupts::new(cpus, HZ);
    for cpu in 0..cpus {
        all.lapic_write(cpu, 0xf0, &0x1ffu32.to_le_bytes(), 0);
    }
    all
}

fn ioapic_entry(all: &mut Interrupts, pin: u8, entry: u64) {
    for (register, value) in [(0x11 + 2 * pin, entry >> 32), (0x10 + 2 * pin, entry)] {
        all.ioapic_write(0, &[register]);
        all.ioapic_write(0x10, &(value as u32).to_le_bytes());
    }
}

fn init_pic(all: &mut Interrupts) {
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1)] {
        all.pic_write(port, value);
    }
}

fn signal(cpu: u32, kind: SignalKind) -> CpuSignal {
    CpuSignal { cpu, kind }
}

#[test]
fn level_interrupt_round_trip() {
    let mut all = machine(2);
    ioapic_entry(&mut all, 17, 1 << 56 | 0x8055);
    let line = all.cpu_line(1).unwrap();
    all.set_line(17, true);
    assert_eq!(all.take_signals(), [signal(1, SignalKind::Interrupt)]);
    assert!(line.pending() && !all.pending(0));
    assert_eq!(all.acknowledge(1), Some(0x55));
    assert!(!line.pending());
    all.lapic_write(1, 0xb0, &[0; 4], 0);
    assert!(line.pending(), "the line is still asserted");
    assert_eq!(all.acknowledge(1), Some(0x55));
    all.set_line(17, false);
    all.lapic_write(1, 0xb0, &[0; 4], 0);
    assert!(!line.pending());
}

#[test]
fn timer_line_is_pin_2() {
    let mut all = machine(1);
    ioapic_entry(&mut all, 2, 0x30);
    all.set_line(0, true);
    assert_eq!(all.acknowledge(0), Some(0x30));
}

#[test]
fn pic_through_virtual_wire() {
    let mut all = Interrupts::new(1, HZ);
    init_pic(&mut all);
    all.set_line(0, true);
    assert!(!all.pending(0), "LINT0 is masked after reset");
    all.virtual_wire();
    assert_eq!(all.take_signals(), [signal(0, SignalKind::Interrupt)]);
    assert_eq!(all.acknowledge(0), Some(0x20));
    assert_eq!(all.acknowledge(0), None);
    // With the local APIC off the 8259 reaches the CPU directly.
    let mut all = Interrupts::new(1, HZ);
    init_pic(&mut all);
    all.msr_write(0, 0x1b, 0xfee0_0100, 0).unwrap();
    all.set_line(1, true);
    assert_eq!(all.acknowledge(0), Some(0x21));
    assert_eq!(all.cpu_line(0).unwrap().apic_page(), None);
}

#[test]
fn ipis() {
    let mut all = machine(3);
    all.lapic_write(0, 0x300, &0xc4500u32.to_le_bytes(), 0);
    all.lapic_write(0, 0x310, &(2u32 << 24).to_le_bytes(), 0);
    all.lapic_write(0, 0x300, &0x4608u32.to_le_bytes(), 0);
    all.lapic_write(0, 0x300, &0x4400u32.to_le_bytes(), 0);
    assert_eq!(
        all.take_signals(),
        [
            signal(1, SignalKind::Init),
            signal(2, SignalKind::Init),
            signal(2, SignalKind::Sipi(8)),
            signal(2, SignalKind::Nmi),
        ]
    );
    all.lapic_write(1, 0x300, &0x80041u32.to_le_bytes(), 0);
    assert!((0..3).all(|cpu| all.acknowledge(cpu) == Some(0x41)));
}

#[test]
fn timers_and_task_priority() {
    let mut all = machine(2);
    all.lapic_write(1, 0x320, &0x40u32.to_le_bytes(), 0);
    all.lapic_write(1, 0x3e0, &0xbu32.to_le_bytes(), 0);
    all.lapic_write(1, 0x380, &500u32.to_le_bytes(), 0);
    assert_eq!(all.deadline(), Some(500));
    all.set_cr8(1, 5);
    all.tick(500);
    assert_eq!((all.deadline(), all.pending(1)), (None, false));
    all.set_cr8(1, 0);
    assert_eq!(all.take_signals(), [signal(1, SignalKind::Interrupt)]);
    all.init_cpu(1);
    assert!(!all.cpu_line(1).unwrap().pending());
}

#[test]
fn external_local_apics() {
    let mut all = Interrupts::with_external_lapics();
    ioapic_entry(&mut all, 5, 0x8035);
    all.set_line(5, true);
    assert_eq!(all.take_messages(), [Msi { address: 0xfee0_0000, data: 0xc035 }]);
    all.broadcast_eoi(0x35);
    assert_eq!(all.take_messages().len(), 1);
    init_pic(&mut all);
    all.set_line(1, true);
    assert!(all.pending(0) && all.cpu_line(0).unwrap().pending());
    assert_eq!((all.acknowledge(0), all.acknowledge(0)), (Some(0x21), None));
    assert!(all.msr_read(0, 0x1b, 0).is_err());
}

#[test]
fn save_restore_and_unknown_cpus() {
    let mut all = machine(2);
    ioapic_entry(&mut all, 17, 1 << 56 | 0x8055);
    all.set_line(17, true);
    all.lapic_write(0, 0x320, &0x2_0040u32.to_le_bytes(), 0);
    all.lapic_write(0, 0x380, &5000u32.to_le_bytes(), 0);
    let saved = all.state(10);
    let mut other = Interrupts::new(2, HZ);
    other.restore(&saved).unwrap();
    assert_eq!(other.state(10), saved);
    assert_eq!(other.take_signals(), [signal(1, SignalKind::Interrupt)]);
    assert_eq!(other.deadline(), all.deadline());
    assert!(Interrupts::new(3, HZ).restore(&saved).is_err());
    other.set_line(17, false);
    other.reset();
    assert_eq!(other.state(0), Interrupts::new(2, HZ).state(0));
    let mut data = [0; 4];
    other.lapic_read(9, 0, &mut data, 0);
    other.lapic_write(9, 0, &data, 0);
    assert_eq!((data, other.acknowledge(9), other.pending(9), other.cr8(9)), ([0xff; 4], None, false, 0));
    (0..=255).for_each(|gsi| other.set_line(gsi, true));
}
